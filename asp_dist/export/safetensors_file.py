"""Writing safetensors files: hashed, and durable before they are named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save


def write_safetensors(
    stream: IO[bytes], tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> tuple[int, str]:
    """Write `tensors` to `stream` in the safetensors format.

    Args:
        stream: an open binary stream.
        tensors: name -> tensor on the CPU, of any shape and strides; those that share memory are written each by itself.
        metadata: text stored in the header.

    Returns:
        The number of bytes written and their SHA-256, in hexadecimal.
    """
    apart: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if storage in seen else tensor  # the library refuses shared memory
        seen.add(storage)
    data = save(apart, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    digest, size = hashlib.sha256(), 0
    for piece in (_sorted_header(data[8:end]), memoryview(data)[end:]):
        stream.write(piece)
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()


def _sorted_header(text: bytes) -> bytes:
    """The header with its length, and its metadata sorted: the library writes them in another order each time."""
    header = json.loads(text)
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path`: aside first, synced to the disk, then renamed, so that no torn file has that name."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb") as stream:
            write_safetensors(stream, {k: t.detach().cpu() for k, t in tensors.items()}, metadata)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

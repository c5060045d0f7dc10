"""Writing safetensors files: straight from the tensors' memory, hashed on the way, durable before they are named.

The format is eight bytes with the header's length, a JSON header, and the tensors' bytes
(https://github.com/huggingface/safetensors). Writing it here rather than through the library saves a copy of each
tensor, which matters while a training step wants the same memory bandwidth, and gives the hash for nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

import torch

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CHUNK = 1 << 22


def write_safetensors(
    stream: IO[bytes], tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> tuple[int, str]:
    """Write `tensors` to `stream` in the safetensors format.

    Args:
        stream: an open binary stream.
        tensors: name -> tensor on the CPU, of any shape; views are made contiguous.
        metadata: text stored in the header.

    Returns:
        The number of bytes written and their SHA-256, in hexadecimal.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    size = 0
    for block in (len(text).to_bytes(8, "little"), text, *(_bytes(t) for t in tensors.values())):
        view = memoryview(block)
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            digest.update(piece)
            stream.write(piece)
        size += len(view)
    return size, digest.hexdigest()


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


def _bytes(tensor: torch.Tensor) -> Any:
    """The memory of `tensor`, row-major, as a buffer of bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data

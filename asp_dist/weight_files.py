"""Files of weights: safetensors, hashed and durable before they are named, and the sparse file.

In a sparse file a tensor ``NAME`` of n weights, k of them nonzero, becomes ``NAME.bitmap`` (uint8, ⌈n/8⌉, first weight in the
highest bit, C order) and ``NAME.values`` (k of the tensor's own type, in the same order); its shape is in the file's metadata.
Every other tensor is stored as it is. This is what `Budget.bytes` counts, header aside.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from asp_dist.files import replacing

_POWERS = (128, 64, 32, 16, 8, 4, 2, 1)  # of the bits of a byte, the highest first


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
    """Write `tensors` to `path` in the safetensors format; see `write_safetensors`."""
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        write_safetensors(stream, {k: t.detach().cpu() for k, t in tensors.items()}, metadata)


def pack_bits(mask: Tensor) -> Tensor:
    """A flat boolean mask as uint8 [⌈n/8⌉], the first entry in the highest bit, the rest padded with zeros."""
    padded = torch.zeros(math.ceil(mask.numel() / 8) * 8, dtype=torch.uint8)
    padded[: mask.numel()] = mask
    powers = torch.tensor(_POWERS, dtype=torch.uint8)
    return (padded.view(-1, 8) * powers).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bitmap: Tensor, count: int) -> Tensor:
    """The flat boolean mask of `count` entries that `pack_bits` packed."""
    powers = torch.tensor(_POWERS, dtype=torch.uint8)
    return (bitmap[:, None] & powers).ne(0).view(-1)[:count]


def save_sparse(
    tensors: Mapping[str, Tensor], pruned: Iterable[str], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` to `path`, those named in `pruned` as bitmap and values, with further `metadata`.

    Raises:
        KeyError: `pruned` names a tensor that is not there.
    """
    stored = dict(tensors)
    shapes = {}
    for name in pruned:
        values = stored.pop(name).detach().cpu().contiguous().view(-1)
        shapes[name] = list(tensors[name].shape)
        mask = values != 0
        stored[f"{name}.bitmap"], stored[f"{name}.values"] = pack_bits(mask), values[mask]
    save_safetensors(path, stored, {**(metadata or {}), "format": "pt", "sparse_shapes": json.dumps(shapes)})


def load_sparse(path: Path) -> dict[str, Tensor]:
    """The dense tensors of a file that `save_sparse` wrote.

    Raises:
        ValueError: the file has no sparse tensors, or a bitmap does not match its values.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "sparse_shapes" not in metadata:
            raise ValueError(f"{path} is not a sparse file of asp_dist: its metadata lack 'sparse_shapes'")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, shape in json.loads(metadata["sparse_shapes"]).items():
        values = tensors.pop(f"{name}.values")
        mask = unpack_bits(tensors.pop(f"{name}.bitmap"), math.prod(shape))
        if int(mask.sum()) != values.numel():
            raise ValueError(f"{path}: {name} has {values.numel()} values for {int(mask.sum())} set bits")
        dense = torch.zeros(math.prod(shape), dtype=values.dtype)
        dense[mask] = values
        tensors[name] = dense.view(shape)
    return tensors

"""The sparse file: a safetensors file that stores pruned weights as a bitmap and the kept values.

A tensor ``NAME`` of n weights, k of them nonzero, becomes ``NAME.bitmap`` (uint8, ⌈n/8⌉, first weight in the highest bit,
C order) and ``NAME.values`` (k of the tensor's own type, in the same order); its shape stands in the file's metadata. Every
other tensor is stored as it is. This is what `Budget.bytes` counts, header aside.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from asp_dist.export.safetensors_file import save_safetensors

_POWERS = (128, 64, 32, 16, 8, 4, 2, 1)


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


def save_sparse(tensors: Mapping[str, Tensor], pruned: Iterable[str], path: Path) -> None:
    """Write `tensors` to `path`, those named in `pruned` as bitmap and values.

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
    save_safetensors(path, stored, {"format": "pt", "sparse_shapes": json.dumps(shapes)})


def load_sparse(path: Path) -> dict[str, Tensor]:
    """The dense tensors of a file that `save_sparse` wrote.

    Raises:
        ValueError: the file has no sparse tensors, or a bitmap does not match its values.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if "sparse_shapes" not in metadata:
            raise ValueError(f"{path} is no sparse file of asp_dist: its metadata lack 'sparse_shapes'")
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

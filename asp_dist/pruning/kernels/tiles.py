"""How one launch finds its way through all layers: tables of tiles, and the addresses of the layers' tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

# Weights that one program of a kernel works on. Partial sums are one number per tile.
TILE = 4096
# Lists of addresses that are kept on the device: gradients move between a few places from step to step.
KEPT_LISTS = 64

# What a tile leaves for the sums over its layer.
PRODUCTS, SUM, SQUARES, KEPT, NEARBY_KEPT, LARGEST = range(6)
ROWS = 6

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Tiles:
    """The tiles of L layers, as tables on their device.

    Args:
        layers: one tensor of each layer, in its local shape.

    Attributes:
        numel: int64 [L].
        kinds: int32 [L], each layer's type, see `KINDS`.
        layer: int32 [T], the layer of each tile.
        start: int64 [T], its first weight in the layer.
        first: int32 [L + 1], the first tile of each layer, and T.
        partials: float64 [ROWS, T], what each tile left.
    """

    def __init__(self, layers: Sequence[Tensor]) -> None:
        device = layers[0].device
        counts = [-(-layer.numel() // TILE) for layer in layers]
        numbers = torch.arange(len(layers)).repeat_interleave(torch.tensor(counts))
        first = torch.tensor([0, *counts]).cumsum(0)
        start = (torch.arange(int(first[-1])) - first[numbers]) * TILE
        self.numel = torch.tensor([layer.numel() for layer in layers], device=device)
        self.kinds = torch.tensor([KINDS.get(layer.dtype, -1) for layer in layers], dtype=torch.int32, device=device)
        self.layer = numbers.to(device, torch.int32)
        self.start = start.to(device)
        self.first = first.to(device, torch.int32)
        self.partials = torch.zeros(ROWS, int(first[-1]), dtype=torch.float64, device=device)

    def tables(self) -> list[Tensor]:
        """The tables, in the order in which the operators take them."""
        return [self.numel, self.kinds, self.layer, self.start, self.first]


_kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors' addresses on their device, int64 [L]; 0 for an empty one. Sent only if they were not sent before."""
    key = (tensors[0].get_device(), *(tensor.data_ptr() for tensor in tensors))
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    table = to_device(torch.tensor(key[1:]), tensors[0].device)
    _kept[key] = table
    if len(_kept) > KEPT_LISTS:
        _kept.popitem(last=False)
    return table


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values`, a tensor of the CPU, on `device`; the host does not wait for it."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)

"""The passes over all layers as operators of torch, so that `torch.compile` and fake tensors see what they read and write.

On a GPU each is one launch of a Triton kernel, as on the CPU under ``TRITON_INTERPRET=1``. On the CPU each is otherwise its
plain form in torch, which says what the kernel computes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from asp_dist.pruning.kernels.tiles import KEPT, LARGEST, NEARBY_KEPT, PRODUCTS, ROWS, SQUARES, SUM
from asp_dist.pruning.options import Hard, Operator, Power, Soft
from asp_dist.pruning.weights import count_above, flat, largest, moments, pruned_dot, scale_pruned_gradient_, write_pruned

OPERATORS: tuple[type[Operator], ...] = (Hard, Soft, Power)


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels run on tensors of `device`."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _launched(kernel: str, device: torch.device, *arguments: Any) -> bool:
    """Launch a kernel of `multi_tensor` over all layers; False where the plain form has to do."""
    if not runs_kernels(device):
        return False
    from asp_dist.pruning.kernels import multi_tensor

    with on(device):
        multi_tensor.LAUNCHES[kernel](*arguments)
    return True


def _fill(row: Tensor, tables: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
    """Leave each layer's total in its first tile."""
    row.zero_()
    for first, last, total in zip(tables[-1].tolist(), tables[-1].tolist()[1:], totals):
        if last > first:
            row[first] = total.double()


@torch.library.custom_op("asp_dist::threshold_products", mutates_args=("gradients", "partials"))
def threshold_products(
    gradients: Sequence[Tensor],
    dense: Sequence[Tensor],
    tables: Sequence[Tensor],
    thresholds: Tensor,
    unscale: Tensor,
    partials: Tensor,
    scale: float,
) -> None:
    """Σ over pruned weights (|w| <= b) of gradient·weight, per tile; then their gradients times `scale`.

    Args:
        gradients: in the memory order of `dense`; an empty tensor where a layer has none.
        dense: the dense weights of each layer.
        tables: see `Tiles.tables`.
        thresholds: float64 [L], b in weight units.
        unscale: the factor that the gradients still carry, one number.
        partials: see `Tiles.partials`.
        scale: θ.
    """
    if _launched("products", partials.device, gradients, dense, tables, thresholds, unscale, partials, scale):
        return
    totals = []
    for gradient, weights, threshold in zip(gradients, dense, thresholds.tolist()):
        if not gradient.numel():
            totals.append(torch.zeros(()))
            continue
        pruned = torch.empty_like(flat(weights))
        write_pruned(Hard(), flat(weights), 0.0, threshold, pruned)
        totals.append(pruned_dot(flat(gradient), flat(weights), pruned, threshold, Hard()) / unscale)
        scale_pruned_gradient_(flat(gradient), pruned, scale)
    _fill(partials[PRODUCTS], tables, totals)


@torch.library.custom_op("asp_dist::layer_moments", mutates_args=("partials",))
def layer_moments(dense: Sequence[Tensor], tables: Sequence[Tensor], partials: Tensor) -> None:
    """Σw and Σw², per tile."""
    if _launched("moments", partials.device, dense, tables, partials):
        return
    sums = [moments(flat(weights)) for weights in dense]
    _fill(partials[SUM], tables, [total for total, _ in sums])
    _fill(partials[SQUARES], tables, [squares for _, squares in sums])


@torch.library.custom_op("asp_dist::write_layers", mutates_args=("dense", "pruned", "partials"))
def write_layers(
    dense: Sequence[Tensor],
    pruned: Sequence[Tensor],
    tables: Sequence[Tensor],
    thresholds: Tensor,
    means: Tensor,
    partials: Tensor,
    ratio: float,
    operator: int,
    power: float,
    center: bool,
) -> None:
    """w −= mean, if `center` says so; the pruned weights; and counts per tile.

    Args:
        dense: the dense weights of each layer.
        pruned: where the pruned ones go.
        tables: see `Tiles.tables`.
        thresholds: float64 [L], b in weight units.
        means: float64 [L].
        partials: see `Tiles.partials`; gets the kept weights, those above `ratio`·b, and the largest |w|.
        ratio: of the second threshold to the first.
        operator: index in `OPERATORS`.
        power: p of `Power`.
        center: whether the means are subtracted.
    """
    if _launched("write", partials.device, dense, pruned, tables, thresholds, means, partials, ratio, operator, power, center):
        return
    chosen = Power(power) if OPERATORS[operator] is Power else OPERATORS[operator]()
    counts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for weights, target, threshold, mean in zip(dense, pruned, thresholds.tolist(), means.tolist()):
        write_pruned(chosen, flat(weights), mean if center else 0.0, threshold, flat(target))
        counts[0].append(torch.count_nonzero(target))
        counts[1].append(count_above(flat(weights), ratio * threshold))
        counts[2].append(torch.nan_to_num(largest(flat(weights)), nan=torch.inf))
    for row, totals in zip((KEPT, NEARBY_KEPT, LARGEST), counts):
        _fill(partials[row], tables, totals)


@torch.library.custom_op("asp_dist::count_nonzero", mutates_args=("partials",))
def count_nonzero(tensors: Sequence[Tensor], tables: Sequence[Tensor], partials: Tensor) -> None:
    """How many weights of each layer are not zero, per tile."""
    if _launched("count", partials.device, tensors, tables, partials):
        return
    _fill(partials[KEPT], tables, [torch.count_nonzero(tensor) for tensor in tensors])


@torch.library.custom_op("asp_dist::clear_removed", mutates_args=("tensors",))
def clear_removed(tensors: Sequence[Tensor], dense: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    """Zero what a frozen mask has removed, where `dense` is not zero; an empty tensor is left out."""
    if _launched("clear_removed", tables[0].device, tensors, dense, tables):
        return
    for tensor, weights in zip(tensors, dense):
        if tensor.numel():
            flat(tensor).masked_fill_(flat(weights) != 0, 0.0)


@torch.library.custom_op("asp_dist::combine_tiles", mutates_args=("out",))
def combine_tiles(
    partials: Tensor, tables: Sequence[Tensor], share: Tensor, shard: Tensor, thresholds: Tensor, out: Tensor
) -> None:
    """What the ranks reduce: the sums over each layer's tiles.

    Args:
        partials: see `Tiles.partials`.
        tables: see `Tiles.tables`.
        share: float64 [L + 1]: one over the number of ranks that have the same weights; then, for the thresholds, 1 on the
            first rank and 0 on the others.
        shard: int32 [L + 1]: this rank's shard of each layer; then the last row of `out`.
        thresholds: float64 [L].
        out: float64 [ROWS + shards, L]: products, Σw, Σw², kept, nearby; the largest |w| of each shard; the thresholds.
    """
    if _launched("combine", partials.device, partials, tables, share, shard, thresholds, out):
        return
    lengths = tables[-1].diff().long()
    for row in range(ROWS - 1):
        out[row] = torch.segment_reduce(partials[row], "sum", lengths=lengths) * share[:-1]
    out[ROWS - 1 : -1] = 0.0
    maxima = torch.segment_reduce(partials[ROWS - 1], "max", lengths=lengths, initial=0.0) * share[:-1]
    for index, (place, value) in enumerate(zip(shard.tolist(), maxima)):
        out[ROWS - 1 + place, index] = value
    out[-1] = thresholds * share[-1]


for _one in (threshold_products, layer_moments, write_layers, count_nonzero, clear_removed, combine_tiles):
    _one.register_fake(lambda *args, **kwargs: None)

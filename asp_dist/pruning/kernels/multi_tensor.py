"""The Triton kernels over all layers at once, and their launches.

Each program works on one tile and leaves its part of a sum; sums over tiles are taken in a fixed order, so every rank and every
run get the same bits. Weights are computed with in float32, and summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from asp_dist.pruning.kernels.tiles import KEPT, LARGEST, NEARBY_KEPT, PRODUCTS, ROWS, SQUARES, SUM, TILE, addresses

WARPS = 8
COMBINED_TILES = 256


@triton.jit
def _load(address, kind, offsets, mask):
    """Weights as float32; 0 outside of the mask."""
    if kind == 0:
        values = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    elif kind == 1:
        values = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def _store(address, kind, offsets, values, mask):
    if kind == 0:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, values, mask=mask)
    elif kind == 1:
        tl.store(address.to(tl.pointer_type(tl.bfloat16)) + offsets, values.to(tl.bfloat16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, values.to(tl.float16), mask=mask)


@triton.jit
def _place(tile_layer, tile_start, numel, TILE: tl.constexpr):
    """This program's tile: its layer, the places of its weights in it, and which of them exist."""
    tile = tl.program_id(0)
    layer = tl.load(tile_layer + tile)
    offsets = tl.load(tile_start + tile) + tl.arange(0, TILE)
    return tile, layer, offsets, offsets < tl.load(numel + layer)


@triton.jit
def _rounded(values, kind):
    """float32 values as the layer's type holds them: to nearest, ties to even."""
    rounded = values
    if kind == 1:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        rounded = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    elif kind == 2:
        rounded = values.to(tl.float16).to(tl.float32)
    return rounded


@triton.jit
def _products(
    gradients, dense, numel, kinds, tile_layer, tile_start, thresholds, unscale, partials, scale,
    SCALED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Σ over pruned weights of gradient·weight; their gradients times `scale`."""
    tile, layer, offsets, exists = _place(tile_layer, tile_start, numel, TILE)
    kind = tl.load(kinds + layer)
    source = tl.load(gradients + layer)
    mask = exists & (source != 0)
    gradient = _load(source, kind, offsets, mask)
    weights = _load(tl.load(dense + layer), kind, offsets, mask)
    removed = mask & (tl.abs(weights) <= tl.load(thresholds + layer).to(tl.float32))
    product = tl.where(removed, gradient.to(tl.float64) * weights.to(tl.float64), 0.0)
    tl.store(partials + tile, tl.sum(product) / tl.load(unscale).to(tl.float64))
    if SCALED:
        _store(source, kind, offsets, _rounded(gradient * scale, kind), removed)


@triton.jit
def _moments(dense, numel, kinds, tile_layer, tile_start, sums, squares, TILE: tl.constexpr):
    """Σw and Σw²."""
    tile, layer, offsets, mask = _place(tile_layer, tile_start, numel, TILE)
    weights = _load(tl.load(dense + layer), tl.load(kinds + layer), offsets, mask).to(tl.float64)
    tl.store(sums + tile, tl.sum(weights))
    tl.store(squares + tile, tl.sum(weights * weights))


@triton.jit
def _write(
    dense, pruned, numel, kinds, tile_layer, tile_start, thresholds, means, kept, nearby, largest, power,
    RATIO: tl.constexpr, OPERATOR: tl.constexpr, CENTER: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """w −= mean; the pruned weights; how many are kept, and how many would be at RATIO times the threshold; the largest |w|."""
    tile, layer, offsets, mask = _place(tile_layer, tile_start, numel, TILE)
    kind = tl.load(kinds + layer)
    source = tl.load(dense + layer)
    weights = _load(source, kind, offsets, mask)
    if CENTER:
        weights = _rounded(weights - tl.load(means + layer).to(tl.float32), kind)
        _store(source, kind, offsets, weights, mask)
    exact = tl.load(thresholds + layer)
    threshold = exact.to(tl.float32)
    size = tl.abs(weights)
    if OPERATOR == 0:
        values = tl.where(size <= threshold, 0.0, weights)
    elif OPERATOR == 1:
        values = tl.where(size <= threshold, 0.0, tl.where(weights > 0, weights - threshold, weights + threshold))
    else:
        # A weight above the threshold keeps a value above zero, as an exact power would give it.
        rest = tl.maximum(1.0 - tl.exp2(power * tl.log2(tl.div_rn(threshold, size))), 5.9604645e-08)
        values = tl.where(size <= threshold, 0.0, weights * tl.exp2(tl.log2(rest) / power))
    values = _rounded(values, kind)
    _store(tl.load(pruned + layer), kind, offsets, values, mask)
    tl.store(kept + tile, tl.sum((mask & (values != 0)).to(tl.int32)).to(tl.float64))
    tl.store(nearby + tile, tl.sum((mask & (size > (exact * RATIO).to(tl.float32))).to(tl.int32)).to(tl.float64))
    size = tl.where(mask & (weights != weights), float("inf"), tl.where(mask, size, 0.0))
    tl.store(largest + tile, tl.max(size, axis=0).to(tl.float64))


@triton.jit
def _count(tensors, numel, kinds, tile_layer, tile_start, kept, TILE: tl.constexpr):
    """How many weights are not zero."""
    tile, layer, offsets, mask = _place(tile_layer, tile_start, numel, TILE)
    values = _load(tl.load(tensors + layer), tl.load(kinds + layer), offsets, mask)
    tl.store(kept + tile, tl.sum((mask & (values != 0)).to(tl.int32)).to(tl.float64))


@triton.jit
def _clear_removed(tensors, dense, numel, kinds, tile_layer, tile_start, TILE: tl.constexpr):
    """Zero what a frozen mask has removed: where the dense weights are not zero."""
    _, layer, offsets, exists = _place(tile_layer, tile_start, numel, TILE)
    kind = tl.load(kinds + layer)
    target = tl.load(tensors + layer)
    mask = exists & (target != 0)
    weights = _load(tl.load(dense + layer), kind, offsets, mask)
    _store(target, kind, offsets, tl.zeros_like(weights), mask & (weights != 0))


@triton.jit
def _combine(partials, first, share, thresholds, out, tiles, layers, shard, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over each layer's tiles, times `share`; the largest |w| in the row of this rank's shard; the thresholds."""
    layer = tl.program_id(0)
    begin = tl.load(first + layer)
    end = tl.load(first + layer + 1)
    factor = tl.load(share + layer)
    last = tl.load(shard + layers)
    for row in tl.static_range(ROWS):
        total = tl.zeros((BLOCK,), dtype=tl.float64)
        for position in range(begin, end, BLOCK):
            offsets = position + tl.arange(0, BLOCK)
            values = tl.load(partials + row * tiles + offsets, mask=offsets < end, other=0.0)
            if row == ROWS - 1:
                total = tl.maximum(total, values)
            else:
                total += values
        if row == ROWS - 1:
            mine = ROWS - 1 + tl.load(shard + layer)
            for other in range(ROWS - 1, last):  # what an all-reduce has left in the rows of the other shards goes
                tl.store(out + other * layers + layer, tl.where(other == mine, tl.max(total, axis=0) * factor, 0.0))
        else:
            tl.store(out + row * layers + layer, tl.sum(total) * factor)
    tl.store(out + last * layers + layer, tl.load(thresholds + layer) * tl.load(share + layers))


def _launch_products(
    gradients: Sequence[Tensor],
    dense: Sequence[Tensor],
    tables: Sequence[Tensor],
    thresholds: Tensor,
    unscale: Tensor,
    partials: Tensor,
    scale: float,
) -> None:
    numel, kinds, layer, start, _ = tables
    _products[(layer.numel(),)](
        addresses(gradients), addresses(dense), numel, kinds, layer, start, thresholds, unscale, partials[PRODUCTS], scale,
        SCALED=scale != 1.0, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip


def _launch_moments(dense: Sequence[Tensor], tables: Sequence[Tensor], partials: Tensor) -> None:
    numel, kinds, layer, start, _ = tables
    _moments[(layer.numel(),)](
        addresses(dense), numel, kinds, layer, start, partials[SUM], partials[SQUARES], TILE=TILE, num_warps=WARPS
    )


def _launch_write(
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
    numel, kinds, layer, start, _ = tables
    _write[(layer.numel(),)](
        addresses(dense), addresses(pruned), numel, kinds, layer, start, thresholds, means, partials[KEPT],
        partials[NEARBY_KEPT], partials[LARGEST], power,
        RATIO=ratio, OPERATOR=operator, CENTER=center, TILE=TILE, num_warps=WARPS,
    )  # fmt: skip


def _launch_count(tensors: Sequence[Tensor], tables: Sequence[Tensor], partials: Tensor) -> None:
    numel, kinds, layer, start, _ = tables
    _count[(layer.numel(),)](addresses(tensors), numel, kinds, layer, start, partials[KEPT], TILE=TILE, num_warps=WARPS)


def _launch_clear_removed(tensors: Sequence[Tensor], dense: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    numel, kinds, layer, start, _ = tables
    _clear_removed[(layer.numel(),)](
        addresses(tensors), addresses(dense), numel, kinds, layer, start, TILE=TILE, num_warps=WARPS
    )


def _launch_combine(
    partials: Tensor, tables: Sequence[Tensor], share: Tensor, shard: Tensor, thresholds: Tensor, out: Tensor
) -> None:
    first, layers = tables[-1], thresholds.numel()
    _combine[(layers,)](
        partials, first, share, thresholds, out, partials.shape[1], layers, shard, ROWS=ROWS, BLOCK=COMBINED_TILES
    )


LAUNCHES: dict[str, Callable[..., None]] = {
    "products": _launch_products,
    "moments": _launch_moments,
    "write": _launch_write,
    "count": _launch_count,
    "clear_removed": _launch_clear_removed,
    "combine": _launch_combine,
}

"""The passes over all layers by kernels, with the numbers [L] on the device: the host reads none of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from asp_dist.pruning.density import NEARBY
from asp_dist.pruning.kernels import ops
from asp_dist.pruning.kernels.tiles import KEPT, KINDS, LARGEST, NEARBY_KEPT, PRODUCTS, ROWS, SQUARES, SUM, Tiles
from asp_dist.pruning.options import Operator, Power
from asp_dist.pruning.passes import LayerSums, means_and_sigmas
from asp_dist.pruning.weights import LayerWeights, RankReducer, flat

# Room for numbers of the training loop in the all-reduce.
CARRIED = 16


class DevicePasses:
    """One launch for each pass; see `asp_dist.pruning.passes.HostPasses`, which has the same methods.

    Every layer is counted at every step, in the pass that writes it.

    Args:
        layers: the layers as this rank holds them.
        reducer: the ranks.
        operator: `Hard`, `Soft` or `Power`.

    Attributes:
        home: where the numbers [L] are.
        fresh: bool [L], the layers that were counted last: all.
    """

    def __init__(self, layers: Sequence[LayerWeights], reducer: RankReducer, operator: Operator) -> None:
        self.layers, self.reducer, self.operator = layers, reducer, operator
        self.home = self.device = layers[0].dense.device
        self.numel = torch.tensor([float(layer.info.numel) for layer in layers], dtype=torch.float64, device=self.home)
        self.tiles = Tiles([layer.dense for layer in layers])
        self.fresh = torch.ones(len(layers), dtype=torch.bool, device=self.home)
        self._one = torch.ones((), device=self.home)
        self._zeros = torch.zeros_like(self.numel)
        shards = max(layer.shards for layer in layers)
        first = 1.0 if reducer.rank == 0 else 0.0
        self._share = torch.cat([reducer.share, torch.full_like(reducer.share[:1], first)])
        self._shard = torch.tensor([*(layer.shard for layer in layers), ROWS - 1 + shards], dtype=torch.int32, device=self.home)
        self._reduced = torch.zeros((ROWS + shards) * len(layers) + CARRIED, dtype=torch.float64, device=self.home)

    @property
    def packed(self) -> Tensor:
        """The ranks' sums, float64 [ROWS + shards, L]; see `ops.combine_tiles`."""
        return self._reduced[:-CARRIED].view(-1, len(self.layers))

    @property
    def carried(self) -> Tensor:
        """Further numbers that the same all-reduce sums, float64 [CARRIED]."""
        return self._reduced[-CARRIED:]

    def take_products(self, indices: Sequence[int], thresholds: Tensor, scale: float, grad_scale: Tensor | None) -> None:
        """Take Σ over pruned weights of gradient·weight for the next `reduce`, and scale these gradients."""
        gradients = self._gradients(indices)
        unscale = self._one if grad_scale is None else grad_scale
        partials = self.tiles.partials
        if len(indices) < len(self.layers):  # the other optimizers' layers have theirs already, or will get them
            partials = partials.clone()
        ops.threshold_products(gradients, self._dense(), self.tiles.tables(), thresholds, unscale, partials, scale)
        if partials is not self.tiles.partials:
            chosen = torch.zeros(len(self.layers), dtype=torch.bool)
            chosen[list(indices)] = True
            tiles = chosen.to(self.home)[self.tiles.layer.long()]
            self.tiles.partials[PRODUCTS] = torch.where(tiles, partials[PRODUCTS], self.tiles.partials[PRODUCTS])
        if scale != 1.0:
            self._return_gradients(indices, gradients)

    def reduce(self, thresholds: Tensor) -> LayerSums:
        """The sums of all layers now, and the products and counts that were taken last: the step's one all-reduce."""
        self.take_sums(thresholds)
        return self.unpack(self.packed)

    def take_sums(self, thresholds: Tensor) -> None:
        """Leave the ranks' sums in `packed`, float64 [ROWS + shards, L]; see `ops.combine_tiles`."""
        ops.layer_moments(self._dense(), self.tiles.tables(), self.tiles.partials)
        ops.combine_tiles(self.tiles.partials, self.tiles.tables(), self._share, self._shard, thresholds, self.packed)
        self.reducer.sum_(self._reduced)

    def unpack(self, packed: Tensor) -> LayerSums:
        """The rows of `packed`."""
        means, sigmas = means_and_sigmas(packed[SUM], packed[SQUARES], self.numel)
        largest = packed[LARGEST]
        for row in range(ROWS, packed.shape[0] - 1):
            largest = torch.maximum(largest, packed[row])
        # Ranks' shares of a count add up to a whole number, up to rounding.
        kept, nearby = ((packed[row] + 0.5).floor() for row in (KEPT, NEARBY_KEPT))
        return LayerSums(packed[packed.shape[0] - 1], means, sigmas, packed[PRODUCTS], kept, nearby, largest)

    def write(self, indices: Sequence[int], thresholds: Tensor, means: Tensor | None = None) -> None:
        """Write and count the pruned weights; subtract the means [L] from the dense ones first, if they are given.

        All layers are written, whichever are meant: the others are as they were.
        """
        power = self.operator.p if isinstance(self.operator, Power) else 1.0
        pruned = [layer.flat_pruned() for layer in self.layers]
        ops.write_layers(
            self._dense(), pruned, self.tiles.tables(), thresholds, self._zeros if means is None else means,
            self.tiles.partials, NEARBY, ops.OPERATORS.index(type(self.operator)), power, means is not None,
        )  # fmt: skip

    def mask_gradients(self, indices: Sequence[int]) -> None:
        """Zero the gradients of the weights that a frozen mask has removed."""
        gradients = self._gradients(indices)
        ops.clear_removed(gradients, self._dense(), self.tiles.tables())
        self._return_gradients(indices, gradients)

    def mask_weights(self, indices: Sequence[int]) -> None:
        """Zero the weights that a frozen mask has removed; of all layers, whichever are meant."""
        ops.clear_removed([layer.flat_pruned() for layer in self.layers], self._dense(), self.tiles.tables())

    def count_some(self, thresholds: Tensor) -> None:
        """Nothing: `write` has counted all layers."""

    def count_all(self, thresholds: Tensor) -> None:
        """Nothing: `write` has counted all layers."""

    def kept(self) -> Tensor:
        """Nonzero weights of every layer now, float64 [L] on the CPU; a collective of its own, outside of any step."""
        partials = self.tiles.partials.clone()
        ops.count_nonzero([layer.flat_pruned() for layer in self.layers], self.tiles.tables(), partials)
        out = torch.zeros_like(self.packed)
        ops.combine_tiles(partials, self.tiles.tables(), self._share, self._shard, self._zeros, out)
        self.reducer.sum_(out)
        return out[KEPT].cpu().round()

    def state_dict(self) -> dict[str, Any]:
        """As that of `HostPasses`, for a run that goes on there."""
        return {"fresh": self.fresh.cpu(), "next": 0}

    def load_state_dict(self, state: dict[str, Any], thresholds: Tensor, *, frozen: bool) -> None:
        """Count anew, unless the mask is frozen; the layers must have their restored weights."""
        if not frozen:
            self.write(range(len(self.layers)), thresholds)

    def _dense(self) -> list[Tensor]:
        return [layer.flat_dense() for layer in self.layers]

    def _gradients(self, indices: Sequence[int]) -> list[Tensor]:
        """Flat gradients in the memory order of the weights; an empty tensor where there is none, or a layer is not meant."""
        chosen = set(indices)
        flats = [layer.flat_gradient() if index in chosen else None for index, layer in enumerate(self.layers)]
        return [layer.flat_dense()[:0] if one is None else one for layer, one in zip(self.layers, flats)]

    def _return_gradients(self, indices: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """Copy those gradients back that were copied, because their memory order is another than their weights'."""
        for index in indices:
            gradient = self.layers[index].gradient()
            if gradient is not None and gradient.data_ptr() != gradients[index].data_ptr():
                gradient.copy_(gradients[index].as_strided(gradient.shape, self.layers[index].dense.stride()))


def fits(layers: Sequence[LayerWeights], operator: Operator) -> bool:
    """Whether kernels exist for these layers and this operator."""
    kinds = {layer.dense.dtype for layer in layers}
    known = kinds <= set(KINDS) or not ops.runs_kernels(layers[0].dense.device)
    return known and type(operator) in ops.OPERATORS and all(layer.block == 1 for layer in layers)


@cache
def works(device: torch.device) -> bool:
    """Whether the kernels compute on `device` what the plain passes do; a warning says so once where they don't."""
    try:
        problem = _difference(device)
    except Exception as error:  # whatever a driver or a compiler may raise here must not end a run
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(
            f"the pruning kernels do not work on {device} ({problem}): its layers are pruned one by one, which is slower",
            stacklevel=2,
        )
    return not problem


def _difference(device: torch.device) -> str:
    """What the kernels do otherwise than the plain passes, on small layers; empty if nothing."""
    generator = torch.Generator().manual_seed(0)
    sizes, kinds = (1, 1000, 5000), list(KINDS)
    for operator in range(len(ops.OPERATORS)):
        results = []
        for where in (device, torch.device("cpu")):
            generator.manual_seed(operator)
            dense = [torch.randn(n, generator=generator).to(where, kind) for n, kind in zip(sizes, kinds)]
            gradients = [torch.randn(n, generator=generator).to(where, kind) for n, kind in zip(sizes, kinds)]
            pruned = [torch.empty_like(one) for one in dense]
            tiles = Tiles(dense)
            b = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, device=where)
            out = torch.zeros(ROWS + 1, 3, dtype=torch.float64, device=where)
            share, shard = torch.ones(4, dtype=torch.float64, device=where), torch.tensor([0, 0, 0, ROWS], dtype=torch.int32)
            ops.threshold_products(gradients, dense, tiles.tables(), b, torch.ones((), device=where), tiles.partials, 0.5)
            ops.layer_moments(dense, tiles.tables(), tiles.partials)
            ops.write_layers(dense, pruned, tiles.tables(), b, 0.1 * b, tiles.partials, NEARBY, operator, 3.0, True)
            ops.combine_tiles(tiles.partials, tiles.tables(), share, shard.to(where), b, out)
            ops.clear_removed(gradients, pruned, tiles.tables())
            results.append([out.cpu(), *(flat(one).double().cpu() for one in (*dense, *pruned, *gradients))])
        # Powers are approximated on a GPU: where a type has few digits, a last one may be another.
        names = [("sums", torch.float32)]
        names += [(f"{name} of {kind}", kind) for name in ("weights", "pruned weights", "gradients") for kind in kinds]
        for (name, kind), one, other in zip(names, *results):
            tolerance = max(1e-4, 2.0 * torch.finfo(kind).eps)
            if not torch.allclose(one, other, rtol=tolerance, atol=1e-5) or not torch.equal(one == 0, other == 0):
                return f"other {name}, {ops.OPERATORS[operator].__name__}"
    return ""

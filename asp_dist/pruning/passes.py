"""The passes over all layers, and the sums that they take: the same on every rank, by one all-reduce per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asp_dist.pruning.density import NEARBY
from asp_dist.pruning.options import Operator
from asp_dist.pruning.weights import (
    LayerWeights,
    RankReducer,
    count_above,
    largest,
    moments,
    pruned_dot,
    pruned_dot_of_blocks,
    scale_pruned_gradient_,
    write_pruned,
    write_pruned_blocks,
)

# A count is a pass over the weights. So each step counts layers of this many weights, or this share of all, in turn.
COUNTED_WEIGHTS = 2_000_000
COUNTED_SHARE = 1 / 8
# Layers' means that chance would give to fresh weights less often than this belong to a trained network.
FRESH_PROBABILITY = 1e-6


@dataclass(frozen=True)
class LayerSums:
    """What a step's all-reduce gives; float64 [L].

    Attributes:
        thresholds: the first rank's thresholds.
        means: mean of the dense weights.
        sigmas: their standard deviation.
        products: Σ over pruned weights of gradient·weight.
        kept: nonzero weights, when each layer was counted last.
        nearby: weights above `NEARBY` times the threshold, at the same time; None where nobody asked for them.
        largest: the largest |w|, in weight units; as `nearby`.
    """

    thresholds: Tensor
    means: Tensor
    sigmas: Tensor
    products: Tensor
    kept: Tensor
    nearby: Tensor | None
    largest: Tensor | None


def means_and_sigmas(total: Tensor, squares: Tensor, numel: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations from Σw and Σw², [L] each."""
    means = total / numel
    variances = (squares - numel * means.square()) / (numel - 1.0).clamp(min=1.0)
    return means, variances.clamp_min(0.0).sqrt()


class HostPasses:
    """Passes layer by layer, with numbers [L] on the CPU. On a GPU the host waits for the device in each step.

    Args:
        layers: the layers as this rank holds them.
        reducer: the ranks.
        operator: what the kept weights become.
        nearby: whether to count near the threshold too, and to look for the largest weight.

    Attributes:
        home: where the numbers [L] are.
        fresh: bool [L], the layers that were counted last.
    """

    home = torch.device("cpu")

    def __init__(self, layers: Sequence[LayerWeights], reducer: RankReducer, operator: Operator, *, nearby: bool) -> None:
        self.layers, self.reducer, self.operator, self.nearby = layers, reducer, operator, nearby
        self.device = layers[0].dense.device
        self.numel = torch.tensor([float(layer.info.numel) for layer in layers], dtype=torch.float64)
        # Kept weights; where they are asked for, weights near the threshold, and the largest one of each shard.
        rows = 2 + max(layer.shards for layer in layers) if nearby else 1
        self._counts = torch.zeros(rows, len(layers), dtype=torch.float64, device=self.device)
        self._products = torch.zeros(len(layers), dtype=torch.float64, device=self.device)
        self.fresh = torch.ones(len(layers), dtype=torch.bool)
        self._next = 0

    def take_products(self, indices: Sequence[int], thresholds: Tensor, scale: float, grad_scale: Tensor | None) -> None:
        """Take Σ over pruned weights of gradient·weight for the next `reduce`, and scale these gradients.

        Args:
            indices: the layers that are meant.
            thresholds: b of all layers, in weight units.
            scale: factor on the gradients of pruned weights.
            grad_scale: factor that the gradients still carry; None: 1.
        """
        bounds = thresholds.tolist()
        products = {}
        for index in indices:
            layer = self.layers[index]
            gradient = layer.flat_gradient()
            if gradient is not None:
                pruned = layer.flat_pruned()
                if layer.block > 1 and not self.operator.keeps_values:
                    products[index] = pruned_dot_of_blocks(gradient, layer, bounds[index])
                else:
                    products[index] = pruned_dot(gradient, layer.flat_dense(), pruned, bounds[index], self.operator)
                scale_pruned_gradient_(layer.gradient(), layer.pruned, scale)
        for index, product in products.items():
            self._products[index] = product if grad_scale is None else product / grad_scale.to(product.device)

    def reduce(self, thresholds: Tensor) -> LayerSums:
        """The sums of all layers now, and the products and counts that were taken last: the step's one all-reduce.

        It also carries the first rank's thresholds: processors that round differently would let them drift apart.

        On a GPU it is also the step's one copy to the host.
        """
        sums = [moments(layer.flat_dense()) for layer in self.layers]
        first = torch.stack([total for total, _ in sums]).double()
        second = torch.stack([squares for _, squares in sums]).double()
        columns = (self._products, first, second, *self._counts)
        *reduced, thresholds = torch.stack(self.reducer.reduce(*columns, of_first=thresholds.to(self.device))).cpu()
        self._products = torch.zeros_like(self._products)
        products, total, squares, kept, *counted = reduced
        means, sigmas = means_and_sigmas(total, squares, self.numel)
        return LayerSums(
            thresholds=thresholds,
            means=means,
            sigmas=sigmas,
            products=products,
            kept=kept.round(),
            nearby=counted[0].round() if self.nearby else None,
            largest=torch.stack(counted[1:]).amax(dim=0) if self.nearby else None,
        )

    def write(self, indices: Sequence[int], thresholds: Tensor, means: Tensor | None = None) -> None:
        """Write the pruned weights of some layers; subtract the means [L] from the dense ones first, if they are given."""
        bounds, centers = thresholds.tolist(), None if means is None else means.tolist()
        for index in indices:
            layer = self.layers[index]
            mean = 0.0 if centers is None else centers[index]
            if layer.block > 1:
                write_pruned_blocks(self.operator, layer, mean, bounds[index])
            else:
                write_pruned(self.operator, layer.flat_dense(), mean, bounds[index], layer.flat_pruned())

    def mask_gradients(self, indices: Sequence[int]) -> None:
        """Zero the gradients of the weights that a frozen mask has removed."""
        for index in indices:
            gradient = self.layers[index].gradient()
            if gradient is not None:
                gradient.masked_fill_(self.layers[index].is_removed(), 0.0)

    def mask_weights(self, indices: Sequence[int]) -> None:
        """Zero the weights that a frozen mask has removed."""
        for index in indices:
            self.layers[index].pruned.masked_fill_(self.layers[index].is_removed(), 0.0)

    def count_some(self, thresholds: Tensor) -> None:
        """Count some layers, in turn; `thresholds` are in weight units. The next all-reduce carries the counts."""
        bounds = thresholds.tolist()
        quota = max(COUNTED_WEIGHTS, float(self.numel.sum()) * COUNTED_SHARE)
        self.fresh.zero_()
        while quota > 0 and not bool(self.fresh[self._next]):
            index = self._next
            self.fresh[index] = True
            self._counts[:, index] = self._count(self.layers[index], bounds[index])
            quota -= float(self.numel[index])
            self._next = (index + 1) % len(self.layers)

    def count_all(self, thresholds: Tensor) -> None:
        """Count every layer; which ones were counted last stays as it is."""
        self._counts = torch.stack([self._count(layer, b) for layer, b in zip(self.layers, thresholds.tolist())], dim=1)

    def kept(self) -> Tensor:
        """Nonzero weights of every layer now, float64 [L] on the CPU; a collective of its own, outside of any step."""
        counts = torch.stack([torch.count_nonzero(layer.pruned) for layer in self.layers]).double()
        return self.reducer.reduce(counts)[0].cpu().round()

    def _count(self, layer: LayerWeights, threshold: float) -> Tensor:
        column = torch.zeros_like(self._counts[:, 0])
        column[0] = count_above(layer.flat_pruned(), 0.0)
        if self.nearby:
            compared = layer.flat_dense() if layer.block == 1 else layer.magnitudes()
            column[1] = layer.block * count_above(compared, NEARBY * threshold)
            column[2 + layer.shard] = largest(compared)
        return column

    def state_dict(self) -> dict[str, Any]:
        """Which layers are counted next. The counts themselves are made anew after loading."""
        return {"fresh": self.fresh.clone(), "next": self._next}

    def load_state_dict(self, state: dict[str, Any], thresholds: Tensor, *, frozen: bool) -> None:
        """Restore `state_dict`; the layers must have their restored weights."""
        self.count_all(thresholds)
        self.fresh, self._next = state["fresh"].clone(), state["next"]


def means_are_chance(sums: LayerSums, numel: Tensor) -> bool:
    """Whether the layers' means are what chance leaves in freshly drawn weights.

    A mean of n independent weights is normal with standard deviation σ/√n, so the sum of the squared means, each in its own
    unit, follows a chi-squared distribution with L degrees of freedom. Training moves layers' means far out of it.
    """
    standardized = sums.means * numel.sqrt() / sums.sigmas.clamp_min(1e-30)
    degrees = torch.tensor(numel.numel() / 2.0, dtype=torch.float64)
    return bool(torch.special.gammaincc(degrees, standardized.square().sum() / 2.0) > FRESH_PROBABILITY)

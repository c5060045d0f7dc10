"""Per-layer sums and counts, the same on every rank: one all-reduce per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asp_dist.pruning.density import NEARBY
from asp_dist.pruning.weights import LayerWeights, RankReducer, count_above, largest, moments

# A count is a pass over the weights. So each step counts layers of this many weights, or this share of all, in turn.
COUNTED_WEIGHTS = 2_000_000
COUNTED_SHARE = 1 / 8
# Layers' means that chance would give to fresh weights less often than this belong to a trained network.
FRESH_PROBABILITY = 1e-6


@dataclass(frozen=True)
class LayerSums:
    """What a step's all-reduce gives; float64 [L], on the CPU.

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


class LayerStatistics:
    """Takes the sums and counts of L layers, and makes them the same on every rank.

    Args:
        layers: the layers as this rank holds them.
        reducer: the ranks.
        device: where the weights are.
        nearby: whether to count near the threshold too, and to look for the largest weight.

    Attributes:
        fresh: bool [L], the layers that were counted last.
    """

    def __init__(self, layers: Sequence[LayerWeights], reducer: RankReducer, device: torch.device, *, nearby: bool) -> None:
        self.layers, self.reducer, self.device, self.nearby = layers, reducer, device, nearby
        self.numel = torch.tensor([float(layer.info.numel) for layer in layers], dtype=torch.float64)
        # Kept weights; where they are asked for, weights near the threshold, and the largest one of each shard.
        rows = 2 + max(layer.shards for layer in layers) if nearby else 1
        self._counts = torch.zeros(rows, len(layers), dtype=torch.float64, device=device)
        self.fresh = torch.ones(len(layers), dtype=torch.bool)
        self._next = 0

    def reduce(self, products: Tensor, thresholds: Tensor) -> LayerSums:
        """The sums of all layers now and the counts that were taken last: the step's one all-reduce.

        It also carries the first rank's thresholds: processors that round differently would let them drift apart.

        On a GPU it is also the step's one copy to the host.
        """
        sums = [moments(layer.flat_dense()) for layer in self.layers]
        first = torch.stack([total for total, _ in sums]).double()
        second = torch.stack([squares for _, squares in sums]).double()
        columns = (products, first, second, *self._counts)
        *reduced, thresholds = torch.stack(self.reducer.reduce(*columns, of_first=thresholds.to(self.device))).cpu()
        products, total, squares, kept, *counted = reduced
        means = total / self.numel
        variances = (squares - self.numel * means.square()) / (self.numel - 1.0).clamp(min=1.0)
        return LayerSums(
            thresholds=thresholds,
            means=means,
            sigmas=variances.clamp_min(0.0).sqrt(),
            products=products,
            kept=kept.round(),
            nearby=counted[0].round() if self.nearby else None,
            largest=torch.stack(counted[1:]).amax(dim=0) if self.nearby else None,
        )

    def count_some(self, thresholds: Sequence[float]) -> None:
        """Count some layers, in turn; `thresholds` are in weight units. The next all-reduce carries the counts."""
        quota = max(COUNTED_WEIGHTS, float(self.numel.sum()) * COUNTED_SHARE)
        self.fresh.zero_()
        while quota > 0 and not bool(self.fresh[self._next]):
            index = self._next
            self.fresh[index] = True
            self._counts[:, index] = self._count(self.layers[index], thresholds[index])
            quota -= float(self.numel[index])
            self._next = (index + 1) % len(self.layers)

    def count_all(self, thresholds: Sequence[float]) -> None:
        """Count every layer; which ones were counted last stays as it is."""
        self._counts = torch.stack([self._count(layer, b) for layer, b in zip(self.layers, thresholds)], dim=1)

    def kept(self) -> Tensor:
        """Nonzero weights of every layer now, float64 [L] on the CPU; a collective of its own, outside of any step."""
        counts = torch.stack([torch.count_nonzero(layer.pruned) for layer in self.layers]).double()
        return self.reducer.reduce(counts)[0].cpu().round()

    def _count(self, layer: LayerWeights, threshold: float) -> Tensor:
        column = torch.zeros_like(self._counts[:, 0])
        column[0] = torch.count_nonzero(layer.pruned)
        if self.nearby:
            column[1] = count_above(layer.flat_dense(), NEARBY * threshold)
            column[2 + layer.shard] = largest(layer.flat_dense())
        return column

    def state_dict(self) -> dict[str, Any]:
        """Which layers are counted next. The counts themselves are made anew after loading."""
        return {"fresh": self.fresh.clone(), "next": self._next}

    def load_state_dict(self, state: dict[str, Any], thresholds: Sequence[float]) -> None:
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

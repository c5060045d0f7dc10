"""The exact projection: which weights to keep so that counted nonzeros meet the budget, the same on every rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from asp_dist.pruning.budget import ResolvedBudget
from asp_dist.pruning.weights import LayerWeights, RankReducer

# Thresholds are scaled by exp(±this) in search of the budget, and a further budget's penalty goes up to the other.
MAX_LOG_SCALE = 80.0
MAX_PENALTY = 20.0


class SortedMagnitudes:
    """|w| of every layer, sorted, so that counting the weights above a threshold takes no pass over them.

    Where weights share a mask, a block counts as one, and its norm is compared.

    Needs memory for one sorted copy of the prunable weights.

    Args:
        layers: the layers as this rank has them.
        reducer: the ranks.
    """

    def __init__(self, layers: Sequence[LayerWeights], reducer: RankReducer) -> None:
        self.layers = layers
        self.reducer = reducer
        # float64 counts of float32 magnitudes are exact; half-precision weights are widened.
        self.wide = torch.float64 if any(layer.dense.dtype == torch.float64 for layer in layers) else torch.float32
        self.sorted = [layer.magnitudes().to(self.wide).sort().values for layer in layers]
        self.blocks = torch.tensor([float(layer.block) for layer in layers], dtype=torch.float64)
        self.numel = torch.tensor([float(layer.info.numel) for layer in layers], dtype=torch.float64) / self.blocks

    def counts(self, thresholds: Tensor, *, strictly: bool = False) -> Tensor:
        """Number of weights with |w| >= threshold (or > threshold) of each layer over all ranks, float64 [L] on the CPU."""
        local = [
            float(values.numel() - torch.searchsorted(values, t.to(values), right=strictly).item())
            for values, t in zip(self.sorted, thresholds.to(self.wide))
        ]
        counts = torch.tensor(local, dtype=torch.float64)
        if not any(layer.sharded for layer in self.layers):
            return counts  # Every rank has, and counts, the same weights.
        (reduced,) = self.reducer.reduce(counts.to(self.reducer.share.device))
        return reduced.cpu().round()

    def kth_largest(self, ranks: Tensor) -> Tensor:
        """The k-th largest |w| of each layer (k in 1..n, float64 [L]), over all ranks, by bisection on bit patterns."""
        integer = torch.int64 if self.wide == torch.float64 else torch.int32
        low = torch.zeros(len(self.sorted), dtype=torch.int64)  # count(>= low) >= k always
        high = torch.full_like(low, torch.tensor(math.inf, dtype=self.wide).view(integer).item())
        while bool((high - low > 1).any()):
            middle = low + (high - low) // 2
            enough = self.counts(middle.to(integer).view(self.wide)) >= ranks
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return low.to(integer).view(self.wide)


def _smallest_scale(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The smallest x in [low, high] with fits(x), for a predicate that is false below some x and true above."""
    for _ in range(100):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def keep_counts(magnitudes: SortedMagnitudes, thresholds: Tensor, budgets: Sequence[ResolvedBudget], floors: Tensor) -> Tensor:
    """How many weights of each layer stay: the exact budget, with the allocation that the thresholds express.

    Weights are ordered by |w| / threshold over the whole network, and as many of the first are kept as every budget allows;
    where a next weight costs too much, cheaper ones behind it may still fit.

    Args:
        magnitudes: the layers' sorted weights.
        thresholds: float64 [L] in weight units.
        budgets: the budgets.
        floors: least number of weights of each layer, float64 [L].

    Returns:
        float64 [L] of integers; where weights share a mask, of blocks.
    """
    numel = magnitudes.numel
    budgets = [dataclasses.replace(budget, per_weight=budget.per_weight * magnitudes.blocks) for budget in budgets]
    floors = (floors / magnitudes.blocks).ceil().clamp(min=1.0).minimum(numel)
    ceilings = numel.clone()
    for budget in budgets:
        if budget.scope == "layer":
            per_weight = budget.per_weight.clamp_min(1e-300)
            ceilings = torch.minimum(ceilings, (budget.allowed / per_weight + 1e-9).floor())
    network = [budget for budget in budgets if budget.scope == "network"]
    if not network:
        return torch.maximum(ceilings, floors)
    penalties = [0.0] * len(network)

    def counts(log_scale: float) -> Tensor:
        exponent = torch.full_like(numel, log_scale)
        for penalty, budget in zip(penalties, network):
            exponent += penalty * budget.per_weight / budget.per_weight.max()
        kept = magnitudes.counts(thresholds * exponent.exp())
        return torch.maximum(torch.minimum(kept, ceilings), floors)

    def fits(kept: Tensor, which: Sequence[ResolvedBudget] = network) -> bool:
        return all(float((budget.per_weight * kept).sum()) <= float(budget.allowed) * (1 + 1e-12) for budget in which)

    def first_scale() -> float:
        return _smallest_scale(lambda x: fits(counts(x), network[:1]), -MAX_LOG_SCALE, MAX_LOG_SCALE)

    # Further budgets: raise the thresholds of the layers that cost most in them until the first budget's mask fits them.
    for index in range(1, len(network)):

        def enough(penalty: float, index: int = index) -> bool:
            penalties[index] = penalty
            return fits(counts(first_scale()), network[: index + 1])

        if not enough(0.0):
            penalties[index] = MAX_PENALTY if not enough(MAX_PENALTY) else _coarse(enough, MAX_PENALTY)
    scale = _smallest_scale(lambda x: fits(counts(x)), -MAX_LOG_SCALE, MAX_LOG_SCALE)
    return _fill(counts(scale), magnitudes, thresholds, network, ceilings)


def _coarse(enough: Callable[[float], bool], high: float) -> float:
    low = 0.0
    for _ in range(20):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    enough(high)
    return high


def _fill(
    kept: Tensor, magnitudes: SortedMagnitudes, thresholds: Tensor, budgets: Sequence[ResolvedBudget], ceilings: Tensor
) -> Tensor:
    """Add the best next weights, ties and cheap ones, while every budget allows one more."""
    kept = kept.clone()
    costs = torch.stack([budget.per_weight for budget in budgets])
    allowed = torch.tensor([float(budget.allowed) for budget in budgets], dtype=torch.float64)
    while True:
        slack = allowed - (costs * kept).sum(dim=1)
        room = torch.where(costs > 0, slack[:, None] / costs.clamp_min(1e-300), torch.inf).amin(dim=0)
        open_layers = (kept < ceilings) & (room >= 1.0 - 1e-9)
        if not bool(open_layers.any()):
            return kept
        following = magnitudes.kth_largest(torch.minimum(kept + 1, magnitudes.numel)).double()
        score = torch.where(open_layers, following / thresholds, -torch.inf)
        best = int(score.argmax())
        # All weights of that layer that tie with its next one, as far as they fit, in one go.
        probe = torch.full_like(thresholds, torch.inf)
        probe[best] = following[best]
        ties = float(magnitudes.counts(probe)[best] - kept[best])
        kept[best] += max(1.0, min(ties, float((room[best] + 1e-9).floor()), float(ceilings[best] - kept[best])))


def keep_masks(magnitudes: SortedMagnitudes, kept: Tensor) -> list[Tensor]:
    """Boolean masks, flat and local, of the `kept` largest weights of each layer; equal ones are taken in index order."""
    threshold = magnitudes.kth_largest(kept)
    above = magnitudes.counts(threshold, strictly=True)
    masks = []
    for index, layer in enumerate(magnitudes.layers):
        values = layer.magnitudes().to(magnitudes.wide)
        last = threshold[index].to(values)
        tie = values == last
        wanted = int(kept[index] - above[index]) - _ties_before(layer, tie)
        mask = values > last
        mask[tie.nonzero().flatten()[: max(wanted, 0)]] = True
        masks.append(layer.spread(mask))
    return masks


def freeze_(layers: Sequence[LayerWeights], masks: Sequence[Tensor]) -> None:
    """Write the frozen mask into the layers, in place.

    The pruned weights keep what the operator made of the kept ones, or their dense values where it had made zeros of them.
    The dense weights keep the removed ones, and are zero elsewhere: nonzero there means removed. So that this holds, kept
    weights and removed ones that happen to be zero become the smallest number of their type.
    """
    for layer, mask in zip(layers, masks):
        dense, pruned = layer.flat_dense(), layer.flat_pruned()
        tiny = torch.finfo(dense.dtype).tiny
        pruned.copy_(torch.where(mask, torch.where(pruned == 0, dense, pruned), 0.0))
        pruned.masked_fill_(mask & (pruned == 0), tiny)
        dense.masked_fill_(mask, 0.0)
        dense.masked_fill_(~mask & (dense == 0), tiny)


def _ties_before(layer: LayerWeights, tie: Tensor) -> int:
    """Ties on the ranks that have the rows before this rank's."""
    if layer.shard_group is None:
        return 0
    mine = torch.tensor([int(tie.sum())], dtype=torch.int64, device=tie.device)
    everyone = [torch.zeros_like(mine) for _ in range(dist.get_world_size(layer.shard_group))]
    dist.all_gather(everyone, mine, group=layer.shard_group)
    return int(sum(int(count) for count in everyone[: dist.get_rank(layer.shard_group)]))

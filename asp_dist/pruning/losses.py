"""The sparsity losses of arXiv 2006.02768: functions of the layers' densities alone, with their analytic gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asp_dist.pruning.budget import Limit


@dataclass(frozen=True)
class LossValue:
    """A sparsity loss.

    Attributes:
        value: the loss, without its weight λ.
        gradient: its derivative by each layer's density, float64 [L].
        gap: density minus target: positive while too many weights are kept.
    """

    value: Tensor
    gradient: Tensor
    gap: Tensor


def sparsity_loss(limit: Limit, densities: Tensor, target: Tensor) -> LossValue:
    """The loss that drives the densities [L] to `target` (one number for a network, [L] for layers).

    With D the network's density, Σ c_l·d_l / Σ c_l, and c_l the layers' costs (for weights: their sizes):
    equal to, network: (D − target)²; at most, network: max(0, D − target); equal to, per layer: mean_l (d_l − target_l)²;
    at most, per layer: mean_l max(0, d_l − target_l).
    """
    count = densities.numel()
    gap = limit.density(densities) - target
    share = torch.full_like(densities, 1.0 / count) if limit.scope == "layer" else limit.dense / limit.dense.sum()
    if limit.bound == "equal":
        value, slope = gap.square(), 2.0 * gap
    else:
        value, slope = gap.clamp_min(0.0), (gap > 0).to(gap.dtype)
    return LossValue(value.mean(), slope * share, gap)

"""The Gaussian model of a layer's density (arXiv 2006.02768, section 3): weights are taken as normal with mean 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# Published bounds of the threshold r, in units of σ, and the ε that is added to the threshold in weight units.
MAX_THRESHOLD = 5.0
EPSILON = 1e-6
# Ratio of the second threshold at which weights are counted to the first: near enough for a slope, far enough for a count.
NEARBY = 1.05
# Bounds on a layer's slope in units of the Gaussian's. A layer of uniform weights has 250 at a density of 0.001.
STEEPNESS = (0.1, 1000.0)
# Weights, kept or removed, at which a count moves the model half way: the variance of a count's logit is about one over it.
EVIDENCE = 4.0
# Densities are told from 0 and from 1 by at least this much, so that a logit and a slope stay finite.
MARGIN = 1e-9
# The density at which the Gaussian model reaches about 5.45 σ, beyond `MAX_THRESHOLD`.
LEAST_DENSITY = 5e-8
# Tails of a layer's weights: bounds on the power of the distance to the largest one, and the power where no count tells it.
TAIL_POWERS = (1.0, 50.0)
USUAL_TAIL_POWER = 2.0
# The share of the largest weight that no threshold exceeds.
BELOW_LARGEST = 1.0 - 1e-3
# Keeps a divisor from being 0.
TINY = 1e-300


def gaussian_density(thresholds: Tensor) -> Tensor:
    """Predicted share of weights that are kept, 1 − erf(r / √2), for thresholds r in units of σ; same shape."""
    return torch.special.erfc(thresholds / math.sqrt(2.0))


def gaussian_density_gradient(thresholds: Tensor) -> Tensor:
    """Derivative of `gaussian_density` by r: −√(2/π)·exp(−r²/2)."""
    return -math.sqrt(2.0 / math.pi) * torch.exp(-0.5 * thresholds.square())


def threshold_for_density(density: Tensor) -> Tensor:
    """The threshold r, in units of σ, at which the Gaussian model predicts `density` in (0, 1]; same shape."""
    return math.sqrt(2.0) * torch.special.erfinv(1.0 - density)


def weight_threshold(thresholds: Tensor, sigmas: Tensor) -> Tensor:
    """Thresholds in weight units: b = clamp(r, 0, 5)·σ + 1e-6 (the 1e-6 is not scaled); same shape."""
    return thresholds.clamp(0.0, MAX_THRESHOLD) * sigmas + EPSILON


@dataclass(frozen=True)
class LayerCounts:
    """What was counted in the L layers, over all ranks; float64 [L].

    Attributes:
        kept: weights above the threshold.
        nearby: weights above `NEARBY` times the threshold.
        largest: the largest |w|, in units of σ.
    """

    kept: Tensor
    nearby: Tensor
    largest: Tensor


class DensityModel:
    """Densities as functions of the thresholds: the Gaussian estimate, bent to what was counted.

    Weights are not normal. So each layer's logit of the Gaussian density is stretched and shifted, to
    ``logit d = steepness·logit(gaussian) + shift``, such that the curve has the counted density at the counted threshold, and
    the counted slope between it and a threshold `NEARBY` times as high. The slope matters: corrected by a shift alone, layers
    with light tails (uniform weights below 15 % density, for one) are corrected by more than twice what is needed, and their
    density swings up and down from count to count.

    Args:
        numel: float64 [L], weights of each layer.
        corrected: False leaves the Gaussian estimate as published.
        nearby_at: the thresholds of the second count, from those of the first; None: `NEARBY` times as high.

    Attributes:
        STATE: the attributes that `observe` changes besides `fresh`.
        anchor: float64 [L], the thresholds at which each layer was counted last, in units of σ.
        fresh: bool [L], the layers that the last call of `observe` counted.
    """

    STATE: ClassVar = ("steepness", "shift", "anchor", "kept", "nearby", "largest")

    def __init__(self, numel: Tensor, *, corrected: bool, nearby_at: Callable[[Tensor], Tensor] | None = None) -> None:
        self.corrected = corrected
        self.nearby_at = nearby_at or (lambda thresholds: NEARBY * thresholds)
        self.numel = numel
        self.steepness = torch.ones_like(numel)
        self.shift = torch.zeros_like(numel)
        self.anchor = torch.zeros_like(numel)
        self.kept = torch.ones_like(numel)
        self.nearby = torch.ones_like(numel)
        self.largest = torch.full_like(numel, MAX_THRESHOLD)
        self.fresh = torch.ones_like(numel, dtype=torch.bool)

    @staticmethod
    def _logit(density: Tensor) -> Tensor:
        return torch.logit(density, eps=MARGIN)

    def observe(self, thresholds: Tensor, counts: LayerCounts, where: Tensor) -> None:
        """Update the model with the counts of the layers in the boolean mask `where` [L], made at `thresholds` [L] = b/σ."""
        self.fresh = where
        kept, nearby = counts.kept / self.numel, counts.nearby / self.numel
        # A count says no more than that the density lies half a weight inside of 0 and 1.
        half = 0.5 / self.numel
        level, next_level = (self._logit(d.clamp(half, 1.0 - half)) for d in (kept, nearby))
        here, further = (self._logit(gaussian_density(t)) for t in (thresholds, self.nearby_at(thresholds)))
        # Equal counts say nothing about the slope; an old steep one would pin the layer.
        known = (nearby < kept) & (kept < 1.0)
        secant = (next_level - level) / (further - here).clamp(max=-1e-12)
        steepness = torch.where(known, secant.clamp(*STEEPNESS), self.steepness.sqrt())
        # A logit of few weights is mostly chance: the curve follows a count by as much as it has to say.
        evidence = torch.minimum(counts.kept, self.numel - counts.kept) + 0.5
        believed = self.steepness * here + self.shift
        # A layer that counts 0 or 1 where the curve says the same needs no correction.
        level = torch.where(counts.kept == 0, level.minimum(believed), level)
        level = torch.where(counts.kept == self.numel, level.maximum(believed), level)
        level = believed + evidence / (evidence + EVIDENCE) * (level - believed)
        new = (steepness, level - steepness * here, thresholds, kept, nearby, counts.largest)
        old = (self.steepness, self.shift, self.anchor, self.kept, self.nearby, self.largest)
        self.steepness, self.shift, self.anchor, self.kept, self.nearby, self.largest = (
            torch.where(where, a, b) for a, b in zip(new, old)
        )

    def ceiling(self, floors: Tensor) -> Tensor:
        """Thresholds [L] that leave each layer its density in `floors` [L], as far as the last counts tell.

        Near a layer's largest weight, at e, the density falls steeply: as a power p of the distance to it, d ∝ (e − x)^p.
        The power is counted where the second count tells it; 2 otherwise, which comes nearer from count to count for any p < 4.
        No threshold reaches the largest weight, so no layer is ever emptied.
        """
        edge = self.largest.clamp(max=MAX_THRESHOLD)
        gap, next_gap = edge - self.anchor, edge - self.nearby_at(self.anchor)
        kept, nearby = self.kept.clamp_min(0.5 / self.numel), self.nearby
        known = (nearby > 0) & (nearby < kept) & (next_gap > 0)
        shrinking = torch.log(gap / next_gap.clamp_min(TINY)).clamp_min(1e-12)
        power = torch.log(kept / nearby.clamp_min(TINY)) / shrinking
        power = torch.where(known, power.clamp(*TAIL_POWERS), torch.full_like(power, USUAL_TAIL_POWER))
        ceiling = edge - gap.clamp_min(0.0) * (floors / kept).pow(1.0 / power)
        return ceiling.minimum(edge * BELOW_LARGEST)

    def density(self, thresholds: Tensor) -> Tensor:
        """Density of each layer, [L], at `thresholds` [L] in units of σ."""
        gaussian = gaussian_density(thresholds)
        return torch.sigmoid(self.steepness * self._logit(gaussian) + self.shift) if self.corrected else gaussian

    def gradient(self, thresholds: Tensor) -> Tensor:
        """Derivative of `density` by each layer's threshold, [L]."""
        slope = gaussian_density_gradient(thresholds)
        if not self.corrected:
            return slope
        gaussian = gaussian_density(thresholds).clamp(MARGIN, 1.0 - MARGIN)
        density = self.density(thresholds)
        return self.steepness * slope * density * (1.0 - density) / (gaussian * (1.0 - gaussian))

    def threshold(self, densities: Tensor) -> Tensor:
        """The thresholds at which `density` is `densities` [L], in (0, 1]."""
        if self.corrected:
            densities = torch.sigmoid((self._logit(densities) - self.shift) / self.steepness)
        return threshold_for_density(densities.clamp(min=LEAST_DENSITY))

    def state_dict(self) -> dict[str, Tensor]:
        """What the counts so far have made of the model."""
        return {name: getattr(self, name).detach().to("cpu", copy=True) for name in (*self.STATE, "fresh")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`."""
        for name in (*self.STATE, "fresh"):
            setattr(self, name, state[name].to(self.numel.device, copy=True))

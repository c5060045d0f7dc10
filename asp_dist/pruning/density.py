"""The Gaussian model of a layer's density (arXiv 2006.02768, section 3): weights are taken as normal with mean 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Published bounds of the threshold r, in units of σ, and the ε that is added to the threshold in weight units.
MAX_THRESHOLD = 5.0
EPSILON = 1e-6


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


class DensityModel:
    """Densities as functions of the thresholds: the Gaussian estimate, corrected by what was counted.

    Weights are not normal, so each layer's logit of the Gaussian density is shifted by the difference to the logit of the
    density last measured. The shift changes slowly, while thresholds and σ move at every step. Its bound of ±15 leaves room for
    layers in which a few large weights make σ: there, the largest threshold may keep 1 % where the estimate says 0.00006 %.

    Args:
        layers: number of layers L.
        corrected: False leaves the Gaussian estimate as published.
    """

    def __init__(self, layers: int, *, corrected: bool) -> None:
        self.corrected = corrected
        self.shift = torch.zeros(layers, dtype=torch.float64)

    @staticmethod
    def _logit(density: Tensor) -> Tensor:
        return torch.logit(density, eps=1e-9)

    def observe(self, thresholds: Tensor, measured: Tensor, where: Tensor) -> None:
        """Take in measured densities [L] at `thresholds` [L], for the layers in the boolean mask `where` [L]."""
        if self.corrected:
            shift = self._logit(measured) - self._logit(gaussian_density(thresholds))
            self.shift = torch.where(where, shift.clamp(-15.0, 15.0), self.shift)

    def density(self, thresholds: Tensor) -> Tensor:
        """Density of each layer, [L], at `thresholds` [L] in units of σ."""
        gaussian = gaussian_density(thresholds)
        return torch.sigmoid(self._logit(gaussian) + self.shift) if self.corrected else gaussian

    def gradient(self, thresholds: Tensor) -> Tensor:
        """Derivative of `density` by each layer's threshold, [L]."""
        slope = gaussian_density_gradient(thresholds)
        if not self.corrected:
            return slope
        gaussian = gaussian_density(thresholds).clamp(1e-9, 1.0 - 1e-9)
        density = self.density(thresholds)
        return slope * density * (1.0 - density) / (gaussian * (1.0 - gaussian))

    def threshold(self, densities: Tensor) -> Tensor:
        """The thresholds at which `density` is `densities` [L], in (0, 1]."""
        if self.corrected:
            densities = torch.sigmoid(self._logit(densities) - self.shift)
        return threshold_for_density(densities.clamp(min=5e-8))

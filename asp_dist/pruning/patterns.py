"""Weights that share a mask: groups of neighboring output channels, and what a threshold means for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asp_dist.pruning.density import gaussian_density

# Thresholds in units of σ at which groups are compared with single weights; in between is a straight line.
POINTS = 2049
FARTHEST = 6.0


class GroupScale:
    """Thresholds of groups that keep the same share of normal weights as thresholds of single weights do.

    A group of n weights is kept while the root of the mean of its squares exceeds its threshold. For normal weights n times
    that mean, in units of σ², follows a chi-squared distribution with n degrees of freedom. So the threshold r of single
    weights, which the density model and the controls speak of, and the threshold g of groups that keeps as many solve
    ``erfc(r / √2) = Q(n / 2, n·g² / 2)``, with Q the regularized upper incomplete gamma function.

    Args:
        sizes: weights per group of each layer; 1: every weight on its own.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = torch.tensor(sizes, dtype=torch.float64)
        self.grid = torch.linspace(0.0, FARTHEST, POINTS, dtype=torch.float64)
        kinds = sorted(set(sizes))
        tables = torch.stack([self.grid if size == 1 else self._table(size) for size in kinds])
        self.tables = tables[[kinds.index(size) for size in sizes]]

    def _table(self, size: int) -> Tensor:
        """The threshold of groups of `size` for each of the grid, by bisection."""
        kept = gaussian_density(self.grid)
        low, high = torch.zeros_like(self.grid), torch.full_like(self.grid, FARTHEST)
        half = torch.tensor(size / 2.0, dtype=torch.float64)
        for _ in range(60):
            middle = 0.5 * (low + high)
            too_many = torch.special.gammaincc(half, half * middle.square()) > kept
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        high[0] = 0.0
        return high

    def of_groups(self, thresholds: Tensor) -> Tensor:
        """Thresholds of groups [L] for those of single weights, in units of σ."""
        x = (thresholds / (FARTHEST / (POINTS - 1))).clamp(0.0, POINTS - 1.0)
        left = x.floor().clamp(max=POINTS - 2.0)
        low, high = (self.tables.gather(1, (left + i).long()[:, None])[:, 0] for i in (0, 1))
        return torch.where(self.sizes == 1, thresholds, low + (x - left) * (high - low))

    def of_weights(self, thresholds: Tensor) -> Tensor:
        """Thresholds of single weights [L] for those of groups: the inverse; at most `FARTHEST` for groups."""
        right = torch.searchsorted(self.tables, thresholds[:, None].contiguous())[:, 0].clamp(1, POINTS - 1)
        low, high = (self.tables.gather(1, (right + i)[:, None])[:, 0] for i in (-1, 0))
        share = ((thresholds - low) / (high - low)).clamp(0.0, 1.0)
        found = (right - 1 + share) * (FARTHEST / (POINTS - 1))
        return torch.where(self.sizes == 1, thresholds, found)


def grouped(tensor: Tensor, size: int) -> Tensor:
    """A view of a layer's tensor [O, ...] as [O / size, size, ...]."""
    return tensor.unflatten(0, (tensor.shape[0] // size, size))


def norms(weights: Tensor, size: int) -> Tensor:
    """The root mean square of each group of `size` neighbors along the first dimension: [O / size, ...], float32 at least."""
    wide = weights.double() if weights.dtype == torch.float64 else weights.float()
    return grouped(wide, size).square().mean(1).sqrt()

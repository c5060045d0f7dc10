"""Control that holds the scheduled budget at every step: one common factor is solved for, the allocation is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from asp_dist.pruning.budget import Limit
from asp_dist.pruning.control import Control, Observation
from asp_dist.pruning.density import NEARBY, DensityModel, threshold_for_density
from asp_dist.pruning.schedule import Ramp

Allocation = Literal["uniform", "magnitude", "erk"]


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Erdős–Rényi-kernel densities (RigL, arXiv 1911.11134): proportional to (sum of dimensions) / (product), capped at 1.

    Args:
        shapes: shapes of the layers' weights.
        density: density of all layers together.
    """
    numel = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    capped: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in capped]
        wanted = density * sum(numel) - sum(numel[i] for i in capped)
        factor = wanted / max(sum(raw[i] * numel[i] for i in free), 1e-300)
        over = {i for i in free if factor * raw[i] > 1.0}
        if not over:
            return [1.0 if i in capped else factor * raw[i] for i in range(len(shapes))]
        capped |= over


class TrackControl(Control):
    """Thresholds b_l = κ·exp(α_l)·u_l in weight units, with κ solved for at each step so that the budget holds.

    u_l is σ_l (``uniform``: equal sparsity under the Gaussian model), 1 (``magnitude``: one global threshold) or what gives
    Erdős–Rényi-kernel densities (``erk``). The allocation α follows the task: raising log b_l by δ changes the loss by
    −δ·Σ_{|w| <= b} g·w, and saves cost; layers in which a unit of cost is cheap to save get higher thresholds. Its step is
    normalised over the layers, bounded, and holds the budget to first order; |α_l| is bounded and every layer has a floor.

    Args:
        limits: the budgets; the first one is held at every step, further ones (at most, network) by growing penalties.
        model: density model, corrected by measured counts.
        ramp: how the target moves.
        allocation: where the allocation starts.
        shapes: shapes of the layers' weights, for ``erk``.
        floors: smallest density of each layer, float64 [L].
        rate: change of log b per step of a layer one standard deviation above the mean, at the peak of the optimizer's
            learning rate; it follows the learning rate's schedule. 0 keeps the starting allocation.
        momentum: smoothing of the task's signal.
    """

    max_alpha = 1.5
    max_move = NEARBY - 1.0  # of a threshold between two counts, in units of σ, beside what the schedule asks for
    penalty_gain = 0.5

    def __init__(
        self,
        limits: Sequence[Limit],
        model: DensityModel,
        ramp: Ramp,
        *,
        allocation: Allocation = "magnitude",
        shapes: Sequence[Sequence[int]] = (),
        floors: Tensor,
        rate: float = 0.003,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(limits, model, ramp)
        if allocation not in ("uniform", "magnitude", "erk"):
            raise ValueError(f"allocation {allocation!r} is none of 'uniform', 'magnitude', 'erk'")
        if any(limit.bound != "at_most" or limit.scope != "network" for limit in limits[1:]):
            raise ValueError("control 'track': budgets after the first must be 'at_most' over the network")
        self.allocation = allocation
        self.floors = floors
        self.rate = rate
        self.momentum = momentum
        self.alpha = torch.zeros_like(model.numel)
        self.signal = torch.zeros_like(model.numel)
        self.penalties = [0.0 for _ in limits[1:]]
        self.log_kappa: float | None = None
        self.peak_lr = 0.0
        self.asked = torch.zeros_like(model.numel)
        if allocation == "erk":
            density = float(limits[0].target_density.mean())
            erk = torch.tensor(erk_densities(shapes, density), dtype=torch.float64).clamp(max=0.99)
            self.erk_thresholds = threshold_for_density(erk)

    def _base(self, sigmas: Tensor) -> Tensor:
        """exp(α_l)·u_l/σ_l with the penalties of further budgets: thresholds in units of σ, up to the factor κ."""
        base = torch.ones_like(sigmas)
        if self.allocation == "magnitude":
            base = 1.0 / sigmas.clamp_min(1e-30)
        elif self.allocation == "erk":
            base = self.erk_thresholds
        exponent = self.alpha.clone()
        for penalty, limit in zip(self.penalties, self.limits[1:]):
            exponent += penalty * limit.per_weight / limit.per_weight.max()
        return base * exponent.exp()

    def start(self, sigmas: Tensor) -> Tensor:
        unbounded = torch.full_like(sigmas, torch.inf)
        return self._solve(sigmas, 0, -unbounded, unbounded)

    def _cost(self, thresholds: Tensor) -> float:
        densities = torch.maximum(self.model.density(thresholds), self.floors)
        return float(self.limits[0].density(densities))

    def _solve(self, sigmas: Tensor, step: int, lowest: Tensor, highest: Tensor) -> Tensor:
        """Thresholds in [lowest, highest] at which the first budget's scheduled target holds under the density model."""
        target = self.targets(step)[0]
        ceiling = self.model.ceiling(self.floors).minimum(highest)
        floor = lowest.clamp_min(0.0)
        if self.limits[0].scope == "layer":
            return torch.maximum(torch.minimum(self.model.threshold(target), ceiling), floor)
        goal = float(target)
        if goal >= 1.0 - 1e-9:
            self.log_kappa = None
            return torch.zeros_like(sigmas)
        base = self._base(sigmas)

        def thresholds(log_kappa: float) -> Tensor:
            return torch.maximum(torch.minimum(math.exp(log_kappa) * base, ceiling), floor)

        # Bracket around the last solution, then regula falsi (Illinois) on a monotone function: a handful of evaluations.
        middle = self.log_kappa if self.log_kappa is not None else -math.log(float(base.median()))
        width = 0.05
        low, high = middle - width, middle + width
        while (f_low := self._cost(thresholds(low)) - goal) < 0 and low > middle - 60:
            low, width = low - width, 2 * width
        while (f_high := self._cost(thresholds(high)) - goal) > 0 and high < middle + 60:
            high, width = high + width, 2 * width
        if f_low < 0 or f_high > 0:
            # The bounds allow no such thresholds now: as near as they do, and from the same place again after the next step.
            return thresholds(low if f_low < 0 else high)
        x = middle
        for _ in range(60):
            x = high - f_high * (high - low) / (f_high - f_low) if f_high != f_low else 0.5 * (low + high)
            value = self._cost(thresholds(x)) - goal
            if abs(value) < 1e-9 * goal or high - low < 1e-12:
                break
            if value > 0:
                low, f_low, f_high = x, value, 0.5 * f_high
            else:
                high, f_high, f_low = x, value, 0.5 * f_low
        self.log_kappa = x
        return thresholds(x)

    def move(self, thresholds: Tensor, seen: Observation) -> Tensor:
        products = torch.nan_to_num(seen.pruned_products, nan=0.0, posinf=0.0, neginf=0.0)
        self.signal = self.momentum * self.signal - (1.0 - self.momentum) * products
        # The first steps' rate may be a warm-up's, which is no measure of anything.
        self.peak_lr = max(self.peak_lr, seen.lr, seen.base_lr)
        if self.rate and self.ramp.share(seen.step) > 0:
            self._learn(thresholds, self.rate * seen.lr / max(self.peak_lr, 1e-30))
        densities = self.model.density(thresholds)
        for i, (limit, target) in enumerate(zip(self.limits[1:], self.targets(seen.step)[1:])):
            excess = float(limit.density(densities) / target) - 1.0
            self.penalties[i] = min(max(self.penalties[i] + self.penalty_gain * excess, 0.0), 6.0)
        return self._solve(seen.sigmas, seen.step + 1, *self._bounds(seen.step))

    def _bounds(self, step: int) -> tuple[Tensor, Tensor]:
        """How far each layer's threshold may be from where its weights were counted last, for the move after `step`."""
        now, then = (threshold_for_density(self.targets(s)[0]).expand_as(self.asked) for s in (step, step + 1))
        self.asked = torch.where(self.model.fresh, now, self.asked)
        anchor = self.model.anchor
        # Under one factor for all layers, thresholds move in proportion to their size.
        scheduled = 2.0 * (then - self.asked).abs() * (anchor / self.asked.clamp_min(0.1)).clamp_min(1.0)
        bound = self.max_move * anchor.clamp_min(1.0) + scheduled
        return anchor - bound, anchor + bound

    def _learn(self, thresholds: Tensor, rate: float) -> None:
        """One bounded step of the allocation along directions that keep the budget."""
        # Cost saved per unit of log b; a layer at its floor or with no threshold saves nothing and is left alone.
        saved = -self.limits[0].dense * self.model.gradient(thresholds) * thresholds
        active = (saved > 0) & (self.model.density(thresholds) > 1.05 * self.floors)
        if int(active.sum()) < 2:
            return
        harm = torch.where(active, self.signal / saved.clamp_min(1e-300), torch.zeros_like(saved))
        weight = torch.where(active, saved, torch.zeros_like(saved))
        weight = weight / weight.sum()
        away = torch.where(active, harm - (weight * harm).sum(), torch.zeros_like(harm))
        scale = (weight * away.square()).sum().sqrt()
        if not bool(scale > 0):
            return
        step = (away / scale).clamp(-3.0, 3.0)
        self.alpha = (self.alpha - rate * step).clamp(-self.max_alpha, self.max_alpha)

    def state_dict(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha,
            "signal": self.signal,
            "density": self.model.state_dict(),
            "penalties": list(self.penalties),
            "log_kappa": self.log_kappa,
            "peak_lr": self.peak_lr,
            "asked": self.asked.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha, self.signal = state["alpha"].clone(), state["signal"].clone()
        self.model.load_state_dict(state["density"])
        self.penalties = list(state["penalties"])
        self.log_kappa, self.peak_lr = state["log_kappa"], state["peak_lr"]
        self.asked = state["asked"].clone()

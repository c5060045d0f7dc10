"""Track: the scheduled budget holds at every step, by one common factor that is solved for; the allocation is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asp_dist.pruning.control.controller import Controller, Problem, StepStats
from asp_dist.pruning.density import NEARBY, threshold_for_density
from asp_dist.pruning.names import ALLOCATION_AT_BOUNDS
from asp_dist.pruning.options import Track

# Bound on the allocation: no threshold is more than 4.5 times, or less than a 4.5th of, what the start gives it.
MAX_ALPHA = 1.5
# Smoothing of the task's signal.
SIGNAL_MOMENTUM = 0.9
# A layer's step of the allocation is bounded at so many standard deviations over the layers.
MAX_DEVIATIONS = 3.0
# Layers less dense than this many times their floor cannot give weights away; they are left alone.
FLOOR_MARGIN = 1.05
# How fast the penalty of a further budget grows with its excess, and its bound, as a factor exp(6) on the thresholds.
PENALTY_GAIN = 0.5
MAX_PENALTY = 6.0
# A threshold moves no further than this between two counts of its layer (in units of σ), besides what the schedule asks for.
MAX_MOVE = NEARBY - 1.0
# What the schedule may ask for: so many times what it asks of normal weights.
SCHEDULE_MARGIN = 2.0
# Erdős–Rényi densities are capped here, where a threshold of 0 would not follow the common factor.
MAX_ERK_DENSITY = 0.99
# Where the root is looked for, in log κ around the last one, and how near the density must come to the target, relatively.
BRACKET_WIDTH = 0.05
MAX_BRACKET = 60.0
ROOT_TOLERANCE = 1e-9


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


class TrackController(Controller):
    """Thresholds b_l = κ·exp(α_l)·u_l in weight units, with κ solved for at each step so that the budget holds.

    u_l is σ_l (``uniform``: equal sparsity under the Gaussian estimate), 1 (``magnitude``: one global threshold) or what gives
    Erdős–Rényi-kernel densities (``erk``). The allocation α follows the task: raising log b_l by δ changes the loss by
    −δ·Σ_{|w| <= b} g·w, and saves cost; layers in which a unit of cost is cheap to save get higher thresholds. Its step is
    normalized over the layers, bounded, and keeps the budget to first order; |α_l| is bounded and every layer has a floor.

    Args:
        options: see `Track`.
        problem: the network's layers and budgets. The first budget holds at every step, further ones (at most, over the
            network) are reached by growing penalties.

    Raises:
        ValueError: a further budget is of another kind.
    """

    def __init__(self, options: Track, problem: Problem) -> None:
        super().__init__(problem)
        if any(budget.bound != "at_most" or budget.scope != "network" for budget in problem.budgets[1:]):
            raise ValueError("Track: budgets after the first must be 'at_most' over the network")
        self.options = options
        self.alpha = torch.zeros_like(problem.floors)
        self.signal = torch.zeros_like(problem.floors)
        self.penalties = [0.0 for _ in problem.budgets[1:]]
        self.log_kappa: float | None = None
        self.peak_lr = torch.zeros_like(problem.floors)
        self.scheduled = torch.zeros_like(problem.floors)
        density = float(problem.budgets[0].target_density.mean())
        erk = torch.tensor(erk_densities(problem.shapes, density), dtype=torch.float64)
        self.erk_thresholds = threshold_for_density(erk.clamp(max=MAX_ERK_DENSITY))

    def start(self, sigmas: Tensor) -> Tensor:
        unbounded = torch.full_like(sigmas, torch.inf)
        return self._solve(sigmas, 0, -unbounded, unbounded)

    def move(self, thresholds: Tensor, stats: StepStats) -> Tensor:
        products = torch.nan_to_num(stats.pruned_products, nan=0.0, posinf=0.0, neginf=0.0)
        self.signal = SIGNAL_MOMENTUM * self.signal - (1.0 - SIGNAL_MOMENTUM) * products
        # The first steps' rate may be a warm-up's, which says nothing about the schedule.
        self.peak_lr = torch.stack([self.peak_lr, stats.lr, stats.base_lr]).amax(dim=0)
        if self.options.rate and self.problem.ramp.share(stats.step) > 0:
            self._learn(thresholds, self.options.rate * stats.lr / self.peak_lr.clamp_min(1e-30))
        self._penalize(thresholds, stats.step)
        return self._solve(stats.sigmas, stats.step + 1, *self._bounds(stats.step))

    def _base(self, sigmas: Tensor) -> Tensor:
        """exp(α_l)·u_l/σ_l with the penalties of further budgets: thresholds in units of σ, up to the factor κ."""
        base = torch.ones_like(sigmas)
        if self.options.allocation == "magnitude":
            base = 1.0 / sigmas.clamp_min(1e-30)
        elif self.options.allocation == "erk":
            base = self.erk_thresholds
        exponent = self.alpha.clone()
        for penalty, budget in zip(self.penalties, self.problem.budgets[1:]):
            exponent += penalty * budget.per_weight / budget.per_weight.max()
        return base * exponent.exp()

    def _cost(self, thresholds: Tensor) -> float:
        densities = torch.maximum(self.problem.density_model.density(thresholds), self.problem.floors)
        return float(self.problem.budgets[0].density(densities))

    def _solve(self, sigmas: Tensor, step: int, lowest: Tensor, highest: Tensor) -> Tensor:
        """Thresholds in [lowest, highest] at which the first budget's scheduled target holds under the density model."""
        model, target = self.problem.density_model, self.problem.targets(step)[0]
        ceiling = model.ceiling(self.problem.floors).minimum(highest)
        lowest = lowest.clamp_min(0.0)
        if self.problem.budgets[0].scope == "layer":
            return torch.maximum(torch.minimum(model.threshold(target), ceiling), lowest)
        goal = float(target)
        if goal >= 1.0 - 1e-9:
            self.log_kappa = None
            return torch.zeros_like(sigmas)
        base = self._base(sigmas)

        def thresholds(log_kappa: float) -> Tensor:
            return torch.maximum(torch.minimum(math.exp(log_kappa) * base, ceiling), lowest)

        def excess(log_kappa: float) -> float:
            return self._cost(thresholds(log_kappa)) - goal

        middle = self.log_kappa if self.log_kappa is not None else -math.log(float(base.median()))
        root = falling_root(excess, middle, tolerance=ROOT_TOLERANCE * goal)
        if abs(root - middle) < MAX_BRACKET:
            self.log_kappa = root  # else the bounds allow no such thresholds now: start from the same place next time
        return thresholds(root)

    def _penalize(self, thresholds: Tensor, step: int) -> None:
        """Raise the penalties of the further budgets that are exceeded, and lower those of the others."""
        densities = self.problem.density_model.density(thresholds)
        for i, (budget, target) in enumerate(zip(self.problem.budgets[1:], self.problem.targets(step)[1:])):
            excess = float(budget.density(densities) / target) - 1.0
            self.penalties[i] = min(max(self.penalties[i] + PENALTY_GAIN * excess, 0.0), MAX_PENALTY)

    def _bounds(self, step: int) -> tuple[Tensor, Tensor]:
        """How far each layer's threshold may be from where its weights were counted last, for the move after `step`."""
        model = self.problem.density_model
        now, after = (threshold_for_density(self.problem.targets(s)[0]).expand_as(self.scheduled) for s in (step, step + 1))
        self.scheduled = torch.where(model.fresh, now, self.scheduled)
        # Under one factor for all layers, thresholds move in proportion to their size.
        proportion = (model.anchor / self.scheduled.clamp_min(0.1)).clamp_min(1.0)
        asked = SCHEDULE_MARGIN * (after - self.scheduled).abs() * proportion
        bound = MAX_MOVE * model.anchor.clamp_min(1.0) + asked
        return model.anchor - bound, model.anchor + bound

    def _learn(self, thresholds: Tensor, rate: Tensor) -> None:
        """One bounded step of the allocation along directions that keep the budget; `rate` [L]."""
        model, budget = self.problem.density_model, self.problem.budgets[0]
        # Cost saved per unit of log b; a layer at its floor or with no threshold saves nothing and is left alone.
        saved = -budget.dense * model.gradient(thresholds) * thresholds
        active = (saved > 0) & (model.density(thresholds) > FLOOR_MARGIN * self.problem.floors)
        if int(active.sum()) < 2:
            return
        harm = torch.where(active, self.signal / saved.clamp_min(1e-300), torch.zeros_like(saved))
        weight = torch.where(active, saved, torch.zeros_like(saved))
        weight = weight / weight.sum()
        away = torch.where(active, harm - (weight * harm).sum(), torch.zeros_like(harm))
        scale = (weight * away.square()).sum().sqrt()
        if not bool(scale > 0):
            return
        step = (away / scale).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        self.alpha = (self.alpha - rate * step).clamp(-MAX_ALPHA, MAX_ALPHA)

    def metrics(self, thresholds: Tensor, lr: Tensor, step: int) -> dict[str, float]:
        return {ALLOCATION_AT_BOUNDS: float((self.alpha.abs() >= MAX_ALPHA).double().mean())}

    def begin(self) -> None:
        self.peak_lr = torch.zeros_like(self.peak_lr)

    def state_dict(self) -> dict[str, Any]:
        return {
            "alpha": self.alpha.clone(),
            "signal": self.signal.clone(),
            "penalties": list(self.penalties),
            "log_kappa": self.log_kappa,
            "peak_lr": self.peak_lr.clone(),
            "scheduled": self.scheduled.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha, self.signal = state["alpha"].clone(), state["signal"].clone()
        self.penalties, self.log_kappa = list(state["penalties"]), state["log_kappa"]
        self.peak_lr, self.scheduled = state["peak_lr"].clone(), state["scheduled"].clone()


def falling_root(function: Any, guess: float, *, tolerance: float) -> float:
    """The root of a falling function near `guess`, to within `tolerance` of zero; where it has none, an end of the bracket."""
    width = BRACKET_WIDTH
    low, high = guess - width, guess + width
    while (f_low := function(low)) < 0 and low > guess - MAX_BRACKET:
        low, width = low - width, 2 * width
    while (f_high := function(high)) > 0 and high < guess + MAX_BRACKET:
        high, width = high + width, 2 * width
    if f_low < 0 or f_high > 0:
        return low if f_low < 0 else high
    x = guess
    # Regula falsi (Illinois): a handful of evaluations.
    for _ in range(60):
        x = high - f_high * (high - low) / (f_high - f_low) if f_high != f_low else 0.5 * (low + high)
        value = function(x)
        if abs(value) < tolerance or high - low < 1e-12:
            break
        if value > 0:
            low, f_low, f_high = x, value, 0.5 * f_high
        else:
            high, f_high, f_low = x, value, 0.5 * f_low
    return x

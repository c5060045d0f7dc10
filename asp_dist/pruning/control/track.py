"""Track: the scheduled budget holds at every step, by one common factor that is solved for; the allocation is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from asp_dist.pruning.control.controller import Controller, Problem, RampPosition, StepStats
from asp_dist.pruning.density import NEARBY, TINY, threshold_for_density
from asp_dist.pruning.kernels.fused import repeat
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
# A target density from which on nothing is pruned.
DENSE = 1.0 - 1e-9
# A threshold, in units of σ, that no layer's first weight is below.
LEAST_THRESHOLD = 1e-12
# Where the root is looked for, in log κ around the last one, and how near the density must come to the target, relatively.
BRACKET_WIDTH = 0.05
MAX_BRACKET = 60.0
ROOT_TOLERANCE = 1e-9
# Rounds of four evaluations that the root gets where nothing may be read.
ROOT_ROUNDS = 10

Function = Callable[[Tensor], Tensor]


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

    state = ("alpha", "signal", "penalties", "log_kappa", "peak_lr", "scheduled")
    fusible = True

    def __init__(self, options: Track, problem: Problem) -> None:
        super().__init__(problem)
        if any(budget.bound != "at_most" or budget.scope != "network" for budget in problem.budgets[1:]):
            raise ValueError("Track: budgets after the first must be 'at_most' over the network")
        self.options = options
        self.alpha = torch.zeros_like(problem.floors)
        self.signal = torch.zeros_like(problem.floors)
        self.penalties = [torch.zeros_like(budget.target_density) for budget in problem.budgets[1:]]
        self.log_kappa = torch.full_like(problem.floors[0], torch.nan)  # not known yet
        self.peak_lr = torch.zeros_like(problem.floors)
        self.scheduled = torch.zeros_like(problem.floors)
        density = float(problem.budgets[0].target_density.mean())
        erk = torch.tensor(erk_densities(problem.shapes, density), dtype=torch.float64, device=problem.floors.device)
        self.erk_thresholds = threshold_for_density(erk.clamp(max=MAX_ERK_DENSITY))

    def start(self, sigmas: Tensor) -> Tensor:
        unbounded = torch.full_like(sigmas, torch.inf)
        share = torch.full_like(sigmas[0], self.problem.ramp.share(0))
        return self._solve(sigmas, share, -unbounded, unbounded)

    def move(self, thresholds: Tensor, stats: StepStats) -> Tensor:
        products = torch.nan_to_num(stats.pruned_products, nan=0.0, posinf=0.0, neginf=0.0)
        self.signal = SIGNAL_MOMENTUM * self.signal - (1.0 - SIGNAL_MOMENTUM) * products
        # The first steps' rate may be a warm-up's, which says nothing about the schedule.
        self.peak_lr = self.peak_lr.maximum(stats.lr).maximum(stats.base_lr)
        position = stats.position
        if self.options.rate and (self.problem.unread or bool(position.share > 0)):
            before = self.alpha
            self._learn(thresholds, self.options.rate * stats.lr / self.peak_lr.clamp_min(1e-30))
            self.alpha = torch.where(position.share > 0, self.alpha, before)
        self._penalize(thresholds, position)
        return self._solve(stats.sigmas, position.next_share, *self._bounds(position))

    def _base(self, sigmas: Tensor) -> Tensor:
        """exp(α_l)·u_l/σ_l with the penalties of further budgets: thresholds in units of σ, up to the factor κ."""
        base = torch.ones_like(sigmas)
        if self.options.allocation == "magnitude":
            base = 1.0 / sigmas.clamp_min(1e-30)
        elif self.options.allocation == "erk":
            base = self.erk_thresholds
        exponent = self.alpha
        for penalty, budget in zip(self.penalties, self.problem.budgets[1:]):
            exponent = exponent + penalty * budget.per_weight / budget.per_weight.amax()
        return base * exponent.exp()

    def _cost(self, thresholds: Tensor) -> Tensor:
        densities = torch.maximum(self.problem.density_model.density(thresholds), self.problem.floors)
        return self.problem.budgets[0].density(densities)

    def _solve(self, sigmas: Tensor, share: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        """Thresholds in [lowest, highest] at which the first budget's target holds under the density model.

        Args:
            sigmas: σ of each layer.
            share: of the final sparsity, which is the target.
            lowest: bounds on the thresholds, [L].
            highest: the same.
        """
        model, goal = self.problem.density_model, self.problem.targets_at(share)[0]
        ceiling = model.ceiling(self.problem.floors).minimum(highest)
        lowest = lowest.clamp_min(0.0)
        if self.problem.budgets[0].scope == "layer":
            return torch.maximum(torch.minimum(model.threshold(goal), ceiling), lowest)
        dense = goal >= DENSE
        unknown = torch.full_like(goal, torch.nan)
        if not self.problem.unread and bool(dense):
            self.log_kappa = unknown
            return torch.zeros_like(sigmas)
        base = self._base(sigmas)

        def thresholds(log_kappa: Tensor) -> Tensor:
            return torch.maximum(torch.minimum(log_kappa.exp() * base, ceiling), lowest)

        def excess(log_kappa: Tensor) -> Tensor:
            return self._cost(thresholds(log_kappa)) - goal

        usual = base.log().mean() if self.problem.unread else base.median().log()
        middle = torch.where(self.log_kappa.isnan(), -usual, self.log_kappa)
        if self.problem.unread:
            # Beyond these no layer's threshold changes any more.
            low = (lowest.clamp_min(LEAST_THRESHOLD) / base).log().amin()
            high = (ceiling.clamp_min(LEAST_THRESHOLD) / base).log().amax()
            bracket = (
                (low - BRACKET_WIDTH).clamp_min(middle - MAX_BRACKET),
                (high + BRACKET_WIDTH).clamp_max(middle + MAX_BRACKET),
            )
            root, found = falling_root_unread(excess, *bracket)
        else:
            root, found = falling_root(excess, middle, tolerance=ROOT_TOLERANCE * float(goal))
        # Where the bounds allow no such thresholds now: start from the same place next time.
        self.log_kappa = torch.where(dense, unknown, torch.where(found, root, self.log_kappa))
        return torch.where(dense, torch.zeros_like(sigmas), thresholds(root))

    def _penalize(self, thresholds: Tensor, position: RampPosition) -> None:
        """Raise the penalties of the further budgets that are exceeded, and lower those of the others."""
        densities = self.problem.density_model.density(thresholds)
        targets = self.problem.targets_at(position.share)
        for number, (budget, target) in enumerate(zip(self.problem.budgets[1:], targets[1:])):
            excess = budget.density(densities) / target - 1.0
            self.penalties[number] = (self.penalties[number] + PENALTY_GAIN * excess).clamp(0.0, MAX_PENALTY)

    def _bounds(self, position: RampPosition) -> tuple[Tensor, Tensor]:
        """How far each layer's threshold may be from where its weights were counted last, for the move after this step."""
        model = self.problem.density_model
        now, after = (
            threshold_for_density(self.problem.targets_at(share)[0]).expand_as(self.scheduled)
            for share in (position.share, position.next_share)
        )
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
        harm = torch.where(active, self.signal / saved.clamp_min(TINY), torch.zeros_like(saved))
        weight = torch.where(active, saved, torch.zeros_like(saved))
        weight = weight / weight.sum().clamp_min(TINY)
        away = torch.where(active, harm - (weight * harm).sum(), torch.zeros_like(harm))
        scale = (weight * away.square()).sum().sqrt()
        step = (away / scale.clamp_min(TINY)).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        # One layer alone has nothing to give to, and layers that all gain alike have no reason to.
        learns = (active.double().sum() >= 2) & (scale > 0)
        self.alpha = torch.where(learns, (self.alpha - rate * step).clamp(-MAX_ALPHA, MAX_ALPHA), self.alpha)

    def metrics(self, thresholds: Tensor, lr: Tensor, step: int) -> dict[str, float]:
        return {ALLOCATION_AT_BOUNDS: float((self.alpha.abs() >= MAX_ALPHA).double().mean())}

    def begin(self) -> None:
        self.peak_lr = torch.zeros_like(self.peak_lr)


def falling_root(function: Function, guess: Tensor, *, tolerance: float) -> tuple[Tensor, Tensor]:
    """The root of a falling function near `guess`, to within `tolerance` of zero.

    Returns:
        The root, or an end of the bracket where the function has none; and whether it has one.
    """

    def value(x: float) -> float:
        return float(function(torch.tensor(x, dtype=torch.float64)))

    def result(x: float, *, found: bool) -> tuple[Tensor, Tensor]:
        return torch.tensor(x, dtype=torch.float64), torch.tensor(found)

    x, width = float(guess), BRACKET_WIDTH
    low, high = x - width, x + width
    farthest = (x - MAX_BRACKET, x + MAX_BRACKET)
    while (f_low := value(low)) < 0 and low > farthest[0]:
        low, width = low - width, 2 * width
    while (f_high := value(high)) > 0 and high < farthest[1]:
        high, width = high + width, 2 * width
    if f_low < 0 or f_high > 0:
        return result(low if f_low < 0 else high, found=False)
    # Regula falsi (Illinois): a handful of evaluations.
    for _ in range(60):
        x = high - f_high * (high - low) / (f_high - f_low) if f_high != f_low else 0.5 * (low + high)
        now = value(x)
        if abs(now) < tolerance or high - low < 1e-12:
            break
        if now > 0:
            low, f_low, f_high = x, now, 0.5 * f_high
        else:
            high, f_high, f_low = x, now, 0.5 * f_low
    return result(x, found=True)


def falling_root_unread(function: Function, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """As `falling_root`, between `low` and `high`, by a number of evaluations that depends on no value."""

    def narrow(low: Tensor, high: Tensor, f_low: Tensor, f_high: Tensor, x: Tensor, best: Tensor) -> list[Tensor]:
        # Three steps of regula falsi (Illinois), then one bisection, which no shape of the function slows down.
        for number in range(4):
            gap = f_high - f_low
            straight = high - f_high * (high - low) / torch.where(gap == 0, torch.ones_like(gap), gap)
            middle = 0.5 * (low + high)
            try_at = middle if number == 3 else torch.where(gap == 0, middle, straight)
            now = function(try_at)
            nearer = now.abs() < best
            x, best = torch.where(nearer, try_at, x), torch.where(nearer, now.abs(), best)
            above = now > 0
            f_low, f_high = torch.where(above, now, 0.5 * f_low), torch.where(above, 0.5 * f_high, now)
            low, high = torch.where(above, try_at, low), torch.where(above, high, try_at)
        return [low, high, f_low, f_high, x, best]

    f_low, f_high = function(low), function(high)
    found = (f_low >= 0) & (f_high <= 0)
    end = torch.where(f_low < 0, low, high)
    carried = repeat(ROOT_ROUNDS, narrow, [low, high, f_low, f_high, end, torch.full_like(low, torch.inf)])
    return torch.where(found, carried[4], end), found

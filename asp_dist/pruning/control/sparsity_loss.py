"""The adaptive sparsity loss (arXiv 2006.02768): its losses on the layers' densities, and the controller that descends them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asp_dist.pruning.budget import ResolvedBudget
from asp_dist.pruning.control.controller import Controller, Problem, StepStats
from asp_dist.pruning.density import MAX_THRESHOLD, weight_threshold
from asp_dist.pruning.names import SPARSITY_LOSS, THRESHOLD_LR
from asp_dist.pruning.options import SparsityLoss

# The published learning rate of the thresholds, in units of the optimizer's.
PUBLISHED_LR_RATIO = 0.01
# Far out in the tail the density's slope is nearly zero. Bounded, so that a layer can recover.
LEAST_SLOPE = 1e-4
# The largest share of the cost that the integral of the gap may add to it.
MAX_INTEGRAL = 0.1
# The largest move of a threshold in one step towards the budget, in units of σ.
MAX_BUDGET_MOVE = 0.25


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


def sparsity_loss(budget: ResolvedBudget, densities: Tensor, target: Tensor) -> LossValue:
    """The loss that drives the densities [L] to `target` (one number for a network, [L] for layers).

    With D the network's density, Σ c_l·d_l / Σ c_l, and c_l the layers' costs (for weights: their sizes):
    equal to, network: (D − target)²; at most, network: max(0, D − target); equal to, per layer: mean_l (d_l − target_l)²;
    at most, per layer: mean_l max(0, d_l − target_l).
    """
    count = densities.numel()
    gap = budget.density(densities) - target
    share = torch.full_like(densities, 1.0 / count) if budget.scope == "layer" else budget.dense / budget.dense.sum()
    if budget.bound == "equal":
        value, slope = gap.square(), 2.0 * gap
    else:
        value, slope = gap.clamp_min(0.0), (gap > 0).to(gap.dtype)
    return LossValue(value.mean(), slope * share, gap)


class SparsityLossController(Controller):
    """Gradient descent with momentum on task loss + λ·sparsity loss.

    With `threshold_lr` given, or a constant target, the update is the published one: v ← m·v + ∇, r ← r − lr·v.

    Otherwise the rate is derived at every step, so that the sparsity loss closes the share `closing` of the gap to the ramped
    target per step, for any λ and any length of the run: thresholds move by −η·(∇task_l/s_l + λ·∇sparsity_l/s_l), with
    s_l the layer's share of the cost (both gradients grow with it) and η = closing / (2λ·Σ s_l·d'_l²). The task's part of a
    move is bounded by `max_task_move`.

    Args:
        options: see `SparsityLoss`.
        problem: the network's layers and budgets.
    """

    state = ("velocity", "integrals")
    fusible = True
    closing = 0.2
    max_task_move = 0.02
    integral_gain = 0.02

    def __init__(self, options: SparsityLoss, problem: Problem) -> None:
        super().__init__(problem)
        self.options = options
        self.velocity = torch.zeros_like(problem.floors)
        self.integrals = [torch.zeros_like(budget.target_density) for budget in problem.budgets]

    @property
    def derived(self) -> bool:
        """Whether the thresholds' learning rate is derived from the run."""
        return self.options.threshold_lr is None and self.problem.ramp.shape != "constant"

    def start(self, sigmas: Tensor) -> Tensor:
        if self.options.initial_threshold is not None:
            return torch.full_like(sigmas, self.options.initial_threshold)
        target = self.problem.targets(0)[0].expand_as(sigmas)
        return self.problem.density_model.threshold(target).clamp(0.0, MAX_THRESHOLD)

    def learning_rate(self, lr: Tensor) -> Tensor:
        """The thresholds' learning rates in the published update, [L], from the optimizer's."""
        if self.options.threshold_lr is not None:
            return torch.full_like(lr, self.options.threshold_lr)
        return PUBLISHED_LR_RATIO * lr

    def metrics(self, thresholds: Tensor, lr: Tensor, step: int) -> dict[str, float]:
        """λ times the sum of the budgets' losses, and the thresholds' learning rate where it is not derived."""
        densities = self.problem.density_model.density(thresholds)
        losses = [
            float(sparsity_loss(budget, densities, target).value)
            for budget, target in zip(self.problem.budgets, self.problem.targets(step))
        ]
        rate = {} if self.derived else {THRESHOLD_LR: float(self.learning_rate(lr).max())}
        return {SPARSITY_LOSS: self.options.weight * sum(losses), **rate}

    def _task_gradient(self, thresholds: Tensor, stats: StepStats) -> Tensor:
        """∂L_task/∂r = −(σ/b)·Σ_{|w| <= b} g·w; zero where r is clamped or the sum is not finite."""
        scale = stats.old_sigmas / weight_threshold(thresholds, stats.old_sigmas)
        free = (thresholds >= 0.0) & (thresholds <= MAX_THRESHOLD)
        gradient = torch.where(free, -scale * stats.pruned_products, torch.zeros_like(thresholds))
        return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)

    def move(self, thresholds: Tensor, stats: StepStats) -> Tensor:
        model = self.problem.density_model
        densities, slopes = model.density(thresholds), model.gradient(thresholds)
        task = self._task_gradient(thresholds, stats)
        targets = self.problem.targets_at(stats.position.share)
        if self.derived:
            return self._derived_move(thresholds, task, densities, slopes, targets, stats.position.arrived)
        gradient = task
        for number, (budget, target) in enumerate(zip(self.problem.budgets, targets)):
            loss = sparsity_loss(budget, densities, target)
            if self.options.multiplier:
                self.integrals[number] = self.integrals[number] + self.integral_gain * loss.gap
                loss = sparsity_loss(budget, densities, target - self.integrals[number])
            gradient = gradient + self.options.weight * loss.gradient * slopes
        self.velocity = self.options.momentum * self.velocity + gradient
        return thresholds - self.learning_rate(stats.lr) * self.velocity

    def _derived_move(
        self, thresholds: Tensor, task: Tensor, densities: Tensor, slopes: Tensor, targets: list[Tensor], arrived: Tensor
    ) -> Tensor:
        slopes = slopes.clamp(max=-LEAST_SLOPE)
        first = self.problem.budgets[0]
        shares = (first.dense / first.dense.sum()).clamp_min(1e-12)
        rate = self.closing / (2.0 * max(self.options.weight, 1e-12) * (shares * slopes.square()).sum())
        momentum = self.options.momentum
        self.velocity = momentum * self.velocity + (1.0 - momentum) * task
        moved = thresholds - (rate * self.velocity / shares).clamp(-self.max_task_move, self.max_task_move)
        for number, (budget, target) in enumerate(zip(self.problem.budgets, targets)):
            gap = budget.density(densities) - target
            if self.options.multiplier:
                # The density always lags a moving target; the sum of that gap would carry it past the target.
                integral = self.integrals[number]
                summed = (integral + self.integral_gain * gap).clamp(-MAX_INTEGRAL, MAX_INTEGRAL)
                self.integrals[number] = torch.where(arrived, summed, integral)
                gap = gap + self.integrals[number]
            if budget.bound == "at_most":
                gap = gap.clamp_min(0.0)
            if budget.scope == "layer":
                step = gap / slopes
            else:
                own = budget.dense / budget.dense.sum()
                # Equal moves where costs are per weight; along the cost's own gradient where another budget adds to it.
                step = gap * slopes * (own / shares) / (own.square() / shares * slopes.square()).sum()
            moved = moved - (self.closing * step).clamp(-MAX_BUDGET_MOVE, MAX_BUDGET_MOVE)
        return moved.clamp(0.0, MAX_THRESHOLD)

"""What moves the thresholds: the interface, and the adaptive sparsity loss of arXiv 2006.02768."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asp_dist.pruning.budget import Limit
from asp_dist.pruning.density import MAX_THRESHOLD, DensityModel, weight_threshold
from asp_dist.pruning.losses import sparsity_loss
from asp_dist.pruning.schedule import Ramp


@dataclass(frozen=True)
class Observation:
    """What one optimizer step tells about the L layers, the same on every rank; float64 [L], on the CPU.

    Attributes:
        pruned_products: Σ over pruned weights of gradient·weight, at the thresholds and σ of the forward pass.
        old_sigmas: σ of the dense weights that the forward pass was pruned from.
        sigmas: σ of the dense weights now, after the optimizer's step.
        lr: the optimizer's learning rate.
        step: number of optimizer steps done, this one not counted.
        base_lr: the rate that the optimizer's schedule starts from or rises to; 0: there is none.
    """

    pruned_products: Tensor
    old_sigmas: Tensor
    sigmas: Tensor
    lr: float
    step: int
    base_lr: float = 0.0


def targets_at(limits: Sequence[Limit], share: float) -> list[Tensor]:
    """Target density of each limit when `share` of the final sparsity is asked for."""
    return [1.0 - share * (1.0 - limit.target_density) for limit in limits]


class Control(ABC):
    """Moves the thresholds r (float64 [L], units of σ), once per optimizer step.

    Args:
        limits: the budgets; the first is the one that reports and schedules follow.
        model: how densities follow from thresholds.
        ramp: how the target moves over the run.
    """

    def __init__(self, limits: Sequence[Limit], model: DensityModel, ramp: Ramp) -> None:
        self.limits = list(limits)
        self.model = model
        self.ramp = ramp

    def targets(self, step: int) -> list[Tensor]:
        """Target density of each limit at optimizer step `step`."""
        return targets_at(self.limits, self.ramp.share(step))

    @abstractmethod
    def start(self, sigmas: Tensor) -> Tensor:
        """The thresholds at the start."""

    @abstractmethod
    def move(self, thresholds: Tensor, seen: Observation) -> Tensor:
        """The thresholds after one optimizer step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that `move` depends on and that changes."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""


class LossControl(Control):
    """Gradient descent with momentum on task loss + λ·sparsity loss, as published; options make it arrive in time.

    With `threshold_lr` given, or a constant target, the update is the published one: v ← m·v + ∇, r ← r − lr·v.

    Else the rate is derived at every step, so that the sparsity loss closes the share `closing` of the gap to the ramped
    target per step, whatever λ and the length of the run: thresholds move by −η·(∇task_l/s_l + λ·∇sparsity_l/s_l), with
    s_l the layer's share of the cost (both gradients grow with it) and η = closing / (2λ·Σ s_l·d'_l²). The task's part of a
    move is bounded by `max_move`.

    Args:
        limits: the budgets.
        model: Gaussian, or corrected by measured counts.
        ramp: how the target moves.
        weight: λ.
        initial_threshold: r at the start; None: where the model predicts the target of step 0.
        lr: learning rate of the thresholds; None: 0.01 × the optimizer's current one if the target is constant, else derived.
        momentum: momentum m of the published update.
        multiplier: add an integral of the gap to it (the multiplier of an augmented Lagrangian), which removes the standing
            error that a balance of the two gradients leaves.
    """

    closing = 0.2
    max_move = 0.02
    integral_gain = 0.02

    def __init__(
        self,
        limits: Sequence[Limit],
        model: DensityModel,
        ramp: Ramp,
        *,
        weight: float = 10.0,
        initial_threshold: float | None = None,
        lr: float | None = None,
        momentum: float = 0.9,
        multiplier: bool = False,
    ) -> None:
        super().__init__(limits, model, ramp)
        self.weight = weight
        self.initial_threshold = initial_threshold
        self.lr = lr
        self.momentum = momentum
        self.multiplier = multiplier
        self.velocity = torch.zeros_like(model.numel)
        self.integrals = [torch.zeros_like(limit.target_density) for limit in self.limits]

    @property
    def derived(self) -> bool:
        """Whether the thresholds' learning rate is derived from the run."""
        return self.lr is None and self.ramp.shape != "constant"

    def start(self, sigmas: Tensor) -> Tensor:
        if self.initial_threshold is not None:
            return torch.full_like(sigmas, self.initial_threshold)
        return self.model.threshold(self.targets(0)[0].expand_as(sigmas)).clamp(0.0, MAX_THRESHOLD)

    def learning_rate(self, optimizer_lr: float) -> float:
        """The thresholds' learning rate in the published update."""
        return self.lr if self.lr is not None else 0.01 * optimizer_lr

    def _task_gradient(self, thresholds: Tensor, seen: Observation) -> Tensor:
        """∂L_task/∂r = −(σ/b)·Σ_{|w| <= b} g·w; zero where r is clamped."""
        scale = seen.old_sigmas / weight_threshold(thresholds, seen.old_sigmas)
        free = (thresholds >= 0.0) & (thresholds <= MAX_THRESHOLD)
        return torch.where(free, -scale * seen.pruned_products, torch.zeros_like(thresholds))

    def move(self, thresholds: Tensor, seen: Observation) -> Tensor:
        densities, slopes = self.model.density(thresholds), self.model.gradient(thresholds)
        task = torch.nan_to_num(self._task_gradient(thresholds, seen), nan=0.0, posinf=0.0, neginf=0.0)
        targets = self.targets(seen.step)
        if self.derived:
            arrived = seen.step >= self.ramp.arrival_step()
            return self._derived_move(thresholds, task, densities, slopes, targets, arrived)
        gradient = task
        for limit, target, integral in zip(self.limits, targets, self.integrals):
            loss = sparsity_loss(limit, densities, target)
            if self.multiplier:
                integral += self.integral_gain * loss.gap
                loss = sparsity_loss(limit, densities, target - integral)
            gradient = gradient + self.weight * loss.gradient * slopes
        self.velocity = self.momentum * self.velocity + gradient
        return thresholds - self.learning_rate(seen.lr) * self.velocity

    def _derived_move(
        self, thresholds: Tensor, task: Tensor, densities: Tensor, slopes: Tensor, targets: list[Tensor], arrived: bool
    ) -> Tensor:
        # Far out in the tail a slope is next to nothing: bounded below, so that a layer can come back from there.
        slopes = slopes.clamp(max=-1e-4)
        first = self.limits[0]
        shares = (first.dense / first.dense.sum()).clamp_min(1e-12)
        rate = self.closing / (2.0 * max(self.weight, 1e-12) * (shares * slopes.square()).sum())
        self.velocity = self.momentum * self.velocity + (1.0 - self.momentum) * task
        moved = thresholds - (rate * self.velocity / shares).clamp(-self.max_move, self.max_move)
        for limit, target, integral in zip(self.limits, targets, self.integrals):
            gap = limit.density(densities) - target
            if self.multiplier:
                # Behind a moving target there is always a gap; summed up, it would carry the density past the target.
                if arrived:
                    integral += self.integral_gain * gap
                    integral.clamp_(-0.1, 0.1)
                gap = gap + integral
            if limit.bound == "at_most":
                gap = gap.clamp_min(0.0)
            if limit.scope == "layer":
                step = gap / slopes
            else:
                own = limit.dense / limit.dense.sum()
                # Equal moves where costs are per weight; along the cost's own gradient where another budget adds to it.
                step = gap * slopes * (own / shares) / (own.square() / shares * slopes.square()).sum()
            moved = moved - (self.closing * step).clamp(-0.25, 0.25)
        return moved.clamp(0.0, MAX_THRESHOLD)

    def state_dict(self) -> dict[str, Any]:
        return {
            "velocity": self.velocity,
            "integrals": [integral.clone() for integral in self.integrals],
            "density": self.model.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.velocity = state["velocity"].clone()
        self.integrals = [integral.clone() for integral in state["integrals"]]
        self.model.load_state_dict(state["density"])

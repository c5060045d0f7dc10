"""What every controller gets and does: the problem, what one step tells about the layers, and the base class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from asp_dist.pruning.budget import ResolvedBudget
from asp_dist.pruning.density import DensityModel
from asp_dist.pruning.options import Ramp


@dataclass(frozen=True)
class Problem:
    """What is to be pruned, and to what; L layers.

    Attributes:
        budgets: the budgets; the ramp and the metrics follow the first.
        ramp: the target over the run.
        density_model: predicts the layers' densities from their thresholds.
        shapes: shapes of the layers' weights.
        floors: float64 [L], the smallest density of each layer.
    """

    budgets: tuple[ResolvedBudget, ...]
    ramp: Ramp
    density_model: DensityModel
    shapes: tuple[Sequence[int], ...]
    floors: Tensor

    def targets(self, step: int) -> list[Tensor]:
        """Target density of each budget at optimizer step `step`: one number for a network, [L] for layers."""
        share = self.ramp.share(step)
        return [1.0 - share * (1.0 - budget.target_density) for budget in self.budgets]


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step tells about the L layers, the same on every rank; float64 [L].

    Attributes:
        pruned_products: Σ over pruned weights of gradient·weight, at the thresholds and σ of the forward pass.
        old_sigmas: σ of the dense weights that the forward pass was pruned from.
        sigmas: σ of the dense weights now, after the optimizer's step.
        lr: the optimizer's learning rate of each layer.
        base_lr: the rate that the schedule starts from or rises to, of each layer; 0 without a schedule.
        step: number of optimizer steps before this one.
    """

    pruned_products: Tensor
    old_sigmas: Tensor
    sigmas: Tensor
    lr: Tensor
    base_lr: Tensor
    step: int


class Controller(ABC):
    """Moves the thresholds r (float64 [L], in units of σ), once per optimizer step.

    Args:
        problem: the network's layers and budgets.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    @abstractmethod
    def start(self, sigmas: Tensor) -> Tensor:
        """The thresholds at the start; `sigmas` [L] are the standard deviations of the dense weights."""

    @abstractmethod
    def move(self, thresholds: Tensor, stats: StepStats) -> Tensor:
        """The thresholds after one optimizer step."""

    def metrics(self, thresholds: Tensor, lr: Tensor, step: int) -> dict[str, float]:
        """Further numbers for the log, at `thresholds` [L] before optimizer step `step`; `lr` [L] as in `StepStats`."""
        return {}

    def begin(self) -> None:  # noqa: B027 (a controller that keeps nothing of the schedule needs none)
        """Forget the schedule of the run that a restored state is from; what was learned of the network stays."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that `move` depends on and changes: plain types and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (a controller without state needs none)
        """Restore `state_dict`."""

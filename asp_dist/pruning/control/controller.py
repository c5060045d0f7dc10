"""What every controller gets and does: the problem, what one step tells about the layers, the base class, and one move."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from asp_dist.pruning.budget import ResolvedBudget
from asp_dist.pruning.density import DensityModel, LayerCounts, weight_threshold
from asp_dist.pruning.options import Ramp
from asp_dist.pruning.passes import LayerSums
from asp_dist.pruning.patterns import GroupScale


@dataclass(frozen=True)
class RampPosition:
    """Where an optimizer step stands on the ramp; tensors without dimensions, so that a program of them fits every step.

    Attributes:
        share: float64, share of the final sparsity that is the target before the step.
        next_share: the same after it.
        arrived: boolean, whether the target is the final one.
    """

    share: Tensor
    next_share: Tensor
    arrived: Tensor

    @classmethod
    def at(cls, ramp: Ramp, step: int) -> RampPosition:
        """The position of optimizer step `step`."""
        now, after = (torch.tensor(ramp.share(s), dtype=torch.float64) for s in (step, step + 1))
        return cls(now, after, torch.tensor(step >= ramp.arrival_step()))


@dataclass(frozen=True)
class Problem:
    """What is to be pruned, and to what; L layers.

    Attributes:
        budgets: the budgets; the ramp and the metrics follow the first.
        ramp: the target over the run.
        density_model: predicts the layers' densities from their thresholds.
        shapes: shapes of the layers' weights.
        floors: float64 [L], the smallest density of each layer.
        unread: the tensors are on a device that nothing is read from while it trains: no decision of Python may depend on
            their values.
        groups: what thresholds mean for weights that share a mask; None: no weights do.
    """

    budgets: tuple[ResolvedBudget, ...]
    ramp: Ramp
    density_model: DensityModel
    shapes: tuple[Sequence[int], ...]
    floors: Tensor
    unread: bool = False
    groups: GroupScale | None = None

    def targets(self, step: int) -> list[Tensor]:
        """Target density of each budget at optimizer step `step`: one number for a network, [L] for layers."""
        return self.targets_at(self.ramp.share(step))

    def targets_at(self, share: Tensor | float) -> list[Tensor]:
        """Target density of each budget at a share of the final sparsity; see `Ramp.share`."""
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
        position: where this step stands on the ramp.
    """

    pruned_products: Tensor
    old_sigmas: Tensor
    sigmas: Tensor
    lr: Tensor
    base_lr: Tensor
    step: int
    position: RampPosition


class Controller(ABC):
    """Moves the thresholds r (float64 [L], in units of σ), once per optimizer step.

    Args:
        problem: the network's layers and budgets.

    Attributes:
        state: the attributes that `move` depends on and changes: tensors, or lists of tensors, that it replaces and does
            not write into.
        fusible: whether `move` takes all it needs from tensors, and decides nothing by their values or by the number of the
            step: on a GPU it then becomes one kernel. A subclass says so itself; it is not inherited.
    """

    state: ClassVar[tuple[str, ...]] = ()
    fusible: ClassVar[bool] = False

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
        """Copies of everything in `state`, on the CPU."""
        return {name: _copied(getattr(self, name)) for name in self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        for name in self.state:
            setattr(self, name, _copied(state[name], self.problem.floors.device))


def _copied(value: Tensor | list[Tensor], device: torch.device | str = "cpu") -> Any:
    if isinstance(value, list):
        return [_copied(one, device) for one in value]
    return value.detach().to(device, copy=True)


@dataclass(frozen=True)
class Moved:
    """The layers after a step; float64 [L].

    Attributes:
        thresholds: r, in units of σ.
        sigmas: σ of the dense weights.
        means: their means.
    """

    thresholds: Tensor
    sigmas: Tensor
    means: Tensor


@dataclass(frozen=True)
class StepInputs:
    """What a step tells besides its sums.

    Attributes:
        lr: see `StepStats`, as for the next one.
        base_lr: see `StepStats`.
        step: number of optimizer steps before this one.
        position: where it stands on the ramp.
    """

    lr: Tensor
    base_lr: Tensor
    step: int
    position: RampPosition


def observe(controller: Controller, sums: LayerSums, thresholds: Tensor, sigmas: Tensor, fresh: Tensor) -> None:
    """Update the density model with the counts that were made at `thresholds` and `sigmas` [L]."""
    model = controller.problem.density_model
    if not model.corrected or sums.nearby is None or sums.largest is None:
        return
    bounded = sigmas.clamp_min(1e-30)
    largest = torch.nan_to_num(sums.largest / bounded, nan=torch.inf)
    if controller.problem.groups is not None:
        largest = controller.problem.groups.of_weights(largest)
    scaled = weight_threshold(thresholds, sigmas) / bounded
    model.observe(scaled, LayerCounts(sums.kept, sums.nearby, largest), fresh)


def move(controller: Controller, sums: LayerSums, old_sigmas: Tensor, inputs: StepInputs, fresh: Tensor) -> Moved:
    """Observe the counts, and move the thresholds; the density model and the controller change too."""
    # A gradient that is not a number ruins the weights; the thresholds and the other layers must survive it.
    means = torch.nan_to_num(sums.means, nan=0.0, posinf=0.0, neginf=0.0)
    sigmas = torch.where(torch.isfinite(sums.sigmas), sums.sigmas, old_sigmas)
    observe(controller, sums, sums.thresholds, old_sigmas, fresh)
    stats = StepStats(sums.products, old_sigmas, sigmas, inputs.lr, inputs.base_lr, inputs.step, inputs.position)
    return Moved(controller.move(sums.thresholds, stats), sigmas, means)

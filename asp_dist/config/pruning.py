"""The budget, and how the network is pruned to it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from asp_dist.config.checks import check, check_fraction, check_positive

Cost = Literal["parameters", "macs", "bytes"]


@dataclass(frozen=True)
class BudgetTerm:
    """One budget: a cost and a limit on it. Exactly one of `sparsity`, `density` and `count` is given.

    Args:
        cost: ``parameters`` (weights), ``macs`` (multiply-adds) or ``bytes`` (of the exported sparse file).
        sparsity: share of the cost to save, in [0, 1).
        density: share of the cost to keep, in (0, 1].
        count: absolute limit, in weights, multiply-adds or bytes.
        bound: ``equal`` or ``at_most``.
        scope: over the whole ``network`` or for each ``layer``.
    """

    cost: Cost = "parameters"
    sparsity: float | None = None
    density: float | None = None
    count: int | None = None
    bound: Literal["equal", "at_most"] = "equal"
    scope: Literal["network", "layer"] = "network"

    def __post_init__(self) -> None:
        check_fraction("budget.sparsity", self.sparsity, upper_open=True)
        check(
            self.density is None or 0 < self.density <= 1,
            f"budget.density = {self.density} is outside (0, 1]: give a fraction, such as 0.1 for 10 %",
        )
        check_positive("budget.count", self.count)
        given = [n for n in ("sparsity", "density", "count") if getattr(self, n) is not None]
        check(len(given) <= 1, f"budget: {' and '.join(given)} are given together: keep one of them")


@dataclass(frozen=True)
class BudgetConfig(BudgetTerm):
    """The budget that the network is pruned to; with none of sparsity, density and count: 90 % sparsity.

    Args:
        also: further budgets that hold at the same time.
    """

    also: tuple[BudgetTerm, ...] = ()

    def terms(self) -> tuple[BudgetTerm, ...]:
        """The budgets, this one first, each with its limit set."""
        names = [f.name for f in dataclasses.fields(BudgetTerm)]
        first = BudgetTerm(**{n: getattr(self, n) for n in names})
        if self.sparsity is None and self.density is None and self.count is None:
            first = dataclasses.replace(first, sparsity=0.9)
        return (first, *self.also)


@dataclass(frozen=True)
class PruningConfig:
    """How the network is pruned to the budget; see `asp_dist.pruning.Pruner` for the method.

    Args:
        enabled: False trains the dense network.
        control: ``loss`` (the adaptive sparsity loss, arXiv 2006.02768) or ``track`` (the budget held at every step).
        sparsity_weight: the weight λ of the sparsity loss (``loss``).
        initial_threshold: every layer's threshold r at the start, in units of σ; None: from the schedule.
        threshold_lr: learning rate of the thresholds; None: derived (see `Pruner`).
        density: ``gaussian``, the paper's estimate of a layer's density, or ``measured`` (``loss``).
        multiplier: let a multiplier remove the standing error of the budget (``loss``).
        operator: ``hard`` (published), ``soft`` or ``power`` (Feather, arXiv 2310.02448).
        gradient_scale: factor θ on the gradients that pruned weights receive.
        ramp: shape of the target over time: ``constant``, ``linear`` or ``cubic``.
        ramp_start: share of the training at which the ramp starts.
        ramp_end: share of the training at which the target is reached.
        freeze_at: share of the training at which the exact budget is projected onto and the mask frozen.
        allocation: where the allocation between layers starts (``track``): ``uniform``, ``magnitude`` or ``erk``.
        allocation_rate: how fast the task's gradient moves the allocation (``track``); 0 keeps the starting one.
        min_density: floor on each layer's density.
        min_weights: layers with fewer weights stay dense.
        include: globs on layer names; empty: all.
        exclude: globs on layer names that stay dense.
        prune_first: False keeps the first layer dense (most often the stem).
        prune_last: False keeps the last layer dense (most often the classifier).
        agreement_every: steps between checks that all ranks hold the same thresholds and masks; 0: never.
    """

    enabled: bool = True
    control: Literal["loss", "track"] = "loss"
    sparsity_weight: float = 10.0
    initial_threshold: float | None = None
    threshold_lr: float | None = None
    density: Literal["gaussian", "measured"] = "gaussian"
    multiplier: bool = False
    operator: Literal["hard", "soft", "power"] = "hard"
    gradient_scale: float = 1.0
    ramp: Literal["constant", "linear", "cubic"] = "constant"
    ramp_start: float = 0.0
    ramp_end: float = 0.5
    freeze_at: float = 0.75
    allocation: Literal["uniform", "magnitude", "erk"] = "magnitude"
    allocation_rate: float = 0.003
    min_density: float = 0.001
    min_weights: int = 1000
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    prune_first: bool = True
    prune_last: bool = True
    agreement_every: int = 100

    def __post_init__(self) -> None:
        for name in ("ramp_start", "ramp_end", "freeze_at", "min_density", "gradient_scale"):
            check_fraction(f"pruning.{name}", getattr(self, name))
        check(
            self.ramp_start <= self.ramp_end <= self.freeze_at,
            f"pruning: ramp_start = {self.ramp_start} <= ramp_end = {self.ramp_end} <= freeze_at = {self.freeze_at} "
            "does not hold",
        )
        check(self.sparsity_weight >= 0, f"pruning.sparsity_weight = {self.sparsity_weight} must not be negative")
        check_positive("pruning.threshold_lr", self.threshold_lr)
        check(self.min_weights >= 0, f"pruning.min_weights = {self.min_weights} must not be negative")

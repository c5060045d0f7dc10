"""The options of a `Pruner`, as frozen objects. Nothing here imports torch: a configuration is read without it."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self

TYPE_CHECKING = False  # jsonargparse executes the block below typing's own constant, and would import torch
if TYPE_CHECKING:
    from torch import Tensor

    from asp_dist.pruning.control.controller import Controller, Problem

Cost = Literal["parameters", "macs", "bytes"]
Bound = Literal["equal", "at_most"]
Scope = Literal["network", "layer"]
DensityEstimate = Literal["gaussian", "measured"]
Allocation = Literal["uniform", "magnitude", "erk"]
RampShape = Literal["constant", "linear", "cubic"]


def _check_choice(field: str, value: Any, choices: Any) -> None:
    known = choices.__args__
    if value not in known:
        raise ValueError(f"{field} = {value!r} is not one of {', '.join(map(repr, known))}")


def _check_fraction(field: str, value: float | None) -> None:
    if value is not None and not 0.0 <= value <= 1.0:
        raise ValueError(f"{field} = {value} is outside [0, 1]: give a fraction, such as 0.9 for 90 %")


def _as_globs(field: str, globs: Any) -> tuple[str, ...]:
    if isinstance(globs, str):
        raise ValueError(f"{field} = {globs!r} must be a sequence of globs, not one string")
    return tuple(globs)


@dataclass(frozen=True)
class Budget:
    """What may remain of a network. Usually made by `Budget.parameters`, `Budget.macs` or `Budget.bytes`.

    Exactly one of `sparsity`, `density` and `count` is given.

    Args:
        cost: ``parameters`` (weights), ``macs`` (multiply-adds of one sample) or ``bytes`` (of the exported sparse file: a
            bitmap and the kept values).
        sparsity: share of the prunable layers' dense cost to save, in [0, 1).
        density: share of that cost to keep, in (0, 1].
        count: absolute limit on the whole network, including what is not pruned.
        bound: ``equal`` or ``at_most``.
        scope: over the whole ``network``, or for each ``layer`` on its own.

    Raises:
        ValueError: none or several of the three are given, or a value is out of range.
    """

    cost: Cost = "parameters"
    sparsity: float | None = None
    density: float | None = None
    count: int | None = None
    bound: Bound = "equal"
    scope: Scope = "network"

    def __post_init__(self) -> None:
        given = [name for name in ("sparsity", "density", "count") if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given together" if given else "none is given"
            raise ValueError(f"give exactly one of sparsity, density and count: {found}")
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity = {self.sparsity} is outside [0, 1): give a fraction, such as 0.9 for 90 %")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"density = {self.density} is outside (0, 1]: give a fraction, such as 0.1 for 10 %")
        if self.count is not None and self.count <= 0:
            raise ValueError(f"count = {self.count} must be greater than 0")
        if self.count is not None and self.scope == "layer":
            raise ValueError(f"count = {self.count} limits the whole network, but scope is 'layer'")
        _check_choice("cost", self.cost, Cost)
        _check_choice("bound", self.bound, Bound)
        _check_choice("scope", self.scope, Scope)

    @classmethod
    def parameters(cls, **limit: Any) -> Self:
        """A budget of weights; see the class for the arguments."""
        return cls("parameters", **limit)

    @classmethod
    def macs(cls, **limit: Any) -> Self:
        """A budget of multiply-adds; see the class for the arguments."""
        return cls("macs", **limit)

    @classmethod
    def bytes(cls, **limit: Any) -> Self:
        """A budget of bytes in the exported sparse file; see the class for the arguments."""
        return cls("bytes", **limit)


@dataclass(frozen=True)
class Ramp:
    """The target over the run: from `initial`, usually dense, at `start` to the budget at `end`.

    Positions are shares of `total_steps`.

    Args:
        shape: ``constant`` (the budget from the first step on), ``linear``, or ``cubic``: 1 − (1 − x)³ of the final sparsity,
            as in gradual magnitude pruning (arXiv 1710.01878), with x the position between `start` and `end`.
        start: share of the run at which the ramp starts.
        end: share of the run at which the budget is reached.
        freeze_at: share of the run at which the weights are projected onto the exact budget and the mask is frozen;
            None: never.
        total_steps: length of the run in optimizer steps; required unless the target is constant and never frozen.
        initial: share of the final sparsity that a ramp begins with, in [0, 1): for a network that is pruned already.

    Raises:
        ValueError: 0 <= start <= end <= freeze_at <= 1 is violated.
    """

    shape: RampShape = "constant"
    start: float = 0.0
    end: float = 0.5
    freeze_at: float | None = None
    total_steps: int | None = None
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("shape", self.shape, RampShape)
        if not 0.0 <= self.initial < 1.0:
            raise ValueError(f"initial = {self.initial} is outside [0, 1): it is a share of the final sparsity")
        for field in ("start", "end", "freeze_at"):
            _check_fraction(field, getattr(self, field))
        if self.start > self.end:
            raise ValueError(f"start = {self.start} must not exceed end = {self.end}")
        if self.freeze_at is not None and self.shape != "constant" and self.end > self.freeze_at:
            raise ValueError(f"end = {self.end} must not exceed freeze_at = {self.freeze_at}")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps = {self.total_steps} must be at least 1")

    @property
    def needs_total_steps(self) -> bool:
        """Whether anything depends on the length of the run."""
        return self.shape != "constant" or self.freeze_at is not None

    def share(self, step: int) -> float:
        """Share of the final sparsity that is the target at optimizer step `step`, in [0, 1]."""
        if self.shape == "constant" or self.total_steps is None:
            return 1.0
        first, last = self.start * self.total_steps, self.end * self.total_steps
        x = 1.0 if step >= last else max(0.0, (step - first) / max(last - first, 1.0))
        rise = x if self.shape == "linear" else 1.0 - (1.0 - x) ** 3
        return self.initial + (1.0 - self.initial) * rise

    def arrival_step(self) -> int:
        """The optimizer step from which the target is the final one."""
        if self.shape == "constant" or self.total_steps is None:
            return 0
        return round(self.end * self.total_steps)

    def freeze_step(self) -> int | None:
        """The optimizer step after which the mask is frozen; None: it is not."""
        if self.freeze_at is None or self.total_steps is None:
            return None
        return round(self.freeze_at * self.total_steps)


@dataclass(frozen=True)
class Select:
    """Which layers are pruned.

    Args:
        min_weights: layers with fewer weights stay dense.
        include: globs on layer names; empty: all layers.
        exclude: globs on layer names that stay dense.
        first: False: the first layer in the order of the modules, most often the stem, stays dense.
        last: False: the last layer, most often the classifier, stays dense.
    """

    min_weights: int = 1000
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    first: bool = True
    last: bool = True

    def __post_init__(self) -> None:
        if self.min_weights < 0:
            raise ValueError(f"min_weights = {self.min_weights} must not be negative")
        for field in ("include", "exclude"):
            object.__setattr__(self, field, _as_globs(field, getattr(self, field)))


@dataclass(frozen=True)
class Pattern:
    """Which weights share a mask. One at a time by default, as published; blocks are what sparse kernels on CPUs gain from.

    Args:
        block: output channels, neighbors, that are kept or pruned together at each place of the other dimensions; a group is
            pruned where the root mean square of its weights is at most b. A layer whose output channels are no multiple of
            it is pruned weight by weight, and a warning names it.
        include: globs on the names of the layers that are meant; empty: all.
        exclude: globs on the names of layers that are pruned weight by weight.
    """

    block: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block = {self.block} must be at least 1")
        for field in ("include", "exclude"):
            object.__setattr__(self, field, _as_globs(field, getattr(self, field)))

    def means(self, name: str) -> bool:
        """Whether the layer of that name is one of those that are meant."""
        if any(fnmatchcase(name, glob) for glob in self.exclude):
            return False
        return not self.include or any(fnmatchcase(name, glob) for glob in self.include)


# Near the smallest number that float32 has with all its digits.
SMALLEST = 1e-37


@dataclass(frozen=True)
class Operator(metaclass=ABCMeta):
    """How a threshold turns dense weights into pruned ones: zero where |w| <= b, `prune` elsewhere.

    Attributes:
        keeps_values: whether kept weights keep their dense values.
    """

    keeps_values: ClassVar[bool] = False

    @abstractmethod
    def prune(self, dense: Tensor, threshold: float, out: Tensor) -> None:
        """Write the pruned weights of `dense` into `out`, both flat, with b = `threshold` in weight units.

        Weights in half precision come as float32, so that nothing is rounded before the result.
        """


@dataclass(frozen=True)
class Hard(Operator):
    """Kept weights stay as they are (arXiv 2006.02768)."""

    keeps_values: ClassVar[bool] = True

    def prune(self, dense: Tensor, threshold: float, out: Tensor) -> None:
        import torch

        torch.ops.aten.hardshrink.out(dense, threshold, out=out)


@dataclass(frozen=True)
class Soft(Operator):
    """Kept weights shrink by the threshold: sign(w)·(|w| − b)."""

    def prune(self, dense: Tensor, threshold: float, out: Tensor) -> None:
        import torch

        torch.ops.aten.softshrink.out(dense, threshold, out=out)


@dataclass(frozen=True)
class Power(Operator):
    """Small kept weights shrink, large ones hardly: sign(w)·(|w|^p − b^p)^(1/p) (Feather, arXiv 2310.02448).

    Args:
        p: the power, at least 1; 1 is `Soft`, infinity is `Hard`.
    """

    p: float = 3.0

    def __post_init__(self) -> None:
        if self.p < 1:
            raise ValueError(f"p = {self.p} must be at least 1")

    def prune(self, dense: Tensor, threshold: float, out: Tensor) -> None:
        # As w·(1 − |b/w|^p)^(1/p), whose powers neither overflow nor underflow. Kept weights have a logarithm; the others
        # become 0 at the end, and must not be 0 before, for the logarithm of 0 is slow.
        out.fill_(threshold).div_(dense).abs_().clamp_(max=1.0).pow_(self.p).neg_().add_(1.0)
        out.clamp_(min=SMALLEST).log2_().mul_(1.0 / self.p).exp2_().mul_(dense.hardshrink(threshold))


@dataclass(frozen=True)
class Control(metaclass=ABCMeta):
    """What moves the thresholds; its options. A control of your own is a subclass that builds a `Controller` of your own.

    Attributes:
        centers: whether each layer's mean is subtracted from its dense weights by default.
    """

    centers: ClassVar[bool] = False

    @property
    def density(self) -> DensityEstimate:
        """How layers' densities are estimated from thresholds: ``gaussian``, or ``measured`` to have layers counted."""
        return "measured"

    @abstractmethod
    def controller(self, problem: Problem) -> Controller:
        """The controller that moves the thresholds of one network."""


@dataclass(frozen=True)
class SparsityLoss(Control):
    """Thresholds are trained: gradient descent on the task's loss plus λ times a loss on sparsity (arXiv 2006.02768).

    As published by default. With a ramp, measured densities and the multiplier, it reaches the budget in time.

    Args:
        weight: λ, the weight of the sparsity loss.
        threshold_lr: learning rate of the thresholds; None: 0.01 × the layer's current learning rate if the target is
            constant, derived from the ramp otherwise.
        initial_threshold: threshold r of every layer at the start, in units of σ; None: where the density estimate predicts
            the first target.
        momentum: momentum of the thresholds.
        density: ``gaussian``, the published estimate of a layer's density, or ``measured``, corrected by counts.
        multiplier: add an integral of the gap to the gap, as the multiplier of an augmented Lagrangian does; it removes the
            standing error that a balance of two gradients leaves.
    """

    centers: ClassVar[bool] = True

    weight: float = 10.0
    threshold_lr: float | None = None
    initial_threshold: float | None = None
    momentum: float = 0.9
    density: DensityEstimate = "gaussian"
    multiplier: bool = False

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight = {self.weight} must not be negative")
        if self.threshold_lr is not None and self.threshold_lr < 0:
            raise ValueError(f"threshold_lr = {self.threshold_lr} must not be negative")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum = {self.momentum} is outside [0, 1)")
        _check_choice("density", self.density, DensityEstimate)

    def controller(self, problem: Problem) -> Controller:
        from asp_dist.pruning.control.sparsity_loss import SparsityLossController

        return SparsityLossController(self, problem)


@dataclass(frozen=True)
class Track(Control):
    """The scheduled budget is held at every step; the share of each layer in it is learned from the task's gradient.

    Args:
        allocation: where the allocation starts: ``uniform`` sparsity, one global ``magnitude``, or ``erk`` (Erdős–Rényi
            kernel, arXiv 1911.11134).
        rate: how fast the allocation learns: change of log b per step of a layer one standard deviation above the mean, at
            the peak of the learning rate's schedule. 0 keeps the starting allocation.
    """

    allocation: Allocation = "magnitude"
    rate: float = 0.003

    def __post_init__(self) -> None:
        _check_choice("allocation", self.allocation, Allocation)
        if self.rate < 0:
            raise ValueError(f"rate = {self.rate} must not be negative")

    def controller(self, problem: Problem) -> Controller:
        from asp_dist.pruning.control.track import TrackController

        return TrackController(self, problem)

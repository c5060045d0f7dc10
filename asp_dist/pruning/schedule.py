"""How the target sparsity moves over the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Ramp:
    """The target's course over a run, as a share of the final sparsity.

    Attributes:
        shape: ``constant`` (the final target from the first step), ``linear``, or ``cubic``: 1 − (1 − x)³, the schedule of
            gradual magnitude pruning (arXiv 1710.01878), with x the position between `start` and `end`.
        start: share of the run at which the ramp starts.
        end: share of the run at which the final target is reached.
        freeze_at: share of the run at which the exact budget is projected onto and the mask frozen; None: never.
        total_steps: length of the run in optimizer steps; needed unless the target is constant and never frozen.
    """

    shape: Literal["constant", "linear", "cubic"] = "constant"
    start: float = 0.0
    end: float = 0.5
    freeze_at: float | None = None
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.shape not in ("constant", "linear", "cubic"):
            raise ValueError(f"ramp shape {self.shape!r} is none of 'constant', 'linear', 'cubic'")
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"ramp: 0 <= start = {self.start} <= end = {self.end} <= 1 does not hold")
        if self.freeze_at is not None and not self.end * (self.shape != "constant") <= self.freeze_at <= 1.0:
            raise ValueError(f"ramp: end = {self.end} <= freeze_at = {self.freeze_at} <= 1 does not hold")
        if self.total_steps is None and (self.shape != "constant" or self.freeze_at is not None):
            raise ValueError(f"a {self.shape} ramp with freeze_at = {self.freeze_at} needs total_steps")

    def share(self, step: int) -> float:
        """Share of the final sparsity that is the target at optimizer step `step`, in [0, 1]."""
        if self.shape == "constant" or self.total_steps is None:
            return 1.0
        first, last = self.start * self.total_steps, self.end * self.total_steps
        x = 1.0 if step >= last else max(0.0, (step - first) / max(last - first, 1.0))
        return x if self.shape == "linear" else 1.0 - (1.0 - x) ** 3

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

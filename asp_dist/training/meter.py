"""What a training step adds up between two logged rows: loss, images and seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from asp_dist.tracking.schema import GRAD_NORM, IMAGES_PER_SECOND, TRAIN_LOSS
from asp_dist.training.world import World

CLOCKS = ("data", "forward_backward", "step")


class Meter:
    """Sums since the last row, and over the whole run. Loss sums stay on the device until they are read.

    Args:
        world: the ranks.
        batch_size: images per optimizer step over all ranks.
    """

    def __init__(self, world: World, batch_size: int) -> None:
        self.world = world
        self.batch_size = batch_size
        self.total_images = 0
        self.total_seconds = 0.0
        self._loss = torch.zeros((), dtype=torch.float64, device=world.device)
        self._counted = 0
        self._norm = 0.0
        self._steps = 0
        self._seconds = dict.fromkeys(CLOCKS, 0.0)

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to clock `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def add(self, loss: torch.Tensor, norm: float) -> None:
        """Count a step with its mean loss on this rank and its gradient norm."""
        self._loss += loss.detach()
        self._counted += 1
        self._norm += norm

    def step_done(self, seconds: float) -> None:
        """Count the step's wall time; a skipped step counts too."""
        self._steps += 1
        self._seconds["step"] += seconds
        self.total_images += self.batch_size
        self.total_seconds += seconds

    def row(self) -> dict[str, float]:
        """The means since the last row, over all ranks, and a fresh start; a collective."""
        steps, counted = max(self._steps, 1), max(self._counted, 1)
        loss = float(self.world.sum_(self._loss)) / (counted * self.world.world_size)
        seconds = self._seconds["step"] / steps
        row = {
            **({TRAIN_LOSS: loss, GRAD_NORM: self._norm / counted} if self._counted else {}),
            IMAGES_PER_SECOND: self.batch_size / seconds if seconds else 0.0,
            **{f"time/{name}": self._seconds[name] / steps for name in CLOCKS},
        }
        self._loss = torch.zeros_like(self._loss)
        self._counted, self._norm, self._steps = 0, 0.0, 0
        self._seconds = dict.fromkeys(CLOCKS, 0.0)
        return row

    @property
    def images_per_second(self) -> float:
        """Images per second of training, validation and start-up left out, over the whole run."""
        return self.total_images / self.total_seconds if self.total_seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums, as JSON types."""
        return {
            "loss": float(self._loss),
            "counted": self._counted,
            "norm": self._norm,
            "steps": self._steps,
            "seconds": dict(self._seconds),
            "total_images": self.total_images,
            "total_seconds": self.total_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._loss.fill_(state["loss"])
        self._counted, self._norm, self._steps = state["counted"], state["norm"], state["steps"]
        self._seconds = dict(state["seconds"])
        self.total_images, self.total_seconds = state["total_images"], state["total_seconds"]

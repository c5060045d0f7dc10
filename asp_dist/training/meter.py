"""What a training step adds up between two logged rows: loss, images and seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from asp_dist.pruning.pruner import annotated
from asp_dist.tracking.schema import (
    FASTEST_TIME,
    GPU_MEMORY,
    GPU_UTILIZATION,
    GRAD_NORM,
    IMAGES_PER_SECOND,
    SLOWEST_RANK,
    SLOWEST_TIME,
    TRAIN_LOSS,
)
from asp_dist.training.world import World

CLOCKS = ("data", "forward", "forward_backward", "step")
ON_DEVICE = ("forward", "forward_backward")  # on a GPU, the device takes their time
OWN = ("data", "forward")  # what a rank does without waiting for others


def of_gpu(device: torch.device) -> dict[str, float]:
    """Memory and utilization of a GPU, what its driver tells of them; of the CPU nothing."""
    if device.type != "cuda":
        return {}
    row: dict[str, float] = {GPU_MEMORY: torch.cuda.max_memory_allocated(device)}
    torch.cuda.reset_peak_memory_stats(device)
    with suppress(Exception):  # it needs a package of NVIDIA's, and a driver that answers
        row[GPU_UTILIZATION] = torch.cuda.utilization(device) / 100
    return row


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
        self._sums = torch.zeros(3, dtype=torch.float64, device=world.device)  # losses, norms, and how many
        self._steps = 0
        self._seconds = dict.fromkeys(CLOCKS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to clock `name`; a profiler sees the block under that name, too."""
        with annotated(f"asp_dist: {name}"), self._clock(name):
            yield

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        if name in ON_DEVICE and self.world.device.type == "cuda":
            with self._between_events(name):
                yield
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    @contextmanager
    def _between_events(self, name: str) -> Iterator[None]:
        """Let the device take the time: the host only launches."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._events.append((name, start, end))

    def add(self, loss: torch.Tensor, norm: torch.Tensor, bad: torch.Tensor | None = None) -> None:
        """Count a step with its mean loss on this rank and its gradient norm, unless `bad`, on the device, is true."""
        loss = loss.detach().double()
        numbers = torch.stack([loss, norm.detach().to(loss), torch.ones_like(loss)])
        self._sums += numbers if bad is None else torch.where(bad, torch.zeros_like(numbers), numbers)

    def step_done(self, seconds: float) -> None:
        """Count the step's wall time; a skipped step counts too."""
        self._steps += 1
        self._seconds["step"] += seconds
        self.total_images += self.batch_size
        self.total_seconds += seconds

    def row(self) -> dict[str, float]:
        """The means since the last row, over all ranks, and a fresh start; a collective.

        Of several ranks, the one whose images and forward passes took longest is named: the others wait for it.
        """
        _, norm, counted = self._sums.tolist()
        steps = max(self._steps, 1)
        for name, start, end in self._events:  # over by now: the sums were read behind them
            self._seconds[name] += start.elapsed_time(end) / 1e3
        self._events = []
        shared = torch.zeros(1 + self.world.world_size, dtype=torch.float64, device=self.world.device)
        shared[0] = self._sums[0]
        shared[1 + self.world.rank] = sum(self._seconds[name] for name in OWN) / steps
        losses, *own = self.world.sum_(shared).tolist()
        seconds = self._seconds["step"] / steps
        row = {
            **({TRAIN_LOSS: losses / (counted * self.world.world_size), GRAD_NORM: norm / counted} if counted else {}),
            IMAGES_PER_SECOND: self.batch_size / seconds if seconds else 0.0,
            **{f"time/{name}": self._seconds[name] / steps for name in CLOCKS},
        }
        if self.world.world_size > 1:
            row |= {SLOWEST_RANK: own.index(max(own)), SLOWEST_TIME: max(own), FASTEST_TIME: min(own)}
        self._sums = torch.zeros_like(self._sums)
        self._steps = 0
        self._seconds = dict.fromkeys(CLOCKS, 0.0)
        return row

    @property
    def images_per_second(self) -> float:
        """Images per second of training, validation and start-up left out, over the whole run."""
        return self.total_images / self.total_seconds if self.total_seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums, as JSON types."""
        return {
            "sums": self._sums.tolist(),
            "steps": self._steps,
            "seconds": dict(self._seconds),
            "total_images": self.total_images,
            "total_seconds": self.total_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._sums = torch.tensor(state["sums"], dtype=torch.float64, device=self.world.device)
        self._steps = state["steps"]
        self._seconds = {**dict.fromkeys(CLOCKS, 0.0), **state["seconds"]}
        self.total_images, self.total_seconds = state["total_images"], state["total_seconds"]

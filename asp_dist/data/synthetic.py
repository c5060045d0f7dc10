"""The synthetic source: random tensors that cost nothing, for measuring a trainer alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from asp_dist.data.base import Batch, LoaderOptions, TrainLoader, ValLoader
from asp_dist.data.images import ImageSpec
from asp_dist.data.order import EpochPlan


def noise(batch: int, spec: ImageSpec, classes: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Images float32 [batch, 3, H, W] of unit variance and targets int64 [batch], a function of `seed`."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    images = torch.randn(batch, 3, *spec.size, generator=generator)
    targets = torch.randint(classes, (batch,), generator=generator)
    return images.to(device), targets.to(device)


class SyntheticTrain(TrainLoader):
    """The same micro-batch over and over; see `TrainLoader`.

    Args:
        classes: number of classes.
    """

    backend = "synthetic"

    def __init__(self, plan: EpochPlan, options: LoaderOptions, classes: int) -> None:
        super().__init__(None, plan, options)
        self.classes = classes

    def _batches(self, epoch: int, step: int, pipeline: str | None) -> Iterator[Batch]:
        options = self.options
        batch = noise(self.plan.micro, options.spec_in(epoch), self.classes, options.device, options.seed * 1000 + options.rank)
        for _ in range((self.steps_per_epoch - step) * self.plan.accumulate):
            yield batch


class SyntheticVal(ValLoader):
    """Parts of one random batch; see `ValLoader`.

    Args:
        classes: number of classes.
    """

    def __init__(self, num_samples: int, batch_size: int, options: LoaderOptions, classes: int) -> None:
        super().__init__(None, num_samples, batch_size, options)
        self.classes = classes

    def _batches(self) -> Iterator[Batch]:
        options = self.options
        images, targets = noise(self.batch_size, options.spec, self.classes, options.device, options.seed * 1000 + options.rank)
        for start in range(0, len(self.part), self.batch_size):
            real = min(self.batch_size, len(self.part) - start)
            yield images[:real], targets[:real]

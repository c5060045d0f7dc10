"""Whether an exported file computes what torch computes, on real validation images, in the program that will run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import nn

from asp_dist.config import Config
from asp_dist.data import build_loaders
from asp_dist.errors import UserError
from asp_dist.export.runtimes import Array, Runtime

FIRST = (1, 2, 5)  # sizes of the first batches: a file must take any
BATCH = 32
RANDOM = 8  # images, where there are no real ones


@dataclass(frozen=True)
class Agreement:
    """What a file computes in a runtime, beside torch.

    Args:
        runtime: name and version.
        images: how many.
        difference: largest difference of a logit.
        scale: largest logit of torch's, absolute.
        top1: top-1 accuracy in the runtime; None: the images were random, as the run's data are gone.
        torch_top1: torch's on the same images.
        differing: images with another first class than torch's.
        note: why the images were random.
    """

    runtime: str
    images: int
    difference: float
    scale: float
    top1: float | None
    torch_top1: float | None
    differing: int
    note: str | None = None


def compare_with_torch(
    file: Path, runtime: Runtime, model: nn.Module, config: Config, shape: tuple[int, int, int], images: int, threads: int
) -> Agreement:
    """Run `file` in `runtime`, and `model` in torch, on up to so many validation images of the run.

    Args:
        file: the exported model.
        runtime: the program.
        model: the run's network, on the CPU.
        config: the run's configuration, which says where the images are.
        shape: (C, H, W) of an image.
        images: how many at most.
        threads: the runtime's threads.
    """
    there = runtime.open(file, threads)
    model.eval()
    difference = scale = 0.0
    right = torch_right = differing = seen = 0
    note = None
    try:
        batches = _sized(_validation(config, model, images))
        first = next(batches)
    except (UserError, OSError) as error:
        note = str(error)
        generator = np.random.default_rng(0)
        batches = _sized((generator.standard_normal(shape, dtype=np.float32), -1) for _ in range(RANDOM))
        first = next(batches)
    for array, labels in (first, *batches):
        with torch.no_grad():
            expected = model(torch.from_numpy(array)).float().numpy()
        found = there(array)
        difference = max(difference, float(np.abs(found - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
        mine, theirs = expected.argmax(1), found.argmax(1)
        right, torch_right = right + int((theirs == labels).sum()), torch_right + int((mine == labels).sum())
        differing, seen = differing + int((mine != theirs).sum()), seen + len(array)
    top1, torch_top1 = (None, None) if note else (right / seen, torch_right / seen)
    name = f"{runtime.name} {runtime.version}"
    return Agreement(name, seen, difference, scale, top1, torch_top1, differing, note)


def _validation(config: Config, model: nn.Module, images: int) -> Iterator[tuple[Array, int]]:
    """Up to so many validation images, as the run's own loader gives them on the CPU, with their labels."""
    data = dataclasses.replace(config.data, eval_batch_size=min(BATCH, config.data.batch_size))
    given = resolve_model_data_config(model)
    device = torch.device("cpu")
    loaders = build_loaders(data, model_data=given, seed=config.training.seed, rank=0, world_size=1, device=device)
    try:
        count = 0
        for batch, labels in loaders.val:
            for image, label in zip(batch, labels, strict=True):
                if count == images:
                    return
                count += 1
                yield np.ascontiguousarray(image.numpy()), int(label)
    finally:
        loaders.close()


def _sized(singles: Iterator[tuple[Array, int]]) -> Iterator[tuple[Array, Array]]:
    """Batches of 1, 2 and 5 images, then of `BATCH`."""
    sizes = iter(FIRST)
    size, kept = next(sizes), []
    for single in singles:
        kept.append(single)
        if len(kept) == size:
            yield np.stack([image for image, _ in kept]), np.array([label for _, label in kept])
            size, kept = next(sizes, BATCH), []
    if kept:
        yield np.stack([image for image, _ in kept]), np.array([label for _, label in kept])

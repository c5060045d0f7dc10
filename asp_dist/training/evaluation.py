"""Validation: exact counts over all ranks, however the samples are distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asp_dist.config import TrainingConfig
from asp_dist.data.base import Batch
from asp_dist.tracking.schema import VAL_LOSS, VAL_SAMPLES, VAL_TOP1, VAL_TOP5
from asp_dist.training.build import DTYPES
from asp_dist.training.world import World


def evaluate_model(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainingConfig,
    world: World,
    on_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """`evaluate_models` of one model."""
    return evaluate_models([model], batches, config, world, on_batch)[0]


@torch.no_grad()  # not inference_mode: FSDP2 keeps the tensors that it gathers here for training
def evaluate_models(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    config: TrainingConfig,
    world: World,
    on_batch: Callable[[], None] | None = None,
) -> list[dict[str, float]]:
    """Mean loss, top-1 and top-5 accuracy of each model over the batches of all ranks, each read once; a collective.

    Args:
        models: the networks; left in evaluation mode.
        batches: this rank's images [B, 3, H, W] and targets [B]. As many batches on each rank, some may be empty.
        config: precision and memory order of the forward pass.
        world: the ranks.
        on_batch: called after every batch on the CPU and every twentieth on a GPU, equally often on each rank; may raise.

    Returns:
        For each model ``val/loss`` (nats), ``val/top1`` and ``val/top5`` (fractions), ``val/samples``.
    """
    for model in models:
        model.eval()
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=world.device)  # loss, top-1, top-5, samples
    cuda = world.device.type == "cuda"
    every = 20 if cuda else 1
    for index, (images, targets) in enumerate(whole_batches(batches) if cuda else batches):
        for model, row in zip(models, sums):
            logits = _forward(model, images, config, world)[: len(targets)]
            ranks = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            row[0] += F.cross_entropy(logits, targets, reduction="sum")
            row[1] += ranks[:, 0].sum()
            row[2] += ranks.sum()
            row[3] += len(targets)
        if on_batch is not None and (index + 1) % every == 0:
            on_batch()
    return [_means(*row) for row in world.sum_(sums).tolist()]


def _means(loss: float, top1: float, top5: float, samples: float) -> dict[str, float]:
    count = max(samples, 1.0)
    return {VAL_LOSS: loss / count, VAL_TOP1: top1 / count, VAL_TOP5: top5 / count, VAL_SAMPLES: int(samples)}


def whole_batches(batches: Iterable[Batch]) -> Iterator[Batch]:
    """`batches` with blank images after the real ones where fewer come than before: cuDNN prepares for each new shape."""
    size = 1
    for images, targets in batches:
        size = max(size, len(images))
        blank = images.new_zeros(size - len(images), *images.shape[1:])
        yield (torch.cat([images, blank]) if len(blank) else images), targets


def _forward(model: nn.Module, images: Tensor, config: TrainingConfig, world: World) -> Tensor:
    """Logits [B, classes] in float32. An empty batch runs a blank image: sharded models need every rank to take part."""
    count = len(images)
    if count == 0:
        images = images.new_zeros(1, *images.shape[1:])
    if config.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(world.device.type, DTYPES[config.precision], enabled=config.precision != "float32"):
        logits = model(images)
    return logits[:count].float()

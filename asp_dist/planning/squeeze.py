"""A recipe squeezed for a rehearsal: its whole schedule in a few hundred small steps, on images that can be learned."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

from asp_dist.config import Config, PruningConfig, ScheduleConfig
from asp_dist.data import prepare_digits
from asp_dist.data.formats.folder import class_folders, image_names
from asp_dist.errors import check
from asp_dist.planning.estimate import suggested_data_set
from asp_dist.pruning.control.sparsity_loss import PUBLISHED_LR_RATIO
from asp_dist.training import build
from asp_dist.training.build import scales_with_root

EPOCHS = 10  # of a rehearsal, unless the recipe has fewer
STEPS_PER_EPOCH = 25  # at least, as each epoch builds its pipeline and is validated
CLASSES = 10
VALIDATION_IMAGES = 100
MAX_THRESHOLD_LR = 0.1  # above it, the thresholds swing about the target


def squeeze(config: Config, folder: Path, *, steps: int, batch_size: int, input_size: int) -> tuple[Config, list[str]]:
    """The rehearsal of `config`, and what differs from it, a line each.

    Warm-up, decays, ramp and freeze keep their shares of the schedule. The learning rate follows the batch: in proportion, or
    by its square root for optimizers that normalize their steps. All else is the recipe's.

    Args:
        config: the recipe.
        folder: where the rehearsal's data and runs go.
        steps: optimizer steps, about.
        batch_size: images per optimizer step.
        input_size: image side in pixels.

    Raises:
        UserError: the batch does not divide among the micro-batches.
    """
    accumulate = config.training.accumulate
    check(
        batch_size % accumulate == 0,
        f"--batch-size {batch_size} does not divide into training.accumulate = {accumulate} micro-batches: use a multiple",
    )
    epochs = min(config.schedule.epochs, EPOCHS, max(steps // STEPS_PER_EPOCH, 1))
    source, origin = _source(config, folder)
    images = link_subset(source, folder / "data", train=math.ceil(steps / epochs) * batch_size, val=VALIDATION_IMAGES)
    per_epoch = images // batch_size
    check(per_epoch >= 1, f"--batch-size {batch_size}: {source} has only {images} training images for a rehearsal")
    epochs = min(config.schedule.epochs, max(1, round(steps / per_epoch)))
    ratio = batch_size / config.data.batch_size
    factor = math.sqrt(ratio) if scales_with_root(config.optimizer.name) else ratio
    lr = build.scaled(config).lr * factor
    squeezed = replace(
        config,
        name="pruned",
        data=replace(
            config.data,
            root=str(folder / "data"),
            backend="torch" if config.data.backend == "torch" else "dali",
            format="folder",
            train="train",
            val="val",
            batch_size=batch_size,
            eval_batch_size=VALIDATION_IMAGES,
            input_size=input_size,
            progressive_sizes=_scaled_sizes(config, input_size),
            threads=1,
        ),
        optimizer=replace(config.optimizer, lr=lr, lr_base_size=None),
        schedule=_squeezed_schedule(config.schedule, epochs, factor),
        training=replace(
            config.training,
            ema_decay=_squeezed_decay(config, steps),
            eval_every=1,
            log_every=1,
            max_steps=None,
            patience=None,
        ),
        pruning=_squeezed_pruning(config, steps),
        cluster=replace(config.cluster, mode="local"),
        tracking=replace(config.tracking, wandb="disabled"),
        output=replace(config.output, dir=str(folder), storage=None, checkpoint_epochs=epochs, checkpoint_minutes=None, keep=3),
    )
    changes = [
        f"data: {images} images of {origin} at {input_size}×{input_size}",
        f"schedule: {epochs} of {config.schedule.epochs} epochs, {epochs * per_epoch} steps of {batch_size} images",
        f"optimizer.lr: {lr:.4g} for {config.optimizer.lr:g}, as the batch is {batch_size} for {config.data.batch_size}",
    ]
    if squeezed.pruning != config.pruning:
        changes.append(f"pruning.loss.threshold_lr: {squeezed.pruning.loss.threshold_lr:.4g}, to move as far in fewer steps")
    if squeezed.training.ema_decay != config.training.ema_decay:
        changes.append(f"training.ema_decay: {squeezed.training.ema_decay:.4g} for {config.training.ema_decay}")
    if config.model.pretrained and not config.model.weights:
        squeezed = replace(squeezed, model=replace(config.model, pretrained=False))
        changes.append("model.pretrained: off, a rehearsal downloads nothing")
    if config.resume.from_run is not None:
        squeezed = replace(squeezed, resume=replace(config.resume, from_run=None))
        changes.append("resume.from_run: off, a rehearsal starts from fresh weights")
    return squeezed, changes


def _squeezed_schedule(schedule: ScheduleConfig, epochs: int, factor: float) -> ScheduleConfig:
    """All times in proportion, all rates times `factor`."""
    share = epochs / schedule.epochs
    return replace(
        schedule,
        epochs=epochs,
        warmup_epochs=schedule.warmup_epochs * share,
        warmup_lr=schedule.warmup_lr * factor,
        min_lr=schedule.min_lr * factor,
        decay_epochs=tuple(one * share for one in schedule.decay_epochs),
    )


def _squeezed_decay(config: Config, steps: int) -> float | None:
    """The average's decay that forgets as large a part of the schedule as the recipe's does."""
    decay = config.training.ema_decay
    if decay is None:
        return None
    return 1.0 - min(0.5, (1.0 - decay) * max(1.0, _full_steps(config) / steps))


def _squeezed_pruning(config: Config, steps: int) -> PruningConfig:
    """The published update has a threshold rate that does not depend on the run's length: raised as the run is shortened.

    Its other forms derive the rate from the run.
    """
    pruning, loss = config.pruning, config.pruning.loss
    if pruning.control != "loss" or (loss.threshold_lr is None and pruning.ramp.shape != "constant"):
        return pruning
    mean = loss.threshold_lr or PUBLISHED_LR_RATIO * config.optimizer.lr / 2  # half the peak, as under a cosine
    rate = min(mean * max(1.0, _full_steps(config) / steps), MAX_THRESHOLD_LR)
    return replace(pruning, loss=replace(loss, threshold_lr=rate))


def _full_steps(config: Config) -> float:
    """Optimizer steps of the recipe, on the data set that the network's number of classes suggests."""
    _, (_, images, _) = suggested_data_set(config.model.name)
    return config.schedule.epochs * images / config.data.batch_size


def _scaled_sizes(config: Config, input_size: int) -> tuple[int, ...]:
    """Progressive sizes in proportion, in steps of 8 pixels."""
    largest = max(config.data.progressive_sizes, default=0)
    return tuple(max(8, round(size * input_size / largest / 8) * 8) for size in config.data.progressive_sizes)


def _source(config: Config, folder: Path) -> tuple[Path, str]:
    """A folder of images by class: the run's own, else the embedded digits."""
    root = Path(config.data.root).expanduser()
    train = root / config.data.train
    if config.data.train == "train" and config.data.val == "val" and train.is_dir() and (root / "val").is_dir():
        return root, f"{len(class_folders(train)[:CLASSES])} classes of {root}"
    return prepare_digits(folder / "digits"), "handwritten digits, as data.root has no images by class"


def link_subset(source: Path, target: Path, *, train: int, val: int) -> int:
    """Link about `train` and `val` images of the first classes of `source` below `target`; returns the number to train on."""
    shutil.rmtree(target, ignore_errors=True)
    classes = class_folders(source / "train")[:CLASSES]
    counts = {"train": 0, "val": 0}
    for split, wanted in (("train", train), ("val", val)):
        for name in set(classes).intersection(class_folders(source / split)):
            folder = target / split / name
            folder.mkdir(parents=True)
            for image in image_names(source / split / name)[: math.ceil(wanted / len(classes))]:
                (folder / image).symlink_to((source / split / name / image).absolute())
                counts[split] += 1
    return counts["train"]

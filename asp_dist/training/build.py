"""The factories of the trainer: each turns a part of the configuration into the object that does it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import socket
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import OptimInfo, create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from asp_dist.config import Config, DataConfig, OptimizerConfig, ScheduleConfig, TrainingConfig
from asp_dist.data import DataSet, open_data_set
from asp_dist.data.images import erases_batches
from asp_dist.data.samples import Samples
from asp_dist.errors import UserError
from asp_dist.pruning import Pruner
from asp_dist.training.world import World

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")
LOOKAHEAD = "lookahead_"  # prefix of an optimizer's name
# Optimizers of torch that take all parameters in one launch, and skip a step by a flag on the device.
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
# Images of each split by which the nodes' copies of a data set are compared.
COMPARED = 32
FEW_IMAGES = 32  # of a GPU at once: below, its kernels are too small to fill it
LARGE_SIDE = 128  # of images, in pixels, from which a GPU's arithmetic is what takes the time
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_data(data: DataConfig, world: World) -> DataSet | None:
    """The data set, listed once, by rank 0; None: it is synthetic. A collective.

    Raises:
        UserError: it cannot be opened, or a node sees another one under the same path.
    """
    if data.backend == "synthetic":
        return None
    data_set = world.on_main(lambda: open_data_set(data))
    if world.world_size > 1 and "://" not in data.root:
        check_copies(data_set, world)
    return data_set


def check_copies(data_set: DataSet, world: World) -> None:
    """Raise `UserError` on every rank if the ranks' lists differ, or some files on a node are others than on rank 0's."""
    seen = None
    if world.local_rank == 0 or world.is_main:
        seen = [samples.stored_size(i) for samples in (data_set.train, data_set.val) for i in spread(samples)]
    mine = (socket.gethostname(), data_set.train.fingerprint + data_set.val.fingerprint, seen)
    (main, listed, first), *others = world.gather(mine)
    assert first is not None
    for node, fingerprint, sizes in others:
        if fingerprint != listed:
            raise UserError(f"data: node {node} has another list of images than node {main}; its memory or network is faulty")
        for place, (ours, theirs) in enumerate(zip(first, first if sizes is None else sizes)):
            if ours != theirs:
                samples = data_set.train if place < COMPARED else data_set.val
                file = samples.place(spread(samples)[place % COMPARED])
                found = "lacks it" if theirs is None else f"has {theirs} bytes there"
                raise UserError(
                    f"data: {file} has {ours} bytes on node {main}, and node {node} {found}: every node needs the same data "
                    "set under the same path"
                )


def spread(samples: Samples) -> list[int]:
    """`COMPARED` samples, evenly spread."""
    return [int(index) for index in np.linspace(0, len(samples) - 1, COMPARED)]


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of that name over `model`'s parameters; no weight decay on biases and norms.

    Raises:
        UserError: timm has no such optimizer, it cannot be used here, or it does not accept an argument of
            ``optimizer.kwargs``.
    """
    check_optimizer(config.name)
    info = _optimizer_info(config.name)
    kwargs: dict[str, Any] = dict(config.kwargs)
    if config.layer_decay is not None:
        kwargs.setdefault("layer_decay", config.layer_decay)
    if "deterministic" in inspect.signature(info.opt_class).parameters:
        kwargs.setdefault("deterministic", True)  # Kron's draws would otherwise differ between ranks, and its weights with them
    if info.has_betas and not info.has_momentum and "betas" not in kwargs:
        kwargs.update(_betas(info.opt_class, config.momentum))
    if _on_cuda(model) and info.opt_class in FUSED and not {"fused", "foreach", "differentiable"} & set(kwargs):
        kwargs["fused"] = True
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **kwargs,
        )
    except TypeError as error:
        raise UserError(f"optimizer.kwargs = {config.kwargs} does not fit {config.name}: {error}") from error
    except (ValueError, AssertionError) as error:
        raise UserError(f"optimizer {config.name!r} with {config}: {error}") from error


def scaled(config: Config) -> OptimizerConfig:
    """The optimizer's options with the rate of the run's batch, where ``optimizer.lr_base_size`` says so, as timm scales it."""
    optimizer = config.optimizer
    if optimizer.lr_base_size is None:
        return optimizer
    ratio = config.data.batch_size / optimizer.lr_base_size
    lr = optimizer.lr * (ratio**0.5 if any(part in optimizer.name.lower() for part in ("ada", "lamb")) else ratio)
    return dataclasses.replace(optimizer, lr=lr, lr_base_size=None)


def _on_cuda(model: nn.Module) -> bool:
    parameter = next(model.parameters(), None)
    return parameter is not None and parameter.device.type == "cuda"


def check_optimizer(name: str) -> None:
    """Raise `UserError` unless timm has an optimizer called `name`, or ``lookahead_NAME``, that can be used here."""
    names = list_optimizers()
    if name.lower().removeprefix(LOOKAHEAD) not in names:
        close = difflib.get_close_matches(name, names, n=3) or names[:3]
        raise UserError(f"optimizer.name = {name!r} is not in timm; did you mean {' or '.join(close)}?")
    info = _optimizer_info(name)
    if info.second_order:
        raise UserError(
            f"optimizer.name = {name!r} needs second derivatives, which are not computed here: choose adamw or kron"
        )
    if isinstance(info.opt_class, str):  # of another package, by its path
        package = info.opt_class.split(".")[0]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"optimizer.name = {name!r} needs {package}, which is not installed")


def _optimizer_info(name: str) -> OptimInfo:
    return get_optimizer_info(name.lower().removeprefix(LOOKAHEAD))


def scales_with_root(name: str) -> bool:
    """Whether the optimizer normalizes its steps, so that its rate follows the square root of the batch."""
    info = _optimizer_info(name)
    return info.has_eps or info.has_betas


def _betas(kind: Any, first: float) -> dict[str, Any]:
    """`betas` with the first one replaced, the others as the optimizer's class has them."""
    parameter = inspect.signature(kind).parameters.get("betas")
    if parameter is None or parameter.default in (inspect.Parameter.empty, None):
        return {}
    return {"betas": (first, *parameter.default[1:])}


def build_scheduler(config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Any:
    """timm's scheduler, counted in optimizer steps: ``step_update(step)`` before each step sets the rate of `step`.

    Raises:
        UserError: timm has no such schedule, or it is not one of steps (``plateau``, ``none``).
    """
    if config.name == "none":
        raise UserError("schedule.name = 'none' would leave out the warm-up as well: choose constant")
    if config.name == "plateau":
        raise UserError("schedule.name = 'plateau' depends on results, not on the step: choose cosine, step or poly")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.name,
            num_epochs=config.epochs,
            decay_epochs=config.decay_epochs[0] if config.decay_epochs else config.epochs,
            decay_milestones=config.decay_epochs,  # timm multiplies them, fractions are fine
            decay_rate=config.decay_rate,
            min_lr=config.min_lr,
            warmup_lr=config.warmup_lr,
            warmup_epochs=config.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except ValueError as error:
        raise UserError(f"schedule.name = {config.name!r}: {error}; known: {', '.join(SCHEDULES)}") from error
    return scheduler


def build_mixup(config: Config, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix on the batch, or None when both are off."""
    augment = config.data.augment
    if not (augment.mixup > 0 or augment.cutmix > 0):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        label_smoothing=config.training.label_smoothing,
        num_classes=num_classes,
    )


def build_erasing(config: Config, device: torch.device) -> RandomErasing | None:
    """timm's random erasing of the batch, or None where DALI erases, or nothing does."""
    augment = config.data.augment
    if augment.erase == 0 or not erases_batches(augment):
        return None
    return RandomErasing(augment.erase, mode=augment.erase_mode, max_count=augment.erase_count, device=device)


def build_loss(config: Config) -> nn.Module:
    """The training loss: timm's binary cross-entropy, or cross-entropy, against soft targets when mixup makes them."""
    training, mixed = config.training, config.data.augment.mixup > 0 or config.data.augment.cutmix > 0
    if training.loss == "bce":
        return BinaryCrossEntropy(0.0 if mixed else training.label_smoothing, target_threshold=training.bce_threshold)
    return SoftTargetCrossEntropy() if mixed else nn.CrossEntropyLoss(label_smoothing=training.label_smoothing)


def advice_for_gpus(config: Config, model: nn.Module, side: int, workers: int) -> list[str]:
    """What would leave GPUs idle, or slow, in this run on images of `side` pixels; each with its remedy."""
    training, advice = config.training, []
    images = config.data.batch_size // (workers * training.accumulate)
    if images < FEW_IMAGES:
        less = "or a smaller training.accumulate" if training.accumulate > 1 else "with a larger optimizer.lr, or fewer workers"
        advice.append(
            f"each GPU gets {images} images at once, too few to keep it busy: a larger data.batch_size {less}, may help"
        )
    if side < LARGE_SIDE:
        return advice
    if training.precision == "float32":
        advice.append("training.precision is float32: bfloat16 (or float16) is faster on GPUs with tensor cores")
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in model.modules())
    if not training.channels_last and convolutions > 1:  # a ViT has one
        advice.append("training.channels_last is off: convolutions on GPUs are faster with it")
    return advice


def build_scaler(config: TrainingConfig, device: torch.device) -> torch.amp.GradScaler | None:
    """The gradient scaler of float16, or None for the other precisions."""
    return torch.amp.GradScaler(device.type) if config.precision == "float16" else None


def place_model(config: TrainingConfig, model: nn.Module, world: World) -> nn.Module:
    """Move `model` to the rank's device and memory order, and shard it if the configuration says so."""
    model.to(device=world.device)
    if config.grad_checkpointing:
        checkpoint_gradients(model)
    sharded = config.parallel == "fsdp" and world.world_size > 1
    if config.channels_last and not sharded:  # FSDP2 shards contiguous parameters only; the images are channels_last anyway
        model.to(memory_format=torch.channels_last)
    if config.sync_batch_norm and world.world_size > 1:
        if world.device.type != "cuda":
            raise UserError("training.sync_batch_norm = true needs CUDA: torch has no synchronized batch norm on the CPU")
        model = convert_sync_batchnorm(model)
    if sharded:
        shard_model(model)
    return model


def checkpoint_gradients(model: nn.Module) -> None:
    """Let a timm model compute activations again in the backward pass; raise `UserError` if it cannot."""
    try:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError) as error:
        name = type(model).__name__
        raise UserError(f"training.grad_checkpointing: timm's {name} has none ({error}); leave it out") from error


def build_pruner(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    input_size: tuple[int, int, int],
) -> Pruner | None:
    """The run's pruner, attached to `optimizer`; None if pruning is off.

    Args:
        config: the run.
        model: the network, placed on its device.
        optimizer: its optimizer.
        total_steps: length of the run in optimizer steps.
        input_size: shape of one image, (channels, height, width).

    Raises:
        UserError: the network and the budget do not fit together.
    """
    pruning = config.pruning
    if not pruning.enabled:
        return None
    try:
        return Pruner(
            model,
            optimizer,
            config.budget.all(),
            control=pruning.build_control(),
            ramp=dataclasses.replace(pruning.ramp, total_steps=total_steps),
            select=pruning.select,
            pattern=pruning.pattern,
            operator=pruning.build_operator(),
            min_density=pruning.min_density,
            center=pruning.center,
            gradient_scale=pruning.gradient_scale,
            input_shape=input_size,
            agreement_every=pruning.agreement_every,
        )
    except ValueError as error:
        raise UserError(f"model {config.model.name!r}: {error}") from error


def shard_model(model: nn.Module) -> None:
    """Shard `model` over all ranks (FSDP2): each block with parameters of its own, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            for block in child:
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(model)


def wrap_model(config: TrainingConfig, model: nn.Module, world: World) -> nn.Module:
    """What the training step calls: `model` itself, under DDP with several replicas, compiled if asked for."""
    network = model
    if world.world_size > 1 and config.parallel == "ddp":
        on_cuda = world.device.type == "cuda"
        network = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[world.device.index] if on_cuda else None,
            # Views save a copy, but lie at other alignments before DDP reorders its buckets after the first step, and
            # the CPU's dot products round by alignment: a resumed run would differ in the last bits.
            gradient_as_bucket_view=on_cuda,
            # Batch norm's running statistics are of no use until validation, which takes rank 0's, as checkpoints do.
            forward_sync_buffers=False,
        )
    if config.compile:
        network = torch.compile(network)  # type: ignore[assignment]
    return network

"""A run: everything that the training loop works with, built from the configuration, and its state."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.data import Mixup, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.tensor import DTensor

from asp_dist.checkpoint.format import capture_rng, restore_rng, seed_everything
from asp_dist.checkpoint.manager import CheckpointManager
from asp_dist.checkpoint.record import run_dir
from asp_dist.config import Config, TrainingConfig
from asp_dist.data import Loaders, build_loaders, inspect_data
from asp_dist.data.images import build_spec
from asp_dist.models import build_model
from asp_dist.pruning import Pruner, Snapshot
from asp_dist.tracking import Tracker
from asp_dist.tracking.profile import StepProfile
from asp_dist.training import build
from asp_dist.training.hooks import Hooks
from asp_dist.training.meter import Meter
from asp_dist.training.world import World

if TYPE_CHECKING:
    from asp_dist.training.health import LateFlags

log = logging.getLogger(__name__)
# How far a run is, by the fields of `Run`.
PROGRESS = ("step", "closed_epochs", "bad_steps", "skipped", "best", "results")


class BufferGuard:
    """Copies of a model's buffers from before the last two steps: a batch with bad numbers must not stay in batch norm.

    Attributes:
        tensors: the buffers themselves, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: buffer for name, buffer in model.named_buffers() if not isinstance(buffer, DTensor)}
        self._copies = [{name: buffer.clone() for name, buffer in self.tensors.items()} for _ in range(2)]
        self._steps = [-1, -1]

    @torch.no_grad()
    def keep(self, step: int) -> None:
        """Remember the buffers as they are before optimizer step `step`."""
        copy_alike_(self._copies[step % 2], self.tensors)
        self._steps[step % 2] = step

    @torch.no_grad()
    def restore(self, step: int) -> None:
        """Put them back as they were before optimizer step `step`, the last one or the one before."""
        copy_alike_(self.tensors, self._copies[step % 2])

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """The buffers as they were before optimizer step `step`, the one that runs, or is next."""
        return self._copies[step % 2] if self._steps[step % 2] == step else self.tensors


def copy_alike_(to: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Copy tensors by name, those of one type at a time: torch copies mixed lists one by one."""
    for kind in dict.fromkeys(tensor.dtype for tensor in to.values()):
        names = [name for name, tensor in to.items() if tensor.dtype == kind]
        torch._foreach_copy_([to[name] for name in names], [values[name] for name in names])


class WeightAverage(ModelEmaV3):
    """timm's moving average of the weights, with a launch for each type of tensors instead of one for each counter."""

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None, buffers: dict[str, torch.Tensor] | None = None) -> None:
        """Take `model`'s weights in; `step` counts from 1, and `buffers` are taken instead of its own of these names."""
        mine = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        theirs = {**dict(model.named_parameters()), **dict(model.named_buffers()), **(buffers or {})}
        names = [name for name, tensor in mine.items() if tensor.is_floating_point()]
        self._foreach_lerp_([mine[n] for n in names], [theirs[n] for n in names], weight=1.0 - self.get_decay(step))
        copy_alike_({name: tensor for name, tensor in mine.items() if not tensor.is_floating_point()}, theirs)


@dataclass
class Run:
    """What the training loop works with.

    Args:
        model: the network itself: plain timm names, pruned weights.
        ddp_model: what a training step calls: `model`, under DDP, compiled.
        input_size: shape of one image in validation, (channels, height, width).
        step: optimizer steps done, skipped ones included.
        closed_epochs: epochs that are done with, validation included.
        bad_steps: skipped steps in a row.
        skipped: skipped steps in all.
        best: the best validation at the budget: ``{"step": ..., "val/top1": ...}``.
        results: the latest validation.
        snapshot: the pruner's state at the latest validation; None before it, and without pruning.
        layer_subset: validation batches on which single layers are judged.
        late: whether the host may read a step's flags one step late; see `health.reads_late`.
        watched_until: the step from which it may, after a bad one.
        pending: flags that are on their way to the host.
        deadline: when to stop, by this process's monotonic clock.
        profile: looks into some of the steps, on rank 0.
    """

    config: Config
    world: World
    hooks: Hooks
    folder: Path
    model: nn.Module
    ddp_model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler | None
    ema: WeightAverage | None
    erasing: RandomErasing | None
    mixup: Mixup | None
    loss: nn.Module
    loaders: Loaders
    pruner: Pruner | None
    checkpoints: CheckpointManager
    meter: Meter
    tracker: Tracker
    input_size: tuple[int, int, int]
    total_steps: int
    identity: str
    buffers: BufferGuard
    profile: StepProfile
    step: int = 0
    closed_epochs: int = 0
    bad_steps: int = 0
    skipped: int = 0
    best: dict[str, Any] | None = None
    results: dict[str, Any] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    layer_subset: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    late: bool = False
    watched_until: int = 0
    pending: LateFlags | None = None
    deadline: float = math.inf

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a whole epoch."""
        return int(self.loaders.train.steps_per_epoch)

    @property
    def epochs(self) -> int:
        """Epochs, the last one cut short by ``training.max_steps`` perhaps."""
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def average_weights(self, step: int) -> None:
        """Take the weights as optimizer step `step`, the last one, left them into their average, if there is one."""
        if self.ema is not None:
            self.ema.update(self.model, step + 1, self.buffers.at(step + 1))

    def end_of(self, epoch: int) -> int:
        """Optimizer steps done when `epoch` (from 0) is."""
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)


def count_steps(config: Config, steps_per_epoch: int) -> int:
    """Length of the run in optimizer steps."""
    steps = config.schedule.epochs * steps_per_epoch
    return min(steps, config.training.max_steps or steps)


def build_run(config: Config, world: World, hooks: Hooks, checkpoints: CheckpointManager, identity: str) -> Run:
    """Build the run at its first step; every rank builds the same network.

    Raises:
        UserError: model, data, budget and the number of workers do not go together.
    """
    training = config.training
    if world.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the batches' shapes stay the same
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions have by default
    seed_everything(training.seed)
    data_set = build.open_data(config.data, world)
    info = inspect_data(config.data) if data_set is None else data_set.info
    model = build_model(config.model, len(info.classes), config.data.input_size)
    model_data = resolve_model_data_config(model)
    model = build.place_model(training, model, world)
    loaders = build_loaders(
        config.data,
        model_data=model_data,
        seed=training.seed,
        rank=world.rank,
        world_size=world.world_size,
        device=world.device,
        accumulate=training.accumulate,
        epochs=config.schedule.epochs,
        channels_last=training.channels_last,
        data_set=data_set,
    )
    optimizer = build.build_optimizer(build.scaled(config), model)
    total_steps = count_steps(config, loaders.train.steps_per_epoch)
    ddp_model = build.wrap_model(training, model, world)
    height, width = build_spec(config.data, model_data).size
    input_size = (3, height, width)
    pruner = build.build_pruner(config, model, optimizer, total_steps=total_steps, input_size=input_size)
    run = Run(
        config=config,
        world=world,
        hooks=hooks,
        folder=run_dir(config),
        model=model,
        ddp_model=ddp_model,
        optimizer=optimizer,
        scheduler=build.build_scheduler(config.schedule, optimizer, loaders.train.steps_per_epoch),
        scaler=build.build_scaler(training, world.device),
        ema=build_average(training, model),
        erasing=build.build_erasing(config, world.device),
        mixup=build.build_mixup(config, len(info.classes)),
        loss=build.build_loss(config),
        loaders=loaders,
        pruner=pruner,
        checkpoints=checkpoints,
        meter=Meter(world, config.data.batch_size),
        tracker=Tracker(),
        input_size=input_size,
        total_steps=total_steps,
        identity=identity,
        buffers=BufferGuard(model),
        profile=StepProfile(run_dir(config), training.profile_steps if world.is_main else 0, world.device),
        late=world.device.type == "cuda" and not is_sharded(model),
        deadline=time.monotonic() + 60.0 * (training.max_minutes or math.inf),
    )
    seed_everything(training.seed + 1000003 * (1 + world.rank))  # each rank draws its own dropout and mixup
    return run


def build_average(config: TrainingConfig, model: nn.Module) -> WeightAverage | None:
    """The moving average of the weights, or None."""
    if config.ema_decay is None:
        return None
    return WeightAverage(model, decay=config.ema_decay, use_warmup=config.ema_warmup, update_after_step=config.ema_start)


def capture_state(run: Run) -> dict[str, Any]:
    """Everything that the next step depends on, one part per file; complete on rank 0. A collective."""
    ranks = run.world.gather(
        {
            "rng": capture_rng(run.world.device),
            "loader": run.loaders.train.state_dict(),
            "meter": run.meter.state_dict(),
        }
    )
    sharded = is_sharded(run.model)
    if not (run.world.is_main or sharded):
        return {}
    model, optimizer = full_state(run.model, run.optimizer)
    return {
        "model": model,
        "optimizer": optimizer,
        "pruner": run.pruner.state_dict() if run.pruner else None,
        "ema": run.ema.module.state_dict() if run.ema else None,
        "scaler": run.scaler.state_dict() if run.scaler else None,
        "run": {"steps_per_epoch": run.steps_per_epoch, **{name: getattr(run, name) for name in PROGRESS}},
        "ranks": ranks,
    }


def load_learned(run: Run, state: dict[str, Any]) -> None:
    """Load the weights, their average, the optimizer's and the scaler's state. Without an average there, it is the weights."""
    load_full_state(run.model, run.optimizer, state["model"], state["optimizer"])
    if run.ema is not None:
        run.ema.module.load_state_dict(state["model"] if state["ema"] is None else state["ema"])
    if run.scaler is not None and state["scaler"] is not None:
        run.scaler.load_state_dict(state["scaler"])


def rebuild_pruner(run: Run, step: int = 0) -> None:
    """Begin to prune the network as it is now, at optimizer step `step`; a collective."""
    assert run.pruner is not None
    run.pruner.remove()
    run.pruner = build.build_pruner(
        run.config, run.model, run.optimizer, total_steps=run.total_steps, input_size=run.input_size
    )
    assert run.pruner is not None
    run.pruner.steps = step


def restore_state(run: Run, state: dict[str, Any]) -> None:
    """Set `run` to a captured state. With another number of ranks, the ranks' own parts start anew.

    What the state lacks, because it has been switched on since, starts from the state's weights.
    """
    load_learned(run, state)
    if run.pruner is not None and state["pruner"] is not None:
        run.pruner.load_state_dict(state["pruner"])
    elif run.pruner is not None:
        rebuild_pruner(run, step=state["run"]["step"])
    for name in PROGRESS:
        setattr(run, name, state["run"][name])
    ranks = state["ranks"]
    own = ranks[run.world.rank] if run.world.rank < len(ranks) else ranks[0]
    run.loaders.train.load_state_dict(own["loader"])
    if len(ranks) == run.world.world_size:
        restore_rng(own["rng"], run.world.device)
        run.meter.load_state_dict(own["meter"])
    else:
        seed_everything(run.config.training.seed + 1000003 * (1 + run.world.rank) + run.step)
        run.meter.total_images = own["meter"]["total_images"]
        run.meter.total_seconds = own["meter"]["total_seconds"]


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded `model`'s parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of model and optimizer with whole tensors, independent of the sharding.

    A collective under FSDP2, where only rank 0 receives it.
    """
    if not is_sharded(model):
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    whole, of_optimizer = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(whole), dict(of_optimizer)


def load_full_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, of_model: dict[str, Any], of_optimizer: dict[str, Any]
) -> None:
    """Load what `full_state` gave, on every rank the same."""
    if not is_sharded(model):
        model.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=of_model,
        optim_state_dict=of_optimizer,
        options=StateDictOptions(full_state_dict=True),
    )

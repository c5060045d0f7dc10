"""What becomes of changes to the configuration of a run that resumes: each takes effect, or is refused with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from asp_dist.config import (
    AugmentConfig,
    Config,
    OptimizerConfig,
    PruningConfig,
    check_fixed,
    differences,
    from_dict,
    is_among,
    refuse_change,
    to_dict,
)
from asp_dist.errors import UserError
from asp_dist.pruning.budget import resolve_budget
from asp_dist.training import build
from asp_dist.training.run import Run, count_steps

Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Unused:
    """Fields that some runs do not use.

    Attributes:
        fields: the fields, or groups of them.
        by: whether a run of this configuration, with this many workers, leaves them alone.
        reason: why, in words.
    """

    fields: tuple[str, ...]
    by: Callable[[Config, int], bool]
    reason: str


_FROM_FILES = ("data.root", "data.format", "data.train", "data.val")
_OF_AUGMENT = tuple(f"data.augment.{field.name}" for field in dataclasses.fields(AugmentConfig))
_ON_PIXELS = tuple(name for name in _OF_AUGMENT if "mix" not in name)
_OF_PRUNING = tuple(f"pruning.{field.name}" for field in dataclasses.fields(PruningConfig) if field.name != "enabled")
UNUSED = (
    Unused(
        ("data.augment.policy_ops", "data.augment.policy_prob", "data.augment.policy_increasing"),
        lambda config, workers: config.data.augment.policy != "randaugment",
        "they are RandAugment's, and data.augment.policy is another",
    ),
    Unused(
        ("data.augment.policy_magnitude", "data.augment.policy_std"),
        lambda config, workers: config.data.augment.policy not in ("randaugment", "augmix"),
        "it is RandAugment's and AugMix's, and data.augment.policy is another",
    ),
    Unused(
        ("pruning.pattern.include", "pruning.pattern.exclude"),
        lambda config, workers: config.pruning.pattern.block == 1,
        "pruning.pattern.block = 1",
    ),
    Unused(
        ("data.augment.erase_mode", "data.augment.erase_count"),
        lambda config, workers: config.data.augment.erase == 0,
        "data.augment.erase is off",
    ),
    Unused(
        ("data.augment.scale", "data.augment.ratio"),
        lambda config, workers: config.data.augment.pad > 0,
        "data.augment.pad takes crops of one size",
    ),
    Unused(
        ("optimizer.clip_mode",),
        lambda config, workers: config.optimizer.clip_grad is None,
        "optimizer.clip_grad is off",
    ),
    Unused(
        ("training.ema_warmup", "training.ema_start"),
        lambda config, workers: config.training.ema_decay is None,
        "training.ema_decay is off",
    ),
    Unused(
        ("data.synthetic_samples", "data.synthetic_classes"),
        lambda config, workers: config.data.backend != "synthetic",
        "the data set says so itself; this is for data.backend = synthetic",
    ),
    Unused(
        (*_FROM_FILES, *_ON_PIXELS),
        lambda config, workers: config.data.backend == "synthetic",
        "data.backend = synthetic reads and augments no image",
    ),
    Unused(
        ("data.augment.mixup_prob", "data.augment.mixup_switch_prob", "data.augment.mixup_off_epoch"),
        lambda config, workers: config.data.augment.mixup == config.data.augment.cutmix == 0,
        "data.augment.mixup and cutmix are off",
    ),
    Unused(
        ("training.bce_threshold",),
        lambda config, workers: config.training.loss != "bce",
        "it is for training.loss = bce",
    ),
    Unused(
        ("budget", *_OF_PRUNING),
        lambda config, workers: not config.pruning.enabled,
        "pruning.enabled = False",
    ),
    Unused(
        ("training.sync_batch_norm",),
        lambda config, workers: workers == 1,
        "one worker has nothing to synchronize",
    ),
)
# Fields whose effect is what they make of the steps ahead.
PLANNED = ("schedule", "training.max_steps", "pruning.ramp")
# Fields whose effect is what they make of the optimizer's parameter groups; lr, of the schedule's rates.
OPTIMIZER = ("optimizer.weight_decay", "optimizer.momentum", "optimizer.layer_decay", "optimizer.kwargs")
# At most about so many of the steps ahead are compared.
SAMPLES = 1000


def check_changes(run: Run, before: dict[str, Any], state: dict[str, Any]) -> None:
    """Raise `UserError` if a field was changed that cannot have an effect, or not any more.

    Args:
        run: the run as it is configured now, at its first step.
        before: the configuration that the checkpoint was written with, as `to_dict` gives it.
        state: the checkpoint's state.
    """
    changed = differences(before, to_dict(run.config))
    check_fixed(changed)
    if not changed:
        return
    step = state["run"]["step"]
    check_used(run, changed, from_dict(before))
    check_steps(run, changed, step, state["run"].get("steps_per_epoch"))
    check_pruning(run, changed, step, state["pruner"])
    for name in changed:
        if is_among(name, (*PLANNED, *OPTIMIZER)):
            check_effect(run, name, changed, before, step)


def check_used(run: Run, changed: Changes, before: Config) -> None:
    """Raise `UserError` if neither this run nor the one `before` uses a field that was changed."""
    for name, values in changed.items():
        for unused in UNUSED:
            if is_among(name, unused.fields) and all(unused.by(one, run.world.world_size) for one in (before, run.config)):
                refuse_change(name, *values, unused.reason)
    if run.pruner is not None and "budget.bound" in changed and run.config.pruning.control == "track":
        one, other = (resolve_budget(config.budget.all()[0], run.pruner.costs) for config in (before, run.config))
        if torch.equal(one.allowed, other.allowed):
            refuse_change("budget.bound", *changed["budget.bound"], "pruning.control = track meets either in the same way")


def check_steps(run: Run, changed: Changes, step: int, steps_per_epoch: int | None) -> None:
    """Raise `UserError` if the steps done do not fit the epochs as they are now, or no step is left."""
    if steps_per_epoch not in (None, run.steps_per_epoch):
        name = next((name for name in changed if is_among(name, ("data",))), next(iter(changed)))
        refuse_change(name, *changed[name], f"an epoch would have {run.steps_per_epoch} steps instead of {steps_per_epoch}")
    if step >= run.total_steps:
        name = next((name for name in changed if is_among(name, PLANNED)), next(iter(changed)))
        refuse_change(name, *changed[name], f"{step} steps are done, and the run would have {run.total_steps}")


def check_pruning(run: Run, changed: Changes, step: int, pruner: dict[str, Any] | None) -> None:
    """Raise `UserError` if what is pruned, and how, cannot be changed any more."""
    for name, (before, now) in changed.items():
        if name == "pruning.enabled":
            ramp = dataclasses.replace(run.config.pruning.ramp, total_steps=run.total_steps)
            if not now:
                refuse_change(name, before, now, "its weights are pruned already")
            if ramp.share(step) > 0:
                refuse_change(name, before, now, f"by step {step} the ramp has begun; raise pruning.ramp.start as well")
        if pruner is None or not is_among(name, ("budget", "pruning")):
            continue
        if pruner["frozen"]:
            refuse_change(name, before, now, "its mask is frozen")
        if name == "pruning.center" and now is None:
            refuse_change(name, before, now, "this was decided when the run started")
        if name == "budget.also" and len(before) != len(now):
            refuse_change(name, before, now, "the control's state belongs to another number of budgets")


def check_effect(run: Run, name: str, changed: Changes, before: dict[str, Any], step: int) -> None:
    """Raise `UserError` if without its change to the field `name` the run would do the same, or if the state does not fit."""
    try:
        without: Config = from_dict(_with_value(to_dict(run.config), name.split("."), changed[name][0]))
    except UserError:
        return  # the other changes need this one
    if is_among(name, PLANNED):
        if _steps_ahead(run.config, run.steps_per_epoch, step) == _steps_ahead(without, run.steps_per_epoch, step):
            refuse_change(name, *changed[name], f"it changes nothing from step {step} on")
        return
    if _options(without.optimizer, run.model) == _options(run.config.optimizer, run.model):
        refuse_change(name, *changed[name], f"{run.config.optimizer.name} does not use it")
    problem = _problem_of_state(from_dict(before["optimizer"], OptimizerConfig), run.config.optimizer)
    if problem:
        refuse_change(name, *changed[name], f"the optimizer's state does not fit ({problem})")


def change_options(run: Run, before: dict[str, Any], options: list[dict[str, Any]]) -> None:
    """Give the optimizer what its configuration says now, where the loaded state brought what it said before.

    Args:
        run: the run, its state loaded.
        before: the configuration that the checkpoint was written with, as `to_dict` gives it.
        options: the options of the optimizer's parameter groups before the state was loaded.
    """
    if before["optimizer"] == to_dict(run.config.optimizer):
        return
    old = _options(from_dict(before["optimizer"], OptimizerConfig), run.model)
    for group, was, now in zip(run.optimizer.param_groups, old, options):
        # Some optimizers count in their groups: only what the configuration changed is replaced.
        group.update({key: value for key, value in now.items() if key not in was or was[key] != value})


def group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _options(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    return group_options(build.build_optimizer(config, model))


def _with_value(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    name, *rest = path
    return {**tree, name: _with_value(tree[name], rest, value) if rest else value}


def _steps_ahead(config: Config, steps_per_epoch: int, step: int) -> tuple[Any, ...]:
    """Everything that is planned from `step` on: its length, learning rates and targets."""
    total = count_steps(config, steps_per_epoch)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    scheduler = build.build_scheduler(config.schedule, optimizer, steps_per_epoch)
    ramp = dataclasses.replace(config.pruning.ramp, total_steps=total)
    rates = []
    for ahead in range(step, total, max((total - step) // SAMPLES, 1)):
        scheduler.step_update(ahead)
        rates.append((optimizer.param_groups[0]["lr"], ramp.share(ahead + 1)))
    return total, ramp.freeze_step(), rates


def _problem_of_state(before: OptimizerConfig, now: OptimizerConfig) -> str:
    """What goes wrong when an optimizer goes on from the state of one with other options: tried on a small network."""
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Linear(4, 4))
    one, other = (build.build_optimizer(config, network) for config in (before, now))
    options = group_options(other)
    try:
        for optimizer in (one, other):
            if optimizer is other:
                other.load_state_dict(one.state_dict())
                for group, values in zip(other.param_groups, options):
                    group.update(values)
            for parameter in network.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""

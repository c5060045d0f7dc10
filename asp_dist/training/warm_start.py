"""Starting from another run's state: weights, optimizer and thresholds, at the first step of this run's own schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asp_dist.checkpoint.format import CheckpointError, Manifest, read_checkpoint
from asp_dist.checkpoint.manager import Event
from asp_dist.checkpoint.record import load_config, run_dir
from asp_dist.checkpoint.storage import LocalStore
from asp_dist.config import Config, flatten, to_dict
from asp_dist.errors import UserError, check
from asp_dist.tracking.schema import MODEL_FILE
from asp_dist.training.changes import change_options, group_options
from asp_dist.training.run import Run, load_learned, rebuild_pruner

# What the state is of: it fits no run in which one of these is another; the pruner's state has two more.
MUST_MATCH = ("model.name", "optimizer.name", "training.parallel")
MUST_MATCH_TO_PRUNE = ("pruning.control", "budget.scope")


def check_start(config: Config) -> None:
    """Raise `UserError` unless ``resume.from_run`` is a run whose state a run of this configuration can begin with."""
    if config.resume.from_run is None:
        return
    folder = Path(config.resume.from_run)
    what = f"resume.from_run = {config.resume.from_run!r}"
    check(folder.absolute() != run_dir(config), f"{what} is this run's own folder, which it resumes from anyway: leave it out")
    check(
        config.model.weights is None and not config.model.pretrained,
        f"{what} brings the weights: leave model.weights and model.pretrained out",
    )
    other = load_config(folder)
    theirs, ours = flatten(to_dict(other)), flatten(to_dict(config))
    alone = f"or start from its weights alone: --model.weights {folder / MODEL_FILE}"
    pruned = other.pruning.enabled and config.pruning.enabled
    for name in (*MUST_MATCH, *(MUST_MATCH_TO_PRUNE if pruned else ())):
        there, here = theirs[name], ours[name]
        check(there == here, f"{what} has {name} = {there!r}, this run {here!r}: give the same, {alone}")
    if pruned:
        there, here = len(other.budget.all()), len(config.budget.all())
        check(there == here, f"{what} has {there} budgets, this run {here}: give as many, {alone}")
        ramp = config.pruning.ramp
        check(
            ramp.shape == "constant" or ramp.initial > 0,
            f"{what} is pruned, but pruning.ramp begins with the dense network: set pruning.ramp.initial to the share of this "
            "run's sparsity that it has",
        )
    _latest(folder)


def start_from_run(run: Run) -> Event:
    """Give `run` the state of ``resume.from_run``; returns what is to be logged. A collective.

    Raises:
        UserError: that run has no sound checkpoint, or it does not fit.
    """
    folder = Path(str(run.config.resume.from_run))
    kept: list[dict[str, Any]] = []

    def find() -> tuple[str, Manifest]:
        name, manifest, state = _latest(folder)
        kept.append(state)
        return name, manifest

    name, manifest = run.world.on_main(find)
    state = run.world.share_state(kept[0] if kept else None)
    try:
        _set_state(run, manifest, state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder / 'checkpoints' / name} does not fit this run: {error}") from error
    return Event("start", f"started from {folder}, step {manifest.step}: its weights, optimizer and thresholds")


def _set_state(run: Run, manifest: Manifest, state: dict[str, Any]) -> None:
    options = group_options(run.optimizer)
    load_learned(run, state)
    change_options(run, manifest.config, options)
    if run.pruner is not None and state["pruner"] is not None:
        run.pruner.start_from(state["pruner"])
    elif run.pruner is not None:
        rebuild_pruner(run)


def _latest(folder: Path) -> tuple[str, Manifest, dict[str, Any]]:
    """The newest sound checkpoint in a run's folder: its name and what is in it."""
    store, problems = LocalStore(folder / "checkpoints"), []
    for name in reversed(store.names()):
        try:
            return name, *read_checkpoint(store, name)
        except CheckpointError as error:
            problems.append(str(error))
    found = f"none that can be used: {'; '.join(problems)}" if problems else "none"
    raise UserError(f"resume.from_run: of checkpoints in {folder / 'checkpoints'}, there is {found}")

"""When a run is saved, and how it goes on from what was saved."""

from __future__ import annotations

import logging
import time

from asp_dist.config import Config, UserError, differences, to_dict
from asp_dist.training.checkpoint import Manifest
from asp_dist.training.keeper import Event, Keeper
from asp_dist.training.remote import WAITS_S, Mirror, RemoteStore, open_storage, patiently
from asp_dist.training.run import Run, capture_state, restore_state
from asp_dist.training.rundir import CONFIG, IDENTITY, MODEL, SUMMARY, run_dir, versions
from asp_dist.training.store import LocalStore

log = logging.getLogger(__name__)


# What a run goes on from beside its checkpoint; the files that say whose the folder is come last.
RECORD = ("metrics.jsonl", "layers.jsonl", "wandb_id", IDENTITY, CONFIG)
RESULTS = (*RECORD, "layers.json", "report.html", MODEL, SUMMARY)


def build_keeper(config: Config, identity: str) -> Keeper:
    """The keeper of the run's checkpoints, in its folder or in ``output.storage``."""
    mirror = build_mirror(config)
    if mirror is None:
        return Keeper(LocalStore(run_dir(config) / "checkpoints"), identity, config.output.keep)
    address = f"{str(config.output.storage).split('?')[0].rstrip('/')}/{config.name}/checkpoints"
    store = RemoteStore(address, mirror.system, f"{mirror.path}/checkpoints")
    return Keeper(store, identity, config.output.keep, waits=WAITS_S, saved=lambda: mirror.send(RECORD))


def build_mirror(config: Config) -> Mirror | None:
    """The copies of the run's files in ``output.storage``, if there is one."""
    if config.output.storage is None:
        return None
    system, path = open_storage(config.output.storage)
    return Mirror(system, f"{path}/{config.name}", run_dir(config))


def fetch_record(config: Config) -> None:
    """Bring the run's record here from ``output.storage``, where the run's folder lacks it. For rank 0.

    Raises:
        UserError: the store does not answer.
    """
    mirror = build_mirror(config)
    if mirror is None:
        return
    try:
        fetched = patiently(lambda: mirror.fetch(RECORD), WAITS_S, str(config.output.storage))
    except OSError as error:
        raise UserError(f"output.storage = {config.output.storage!r} does not answer: {error}") from error
    if fetched:
        log.info("fetched %s from %s", ", ".join(fetched), config.output.storage)


def send_results(run: Run) -> None:
    """Copy the run's results to ``output.storage``. For rank 0; what fails is said, the results are here as well."""
    mirror = build_mirror(run.config)
    if mirror is None:
        return
    try:
        mirror.send(RESULTS)
    except OSError as error:
        log_events(run, [Event("warning", f"results not copied to {run.config.output.storage}: {error}")])


def due(run: Run) -> bool:
    """Whether a checkpoint is due after the step being done, by ``output.checkpoint_steps`` or the clock of rank 0.

    Never after a bad step: what is kept is the last good state.
    """
    output = run.config.output
    by_steps = output.checkpoint_steps is not None and (run.step + 1) % output.checkpoint_steps == 0
    minutes = output.checkpoint_minutes
    by_time = run.world.is_main and minutes is not None and run.keeper.seconds_since_save() >= 60.0 * minutes
    return by_steps or by_time


def save(run: Run, *, best: bool = False) -> None:
    """Save the run in the background; a collective."""
    if run.bad_steps:
        return
    log_events(run, run.keeper.events())
    state = capture_state(run)
    if run.world.is_main:
        manifest = Manifest(
            run=run.identity,
            step=run.step,
            world_size=run.world.world_size,
            config=to_dict(run.config),
            versions=versions(),
            metrics=run.results,
            best=best,
        )
        run.keeper.save(manifest, state)


def save_and_wait(run: Run) -> str:
    """Save the run before it stops; returns on every rank what went wrong, or nothing. A collective."""
    save(run)
    run.keeper.wait()
    events = run.keeper.events()
    log_events(run, events)
    failed = [event.message for event in events if event.kind == "warning"]
    return run.world.share(f"its checkpoint failed: {failed[-1]}" if failed else "")


def resume(run: Run) -> list[Event]:
    """Set `run` to its latest sound checkpoint, if there is one; returns what is to be logged. A collective.

    Raises:
        UserError: there are checkpoints, but none that can be used.
    """
    start = time.perf_counter()
    found = {}

    def find() -> str | None:
        run.keeper.store.clean()
        latest = run.keeper.latest()
        if latest is None:
            return None
        found["latest"] = latest
        return latest[0]

    name = run.world.on_main(find)
    events = run.keeper.events()
    if name is None:
        return events
    try:
        manifest, state = found["latest"][1:] if found else run.keeper.load(name)
        restore_state(run, state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{run.keeper.store.where(name)} does not fit this run: {error}") from error
    text = f"resumed from {name} ({manifest.step} of {run.total_steps} steps)"
    for change in changes(run, manifest):
        text += f"; {change}"
    log.info("%s in %.1f s", text, time.perf_counter() - start)
    return [*events, Event("resume", text)]


def changes(run: Run, manifest: Manifest) -> list[str]:
    """What is different from when the checkpoint was written, in words."""
    said = []
    before, now = manifest.world_size, run.world.world_size
    if before != now:
        said.append(
            f"{now} workers instead of {before}: the global batch and its order stay, {run.config.data.batch_size // now} "
            "images per worker and step, new random draws, so no longer bit for bit"
        )
    for name, (old, new) in differences(manifest.config, to_dict(run.config)).items():
        said.append(f"{name} {old!r} -> {new!r}")
    for name, version in versions().items():
        if manifest.versions.get(name) != version:
            said.append(f"{name} {manifest.versions.get(name)} -> {version}")
    return said


def log_events(run: Run, events: list[Event]) -> None:
    """Put the keeper's events into the run's record."""
    for event in events:
        (log.warning if event.kind == "warning" else log.info)(event.message)
        run.tracker.log(run.step, {"kind": "event", "event": event.kind, "message": event.message})

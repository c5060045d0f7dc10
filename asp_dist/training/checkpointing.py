"""When a run is saved, and how it resumes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from asp_dist.checkpoint.folder_lock import hold_lease, place_of
from asp_dist.checkpoint.format import Manifest, versions
from asp_dist.checkpoint.manager import CheckpointManager, Event, Found
from asp_dist.checkpoint.record import run_dir
from asp_dist.checkpoint.remote_storage import Mirror, RemoteStore, StoredLease
from asp_dist.checkpoint.storage import LocalStore, Store
from asp_dist.config import Config, differences, to_dict
from asp_dist.errors import UserError
from asp_dist.files import WAITS_S, retry
from asp_dist.object_store import open_storage
from asp_dist.tracking.rows import dropped_name, read_rows
from asp_dist.tracking.schema import (
    CONFIG_FILE,
    EVENT,
    IDENTITY_FILE,
    LAYERS_FILE,
    LAYERS_HISTORY_FILE,
    METRICS_FILE,
    MODEL_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    WARNING,
)
from asp_dist.training.changes import change_options, check_changes, group_options
from asp_dist.training.run import Run, capture_state, restore_state
from asp_dist.training.warm_start import start_from_run

log = logging.getLogger(__name__)


# What a run resumes from besides its checkpoint; the files that say whose the folder is come last.
RECORD = (
    *(METRICS_FILE, dropped_name(METRICS_FILE), LAYERS_HISTORY_FILE, dropped_name(LAYERS_HISTORY_FILE)),
    *("wandb_id", IDENTITY_FILE, CONFIG_FILE),
)
# What the trackers may still add to when a run ends, and what is the same from then on.
GROWING = (*RECORD, LAYERS_FILE, REPORT_FILE)
RESULTS = (*GROWING, MODEL_FILE, SUMMARY_FILE)


def build_checkpoint_manager(config: Config, identity: str, written: Callable[[int], None] | None = None) -> CheckpointManager:
    """The manager of the run's checkpoints, in its folder or in ``output.storage``; `written` learns each one's step."""
    mirror = build_mirror(config)
    store, keep = build_store(config, config.output.storage), config.output.keep
    if mirror is None:
        return CheckpointManager(store, identity, keep, written=written)
    return CheckpointManager(store, identity, keep, waits=WAITS_S, saved=lambda: mirror.send(RECORD), written=written)


def build_store(config: Config, storage: str | None) -> Store:
    """The run's checkpoints in the store at `storage`; None: in its folder."""
    if storage is None:
        return LocalStore(run_dir(config) / "checkpoints")
    system, path = open_storage(storage)
    address = f"{storage.split('?')[0].rstrip('/')}/{config.name}/checkpoints"
    return RemoteStore(address, system, f"{path}/{config.name}/checkpoints")


def build_mirror(config: Config) -> Mirror | None:
    """The copies of the run's files in ``output.storage``, if there is one."""
    if config.output.storage is None:
        return None
    system, path = open_storage(config.output.storage)
    return Mirror(system, f"{path}/{config.name}", run_dir(config))


@contextmanager
def hold_storage(config: Config, wait_s: float) -> Iterator[None]:
    """Hold the run's place in ``output.storage``, if it has one, against other machines; for rank 0, who has its folder.

    Raises:
        FolderBusy: another machine still writes there; names it.
        OSError: the store does not answer.
    """
    if config.output.storage is None:
        yield
        return
    system, path = open_storage(config.output.storage)
    address = f"{config.output.storage.split('?')[0].rstrip('/')}/{config.name}"
    lease = StoredLease(address, system, f"{path}/{config.name}")
    retry(lease.read, WAITS_S, address)
    with hold_lease(lease, wait_s, place=place_of(run_dir(config)), beat_s=lease.beat_s, silence_s=lease.silence_s):
        yield


def fetch_record(config: Config) -> None:
    """Bring the run's record here from ``output.storage``, where it is ahead of the run's folder. For rank 0.

    Raises:
        UserError: the store has another run of this name.
        OSError: it does not answer.
    """
    mirror = build_mirror(config)
    if mirror is None:
        return

    def fetch() -> list[str]:
        check_identity(config, mirror)
        return mirror.fetch(RECORD)

    try:
        fetched = retry(fetch, WAITS_S, str(config.output.storage))
    except OSError as error:
        raise OSError(f"output.storage = {config.output.storage!r} does not answer: {error}") from error
    if fetched:
        log.info("fetched %s from %s", ", ".join(fetched), config.output.storage)


def check_identity(config: Config, mirror: Mirror) -> None:
    """Raise `UserError` if the folder and the store have records of different runs."""
    theirs, ours = mirror.read(IDENTITY_FILE), run_dir(config) / IDENTITY_FILE
    if theirs is None or not ours.is_file():
        return
    try:
        stored, own = (json.loads(text)["id"] for text in (theirs, ours.read_text()))
    except (ValueError, KeyError, TypeError):
        return  # found to be unreadable when the folder is claimed
    if stored != own:
        raise UserError(
            f"{config.output.storage} has another run called {config.name!r} ({stored}) than {run_dir(config)} ({own}): give "
            "this run another name (--name), or remove the folder to resume the run in the store"
        )


def send_results(run: Run, names: tuple[str, ...] = RESULTS) -> None:
    """Copy the run's results, or some of them, to ``output.storage``; on rank 0.

    A failure is logged: the results are in the run's folder too.
    """
    mirror = build_mirror(run.config)
    if mirror is None:
        return
    try:
        mirror.send(names)
    except OSError as error:
        log_events(run, [Event(WARNING, f"results not copied to {run.config.output.storage}: {error}")])


def send_missing_results(config: Config) -> None:
    """Copy the results of a finished run to ``output.storage`` if it lacks one of them."""
    mirror = build_mirror(config)
    if mirror is None:
        return
    try:
        if mirror.lacks(RESULTS):
            mirror.send(RESULTS)
            log.info("copied the results to %s", config.output.storage)
    except OSError as error:
        log.warning("results not copied to %s: %s", config.output.storage, error)


def due(run: Run) -> bool:
    """Whether a checkpoint is due after the step being done, by ``output.checkpoint_steps`` or the clock of rank 0.

    Never after a bad step: what is kept is the last good state.
    """
    output = run.config.output
    by_steps = output.checkpoint_steps is not None and (run.step + 1) % output.checkpoint_steps == 0
    minutes = output.checkpoint_minutes
    if by_steps or minutes is None or not run.world.is_main or run.checkpoints.seconds_since_save() < 60.0 * minutes:
        return by_steps
    return not run.checkpoints.busy()


def save(run: Run, *, best: bool = False) -> None:
    """Save the run in the background; a collective."""
    if run.bad_steps:
        return
    log_events(run, run.checkpoints.events())
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
        run.checkpoints.save(manifest, state)


def save_and_wait(run: Run) -> str:
    """Save the run before it stops; returns on every rank what went wrong, or nothing. A collective."""
    save(run)
    run.checkpoints.wait()
    events = run.checkpoints.events()
    log_events(run, events)
    failed = [event.message for event in events if event.kind == WARNING]
    return run.world.share(f"its checkpoint failed: {failed[-1]}" if failed else "")


@dataclass(frozen=True)
class Resumed:
    """How a run began.

    Attributes:
        events: what is to be logged.
        elsewhere: whether its checkpoint lies in another place than new ones go to.
        best: whether that checkpoint was the best.
    """

    events: list[Event]
    elsewhere: bool = False
    best: bool = False


def resume(run: Run, places: Sequence[str | None] = ()) -> Resumed:
    """Set `run` to its latest sound checkpoint, if there is one; a collective.

    Args:
        run: the run at its first step.
        places: further ``output.storage`` that it has had; None: its own folder.

    Raises:
        UserError: there are checkpoints, but none that can be used; or there were some, and none is left.
        OSError: a place where it has had checkpoints cannot be read now.
    """
    start = time.perf_counter()
    kept: list[Found] = []
    stores = [build_store(run.config, place) for place in places]

    def find() -> tuple[str, int, Manifest] | None:
        run.checkpoints.store.clean()
        found = run.checkpoints.latest(stores)
        if found is None:
            refuse_to_start_over(run, stores)
            return None
        kept.append(found)
        return found.name, stores.index(found.place) if found.place in stores else -1, found.manifest

    answer = run.world.on_main(find)
    events = run.checkpoints.events()
    if answer is None:
        return Resumed([*events, start_from_run(run)] if run.config.resume.from_run is not None else events)
    name, index, manifest = answer
    place = run.checkpoints.store if index < 0 else stores[index]
    try:
        state = run.world.share_state(kept[0].state if kept else None)
        options = group_options(run.optimizer)
        check_changes(run, manifest.config, state)
        restore_state(run, state)
        change_options(run, manifest.config, options)
    except UserError:
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{place.where(name)} does not fit this run: {error}") from error
    text = f"resumed from {name if index < 0 else place.where(name)} ({manifest.step} of {run.total_steps} steps)"
    for change in changes(run, manifest):
        text += f"; {change}"
    log.info("%s in %.1f s", text, time.perf_counter() - start)
    return Resumed([*events, Event("resume", text)], index >= 0, manifest.best)


def refuse_to_start_over(run: Run, stores: Sequence[Store]) -> None:
    """Raise `UserError` if the run's record says that checkpoints were saved, of which none is left."""
    rows = read_rows(run.folder / METRICS_FILE)
    saved = [row["message"] for row in rows if row.get("event") == "checkpoint"]
    if saved:
        places = " and ".join(store.where("") for store in (run.checkpoints.store, *stores))
        raise UserError(
            f"{run.folder} has the record of a run ({saved[-1]}), but no checkpoint is left in {places}: restore one, or "
            "give the new run another name (--name)"
        )


def changes(run: Run, manifest: Manifest) -> list[str]:
    """What is different from when the checkpoint was written, in words."""
    texts = []
    before, now = manifest.world_size, run.world.world_size
    if before != now:
        texts.append(
            f"{now} workers instead of {before}: the global batch and its order stay, {run.config.data.batch_size // now} "
            "images per worker and step, new random draws, so no longer bit for bit"
        )
    for name, (old, new) in differences(manifest.config, to_dict(run.config)).items():
        texts.append(f"{name} {old!r} -> {new!r}")
    for name, version in versions().items():
        if manifest.versions.get(name) != version:
            texts.append(f"{name} {manifest.versions.get(name)} -> {version}")
    return texts


def log_events(run: Run, events: list[Event]) -> None:
    """Put the manager's events into the run's record."""
    for event in events:
        (log.warning if event.kind == WARNING else log.info)(event.message)
        run.tracker.log(run.step, {"kind": EVENT, "event": event.kind, "message": event.message})

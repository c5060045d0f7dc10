"""Sweeps: variants of one configuration, each an ordinary run of its own, which Ray Tune starts and keeps apart."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import tune

from asp_dist.checkpoint.folder_lock import FolderBusy, hold_folder
from asp_dist.checkpoint.record import finished_summary, run_dir, with_absolute_paths
from asp_dist.cluster import user_keys
from asp_dist.cluster.ray_private import forget_word, get_word, put_word
from asp_dist.cluster.resources import check_room, this_machine
from asp_dist.cluster.session import address_of, ray_session
from asp_dist.cluster.signals import Signals
from asp_dist.config import Config, to_dict
from asp_dist.errors import EXIT_STOPPED, UserError, check
from asp_dist.files import repeating, write_text
from asp_dist.tracking import Tail
from asp_dist.tracking.rows import Row
from asp_dist.tracking.schema import METRICS_FILE
from asp_dist.training.preflight import look_at_data, preflight

OnRow = Callable[[str, Row], None]
OnEnd = Callable[[str, int, str], None]
POLL_S = 0.5
PR_SET_PDEATHSIG = 1
SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # a signal stops the runs after a checkpoint
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs keep their own records
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "RAY_AIR_NEW_OUTPUT": "0",  # and verbose=0: the lines are the sweep's own
}


class SweepStop:
    """Asks the runs of a sweep to stop, through the memory of Ray's head."""

    def __init__(self) -> None:
        self._word = f"asp_dist/sweep/{uuid.uuid4().hex[:12]}/stop"

    def request_stop(self, reason: str) -> None:
        """Ask all of them to save a checkpoint and end, and start no others."""
        put_word(self._word, reason)

    def reason(self) -> str | None:
        """What `request_stop` was given, or None."""
        return get_word(self._word)

    def forget(self) -> None:
        """Remove the word; call it while connected to Ray."""
        forget_word(self._word)


def sweep_dir(point: Config, name: str) -> Path:
    """Folder of the own files of a sweep over the configuration called `name`: ``OUTPUT.DIR/NAME-sweep``."""
    return run_dir(point).with_name(f"{name}-sweep")


def run_sweep(
    points: Sequence[Config],
    folder: Path,
    *,
    concurrent: int = 1,
    on_row: OnRow = lambda name, row: None,
    on_end: OnEnd = lambda name, code, message: None,
) -> dict[str, int]:
    """Run those of `points` that are not finished.

    Args:
        points: the runs; alike in `cluster` and ``output.dir``, with names of their own.
        folder: the sweep's folder, which all nodes see: configurations and logs of the runs.
        concurrent: runs at a time.
        on_row: called with a run's name and each new row of its ``metrics.jsonl``.
        on_end: called with the name, exit code and last words of a run that has ended.

    Returns:
        Exit code of each run by its name, as of ``asp-dist train``; 0: it is finished, 75: it was stopped or not started.

    Raises:
        UserError: the cluster has no room for `concurrent` of them, or another sweep is at work in the folder.
        KeyboardInterrupt: a second SIGINT.
    """
    points = [_everywhere(point) for point in points]
    codes = {point.name: 0 if finished_summary(point) else EXIT_STOPPED for point in points}
    waiting = [point for point in points if codes[point.name]]
    if not waiting:
        return codes
    cluster = waiting[0].cluster
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    with Signals() as signals, ExitStack() as stack:
        try:
            stack.enter_context(hold_folder(folder))
        except FolderBusy as error:
            raise UserError(f"another sweep of that name is at work: {error}") from error
        if address_of(cluster) == "local":
            check_room(waiting, [this_machine()], concurrent, local=True)  # fails before anything starts
        local = stack.enter_context(ray_session(cluster))
        signals.install()
        shares = check_room(waiting, ray.nodes(), concurrent, local=local)
        stop = SweepStop()
        stack.callback(stop.forget)
        signals.connect(stop)
        address = ray.get_runtime_context().gcs_address
        for point in waiting:
            place = dataclasses.replace(point.cluster, address=address, cpus_per_worker=shares.cpus)
            _write_config(dataclasses.replace(point, cluster=place), folder)
        stack.enter_context(_showing(waiting, on_row))
        codes.update(_tune([point.name for point in waiting], folder, stop, concurrent, cluster.max_failures, on_end))
    return codes


def _everywhere(point: Config) -> Config:
    """`point` with its paths named from the root: its process may run on another machine."""
    point = with_absolute_paths(point)
    return dataclasses.replace(point, output=dataclasses.replace(point.output, dir=str(run_dir(point).parent)))


def _write_config(config: Config, folder: Path) -> None:
    path = config_file(folder, config.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


def config_file(folder: Path, name: str) -> Path:
    """The configuration that the run called `name` is started with."""
    return folder / "points" / f"{name}.yaml"


@contextmanager
def _showing(points: Sequence[Config], on_row: OnRow) -> Iterator[None]:
    """Pass on the rows that the runs write."""
    tails = {point.name: Tail(run_dir(point) / METRICS_FILE, from_end=True) for point in points}

    def show() -> None:
        for name, tail in tails.items():
            for row in tail.read():
                on_row(name, row)

    with repeating(show, POLL_S, "sweep"):
        yield
    show()


class _Ends(tune.Callback):
    """Tells of runs that have ended."""

    def __init__(self, on_end: OnEnd) -> None:
        self._on_end = on_end
        self.codes: dict[str, int] = {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The process of a run has ended."""
        name, result = trial.config["name"], trial.last_result
        self.codes[name] = int(result["code"])
        self._on_end(name, self.codes[name], str(result["message"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """What started the process of a run is gone, with its machine perhaps, more often than is allowed."""
        name = trial.config["name"]
        self.codes[name] = 1
        self._on_end(name, 1, "the machine that started it is gone, or Ray's process there")


def _tune(names: list[str], folder: Path, stop: SweepStop, concurrent: int, max_failures: int, on_end: OnEnd) -> dict[str, int]:
    """Let Ray Tune run each of the runs called `names`; returns their exit codes."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    environment = {**user_keys.settings(), **user_keys.from_environment()}
    records = folder / "tune"
    shutil.rmtree(records, ignore_errors=True)
    ends = _Ends(on_end)
    tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_point, folder=folder, stop=stop, environment=environment),
            tune.PlacementGroupFactory([{"memory": 1}]),  # not nothing, which Ray refuses; the CPUs are for the workers
        ),
        param_space={"name": tune.grid_search(names)},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent, reuse_actors=True),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[ends],
            failure_config=tune.FailureConfig(max_failures=max_failures),
        ),
    ).fit()
    shutil.rmtree(records, ignore_errors=True)
    return ends.codes


def run_point(config: dict[str, Any], *, folder: Path, stop: SweepStop, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run ``asp-dist train`` for the run called ``config["name"]``, as a process of this machine; what Ray Tune calls.

    Returns:
        ``code``, its exit code, and ``message``, its last words.
    """
    name = config["name"]
    if stop.reason() is not None:
        return {"code": EXIT_STOPPED, "message": "not started"}
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "asp_dist", "train", "--config", str(config_file(folder, name)), "--quiet"]
    variables = {**os.environ, **environment}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=_end_along
        )
    asked = False
    while process.poll() is None:
        if not asked and stop.reason() is not None:
            asked = True
            process.terminate()
        time.sleep(POLL_S)
    return {"code": process.returncode, "message": last_words(log)}


def _end_along() -> None:
    """Let Linux end this process with the thread that started it: a run whose sweep was killed does not go on alone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def last_words(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def check_points(points: Sequence[Config]) -> list[str]:
    """Check that `points` can be runs of one sweep, and those that are not finished can run.

    Returns:
        The names of those that are.

    Raises:
        UserError: two have one name; one cannot run, see `preflight`; the message says which.
    """
    names = [point.name for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, f"--set gives two runs the name {', '.join(twice)}: give each value once")
    check(points[0].cluster.mode == "ray", "cluster.mode = local: a sweep runs on Ray; leave cluster.mode out")
    finished, listed = [], {}
    for point in map(with_absolute_paths, points):
        if finished_summary(point) is not None:
            finished.append(point.name)
            continue
        try:
            if point.data not in listed:
                listed[point.data] = look_at_data(point)
            preflight(point, listed[point.data])
        except UserError as error:
            raise UserError(f"{point.name}: {error}") from error
    return finished

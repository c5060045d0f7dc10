"""The driver of a run on a Ray cluster: starts Ray Train, shows its rows, passes signals on, and cleans up."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from asp_dist.checkpoint.record import run_dir, with_absolute_paths
from asp_dist.cluster import user_keys
from asp_dist.cluster.failures import ClusterError, FailureLog, describe, event, fatal_error, one_line, repeated
from asp_dist.cluster.launch_files import LaunchFiles
from asp_dist.cluster.ray_private import ClusterTrainer, SaveBeforeResize
from asp_dist.cluster.resources import Resources, check_storage, plan_resources, this_machine
from asp_dist.cluster.session import address_of, ray_session
from asp_dist.cluster.signals import Signals
from asp_dist.cluster.worker import ClusterTorchConfig, Job, TrainFunction, train_loop_per_worker
from asp_dist.config import Config
from asp_dist.tracking import Tail
from asp_dist.tracking.schema import METRICS_FILE
from asp_dist.training.hooks import PREEMPTION, RESIZE, Stopped

OnRow = Callable[[dict[str, Any]], None]
POLL_S = 0.3
GROUP_START_S = 60.0


def run(config: Config, on_row: OnRow | None = None, *, train: TrainFunction | None = None) -> dict[str, Any]:
    """Train on a Ray cluster and return rank 0's summary.

    Args:
        config: the run; relative paths start from this process's working directory.
        on_row: called with each new row of the run's ``metrics.jsonl``, and with an event row per failure.
        train: what each worker runs; None: `asp_dist.training.train`.

    Raises:
        UserError: the cluster is missing or too small, a node does not see the data, or a worker found a mistake.
        Stopped: SIGTERM or SIGINT ended the run after a checkpoint.
        ClusterError: the workers failed more than ``cluster.max_failures`` times without getting further in between, or in a
            way that would repeat.
        KeyboardInterrupt: a second SIGINT.
    """
    # The workers have another working directory.
    config = with_absolute_paths(config)
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, dir=str(run_dir(config).parent)))
    with Signals() as signals:
        if address_of(config.cluster) == "local":
            plan_resources(config, [this_machine()], local=True)  # fails before anything starts
        launch = _Launch(config, signals, on_row or (lambda row: None), train)
        failures, reached = 0, 0
        while True:
            try:
                return launch.run()
            except RayActorError as error:  # Ray Train's controller died; a new session leaves nothing of it behind
                failures = 1 if launch.step > reached else failures + 1
                reached = max(reached, launch.step)
                if 0 <= config.cluster.max_failures < failures:
                    raise ClusterError(f"Ray Train's controller died {failures} times: {one_line(error)}") from error
                launch.on_row(event("Ray Train's controller died; starting another", launch.step))


class _Launch:
    """A run on Ray, for as many launches of Ray Train as it takes."""

    def __init__(self, config: Config, signals: Signals, on_row: OnRow, train: TrainFunction | None) -> None:
        self.config = config
        self.signals = signals
        self.on_row = on_row
        self.train = train
        self.log = str(run_dir(config) / "logs")
        self.step = 0
        self.fits = 0
        self.causes: set[tuple[str, int]] = set()
        self.repeated: ClusterError | None = None

    def run(self) -> dict[str, Any]:
        """Connect to Ray, check that the run fits, train, and return rank 0's summary.

        Where machines that were announced to go away ended the workers, after a checkpoint, others go on.
        """
        with ExitStack() as after_ray, ray_session(self.config.cluster) as local, ExitStack() as after_fit:
            self.signals.install()  # ray.init has set a SIGTERM handler of its own
            user_keys.take()
            needed = plan_resources(self.config, ray.nodes(), local=local)
            files = LaunchFiles.begin(run_dir(self.config))
            after_ray.callback(files.end)
            check_storage(self.config, files, ray.nodes(), needed)
            self.signals.connect(files)
            self._say_sizes(needed)
            after_fit.callback(files.forget)
            outcome = self._fit(files, needed)
            while outcome.get("stopped", [None])[0] in (PREEMPTION, RESIZE):
                reason, step = outcome["stopped"]
                self.on_row({**event(f"{reason}: saved at step {step}; others go on", step), "event": "workers"})
                files.withdraw_resize()
                outcome = self._fit(files, needed)
        if "stopped" in outcome:
            raise Stopped(*outcome["stopped"])
        if "fatal" in outcome:
            raise fatal_error(outcome["fatal"], self.log)
        summary: dict[str, Any] = outcome["summary"]
        return summary

    def _say_sizes(self, needed: Resources) -> None:
        """Name the sizes that an elastic group will have, where the batch does not divide among others."""
        cluster = self.config.cluster
        left_out = set(range(cluster.min_workers or cluster.num_workers, cluster.num_workers + 1)) - set(needed.sizes)
        if left_out:
            sizes, others = (", ".join(map(str, sorted(group))) for group in (needed.sizes, left_out))
            batch = self.config.data.batch_size
            text = f"elastic group of {sizes} workers; data.batch_size = {batch} cannot be shared by {others}"
            self.on_row({**event(text, self.step), "event": "workers"})

    def _fit(self, files: LaunchFiles, needed: Resources) -> dict[str, Any]:
        """Run Ray Train once; another thread shows what happens meanwhile."""
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        trainer = self._trainer(files, needed)
        tails = (
            Tail(files.run_dir / METRICS_FILE, from_end=True),
            Tail(files.folder / "failures", from_end=True),
        )
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(files, trainer, done, *tails), name="watcher", daemon=True)
        watcher.start()
        try:
            result = trainer.fit()
        except (RayError, RuntimeError, TrainingFailedError) as error:
            if self.repeated is not None:
                raise self.repeated from error
            fatal = files.fatal()
            if fatal is not None:
                raise fatal_error(fatal, self.log) from error
            raise self._explain(error) from error
        finally:
            done.set()
            watcher.join()
        outcome: dict[str, Any] = result.return_value
        return outcome

    def _watch(self, files: LaunchFiles, trainer: ClusterTrainer, done: threading.Event, metrics: Tail, failures: Tail) -> None:
        """Show new rows until `done`; end Ray Train at an error that a restart would only repeat."""
        while True:
            last = done.wait(POLL_S)
            for row in metrics.read():
                self.step = row["step"]
                self.on_row(row)
            for row in failures.read():
                self._notice(row.pop("would_repeat"), row["message"])
                self.on_row({**row, "step": self.step})
            if last:
                return
            if files.fatal() is not None or self.repeated is not None:
                trainer.end()

    def _notice(self, would_repeat: bool, message: str) -> None:
        """Remember a failure; the second time that it comes at the same step, restarts are of no use."""
        cause = message.partition(": ")[2], self.step  # whichever rank had it
        if would_repeat and cause in self.causes:
            self.repeated = repeated(message, self.step, self.log)
        self.causes.add(cause)

    def _trainer(self, files: LaunchFiles, needed: Resources) -> ClusterTrainer:
        cluster = self.config.cluster
        environment = user_keys.settings()
        elastic = cluster.min_workers is not None
        trainer = ClusterTrainer(
            train_loop_per_worker,
            train_loop_config={"job": Job(self.config, files, self.train, user_keys.from_environment())},
            torch_config=ClusterTorchConfig(
                backend="cpu:gloo,cuda:nccl" if needed.gpus else "gloo",
                timeout_s=math.ceil(cluster.timeout_s),
                logs=self.log,
            ),
            scaling_config=ScalingConfig(
                num_workers=(needed.sizes[0], needed.sizes[-1]) if elastic else needed.sizes[-1],
                use_gpu=needed.gpus > 0,
                resources_per_worker=needed.per_worker(),
            ),
            run_config=RunConfig(
                name=f"ray-{files.launch}-{self.fits}",
                storage_path=str(files.folder),
                failure_config=FailureConfig(
                    max_failures=cluster.max_failures,
                    # A group that cannot start waits for a node to come back: ten minutes, or as long as a collective would.
                    controller_failure_limit=max(10, math.ceil(cluster.timeout_s / GROUP_START_S)),
                ),
                callbacks=[FailureLog(files), SaveBeforeResize(files.request_resize, files.withdraw_resize)],
                worker_runtime_env={"env_vars": environment} if environment else None,
            ),
        )
        trainer.sizes = needed.sizes if elastic else ()
        trainer.progress = files.progress
        self.fits += 1
        return trainer

    def _explain(self, error: Exception) -> Exception:
        if isinstance(error, RayActorError):
            return error
        if isinstance(error, WorkerGroupError):
            limit = self.config.cluster.max_failures
            return ClusterError(
                f"the workers failed more often than cluster.max_failures = {limit} allows without getting further; the last "
                f"time, {describe(error.worker_failures)} (logs: {self.log})",
                str(error),
            )
        cause = getattr(error, "controller_failure", error)
        return ClusterError(f"Ray Train failed: {one_line(cause)} (logs: {self.log})", str(error))

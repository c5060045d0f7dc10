"""The driver of a run on a Ray cluster: starts Ray Train, shows its rows, passes signals on, and cleans up."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2.api.exceptions import WorkerGroupError

from asp_dist.cluster import keys
from asp_dist.cluster.control import Control
from asp_dist.cluster.failures import ClusterError, FailureLog, describe, event, fatal_error, one_line
from asp_dist.cluster.resources import Resources, check_storage, plan_resources, this_machine
from asp_dist.cluster.session import address_of, ray_session
from asp_dist.cluster.signals import Signals
from asp_dist.cluster.worker import ClusterTorchConfig, Job, TrainFunction, work
from asp_dist.config import Config
from asp_dist.tracking import Tail
from asp_dist.training.hooks import Stopped
from asp_dist.training.rundir import run_dir, with_absolute_paths

OnRow = Callable[[dict[str, Any]], None]
POLL_S = 0.3
GROUP_START_S = 60.0
# Settings of the communication libraries that the workers take over from the driver.
PASSED_ON = ("NCCL_", "GLOO_", "TORCH_", "HF_HUB_OFFLINE")


def run(config: Config, on_row: OnRow | None = None, *, train: TrainFunction | None = None) -> dict[str, Any]:
    """Train on a Ray cluster and return rank 0's summary.

    Args:
        config: the run; relative paths start from this process's working directory.
        on_row: called with each new row of the run's ``metrics.jsonl``, and with an event row per failure.
        train: what each worker runs; None: `asp_dist.training.train`.

    Raises:
        UserError: the cluster is missing or too small, a node does not see the data, or a worker found a mistake.
        Stopped: SIGTERM, SIGINT or a preemption ended the run behind a checkpoint.
        ClusterError: the workers failed more than ``cluster.max_failures`` times, or in a way that would repeat.
        KeyboardInterrupt: a second SIGINT.
    """
    # The workers have another working directory.
    config = with_absolute_paths(config)
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, dir=str(run_dir(config).parent)))
    with Signals() as signals, ExitStack() as after_ray:
        if address_of(config.cluster) == "local":
            plan_resources(config, [this_machine()], local=True)  # fails before anything starts
        with ray_session(config.cluster) as local:
            signals.install()  # ray.init has set a SIGTERM handler of its own
            keys.collect()
            needed = plan_resources(config, ray.nodes(), local=local)
            control = Control.begin(run_dir(config))
            after_ray.callback(control.end)
            check_storage(config, control, ray.nodes(), needed)
            signals.connect(control)
            return _Launch(config, control, needed, on_row or (lambda row: None), train).run()


class ClusterTrainer(TorchTrainer):
    """Ray Train's trainer, which leaves SIGINT to this project and can be ended from another thread.

    It also leaves Ray Data out, which would cost an actor and a heavy import in each worker.
    """

    _controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, DatasetsCallback)]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def end(self) -> None:
        """Kill the controller, and the workers with it: `fit` raises. Does nothing outside of `fit`."""
        controller, self._controller = self._controller, None
        if controller is not None:
            ray.kill(controller)


class _Launch:
    """One launch of Ray Train."""

    def __init__(
        self, config: Config, control: Control, needed: Resources, on_row: OnRow, train: TrainFunction | None
    ) -> None:
        self.config = config
        self.control = control
        self.needed = needed
        self.on_row = on_row
        self.job = Job(config, control, train, keys.here())
        self.log = str(control.run_dir / "logs")
        self.step = 0

    def run(self) -> dict[str, Any]:
        """Train, over as many controllers as die under it, and return rank 0's summary."""
        failures = 0
        while True:
            try:
                outcome = self._fit()
                break
            except RayActorError as error:  # the controller died; the checkpoints are the run's own
                failures += 1
                if 0 <= self.config.cluster.max_failures < failures:
                    raise ClusterError(f"Ray Train's controller died {failures} times: {one_line(error)}") from error
                self.on_row(event("Ray Train's controller died; starting another", self.step))
        if "stopped" in outcome:
            raise Stopped(*outcome["stopped"])
        if "fatal" in outcome:
            raise fatal_error(outcome["fatal"], self.log)
        summary: dict[str, Any] = outcome["summary"]
        return summary

    def _fit(self) -> dict[str, Any]:
        """Run Ray Train once; another thread shows what happens meanwhile."""
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        trainer = self._trainer()
        tails = (
            Tail(self.control.run_dir / "metrics.jsonl", from_end=True),
            Tail(self.control.folder / "failures", from_end=True),
        )
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(trainer, done, *tails), name="watcher", daemon=True)
        watcher.start()
        try:
            result = trainer.fit()
        except (RayError, RuntimeError) as error:
            fatal = self.control.fatal()
            if fatal is not None:
                raise fatal_error(fatal, self.log) from error
            raise self._explain(error) from error
        finally:
            done.set()
            watcher.join()
        outcome: dict[str, Any] = result.return_value
        return outcome

    def _watch(self, trainer: ClusterTrainer, done: threading.Event, metrics: Tail, failures: Tail) -> None:
        """Show new rows until `done`; end Ray Train at an error that a restart would only repeat."""
        while True:
            last = done.wait(POLL_S)
            for row in metrics.read():
                self.step = row["step"]
                self.on_row(row)
            for row in failures.read():
                self.on_row({**row, "step": self.step})
            if last:
                return
            if self.control.fatal() is not None:
                trainer.end()

    def _trainer(self) -> ClusterTrainer:
        cluster, needed = self.config.cluster, self.needed
        elastic = needed.min_workers < needed.workers
        environment = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}
        return ClusterTrainer(
            work,
            train_loop_config=self.job,  # handed to `work` as it is
            torch_config=ClusterTorchConfig(
                backend="cpu:gloo,cuda:nccl" if needed.gpus else "gloo", timeout_s=math.ceil(cluster.timeout_s)
            ),
            scaling_config=ScalingConfig(
                num_workers=(needed.min_workers, needed.workers) if elastic else needed.workers,
                use_gpu=needed.gpus > 0,
                resources_per_worker=needed.per_worker(),
            ),
            run_config=RunConfig(
                name=f"ray-{self.control.launch}",
                storage_path=str(self.control.folder),
                failure_config=FailureConfig(
                    max_failures=cluster.max_failures,
                    # A group that cannot start waits for a node to come back, as long as a collective would wait.
                    controller_failure_limit=math.ceil(cluster.timeout_s / GROUP_START_S),
                ),
                callbacks=[FailureLog(self.control)],
                worker_runtime_env={"env_vars": environment} if environment else None,
            ),
        )

    def _explain(self, error: Exception) -> Exception:
        if isinstance(error, RayActorError):
            return error
        if isinstance(error, WorkerGroupError):
            limit = self.config.cluster.max_failures
            return ClusterError(
                f"the workers failed more often than cluster.max_failures = {limit} allows; the last time, "
                f"{describe(error.worker_failures)} (logs: {self.log})",
                str(error),
            )
        cause = getattr(error, "controller_failure", error)
        return ClusterError(f"Ray Train failed: {one_line(cause)} (logs: {self.log})", str(error))

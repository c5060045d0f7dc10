"""What this project uses of Ray that is not public: check this file when Ray is updated."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray._private import services, worker
from ray._private.utils import get_num_cpus
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_initialized, _internal_kv_put
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.torch.config import _TorchBackend as TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = [
    "ClusterTrainer",
    "DividingScalingPolicy",
    "PatientFailurePolicy",
    "SaveBeforeResize",
    "TorchBackend",
    "find_cluster",
    "forget_word",
    "get_num_cpus",
    "get_word",
    "preempted",
    "put_in_head_memory",
    "put_word",
    "quiet_raylet",
    "take_from_head_memory",
]

logger = logging.getLogger(__name__)
SAVE_WAIT_S = 300.0
SAVE_POLL_S = 0.5


class DividingScalingPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy, which leaves workers that the batch does not divide among on their nodes, idle.

    Lives in Ray Train's controller.

    Args:
        scaling_config: Ray's own.
        sizes: the sizes that a group may have.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.sizes = tuple(sizes)

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        offered = super()._count_possible_workers(reserved_resources)
        return max((size for size in self.sizes if size <= offered), default=0)


class PatientFailurePolicy(DefaultFailurePolicy):
    """Ray Train's failure policy, which counts failures since the run last got further. Lives in Ray Train's controller.

    Args:
        failure_config: Ray's own.
        progress: tells how far the run has ever got, in steps.
    """

    def __init__(self, failure_config: FailureConfig, progress: Callable[[], int]) -> None:
        super().__init__(failure_config)
        self.progress = progress
        self._reached = 0

    def make_decision(self, training_failed_error: Any) -> Any:
        """Restart or give up."""
        reached = self.progress()
        if reached > self._reached:
            self._reached = reached
            self._worker_group_failures = self._controller_failures = 0
        return super().make_decision(training_failed_error)


class SaveBeforeResize(ControllerCallback, WorkerGroupCallback):
    """Lets the workers save a checkpoint and end before their group gets another size. Lives in Ray Train's controller.

    Args:
        request: asks the workers for it.
        withdraw: takes the request back.
    """

    def __init__(self, request: Callable[[], None], withdraw: Callable[[], None]) -> None:
        self._request = request
        self._withdraw = withdraw
        self._group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Remember the group that trains."""
        self._group = worker_group

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Forget it."""
        self._group = None

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Wait until a group that trains has saved; one that has failed, or a first one, has nothing to save."""
        group = self._group
        status = None if group is None else group.get_latest_poll_status()
        if status is None or status.errors or status.finished:
            return
        self._request()
        deadline = time.monotonic() + SAVE_WAIT_S
        try:
            while time.monotonic() < deadline and not (status.errors or status.finished):
                time.sleep(SAVE_POLL_S)
                status = group.poll_status(timeout=SAVE_WAIT_S)
        finally:
            self._withdraw()


class ClusterTrainer(TorchTrainer):
    """Ray Train's trainer, which leaves SIGINT to this project and can be ended from another thread.

    It also leaves Ray Data out, which would cost an actor and a heavy import in each worker.

    Attributes:
        sizes: the sizes that an elastic group may have; empty: a group of fixed size.
        progress: see `PatientFailurePolicy`; None: failures count over the whole run.
    """

    _controller: Any = None
    sizes: Sequence[int] = ()
    progress: Callable[[], int] | None = None

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, DatasetsCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.sizes:
            arguments["scaling_policy"] = DividingScalingPolicy(self.scaling_config, self.sizes)
        if self.progress is not None:
            arguments["failure_policy"] = PatientFailurePolicy(self.run_config.failure_config, self.progress)
        return super()._initialize_and_run_controller(**arguments)

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def end(self) -> None:
        """Kill the controller, and the workers with it: `fit` raises. Does nothing outside of `fit`."""
        controller, self._controller = self._controller, None
        if controller is not None:
            ray.kill(controller)


def preempted() -> bool:
    """Whether Ray announced that one of the group's nodes goes away.

    ``ray.train.get_preemption_info`` is a barrier of all workers, too expensive for every step; this reads what the
    watcher left in this process. The trainer makes the ranks agree.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
    except (ImportError, AttributeError, RuntimeError):
        return False


def quiet_raylet() -> None:
    """Send the raylet's messages about dead workers to the log: they ignore ``log_to_driver=False``.

    The driver says the same in one line of its own.
    """
    worker.print_to_stdstream = lambda data, ignore_prefix: logger.debug("%s", "\n".join(data["lines"]))


def find_cluster(address: str) -> str | None:
    """``HOST:PORT`` of the cluster that `address` names (``auto``: the one started last on this machine), or None."""
    found: str | None = services.canonicalize_bootstrap_address(address)
    return found


def put_in_head_memory(client: JobSubmissionClient, name: str, data: bytes) -> None:
    """Store `data` in the memory of the cluster's head as the package `name`, which ends in ``.zip``."""
    client._do_request("PUT", f"/api/packages/gcs/{name}", data=data).raise_for_status()


def take_from_head_memory(place: str) -> bytes | None:
    """What is stored in the head's memory at ``gcs://NAME``, which is then deleted; None: nothing is."""
    stored: bytes | None = _internal_kv_get(place)
    if stored is not None:
        _internal_kv_del(place)
    return stored


def put_word(name: str, text: str) -> bool:
    """Store `text` under `name` in the memory of the cluster's head, for all its processes; returns whether that worked."""
    try:
        if not _internal_kv_initialized():
            return False
        _internal_kv_put(name, text, overwrite=True)
    except Exception as error:  # Ray raises plain ones here
        logger.warning("Ray did not take %s: %s", name, error)
        return False
    return True


def get_word(name: str) -> str | None:
    """What `put_word` stored; None: nothing, or Ray does not answer."""
    try:
        stored = _internal_kv_get(name) if _internal_kv_initialized() else None
    except Exception as error:
        logger.warning("Ray did not answer for %s: %s", name, error)
        return None
    return None if stored is None else stored.decode()


def forget_word(name: str) -> None:
    """Remove what `put_word` stored."""
    try:
        if _internal_kv_initialized():
            _internal_kv_del(name)
    except Exception as error:
        logger.warning("Ray did not remove %s: %s", name, error)

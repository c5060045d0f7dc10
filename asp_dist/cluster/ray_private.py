"""What this project uses of Ray that is not public: check this file when Ray is updated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray._private import services, worker
from ray._private.utils import get_num_cpus
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.torch.config import _TorchBackend as TorchBackend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

__all__ = [
    "ClusterTrainer",
    "DividingScalingPolicy",
    "TorchBackend",
    "find_cluster",
    "get_num_cpus",
    "preempted",
    "put_in_head_memory",
    "quiet_raylet",
    "take_from_head_memory",
]

logger = logging.getLogger(__name__)


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


class ClusterTrainer(TorchTrainer):
    """Ray Train's trainer, which leaves SIGINT to this project and can be ended from another thread.

    It also leaves Ray Data out, which would cost an actor and a heavy import in each worker.

    Attributes:
        sizes: the sizes that an elastic group may have; empty: a group of fixed size.
    """

    _controller: Any = None
    sizes: Sequence[int] = ()

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, DatasetsCallback)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.sizes:
            arguments["scaling_policy"] = DividingScalingPolicy(self.scaling_config, self.sizes)
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

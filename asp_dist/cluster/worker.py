"""What runs in each Ray Train worker: the trainer, with hooks that reach the driver and Ray."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, get_device

from asp_dist.checkpoint.folder_lock import RESTART_WAIT_S
from asp_dist.cluster.launch_files import LaunchFiles
from asp_dist.cluster.ray_private import TorchBackend, preempted
from asp_dist.config import Config
from asp_dist.errors import UserError
from asp_dist.files import repeating
from asp_dist.training.hooks import PREEMPTION, Hooks, Stopped
from asp_dist.training.world import World

TrainFunction = Callable[[Config, World, Hooks], dict[str, Any]]

# Errors that a restart from the last checkpoint would only repeat.
FATAL = (ValueError, TypeError, LookupError, AttributeError, NameError, ImportError, AssertionError, ArithmeticError)
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """What the driver sends to each worker.

    Args:
        config: the run, with absolute paths.
        files: the launch's launch files.
        train: the train function; None: the project's own trainer.
        keys: the user's keys, as environment variables.
    """

    config: Config
    files: LaunchFiles
    train: TrainFunction | None = None
    keys: dict[str, str] = field(default_factory=dict, repr=False)


class RayHooks(Hooks):
    """Reports to Ray Train's controller, and hears of the driver's requests and Ray's preemption notices."""

    folder_wait_s = RESTART_WAIT_S  # the group before may have lost its machine

    def __init__(self, files: LaunchFiles) -> None:
        self._files = files
        self._reason: str | None = None

    def report(self, metrics: dict[str, Any]) -> None:
        """Hand the metrics to the controller, as plain numbers and strings."""
        plain = {k: v if isinstance(v, (str, bool)) else float(v) for k, v in metrics.items() if v is not None}
        ray.train.report(plain)

    def saved(self, step: int) -> None:
        """Tell Ray Train's controller, who counts failures from there."""
        with suppress(OSError):  # the checkpoint is written all the same
            self._files.write_progress(step)

    def finished(self, run_dir: Path) -> None:
        """Write the report."""
        from asp_dist.report import try_report  # not before: the driver's process has no need of it

        try_report(run_dir)

    def listening(self) -> AbstractContextManager[None]:
        """Poll for the driver's requests, in a thread that a slow storage may hold up, while the context lasts.

        On one rank: the ranks tell each other at every step.
        """
        return repeating(self._poll, POLL_S, "stop")

    def _poll(self) -> None:
        self._reason = self._files.stop_reason()

    def stop_requested(self) -> str | None:
        """The driver's reason, if this rank listens, or ``preemption``."""
        return self._reason or (PREEMPTION if preempted() else None)


def train_loop_per_worker(settings: dict[str, Job]) -> dict[str, Any]:
    """Train on this rank. Returns ``{"summary": ...}`` or ``{"stopped": [reason, step]}``.

    Args:
        settings: the `Job`, under the name ``job``: Ray's page on training shows dictionaries alone.

    Raises:
        UserError: a mistake that a restart would repeat; recorded for the driver as well.
        Exception: anything the trainer raises; Ray Train restarts the group.
    """
    job = settings["job"]
    if not job.files.visible():
        raise UserError(
            f"node {socket.gethostname()} does not see the output folder {job.files.run_dir}: "
            "set output.dir to a folder that all nodes mount"
        )
    fatal = job.files.fatal()
    if fatal is not None:  # a restarted group: the driver ends the run
        return {"fatal": fatal}
    os.environ.update(job.keys)
    world = _world(job.config)
    with ExitStack() as stack:
        stack.enter_context(_log_file(job.files.run_dir, world.rank))
        try:
            train, hooks = job.train or _default_train(), RayHooks(job.files)
            if world.is_main:
                stack.enter_context(hooks.listening())
            return {"summary": train(job.config, world, hooks)}
        except Stopped as stopped:
            return {"stopped": [stopped.reason, stopped.step]}
        except FATAL as error:
            job.files.write_fatal(
                {
                    "rank": world.rank,
                    "node": socket.gethostname(),
                    "type": type(error).__name__,
                    "user": isinstance(error, UserError),
                    "message": str(error),
                    "traceback": traceback.format_exc(),
                }
            )
            raise


def _default_train() -> TrainFunction:
    from asp_dist.training.trainer import train

    return train


def _world(config: Config) -> World:
    context = ray.train.get_context()
    device = get_device() if config.training.device != "cpu" else torch.device("cpu")
    return World(context.get_world_rank(), context.get_local_rank(), context.get_world_size(), device)


@contextmanager
def _log_file(run_dir: Path, rank: int) -> Iterator[None]:
    """Write this worker's log to ``RUN_DIR/logs/rank-N.log``."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{rank}.log")
    handler.setFormatter(logging.Formatter(f"%(asctime)s {socket.gethostname()} %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("asp_dist")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


@dataclass
class ClusterTorchConfig(TorchConfig):
    """Ray Train's process group over the network interface by which the node joined the cluster.

    Left alone, gloo takes the interface that the host's name resolves to, which on many machines is the loopback.

    Args:
        logs: folder that a collective which does not finish is recorded in; see `record_collectives`.
    """

    logs: str = ""

    @property
    def backend_cls(self) -> type[_ClusterBackend]:
        return _ClusterBackend


class _ClusterBackend(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_cluster_interface)
        if isinstance(backend_config, ClusterTorchConfig) and backend_config.logs:
            worker_group.execute(record_collectives, backend_config.logs)
        super().on_start(worker_group, backend_config)


def use_cluster_interface() -> None:
    """Set gloo's and NCCL's interface to the one with this node's Ray address, unless the user set them."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if name != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def record_collectives(logs: str) -> None:
    """Let NCCL's flight recorder write each rank's latest collectives to `logs` when one does not finish in time.

    ``torchfrtrace`` reads the files and names the rank that the others waited for. The user's own settings win.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{logs}/nccl_trace_rank_")


def interface_of(address: str) -> str | None:
    """Name of this machine's interface with the IPv4 `address`, or None."""
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), get_address, request)
            except OSError:
                continue  # the interface has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None

"""A connection to Ray: a temporary cluster on this machine, or an existing one."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from asp_dist.cluster.ray_private import find_cluster, quiet_raylet
from asp_dist.config import ClusterConfig
from asp_dist.errors import UserError

# Settings of Ray Train that are read from the environment; the user's own values win.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # keep the workers' working directory
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every print appears twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # also how often a report gets through
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES alone in workers without a GPU
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # the workers are what the machine is for; Ray starts them at 15
}
OBJECT_STORE_BYTES = 128 << 20  # no training data passes through Ray
EXIT_WAIT_S = 15.0

logger = logging.getLogger(__name__)


def address_of(cluster: ClusterConfig) -> str:
    """Where the run goes: ``HOST:PORT``, ``auto``, or ``local``, a cluster of this machine's own."""
    return cluster.address or os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[bool]:
    """Connect to Ray; yields whether the cluster is this machine's own. Everything started here ends with it.

    Raises:
        UserError: there is no cluster at the address.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet_raylet()
    address = address_of(cluster)
    if address == "local":
        with _local_cluster():
            yield True
        return
    try:
        _check_port(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"no Ray cluster answers at {address} ({reason}): check cluster.address or RAY_ADDRESS, that "
            "this machine is one of its nodes, and with token authentication RAY_AUTH_MODE and the token"
        ) from error
    try:
        yield False
    finally:
        ray.shutdown()


@contextmanager
def _local_cluster() -> Iterator[None]:
    """A Ray cluster with this machine's CPUs and GPUs, in a folder of its own; no process is left behind."""
    # Sockets live in this folder, and their paths may have 107 characters at most.
    folder = tempfile.mkdtemp(prefix="asp-dist-ray-", dir="/tmp")
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # Ray, which turns token authentication on here, would write a token to the home directory: the user's later
        # clusters would start differently. It keeps the first token that a process uses, so this one stays.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        _start(folder)
        yield
    finally:
        children = _descendants(os.getpid())
        ray.shutdown()
        _wait_for_exit(children)
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: str) -> None:
    """Start Ray. On a machine that is short of CPU, it gives up after 30 seconds; then once more.

    Raises:
        RuntimeError: Ray does not start.
    """
    for last in (False, False, True):
        try:
            ray.init(
                address="local",
                include_dashboard=False,  # ten processes; the driver does without
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder,
            )
            return
        except Exception as error:  # Ray raises plain Exceptions here
            ray.shutdown()
            if last:
                text = " ".join(str(error).split())
                raise RuntimeError(f"Ray does not start on this machine: {text}") from error
            logger.warning("Ray did not start (%s), trying again", error)


def _check_port(address: str) -> None:
    """Raise OSError unless something listens at ``HOST:PORT`` (``auto``: at the cluster started here last).

    ``ray.init`` alone would try for more than ten minutes.
    """
    found = find_cluster(address)
    if found is None:
        raise ConnectionError("none was started on this machine")
    host, _, port = found.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _processes() -> dict[int, tuple[int, str]]:
    """Each process's parent and start time, by its number."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if fields[0] != "Z":
            table[int(path.parent.name)] = (int(fields[1]), fields[19])
    return table


def _descendants(root: int) -> dict[int, str]:
    """The live processes below `root`: number -> start time, which together identify a process."""
    table = _processes()
    found: dict[int, str] = {}
    parents = {root}
    while parents:
        children = {pid: start for pid, (parent, start) in table.items() if parent in parents and pid not in found}
        found.update(children)
        parents = set(children)
    return found


def _wait_for_exit(processes: dict[int, str]) -> None:
    """Wait until these processes have ended; those that have not after `EXIT_WAIT_S` seconds are killed."""
    if _have_ended(processes):
        return
    for pid in _alive(processes):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _have_ended(processes)  # a killed process takes its time as well


def _have_ended(processes: dict[int, str]) -> bool:
    """Wait for these processes, `EXIT_WAIT_S` seconds at most; returns whether all have ended."""
    deadline = time.monotonic() + EXIT_WAIT_S
    while _alive(processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _alive(processes: dict[int, str]) -> list[int]:
    """The numbers of those that have not ended; a number may have passed to another process since."""
    table = _processes()
    return [pid for pid, start in processes.items() if table.get(pid, (0, ""))[1] == start]

"""A connection to Ray: a cluster of this machine's own, gone with the run, or one that runs already."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from asp_dist.config import ClusterConfig, UserError

# Settings of Ray Train that are read from the environment; the user's own values win.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # keep the workers' working directory
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every print appears twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # also how often a report gets through
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # leave CUDA_VISIBLE_DEVICES alone in workers without a GPU
    "RAY_DEDUP_LOGS": "0",
}
OBJECT_STORE_BYTES = 128 << 20  # no training data passes through Ray
EXIT_WAIT_S = 15.0


@contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[bool]:
    """Connect to Ray; yields whether the cluster is this machine's own. Everything started here ends with it.

    Raises:
        UserError: there is no cluster at the address.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        with _local_cluster():
            yield True
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
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
    """A Ray cluster with this machine's CPUs and GPUs, in a folder of its own; no process of it stays."""
    # Sockets live in this folder, and their paths may have 107 characters at most.
    folder = tempfile.mkdtemp(prefix="asp-dist-ray-", dir="/tmp")
    try:
        ray.init(
            address="local",
            # With the dashboard, Ray cleans up what a killed controller leaves.
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=folder,
        )
        yield
    finally:
        children = _descendants(os.getpid())
        ray.shutdown()
        _wait_for_exit(children)
        shutil.rmtree(folder, ignore_errors=True)


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
    """Wait until these processes have ended; kill those that have not after `EXIT_WAIT_S` seconds."""
    deadline = time.monotonic() + EXIT_WAIT_S
    while True:
        table = _processes()
        alive = [pid for pid, start in processes.items() if table.get(pid, (0, ""))[1] == start]
        if not alive:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

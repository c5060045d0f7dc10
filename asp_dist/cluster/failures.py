"""What went wrong in the workers, said in one line."""

from __future__ import annotations

import json
import re
import time
from typing import Any

from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayError
from ray.train import UserCallback

from asp_dist.cluster.launch_files import LaunchFiles
from asp_dist.errors import UserError
from asp_dist.tracking.schema import EVENT

# A fault of a device or of the network, which another node may not have.
DEVICE = ("cuda error", "cudnn error", "nccl")
# What the other ranks say when one has died.
COLLATERAL = ("connection closed by peer", "connection reset", "broken pipe", "socket timeout", "ncclremoteerror")


class ClusterError(RuntimeError):
    """The run failed on the cluster. `details` is the worker's traceback, for ``--debug``."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class FailureLog(UserCallback):
    """Writes a line for each failed worker group to the launch files. Lives in Ray Train's controller."""

    def __init__(self, files: LaunchFiles) -> None:
        self._files = files

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Append the failure's cause."""
        row = event(describe(worker_exceptions)) | {"would_repeat": would_repeat(worker_exceptions)}
        with (self._files.folder / "failures").open("a") as file:
            file.write(json.dumps(row) + "\n")


def event(message: str, step: int = 0) -> dict[str, Any]:
    """A row for the driver's display; it alone knows the step."""
    return {"step": step, "kind": EVENT, "event": "failure", "time": time.time(), "message": message}


def describe(failures: dict[int, Exception]) -> str:
    """The cause among the ranks' exceptions: one line that names the rank.

    When one rank dies, the others fail in their collectives; those are named only if nothing better is known.
    """
    if not failures:
        return "the workers failed"
    rank, error = _cause(failures)
    return f"worker {rank}: {one_line(error)}"


def would_repeat(failures: dict[int, Exception]) -> bool:
    """Whether the cause, met again at the same step, is the program's, and not a dead process or a storage's."""
    if not failures:
        return False
    _, error = _cause(failures)
    passing = isinstance(error, ActorDiedError | RayActorError | OutOfMemoryError | OSError)
    # asp_dist.data's own error for images that cannot be read now; its module is too much for Ray Train's controller.
    passing = passing or "DataReadError" in type(error).__name__ or any(word in str(error).lower() for word in DEVICE)
    return not (passing or _collateral(error))


def repeated(message: str, step: int, log: str) -> ClusterError:
    """The error that ends a run which fails in the same way at the same step."""
    return ClusterError(f"{message}: the same error for the second time at step {step}, so no restart will help (logs: {log})")


def _cause(failures: dict[int, Exception]) -> tuple[int, BaseException]:
    """The rank that failed by itself, if one did, and its exception."""
    rank, error = min(failures.items(), key=lambda item: (_collateral(_unwrap(item[1])), item[0]))
    return rank, _unwrap(error)


def one_line(error: BaseException) -> str:
    """The exception's type and message, without traceback and in one line."""
    if isinstance(error, OutOfMemoryError):
        return "was killed because its machine ran out of memory (fewer cluster.num_workers per node would help)"
    if isinstance(error, (ActorDiedError, RayActorError)):
        found = re.search(r"^\s*(?:node_)?ip: (\S+)", str(error), re.MULTILINE)
        node = found[1] if found else ""
        return "its process died" + (f" on node {node}" if node else "") + " (killed, out of memory or crashed)"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if isinstance(error, RayError) and lines else ' '.join(lines)}"


def fatal_error(record: dict[str, Any], log: str) -> Exception:
    """The exception that ends the driver for the error that a worker recorded."""
    if record["user"]:
        return UserError(record["message"])
    place = f"worker {record['rank']} on {record['node']}"
    return ClusterError(f"{place}: {record['type']}: {record['message']} (log: {log})", record["traceback"])


def _unwrap(error: BaseException) -> BaseException:
    """The exception inside Ray Train's wrapper."""
    inner = getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None)
    return _unwrap(inner) if isinstance(inner, BaseException) else error


def _collateral(error: BaseException) -> bool:
    return any(words in str(error).lower() for words in COLLATERAL)

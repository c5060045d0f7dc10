"""Processes that share a process group, forked from one that has imported torch, timm and the trainer."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from waiting import HANG_S

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["asp_dist.training.trainer", "torch.distributed.fsdp", "small_runs"])


def _work(pickled: bytes, environment: dict[str, str], answer: Connection) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        job, arguments = pickle.loads(pickled)
        result = True, job(*arguments)
    except BaseException as error:
        result = False, "".join(traceback.format_exception(error))
        raise
    finally:
        answer.send_bytes(pickle.dumps(result))


def start(job: Callable[..., Any], *arguments: Any, **environment: str) -> tuple[BaseProcess, Connection]:
    """Run `job`, a function of a module, in a process of its own with one thread.

    The pipe gets ``(True, result)`` or ``(False, traceback)``, pickled: a pipe would send tensors as shared memory, which
    ends with the process.
    """
    mine, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_work, args=(pickle.dumps((job, arguments)), environment, theirs))
    process.start()
    theirs.close()
    return process, mine


@contextmanager
def process_group_variables(ranks: int) -> Iterator[list[dict[str, str]]]:
    """Per rank, the variables that torchrun would set."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    shared = {
        **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"},
        **{"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
        **{"TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")},
    }
    yield [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def on_ranks(job: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
    """What `job` returns on each of `ranks` processes that find each other as torchrun's do.

    Raises:
        RuntimeError: a rank failed; with its traceback.
    """
    with process_group_variables(ranks) as variables:
        started = [start(job, *arguments, **one) for one in variables]
        answers: list[tuple[bool, Any]] = []
        for rank, (process, pipe) in enumerate(started):
            try:
                if not pipe.poll(HANG_S):
                    raise TimeoutError(f"rank {rank} does not answer")
                answers.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                process.join()
                answers.append((False, f"rank {rank} ended with exit code {process.exitcode}"))
        for process, _ in started:
            process.join(HANG_S)
        failed = [text for good, text in answers if not good]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [result for _, result in answers]

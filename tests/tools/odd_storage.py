"""Runs ``asp-dist`` on a storage that is odd below a folder, by patched calls of this process.

    python tests/tools/odd_storage.py HOW SECONDS FOLDER asp-dist's words ...

HOW: ``bare`` (no file locks, no flush of a folder), ``late`` (from the first checkpoint on, three questions for a file's
state take SECONDS), ``failing`` (from the first checkpoint on, every call fails for SECONDS). Prints at the end how often it
struck.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from asp_dist.cli import main

how, seconds, folder, *words = sys.argv[1:]
struck = 0


def bare() -> None:
    """As Lustre without its option, or a FUSE file system."""
    fsync = os.fsync

    def no_lock(*arguments: Any) -> None:
        global struck
        struck += 1
        raise OSError(errno.ENOSYS, "Function not implemented")

    def no_folder(number: int) -> None:
        global struck
        if os.path.isdir(f"/proc/self/fd/{number}"):
            struck += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(number)

    fcntl.flock, os.fsync = no_lock, no_folder  # type: ignore[assignment]


def inside(path: Any) -> bool:
    """Whether a call is about the odd storage."""
    return isinstance(path, str | os.PathLike) and str(path).startswith(folder)


def has_checkpoint(listdir: Callable[[str], list[str]] = os.listdir) -> bool:
    """Whether the run has saved one, by the real call."""
    with suppress(OSError):
        return any(name.startswith("step-") for name in listdir(f"{folder}/run/checkpoints"))
    return False


def late() -> None:
    """As a busy server."""
    stat, last = os.stat, [0.0]

    def slow_stat(path: Any, *more: Any, **options: Any) -> os.stat_result:
        global struck
        if inside(path) and struck < 3 and time.monotonic() > last[0] + 1.0 and has_checkpoint():
            struck += 1
            time.sleep(float(seconds))
            last[0] = time.monotonic()
        return stat(path, *more, **options)

    os.stat = slow_stat


def failing() -> None:
    """As a server that is being started again."""
    begun: list[float] = []

    def broken(call: Callable[..., Any]) -> Callable[..., Any]:
        def answer(path: Any, *more: Any, **options: Any) -> Any:
            global struck
            if inside(path):
                if not begun and has_checkpoint():
                    begun.append(time.monotonic())
                if begun and time.monotonic() < begun[0] + float(seconds):
                    struck += 1
                    raise OSError(errno.EIO, "Input/output error", str(path))
            return call(path, *more, **options)

        return answer

    for name in ("open", "stat", "mkdir", "rename", "replace", "unlink", "rmdir", "scandir", "listdir"):
        setattr(os, name, broken(getattr(os, name)))
    io.open = builtins.open = broken(io.open)


if __name__ == "__main__":
    {"bare": bare, "late": late, "failing": failing}[how]()
    code = main(words)
    print(f"struck {struck} times")
    sys.exit(code)

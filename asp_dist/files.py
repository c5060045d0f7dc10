"""Files that appear only when they are complete, how many may be open, and work that is tried again, or now and then."""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

T = TypeVar("T")
# What file systems that flush no folder answer: FUSE and SMB ones, object stores that are mounted.
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EISDIR)
WAITS_S = (0.5, 2.0, 5.0)  # before each further attempt at a place that fails for a while

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A temporary path next to `path`, renamed to it at the end: a reader sees the old file or the whole new one.

    After an error the temporary file is removed and `path` is as it was.

    Args:
        path: the file to write.
        durable: flush the new file to the disk before it is renamed.
    """
    # Containers on several nodes may have the same process numbers.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file as `replacing` does."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a UTF-8 file as `replacing` does."""
    write_bytes(path, text.encode(), durable=durable)


def close_durably(stream: IO[bytes]) -> None:
    """Close `stream` once its bytes are on the disk, where it has one."""
    try:
        stream.flush()
        try:
            number = stream.fileno()
        except (OSError, AttributeError):
            return
        os.fsync(number)
    finally:
        stream.close()


def sync(path: Path) -> None:
    """Flush a file to the disk, or the names in a folder, where its file system can do that."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not (path.is_dir() and error.errno in NO_FOLDER_SYNC):
            raise
    finally:
        os.close(number)


@contextmanager
def repeating(work: Callable[[], None], every_s: float, name: str) -> Iterator[None]:
    """Do `work` every `every_s` seconds, in a thread called `name`, while the context lasts."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(every_s):
            work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def allow_many_files() -> None:
    """Let this process open as many files as the system lets it: a data set of shards has them all open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def retry(work: Callable[[], T], waits: tuple[float, ...], what: str) -> T:
    """The result of `work`, called again after each of `waits` (seconds) while it raises OSError; `what` is for the log.

    A missing file is not a passing fault.
    """
    for wait in waits:
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError as error:
            log.warning("%s failed, trying again in %.1f s: %s", what, wait, error)
            time.sleep(wait)
    return work()

"""The lock of a run's folder: one writer at a time, however it was started, on this machine or another."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from asp_dist.errors import UserError, may_pass
from asp_dist.files import repeating, write_text

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
LEASE_FILE = ".lease"
PLACE_FILE = ".place"
# An NFS server keeps a dead machine's locks for a lease of 90 s and some more.
RESTART_WAIT_S = 300.0
START_WAIT_S = 30.0  # processes that are being ended take some seconds
POLL_S = 0.2
# Where the file system knows no locks: the owner says so often that it is alive, and is dead after silence of so long.
BEAT_S = 5.0
SILENCE_S = 30.0
# Lustre without `-o flock`, NFS without a lock server, FUSE.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class FolderBusy(OSError):  # noqa: N818
    """Another process still writes to the run's folder; it may be gone soon."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Make it the user's mistake if the output folder cannot be written, unless that may pass."""
    try:
        yield
    except OSError as error:
        if may_pass(error):
            raise
        raise UserError(f"output folder {folder} cannot be written: {error.strerror or error}") from error


@contextmanager
def hold_folder(folder: Path, wait_s: float = START_WAIT_S) -> Iterator[None]:
    """Hold the lock of a run's folder; a process that ends in any way lets go of it.

    Args:
        folder: the run's folder; made if it is not there.
        wait_s: how long to wait for another process that holds it.

    Raises:
        FolderBusy: it still does; names its host and process.
        UserError: the folder cannot be written.
        OSError: the file system does not answer.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK_FILE).open("a+")
    with opened as file:
        try:
            _wait(lambda: _flock(file), str(folder), wait_s, lambda: _owner(file))
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.info("%s has no file locks (%s): held by a lease instead", folder, error.strerror)
            with hold_lease(LeaseFile(folder), wait_s, beat_s=BEAT_S, silence_s=SILENCE_S):
                yield
            return
        file.truncate(0)
        json.dump(_me(), file)
        file.flush()
        yield


def check_free(folder: Path, wait_s: float | None = None) -> None:
    """Raise `UserError` if another process writes to the run's folder.

    Args:
        folder: the run's folder, which need not exist.
        wait_s: how long to wait for it; None: `START_WAIT_S` if a person has started this, else `RESTART_WAIT_S`.
    """
    if not folder.is_dir():
        return
    if wait_s is None:
        wait_s = START_WAIT_S if sys.stdin is not None and sys.stdin.isatty() else RESTART_WAIT_S
    try:
        with hold_folder(folder, wait_s):
            pass
    except FolderBusy as error:
        raise UserError(f"{error}. Stop it, or give this run another name (--name) or output.dir") from error


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return _words(file.read())


def _words(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not said which"


def _flock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(take: Callable[[], bool], place: str, wait_s: float, owner: Callable[[], str]) -> None:
    """Call `take` until it returns True, for `wait_s` seconds; `owner` says who has the `place`, in words."""
    begin = time.monotonic()
    told = False
    while not take():
        waited = time.monotonic() - begin
        if waited > wait_s:
            raise FolderBusy(f"another run still writes to {place}: {owner()}")
        if waited > 2.0 and not told:
            told = True
            log.warning("%s still writes to %s: waiting for it, %.0f s at most", owner(), place, wait_s)
        time.sleep(POLL_S)


class Lease(Protocol):
    """A small text that all who want a place see."""

    where: str

    def read(self) -> str:
        """The text; empty if there is none."""

    def write(self, text: str) -> None:
        """Replace it."""

    def remove(self) -> None:
        """Take it away."""


class LeaseFile:
    """The lease of a folder, in a file."""

    def __init__(self, folder: Path) -> None:
        self.where, self._path = str(folder), folder / LEASE_FILE

    def read(self) -> str:
        with suppress(OSError):
            return self._path.read_text()
        return ""

    def write(self, text: str) -> None:
        write_text(self._path, text, durable=False)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


@contextmanager
def hold_lease(lease: Lease, wait_s: float, *, beat_s: float, silence_s: float, place: str = "") -> Iterator[None]:
    """Hold a place by a text that is written again and again; its clock is this process's own, never another machine's.

    Args:
        lease: the text.
        wait_s: how long to wait for another owner.
        beat_s: seconds between two writes.
        silence_s: an owner is dead after so many without one.
        place: what this process holds by a lock already; an owner that held the same lock has ended.

    Raises:
        FolderBusy: another process still holds it; names its host and process.
        OSError: the place does not answer.
    """
    me, beats = uuid.uuid4().hex, itertools.count()
    seen: tuple[str, float] = ("", time.monotonic())

    def owner() -> dict[str, Any]:
        with suppress(ValueError):
            found = json.loads(lease.read() or "{}")
            return found if isinstance(found, dict) else {}
        return {}

    def take() -> bool:
        nonlocal seen
        now = lease.read()
        if now != seen[0]:
            seen = (now, time.monotonic())
        if now and time.monotonic() - seen[1] < silence_s and not (place and owner().get("place") == place):
            return False
        beat()
        time.sleep(1.0)  # two may have found it silent at once: the last one to write has it
        return owner().get("id") == me

    def beat() -> None:
        lease.write(json.dumps({**_me(), "id": me, "place": place, "beat": next(beats)}))

    def keep() -> None:
        with suppress(OSError):
            other = owner()
            if other.get("id") not in (me, None):  # this machine was silent for too long
                log.error("%s was taken over by %s", lease.where, _words(json.dumps(other)))
                return
            beat()

    # A silent owner is found out after a while only: no shorter wait would ever take a dead one's place.
    _wait(take, lease.where, max(wait_s, silence_s + 5.0), lambda: _words(lease.read()))
    try:
        with repeating(keep, beat_s, "lease"):
            yield
    finally:
        with suppress(OSError):
            if owner().get("id") == me:
                lease.remove()


def place_of(folder: Path) -> str:
    """A word that tells this folder from all others, on whatever machine; kept in the folder."""
    path = folder / PLACE_FILE
    if not path.exists():
        write_text(path, uuid.uuid4().hex, durable=False)
    return path.read_text()

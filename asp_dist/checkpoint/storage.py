"""Where checkpoints lie: a folder each, which appears under its name only when it is complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from asp_dist.files import WAITS_S, retry, sync

NAME = re.compile(r"step-\d{8,}")
MANIFEST = "manifest.json"


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The number of optimizer steps in a checkpoint's name."""
    return int(name.split("-")[1])


def spare_name(name: str, taken: Callable[[str], bool]) -> str:
    """A name for a checkpoint that is set aside: ``bad-step-XXXXXXXX``, with a number where that is taken."""
    candidates = (f"bad-{name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
    return next(candidate for candidate in candidates if not taken(candidate))


class Store(Protocol):
    """A place for checkpoints. `write`, then `commit`; until then no other reader sees anything under that name."""

    def names(self) -> list[str]:
        """Names of the checkpoints, oldest first, whether they are sound or not."""

    def begin(self, name: str) -> None:
        """Make room for a checkpoint; what an earlier attempt left under that name goes."""

    def write(self, name: str, file: str) -> IO[bytes]:
        """A stream for one file of a checkpoint that is being written; `close_durably` ends it."""

    def commit(self, name: str) -> None:
        """Let the checkpoint appear under its name."""

    def abort(self, name: str) -> None:
        """Drop what was written since `begin`."""

    def read(self, name: str, file: str) -> bytes:
        """One file of a checkpoint. Raises OSError when it is missing."""

    def remove(self, name: str) -> None:
        """Delete a checkpoint, its manifest first, so that half of it never looks whole."""

    def set_aside(self, name: str) -> str:
        """Rename a checkpoint, with all its files, so that it no longer counts as one; returns the new name."""

    def where(self, name: str) -> str:
        """The checkpoint's address for people."""

    def clean(self) -> None:
        """Remove what a process that died while writing left behind. Nobody may be writing."""


class LocalStore:
    """Checkpoints in a local or network folder: written aside, synced, renamed.

    Args:
        root: the folder.
        waits: seconds between attempts to read or list while its file system fails.
    """

    def __init__(self, root: Path, waits: tuple[float, ...] = WAITS_S) -> None:
        self.root = root
        self.waits = waits

    def names(self) -> list[str]:
        def found() -> list[str]:
            return [p.name for p in self.root.iterdir() if p.is_dir() and NAME.fullmatch(p.name)]

        try:
            return sorted(retry(found, self.waits, str(self.root)), key=step_of)
        except FileNotFoundError:
            return []

    def begin(self, name: str) -> None:
        temporary = self._temporary(name)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write(self, name: str, file: str) -> IO[bytes]:
        return open(self._temporary(name) / file, "wb")

    def commit(self, name: str) -> None:
        sync(self._temporary(name))
        replaced = self._temporary(f"replaced-{name}")
        if (self.root / name).exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.root / name, replaced)
        os.rename(self._temporary(name), self.root / name)
        sync(self.root)
        shutil.rmtree(replaced, ignore_errors=True)

    def abort(self, name: str) -> None:
        shutil.rmtree(self._temporary(name), ignore_errors=True)

    def read(self, name: str, file: str) -> bytes:
        return retry((self.root / name / file).read_bytes, self.waits, self.where(name))

    def remove(self, name: str) -> None:
        (self.root / name / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.root / name, ignore_errors=True)

    def set_aside(self, name: str) -> str:
        new = spare_name(name, lambda candidate: (self.root / candidate).exists())
        os.rename(self.root / name, self.root / new)
        return new

    def where(self, name: str) -> str:
        return str(self.root / name)

    def clean(self) -> None:
        for leftover in self.root.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _temporary(self, name: str) -> Path:
        return self.root / f".writing-{name}"

"""``metrics.jsonl``: one JSON row per line, the run's own record, independent of every tracker."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from asp_dist.errors import may_pass
from asp_dist.files import WAITS_S, retry
from asp_dist.tracking.schema import EVAL, EVENT, TRAIN, VAL

log = logging.getLogger(__name__)

Row = dict[str, Any]


def plain(value: Any) -> Any:
    """`value` as a strict JSON type: numpy and torch scalars become numbers, what is not finite becomes None."""
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(float(value)) else None


def kind_of(row: Row) -> str:
    """The row's own ``kind``, or the one that its keys show: ``event``, ``eval`` or ``train``."""
    if "kind" in row:
        return str(row["kind"])
    if "event" in row:
        return EVENT
    return EVAL if any(key.startswith(VAL) for key in row) else TRAIN


NOT_METRICS = ("step", "time", "kind")


def numbers_of(row: Row) -> dict[str, float]:
    """The metrics of a row, by their names; of an event none."""
    if row["kind"] == EVENT:
        return {}
    return {k: v for k, v in row.items() if k not in NOT_METRICS and isinstance(v, int | float) and not isinstance(v, bool)}


def parse(line: str) -> Row | None:
    """The row on `line`, or None where the line is not a whole row (cut by a kill)."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def read_rows(path: Path) -> list[Row]:
    """All whole rows of a metrics file, oldest first; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [row for row in map(parse, lines) if row is not None]


class MetricsFile:
    """Appends rows to ``metrics.jsonl`` and flushes each, so that a kill loses none that was written.

    Opening it moves the rows after `resume_step`, which the resumed run writes again, and a half-written last line to
    ``metrics.dropped.jsonl``.
    A train or eval row whose step is not above the last one of its kind is dropped: no step appears twice.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.path = path
        self.kept = _truncate(path, resume_step)
        self.last_step: dict[str, int] = {}
        for row in self.kept:
            self.last_step[kind_of(row)] = int(row["step"])
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, row: Row) -> Row | None:
        """Write `row` at `step`; returns the row as written, or None if that step of that kind is recorded already."""
        kind = kind_of(row)
        if kind != EVENT and step <= self.last_step.get(kind, -1):
            return None
        self.last_step[kind] = step
        written = {"step": step, "kind": kind, "time": round(time.time(), 3), **{k: plain(v) for k, v in row.items()}}
        with outliving(self.path):  # the file keeps what it could not write, and writes it with the next row
            self._file.write(json.dumps(written, allow_nan=False) + "\n")
            self._file.flush()
        return written

    def close(self) -> None:
        """Write through to the disk and close; a second call does nothing."""
        if not self._file.closed:
            retry(self._file.flush, WAITS_S, str(self.path))
            os.fsync(self._file.fileno())
            self._file.close()


@contextmanager
def outliving(path: Path) -> Iterator[None]:
    """Go on training where the record at `path` cannot be written for a while; a fault that stays is raised."""
    try:
        yield
    except OSError as error:
        if not may_pass(error):
            raise
        log.warning("%s cannot be written now: %s", path, error)


def _truncate(path: Path, resume_step: int) -> list[Row]:
    """Cut the file at the first row that is broken or lies after `resume_step`; return the rows before it.

    What is cut off is kept in the file's ``.dropped`` twin.
    """
    kept: list[Row] = []
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return kept
    end = 0
    with path.open("rb") as file:
        for line in file:
            row = parse(line.decode("utf-8", errors="replace"))
            if row is None or not line.endswith(b"\n") or row["step"] > resume_step:
                break
            kept.append(row)
            end += len(line)
        file.seek(end)
        rest = file.read()
    if rest:
        with path.with_name(dropped_name(path.name)).open("ab") as dropped:
            dropped.write(rest if rest.endswith(b"\n") else rest + b"\n")
            dropped.flush()
            os.fsync(dropped.fileno())
        os.truncate(path, end)
    return kept


def dropped_name(name: str) -> str:
    """Where the rows go that a resumed run writes again: ``metrics.dropped.jsonl`` for ``metrics.jsonl``."""
    return f"{name.removesuffix('.jsonl')}.dropped.jsonl"


def last_step(data: bytes) -> int:
    """The highest step in the rows of a metrics file's content; -1 without rows."""
    rows = (parse(line) for line in data.decode("utf-8", errors="replace").splitlines())
    return max((int(row["step"]) for row in rows if row is not None), default=-1)


class Tail:
    """Follows a growing ``metrics.jsonl``: each `read` gives the whole rows that came since the last one.

    A resumed run cuts rows off and writes others in their place, at once and perhaps more of them: these are given,
    from the first one that differs.

    Args:
        path: the file, which need not exist yet.
        from_end: skip what is there now.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._given: list[tuple[int, int, int]] = []  # of each line: where it begins and ends, and its checksum
        if from_end:
            self.read()

    def read(self) -> list[Row]:
        """Rows since the last call, oldest first; an unfinished last line waits for the next call."""
        try:
            with self.path.open("rb") as file:
                while self._given and not _stands(file, *self._given[-1]):
                    self._given.pop()
                start = self._given[-1][1] if self._given else 0
                file.seek(start)
                data = file.read()
        except OSError:  # it is not there yet, or a network file system does not answer now
            return []
        rows = []
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            self._given.append((start, start + len(line), zlib.crc32(line)))
            start += len(line)
            rows.append(parse(line.decode("utf-8", errors="replace")))
        return [row for row in rows if row is not None]


def _stands(file: BinaryIO, start: int, end: int, checksum: int) -> bool:
    """Whether the file still has that line at that place."""
    file.seek(start)
    return zlib.crc32(file.read(end - start)) == checksum

"""Reads wandb's ``run-ID.wandb`` files: LevelDB's log framing around wandb's protobuf records.

A resumed run reads how far its own record reaches, so that no step is logged twice and none is missing.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asp_dist.tracking.schema import EVAL, LAYERS, TRAIN, VAL

log = logging.getLogger(__name__)

BLOCK = 32768
FILE_HEADER = 7  # ":W&B", two bytes of magic, one of version
RECORD_HEADER = struct.Struct("<IHB")  # checksum, length, type
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def frames(data: bytes) -> Iterator[bytes]:
    """The whole records in `data`, as bytes; ends at the first incomplete one, as a killed process leaves it."""
    position, parts = FILE_HEADER, b""
    while True:
        if BLOCK - position % BLOCK < RECORD_HEADER.size:
            position += BLOCK - position % BLOCK
        if position + RECORD_HEADER.size > len(data):
            return
        _, length, kind = RECORD_HEADER.unpack_from(data, position)
        start = position + RECORD_HEADER.size
        if kind not in (FULL, FIRST, MIDDLE, LAST) or start + length > len(data):
            return
        position = start + length
        parts = data[start:position] if kind in (FULL, FIRST) else parts + data[start:position]
        if kind in (FULL, LAST):
            yield parts


def records(path: Path) -> Iterator[Any]:
    """wandb's protobuf `Record` messages in one ``.wandb`` file; ends where it is damaged."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto import wandb_internal_pb2

    for frame in frames(path.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        try:
            record.ParseFromString(frame)
        except DecodeError as error:
            log.warning("%s is damaged (%s): what comes after is not read", path, error)
            return
        yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows of one ``.wandb`` file, oldest first."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *outer, key = item.nested_key or [item.key]
                inner = row
                for name in outer:
                    inner = inner.setdefault(name, {})
                inner[key] = json.loads(item.value_json)
            rows.append(row)
    return rows


def run_files(run_dir: Path, run_id: str) -> list[Path]:
    """The ``.wandb`` files of a run, oldest first: one per start."""
    return sorted((run_dir / "wandb").glob(f"*run-*-{run_id}/run-{run_id}.wandb"), key=lambda p: p.parent.name[-24:])


def last_steps(run_dir: Path, run_id: str) -> dict[str, int]:
    """The last optimizer step in the run's files, of each kind of row (``train``, ``eval``, ``layers``)."""
    last: dict[str, int] = {}
    for path in run_files(run_dir, run_id):
        for row in history(path):
            for kind, prefix in ((TRAIN, "train/"), (EVAL, VAL), (LAYERS, "layers/")):
                if "global_step" in row and any(key.startswith(prefix) for key in row):
                    last[kind] = max(last.get(kind, -1), row["global_step"])
    return last

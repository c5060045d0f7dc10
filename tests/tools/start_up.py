"""Counts what the ranks of a run ask of the storage and of each other when it starts, and when it resumes.

    python tests/tools/start_up.py [RANKS ...]

Simulates that many ranks (1, 64 and 1,024) one after the other, on a data set of class folders and a checkpoint made for it:
each does what a rank does, `training.build.open_data` and `training.checkpointing.resume`, with calls and bytes counted; what
rank 0 says to the others is kept for them. "Before" is what each rank did at commit 33adbee: it listed the data set twice and
read the checkpoint itself.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from small_runs import StopAt, small_config, with_changes

from asp_dist.checkpoint.record import run_dir
from asp_dist.checkpoint.storage import LocalStore
from asp_dist.config import Config
from asp_dist.data import prepare_digits
from asp_dist.data.formats.folder import scan_folder
from asp_dist.tracking.schema import IDENTITY_FILE
from asp_dist.training import build, checkpointing
from asp_dist.training.checkpointing import build_checkpoint_manager
from asp_dist.training.hooks import Hooks, Stopped
from asp_dist.training.run import build_run
from asp_dist.training.trainer import train
from asp_dist.training.world import World

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TapedWorld(World):
    """A rank that meets the others on a tape: rank 0, who comes first, writes what it says, and the others read it.

    Args:
        tape: what rank 0 has said.
        counts: messages and bytes that reach this rank.
    """

    tape: list[Any] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    place: list[int] = dataclasses.field(default_factory=lambda: [0])

    def share(self, value: T) -> T:
        """Rank 0's value, from the tape."""
        said: T = pickle.loads(self._said(pickle.dumps(value)))
        return said

    def gather(self, value: T) -> list[T]:
        """Rank 0's value, and as if all others had said the same as this one."""
        first = pickle.loads(self._said(pickle.dumps(value)))
        self.counts["bytes received"] += len(pickle.dumps(value)) * (self.world_size - 1)
        return [first, *[value] * (self.world_size - 1)]

    def _share_bytes(self, tensor: torch.Tensor) -> None:
        said = self._said(tensor.clone())
        if not self.is_main:
            tensor.copy_(said)

    def _said(self, value: Any) -> Any:
        if self.is_main:
            self.tape.append(value)
        else:
            value = self.tape[self.place[0]]
            self.place[0] += 1
            size = value.nbytes if isinstance(value, torch.Tensor) else len(value)
            self.counts["bytes received"] += size
        self.counts["messages"] += 1
        return value


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts data sets listed, and checkpoint files and bytes read, by all that happens inside."""
    counts: Counter[str] = Counter()
    read = LocalStore.read

    def counted_scan(*arguments: Any) -> Any:
        counts["splits listed"] += 1
        return scan_folder(*arguments)

    def counted_read(store: LocalStore, name: str, file: str) -> bytes:
        data = read(store, name, file)
        counts["files read"] += 1
        counts["bytes read"] += len(data)
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asp_dist.data.info.scan_folder", counted_scan)
        patch.setattr(LocalStore, "read", counted_read)
        yield counts


def prepared(folder: Path) -> Config:
    """A run on images in class folders, stopped at its second step."""
    prepare_digits(folder / "digits")
    changes = {"data__backend": "dali", "data__root": str(folder / "digits"), "data__batch_size": 64, "schedule__epochs": 1}
    config = with_changes(small_config(folder / "runs"), **changes)
    with pytest.raises(Stopped):
        train(config, World(), StopAt(2))
    return config


def simulate(config: Config, ranks: int) -> dict[str, Counter[str]]:
    """What all of `ranks` ranks ask for, to start and to resume."""
    identity = json.loads((run_dir(config) / IDENTITY_FILE).read_text())["id"]
    manager = build_checkpoint_manager(config, identity)
    run = build_run(config, World(), Hooks(), manager, identity)
    totals: dict[str, Counter[str]] = {"start": Counter(), "resume": Counter()}
    starts: list[Any] = []
    resumes: list[Any] = []
    for rank in range(ranks):
        for name, tape in (("start", starts), ("resume", resumes)):
            world = TapedWorld(rank, rank % 8, ranks, tape=tape)
            with counted() as counts:
                if name == "start":
                    assert build.open_data(config.data, world) is not None
                else:
                    run.world = world
                    checkpointing.resume(run)
                    assert run.step == 2
            totals[name] += counts + world.counts
    run.loaders.close()
    return totals


def main(sizes: list[int]) -> None:
    """Print a table."""
    with tempfile.TemporaryDirectory() as name:
        config = prepared(Path(name))
        one = simulate(config, 1)
        print(f"{'ranks':>6} {'':7} {'':6} " + " ".join(f"{title:>16}" for title in TITLES))
        for ranks in sizes:
            now = simulate(config, ranks)
            for phase in ("start", "resume"):
                alone = one[phase]
                before = Counter({title: alone[title] * ranks * (2 if title == "splits listed" else 1) for title in alone})
                for when, counts in (("before", before), ("now", now[phase])):
                    cells = [0 if when == "before" and title in NETWORK else counts[title] for title in TITLES]
                    print(f"{ranks:>6} {phase:7} {when:6} " + " ".join(f"{cell:>16,}" for cell in cells))


NETWORK = ("messages", "bytes received")
TITLES = ("splits listed", "files read", "bytes read", *NETWORK)

if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [1, 64, 1024])

"""One writer at a time in a run's folder, with file locks and without."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_config
from waiting import wait_until

from asp_dist.checkpoint import folder_lock
from asp_dist.checkpoint.folder_lock import FolderBusy, check_free, hold_folder
from asp_dist.checkpoint.record import run_dir
from asp_dist.errors import UserError
from asp_dist.training.hooks import Hooks
from asp_dist.training.trainer import train
from asp_dist.training.world import World

HOLDER = """
import sys, time
from pathlib import Path
from asp_dist.checkpoint import folder_lock
if sys.argv[2] == "lease":
    import errno, fcntl
    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")
    fcntl.flock = flock
    folder_lock.BEAT_S = 0.5
with folder_lock.hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path, how: str) -> subprocess.Popen[str]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, as Lustre mounted without them; here by a patched call."""

    def flock(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(folder_lock, "BEAT_S", 0.5)
    monkeypatch.setattr(folder_lock, "SILENCE_S", 4.0)


def test_a_second_writer_is_told_who_the_first_one_is(tmp_path: Path) -> None:
    with holder(tmp_path, "lock") as other:
        busy = pytest.raises(FolderBusy, match=rf"still writes to {tmp_path}: process {other.pid} on \S+, since 20")
        with busy, hold_folder(tmp_path, wait_s=0.3):
            pass
        with pytest.raises(UserError, match=r"process .* Stop it, or give this run another name \(--name\)"):
            check_free(tmp_path, wait_s=0.3)
        other.kill()
    with hold_folder(tmp_path, wait_s=10.0):  # a dead one holds nothing
        pass
    with hold_folder(tmp_path, wait_s=0.0):
        pass


def test_a_run_that_is_started_twice_without_ray_is_refused(tmp_path: Path) -> None:
    """The second one would remove the first one's half-written checkpoint and cut its metrics."""
    config = small_config(tmp_path)
    train(config, World())
    before = {path: path.stat().st_mtime_ns for path in run_dir(config).rglob("*") if path.name != ".lock"}

    class Impatient(Hooks):
        folder_wait_s = 0.3

    with holder(run_dir(config), "lock") as other:
        with pytest.raises(FolderBusy, match=f"process {other.pid}"):
            train(config, World(), Impatient())
        other.kill()
    assert before == {path: path.stat().st_mtime_ns for path in run_dir(config).rglob("*") if path.name != ".lock"}


def test_a_folder_that_cannot_be_made_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=r"output folder .*/file/run cannot be written: Not a directory")
    with refused, hold_folder(tmp_path / "file" / "run"):
        pass


def test_without_file_locks_the_living_hold_the_folder_by_a_lease(tmp_path: Path, no_locks: None) -> None:
    with holder(tmp_path, "lease") as other:
        with pytest.raises(FolderBusy, match=f"process {other.pid} on"), hold_folder(tmp_path, wait_s=5.0):
            pass
        other.kill()
    begin = time.monotonic()
    with hold_folder(tmp_path):  # silent for long enough
        assert time.monotonic() - begin > 3.0
        lease = tmp_path / folder_lock.LEASE_FILE
        first = lease.read_text()
        assert str(os.getpid()) in first
        wait_until(lambda: lease.read_text() != first, "the next beat")
    assert not lease.exists()
    with hold_folder(tmp_path, wait_s=0.0):  # at once: the last one said that it was gone
        pass

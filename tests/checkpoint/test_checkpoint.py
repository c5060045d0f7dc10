"""Checkpoints: what is written comes back, and nothing else is taken for it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from asp_dist.checkpoint.format import (
    CheckpointError,
    Manifest,
    flatten_state,
    read_checkpoint,
    split_state,
    unflatten_state,
    write_checkpoint,
)
from asp_dist.checkpoint.manager import CheckpointManager
from asp_dist.checkpoint.storage import LocalStore
from asp_dist.errors import UserError
from asp_dist.weight_files import save_safetensors


def manifest(step: int = 1, run: str = "mine", best: bool = False) -> Manifest:
    return Manifest(run=run, step=step, world_size=2, config={"name": "x"}, versions={"torch": "2"}, best=best)


def state(value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"fc.weight": torch.full((3, 5), value), "bn.count": torch.tensor(7)},
        "optimizer": {
            "state": {0: {"momentum": torch.arange(4.0)}, 1: {"step": 3}},
            "groups": [{"betas": (0.9, 0.99)}],
        },
        "scaler": None,
    }


def save(store: LocalStore, step: int = 1, value: float = 1.0, **more: Any) -> str:
    plain, parts = split_state(state(value))
    return write_checkpoint(store, manifest(step, **more), plain, parts)


def keep(manager: CheckpointManager, step: int, **more: Any) -> None:
    manager.save(manifest(step, **more), state(float(step)))


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are the same, types and bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and bool(a == b)


def test_state_survives_the_trip(tmp_path: Path) -> None:
    tree = {
        "model": {"w": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last), "b": torch.zeros(0)},
        "numbers": {"a": [1, 2.5, None, True], 3: (torch.tensor(1.5, dtype=torch.bfloat16), "x")},
        "types": [torch.ones(2, dtype=t) for t in (torch.float64, torch.int64, torch.bool, torch.uint8, torch.float16)],
        "inf": float("inf"),
    }
    store = LocalStore(tmp_path)
    plain, parts = split_state(tree)
    name = write_checkpoint(store, manifest(), plain, parts)
    found, back = read_checkpoint(store, name)
    assert name == "step-00000001" and found.world_size == 2 and found.files["model.safetensors"][0] > 0
    assert equal(tree, back)


def test_unknown_types_are_refused() -> None:
    with pytest.raises(TypeError, match=r"a\.1 is a set"):
        flatten_state({"a": [1, {2}]}, {})
    assert unflatten_state({"__tuple__": [1]}, {}) == (1,)


def test_safetensors_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.tensor(3), "c": torch.zeros(0, 2), "d": torch.randn(5).bfloat16()}
    file, notes = tmp_path / "x.safetensors", dict.fromkeys("gfedcba", "é")
    contents = set()
    for _ in range(3):
        save_safetensors(file, tensors, notes)
        contents.add(file.read_bytes())
    assert len(contents) == 1  # the library alone writes the notes in another order each time
    with safe_open(str(file), "pt") as opened:
        assert opened.metadata() == notes
    back = load_file(file)
    assert {k: v.tolist() for k, v in back.items()} == {k: v.tolist() for k, v in tensors.items()}
    assert back["d"].dtype is torch.bfloat16 and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def damage_cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_empty(path: Path) -> None:
    os.truncate(path, 0)


def damage_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_bit, Path.unlink])
def test_damage_is_named_and_the_one_before_is_used(tmp_path: Path, file: str, damage: Any) -> None:
    store = LocalStore(tmp_path)
    for step in (1, 2):
        save(store, step, float(step))
    damage(tmp_path / "step-00000002" / file)
    manager = CheckpointManager(store, "mine", keep=2)
    latest = manager.latest()
    assert latest is not None and latest.name == "step-00000001"
    assert float(latest.state["model"]["fc.weight"][0, 0]) == 1.0
    (event,) = manager.events()
    assert event.kind == "warning" and "step-00000002" in event.message and file in event.message


def test_checkpoints_after_a_fall_back_are_kept(tmp_path: Path) -> None:
    """Step 4000 is the best; 4500 and 5000 rot; the run resumes from 4000 and saves on."""
    store = LocalStore(tmp_path)
    manager = CheckpointManager(store, "mine", keep=2)
    for step in (4000, 4500, 5000):
        keep(manager, step, best=step == 4000)
    manager.wait()
    for step in (4500, 5000):
        damage_bit(tmp_path / f"step-0000{step}" / "model.safetensors")
    kept = (tmp_path / "step-00005000" / "model.safetensors").read_bytes()
    for last in (4300, 4600):  # a second restart finds what the first one saved
        manager = CheckpointManager(store, "mine", keep=2)
        assert manager.latest() is not None
        for step in (last - 200, last - 100, last):
            keep(manager, step)
            manager.wait()
            assert f"step-0000{step}" in store.names()
    assert store.names() == ["step-00004000", "step-00004500", "step-00004600"]
    assert (tmp_path / "bad-step-00005000" / "model.safetensors").read_bytes() == kept


def test_what_cannot_be_read_now_is_neither_skipped_nor_moved_with_a_patched_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path, waits=(0.01, 0.01))
    for step in (1, 2):
        save(store, step, float(step))
    original, failures = Path.read_bytes, [2]

    def failing(path: Path) -> bytes:
        if path.parent.name == "step-00000002" and failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    latest = CheckpointManager(store, "mine", keep=2).latest()  # it answers at the third attempt
    assert latest is not None and latest.name == "step-00000002"
    failures[0] = 1000
    with pytest.raises(OSError, match=r"step-00000002 cannot be read now .*Input/output error.*start again"):
        CheckpointManager(store, "mine", keep=2).latest()
    assert store.names() == ["step-00000001", "step-00000002"]


def test_nothing_usable_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert CheckpointManager(store, "mine", 2).latest() is None
    damage_bit(tmp_path / save(store) / "model.safetensors")
    with pytest.raises(UserError, match=r"step-00000001/model.safetensors does not fit its hash"):
        CheckpointManager(store, "mine", 2).latest()


def test_another_runs_checkpoint_is_not_used(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save(store, 1)
    save(store, 2, run="other")
    manager = CheckpointManager(store, "mine", 2)
    latest = manager.latest()
    assert latest is not None and latest.manifest.step == 1
    assert "belongs to another run" in manager.events()[0].message
    assert store.names() == ["step-00000001"]
    assert load_file(tmp_path / "bad-step-00000002" / "model.safetensors")["fc.weight"].shape == (3, 5)


def test_a_pickle_in_place_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    name = save(store)
    torch.save({"x": 1}, tmp_path / name / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has"):
        read_checkpoint(store, name)


def test_half_written_checkpoints_are_invisible_and_go(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.begin("step-00000005")
    store.write("step-00000005", "model.safetensors").close()
    assert store.names() == [] and len(list(tmp_path.iterdir())) == 1
    store.clean()
    assert list(tmp_path.iterdir()) == []


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    manager = CheckpointManager(LocalStore(tmp_path), "mine", keep=2)
    for step in range(1, 7):
        keep(manager, step, best=step in (2, 3))
    manager.wait()
    assert manager.store.names() == ["step-00000003", "step-00000005", "step-00000006"]
    assert [e.kind for e in manager.events()] == ["checkpoint"] * 6


def test_a_write_that_hangs_delays_the_next_checkpoint_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a storage that answers after a while; training comes by six times meanwhile."""
    monkeypatch.setattr("asp_dist.checkpoint.manager.BUSY_WAIT_S", 0.1)
    answers = threading.Event()

    class Slow(LocalStore):
        def commit(self, name: str) -> None:
            answers.wait()
            super().commit(name)

    manager = CheckpointManager(Slow(tmp_path), "mine", keep=9)
    for step in range(1, 7):
        keep(manager, step)
    assert manager.busy()
    (warning,) = manager.events()
    assert warning.kind == "warning"
    assert warning.message == "the checkpoint of step 1 is still being written after 0 min: others wait for it"
    answers.set()
    manager.wait()
    keep(manager, 7)
    manager.wait()
    assert manager.store.names() == ["step-00000001", "step-00000007"]
    assert [event.kind for event in manager.events()] == ["checkpoint"] * 2


def test_saving_copies_the_state_at_once(tmp_path: Path) -> None:
    manager = CheckpointManager(LocalStore(tmp_path), "mine", keep=2)
    tree = state(1.0)
    manager.save(manifest(1), tree)
    tree["model"]["fc.weight"].fill_(9.0)  # the training goes on
    manager.wait()
    latest = manager.latest()
    assert latest is not None and float(latest.state["model"]["fc.weight"].max()) == 1.0


def test_bad_weights_are_never_a_checkpoint(tmp_path: Path) -> None:
    manager = CheckpointManager(LocalStore(tmp_path), "mine", keep=2)
    keep(manager, 1)
    tree = state()
    tree["model"]["fc.weight"][1, 1] = float("nan")
    manager.save(manifest(2), tree)
    manager.wait()
    assert manager.store.names() == ["step-00000001"]
    assert "non-finite values in fc.weight" in manager.events()[-1].message


def test_manifest_is_readable_by_people(tmp_path: Path) -> None:
    tree = json.loads((tmp_path / save(LocalStore(tmp_path)) / "manifest.json").read_text())
    assert {"step", "world_size", "config", "versions", "files", "sha256", "time", "run"} <= set(tree)


def test_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    try:
        manager = CheckpointManager(LocalStore(tmp_path / "c"), "mine", keep=3)
        keep(manager, 1)
        manager.wait()
        big = {"model": {"w": torch.ones(300, 300)}}
        manager.save(manifest(2), big)
        manager.wait()
        first, second = manager.events()
        assert first.kind == "checkpoint"
        assert second.kind == "warning" and "No space left on device" in second.message
        assert "earlier ones kept: step-00000001" in second.message
        assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-00000001"]
        keep(manager, 3)  # there is room again
        manager.wait()
        assert manager.store.names() == ["step-00000001", "step-00000003"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)

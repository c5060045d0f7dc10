"""Interrupted and resumed against uninterrupted: the same bits, in one process and under torchrun."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, start
from safetensors.torch import load_file
from small_runs import SignalAt, StopAt, digits_config, small_config, with_changes

from asp_dist.checkpoint.format import read_checkpoint
from asp_dist.checkpoint.record import run_dir
from asp_dist.checkpoint.storage import LocalStore
from asp_dist.config import Config
from asp_dist.data import prepare_digits
from asp_dist.errors import UserError
from asp_dist.tracking import read_rows
from asp_dist.training.hooks import Stopped
from asp_dist.training.trainer import train
from asp_dist.training.world import World, init_world


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(prepare_digits(tmp_path_factory.mktemp("digits")))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def last_state(folder: Path) -> dict[str, Any]:
    store = LocalStore(folder / "checkpoints")
    return read_checkpoint(store, store.names()[-1])[1]


def assert_same_bits(a: Any, b: Any, where: str = "state") -> None:
    """Whether two states are the same; clocks aside."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "total_seconds"}:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_bits(x, y, f"{where}.{i}")
    else:
        assert a == b, where


def curve(folder: Path) -> list[dict[str, Any]]:
    """The run's train and eval rows, without clocks."""
    rows = [r for r in read_rows(folder / "metrics.jsonl") if r["kind"] in ("train", "eval")]
    clocks = ("time", "ranks/", "train/images_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]


def assert_same_run(one: Path, two: Path) -> None:
    """Model file, checkpoint (dense weights, thresholds, optimizer, average, RNG, loader) and logged rows."""
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert_same_bits(last_state(one), last_state(two))
    assert curve(one) == curve(two)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The folder of an uninterrupted run."""
    torch.set_num_threads(1)
    config = digits_config(tmp_path_factory.mktemp("whole"), digits)
    train(config, World())
    return run_dir(config)


@pytest.mark.parametrize(("polls", "step"), [(5, 5), (11, 11), (12, 11), (14, 11), (22, 19)])
def test_stopped_and_started_again_is_bit_for_bit_the_same(
    tmp_path: Path, digits: Path, whole: Path, polls: int, step: int
) -> None:
    """Stopped in an epoch of 11 steps, behind its last step, in the first and last batch of its validation, and later."""
    parts = digits_config(tmp_path, digits, "parts")
    with pytest.raises(Stopped, match=f"after step {step};"):
        train(parts, World(), StopAt(polls))
    torch.manual_seed(99)  # what happens between does not matter
    train(parts, World())
    assert_same_run(whole, run_dir(parts))


def test_many_stops(tmp_path: Path, digits: Path) -> None:
    whole, parts = (digits_config(tmp_path, digits, name, training__accumulate=2) for name in ("whole", "parts"))
    train(whole, World())
    for _ in range(3):
        with pytest.raises(Stopped):
            train(parts, World(), StopAt(7))
    train(parts, World())
    assert_same_run(run_dir(whole), run_dir(parts))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_behind_the_step(tmp_path: Path, number: signal.Signals) -> None:
    config = small_config(tmp_path)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=number.name), SignalAt(3, number) as hooks:
        train(config, World(), hooks)
    assert signal.getsignal(number) is before
    assert LocalStore(run_dir(config) / "checkpoints").names() == ["step-00000003"]


def test_a_second_interrupt_does_not_wait() -> None:
    with SignalAt(0) as hooks:
        signal.raise_signal(signal.SIGINT)
        assert hooks.stop_requested() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_torn_checkpoint_costs_the_steps_since_the_one_before(tmp_path: Path, digits: Path, whole: Path) -> None:
    parts = digits_config(tmp_path, digits, "parts", output__checkpoint_steps=4)
    with pytest.raises(Stopped):
        train(parts, World(), StopAt(10))
    file = run_dir(parts) / "checkpoints" / "step-00000010" / "pruner.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    train(parts, World())
    messages = [str(r["message"]) for r in read_rows(run_dir(parts) / "metrics.jsonl") if r["kind"] == "event"]
    assert any("step-00000010/pruner.safetensors" in m and "truncated" in m for m in messages)
    assert any(m.startswith("resumed from step-00000008") for m in messages)
    assert_same_run(whole, run_dir(parts))


def test_only_torn_checkpoints_are_an_error(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    with pytest.raises(Stopped):
        train(config, World(), StopAt(2))
    (run_dir(config) / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint of this run can be used"):
        train(config, World())


def test_dense_and_sgd_free_optimizers_resume_too(tmp_path: Path, digits: Path) -> None:
    changes = {"pruning__enabled": False, "optimizer__name": "adamw", "optimizer__lr": 0.002, "schedule__epochs": 2}
    whole, parts = (digits_config(tmp_path, digits, name, **changes) for name in ("whole", "parts"))
    train(whole, World())
    with pytest.raises(Stopped):
        train(parts, World(), StopAt(6))
    train(parts, World())
    assert_same_run(run_dir(whole), run_dir(parts))


def train_with_many_checkpoints(folder: Path, digits: Path) -> None:
    train(digits_config(folder, digits, "killed", output__checkpoint_steps=2), World())


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path, digits: Path, whole: Path) -> None:
    """SIGKILL, at random moments of a run that saves every second step: the bits of the uninterrupted run, nothing left."""
    folder, moments, kills = tmp_path / "killed", random.Random(5), 0
    while not (folder / "summary.json").exists():
        process, _ = start(train_with_many_checkpoints, tmp_path, digits)
        before = LocalStore(folder / "checkpoints").names()[-1:]
        while process.is_alive() and kills < 2:
            if LocalStore(folder / "checkpoints").names()[-1:] != before:  # it trains
                time.sleep(moments.random())
                process.kill()
                kills += 1
                break
            time.sleep(0.02)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills == 2
    assert_same_run(whole, folder)
    assert len(list((folder / "checkpoints").iterdir())) <= 3 and not list(folder.glob("checkpoints/.*"))


def train_until(folder: Path, digits: Path, name: str, stop: int) -> str:
    """Train on one of the ranks; SIGTERM reaches the last one alone, in its step `stop`: all of them stop after the same."""
    world = init_world("cpu", 60)
    try:
        with SignalAt(stop if world.rank == world.world_size - 1 else 0) as hooks:
            train(digits_config(folder, digits, name, schedule__epochs=2), world, hooks)
    except Stopped as stopped:
        return f"rank {world.rank} {stopped}"
    finally:
        world.close()
    return "done"


@pytest.mark.slow
def test_ranks_stopped_and_started_again(tmp_path: Path, digits: Path) -> None:
    def launch(name: str, stop: int, ranks: int = 2) -> list[str]:
        return on_ranks(train_until, tmp_path, digits, name, stop, ranks=ranks)

    assert launch("whole", 0) == ["done"] * 2
    for rank, said in enumerate(launch("parts", 8)):
        assert said.startswith(f"rank {rank} stopped by SIGTERM after step 8")
    assert launch("parts", 0) == ["done"] * 2
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    launch("fewer", 8)
    assert launch("fewer", 0, ranks=1) == ["done"]
    messages = [str(r["message"]) for r in read_rows(tmp_path / "fewer" / "metrics.jsonl") if r["kind"] == "event"]
    assert any("1 workers instead of 2" in m for m in messages)
    rows = [r["step"] for r in read_rows(tmp_path / "fewer" / "metrics.jsonl") if r["kind"] == "train"]
    assert rows == sorted(set(rows)) and rows[-1] == 22
    model = load_file(tmp_path / "fewer" / "model.safetensors")
    assert sum(int(w.count_nonzero()) for n, w in model.items() if w.dim() == 4 and w.numel() >= 1000) > 0


def test_allowed_changes_are_said(tmp_path: Path) -> None:
    config: Config = small_config(tmp_path)
    with pytest.raises(Stopped):
        train(config, World(), StopAt(2))
    longer = with_changes(config, schedule__epochs=4, resume__allow_changes=("schedule.epochs",))
    assert train(longer, World())["steps"] == 16

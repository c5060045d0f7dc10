"""Runs that are killed under real Ray, with real DALI, end with the weights of a run that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import below, processes
from safetensors import safe_open
from waiting import HANG_S, wait_until

from asp_dist.cluster.worker import POLL_S
from asp_dist.data import prepare

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

EPOCHS, PER_EPOCH = 3, 6


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the digits, as an image folder."""
    full, part = tmp_path_factory.mktemp("digits"), tmp_path_factory.mktemp("few") / "digits"
    prepare("digits", full)
    for split, share in (("train", 4), ("val", 4)):
        for folder in sorted((full / split).iterdir()):
            (part / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[::share]:
                (part / split / folder.name / image.name).hardlink_to(image)
    return part


def write_config(folder: Path, digits: Path, **changes: Any) -> Path:
    """A run of three epochs of six steps on two workers, with all that has a state: averages, momentum, augmentation."""
    config = {
        "name": "run",
        "model": {"name": "test_resnet"},
        "data": {"root": str(digits), "batch_size": 56, "input_size": 32, "threads": 1},
        "schedule": {"epochs": EPOCHS},
        "optimizer": {"lr": 0.02},
        "training": {"device": "cpu", "log_every": 1, "ema_decay": 0.9},
        "pruning": {
            "ramp": {"shape": "cubic", "end": 0.4, "freeze_at": 0.6},
            "select": {"min_weights": 100},
        },
        "cluster": {"num_workers": 2, "cpus_per_worker": 0.5, "max_failures": 2},
        "tracking": {"wandb": "disabled"},
        "output": {"dir": str(folder), "checkpoint_steps": 2},
    }
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value  # type: ignore[dict-item]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "asp_dist", "train", str(config), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(run: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = run.communicate(timeout=HANG_S)
    assert run.returncode == code, output
    return output


def wait_for_step(run: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Until the run's log has reached `step`."""
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()[0]
        path = folder / "run" / "metrics.jsonl"
        if path.exists() and any(json.loads(row).get("step", 0) >= step for row in path.read_text().splitlines()[-1:]):
            return
        time.sleep(0.05)
    raise TimeoutError(f"step {step} was not reached")


def workers(run: subprocess.Popen[str]) -> list[int]:
    """The process numbers of the run's Ray Train workers."""
    return sorted(n for n, title in below(run.pid).items() if "RayTrainWorker" in title)


def contents(folder: Path) -> dict[str, bytes]:
    """The exported weights, bit for bit, and every layer's threshold."""
    with safe_open(str(folder / "run" / "model.safetensors"), "pt") as file:
        found = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
    for row in json.loads((folder / "run" / "layers.json").read_text()):
        found[f"threshold of {row['name']}"] = float(row["threshold"] or 0).hex().encode()
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """What the run measured, without what the clock measured."""
    keys = ("step", "train/loss", "train/grad_norm", "sparsity/measured", "val/loss", "val/top1")
    return [tuple(row.get(key) for key in keys) for row in rows(folder) if row["kind"] in ("train", "eval")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(write_config(folder, digits)))
    assert [row[0] for row in curve(folder)].count(EPOCHS * PER_EPOCH) >= 1
    return folder


def kill_a_worker(run: subprocess.Popen[str]) -> None:
    os.kill(workers(run)[-1], signal.SIGKILL)


def kill_the_driver(run: subprocess.Popen[str]) -> None:
    """The driver, and at once its workers: they would live for seconds more, in which a run as short as this one ends."""
    orphans = workers(run)
    os.kill(run.pid, signal.SIGKILL)
    for number in orphans:
        os.kill(number, signal.SIGKILL)


def kill_the_controller(run: subprocess.Popen[str]) -> None:
    (controller,) = [n for n, title in below(run.pid).items() if "TrainController" in title]
    os.kill(controller, signal.SIGKILL)


def terminate(run: subprocess.Popen[str]) -> None:
    """SIGTERM, with the workers held still until they can see the stop: a run as short as this one ends before they look."""
    held = workers(run)
    for number in held:
        os.kill(number, signal.SIGSTOP)
    os.kill(run.pid, signal.SIGTERM)
    try:
        folder = Path(str(run.args[-1])).parent  # type: ignore[index]
        wait_until(lambda: list(folder.glob("run/cluster/*/stop")), "the driver's stop file", 0.05)
        time.sleep(POLL_S)
    finally:
        for number in held:
            os.kill(number, signal.SIGCONT)


@pytest.mark.parametrize(
    ("disturb", "code"),
    [(kill_a_worker, 0), (kill_the_driver, -signal.SIGKILL), (kill_the_controller, 0), (terminate, 75)],
)
def test_a_disturbed_run_ends_bit_for_bit_like_an_undisturbed_one(
    tmp_path: Path, digits: Path, undisturbed: Path, disturb: Callable[[subprocess.Popen[str]], None], code: int
) -> None:
    config = write_config(tmp_path, digits)
    run = start(config)
    wait_for_step(run, tmp_path, PER_EPOCH + 3)  # in the middle of the second epoch
    disturb(run)
    finish(run, code)
    if code:
        assert not (tmp_path / "run" / "model.safetensors").exists()
        finish(start(config))
    mine, reference = contents(tmp_path), contents(undisturbed)
    assert mine.keys() == reference.keys()
    assert [name for name in mine if mine[name] != reference[name]] == []
    assert curve(tmp_path) == curve(undisturbed)
    assert "resume" in [row.get("event") for row in rows(tmp_path)]
    assert not (tmp_path / "run" / "cluster").exists()
    assert [title for _, _, title in processes() if str(tmp_path) in title] == []

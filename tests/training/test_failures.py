"""A run under real Ray and DALI that loses each of its processes in turn ends with the weights of one that lost none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import below, processes
from ranks import on_ranks
from safetensors import safe_open
from waiting import HANG_S, wait_until

from asp_dist.cluster.worker import POLL_S
from asp_dist.config import from_dict
from asp_dist.data import prepare
from asp_dist.training.trainer import train
from asp_dist.training.world import init_world

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

EPOCHS, PER_EPOCH = 8, 6


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
    """A run of eight epochs of six steps on two workers, with all that has a state: averages, momentum, augmentation."""
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


def without_ray(config: Path) -> None:
    """Train on one of two ranks."""
    world = init_world("cpu", 60)
    train(from_dict(yaml.safe_load(config.read_text())), world)
    world.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    on_ranks(without_ray, write_config(folder, digits))
    assert curve(folder)[-1][0] == EPOCHS * PER_EPOCH
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


def test_a_run_that_loses_each_process_ends_bit_for_bit_like_one_without_ray(
    tmp_path: Path, digits: Path, undisturbed: Path
) -> None:
    config = write_config(tmp_path, digits)

    def in_epoch(epoch: int) -> None:
        wait_for_step(run, tmp_path, (epoch - 1) * PER_EPOCH + 3)

    def resumed() -> int:
        return [row.get("event") for row in rows(tmp_path)].count("resume")

    run = start(config)
    in_epoch(2)
    kill_a_worker(run)
    in_epoch(4)
    assert resumed() == 1
    kill_the_controller(run)
    in_epoch(6)
    assert resumed() == 2
    kill_the_driver(run)
    finish(run, -signal.SIGKILL)
    run = start(config)
    in_epoch(7)
    terminate(run)
    finish(run, 75)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    finish(start(config))
    assert resumed() == 4
    mine, reference = contents(tmp_path), contents(undisturbed)
    assert mine.keys() == reference.keys()
    assert [name for name in mine if mine[name] != reference[name]] == []
    assert curve(tmp_path) == curve(undisturbed)
    assert not (tmp_path / "run" / "cluster").exists()
    assert [title for _, _, title in processes() if str(tmp_path) in title] == []

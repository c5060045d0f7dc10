"""Tracking of real runs, started as a user starts them: what wandb's file holds, and after a kill and a resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from waiting import HANG_S, wait_until

from asp_dist.tracking import read_layers, read_rows
from asp_dist.tracking.wandb import transaction_log
from asp_dist.tracking.wandb.wandb_run import run_id

PROMISED = {
    *("train/loss", "train/lr", "train/images_per_second", "val/loss", "val/top1", "val/top5"),
    *("sparsity/target", "sparsity/predicted", "sparsity/measured", "sparsity/all", "cost/macs_density", "cost/bytes"),
    *("time/data", "time/forward_backward", "time/step", "epoch"),
}
EPOCHS, STEPS = 6, 8  # of 8 steps each
EVERY = 2


def command(folder: Path) -> list[str]:
    """A small run in one process: ResNet-20 on random images."""
    options = {
        "name": "run",
        "output.dir": folder,
        "model.name": "cifar_resnet20",
        "data.backend": "synthetic",
        "data.synthetic_samples": "[128, 32]",
        "data.batch_size": 16,
        "data.input_size": 32,
        "schedule.epochs": EPOCHS,
        "training.log_every": EVERY,
        "training.device": "cpu",
        "pruning.control": "track",
        "cluster.mode": "local",
        "tracking.layer_accuracy_images": 16,
        "tracking.layer_accuracy_every": 3,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "asp_dist", "train", *words]


def environment(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder),
        "NETRC": str(folder / "no-netrc"),
        "CUDA_VISIBLE_DEVICES": "",
    }


def wandb_rows(run: Path) -> list[dict[str, Any]]:
    return [row for path in transaction_log.run_files(run, run_id(run)) for row in transaction_log.history(path)]


def check_files(run: Path) -> None:
    """wandb's file and ``metrics.jsonl`` hold every promised series at every step it is due, once."""
    rows = wandb_rows(run)
    steps = [row["global_step"] for row in rows]
    assert steps == list(range(EVERY, EPOCHS * STEPS + 1, EVERY))
    assert [row["_step"] for row in rows] == steps
    for key in PROMISED:
        due = range(STEPS, EPOCHS * STEPS + 1, STEPS) if key.startswith("val/") else steps
        assert [row["global_step"] for row in rows if key in row] == list(due), key
    assert [row["global_step"] for row in rows if "layers/table" in row] == list(range(STEPS, EPOCHS * STEPS + 1, STEPS))
    scalars = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
    assert len(scalars) <= 40
    mine = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in mine if row["kind"] == "train"] == steps
    for row, same in zip(rows, (row for row in mine if row["kind"] == "train")):
        assert row["train/loss"] == same["train/loss"]


@pytest.mark.slow
def test_wandb_file_of_a_run_holds_every_promised_series(tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path), env=environment(tmp_path), capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb sync") == 1  # said once while it runs; the final table says it again
    run = tmp_path / "run"
    check_files(run)
    (path,) = transaction_log.run_files(run, run_id(run))
    records: dict[str, list[Any]] = {}
    for record in transaction_log.records(path):
        records.setdefault(str(record.WhichOneof("record_type")), []).append(record)
    artifacts = {record.artifact.type for record in records["artifact"]}
    assert {"config", "model", "layers"} <= artifacts
    summary = {item.key for record in records["summary"] for item in record.summary.update}
    assert {"top1", "sparsity", "target_sparsity", "world_size"} <= summary
    assert any(item.key == "schedule" for record in records["config"] for item in record.config.update) or records["run"]
    layers = read_layers(run)
    assert sum(row["pruned"] for row in layers) == 18
    assert all("dense_gain" in row for row in layers if row["pruned"])
    assert json.loads((run / "summary.json").read_text())["wandb_run_id"] == run_id(run)
    assert "Costly layers" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_wandb_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(command(tmp_path), env=environment(tmp_path), stderr=subprocess.DEVNULL, start_new_session=True)
    try:

        def in_the_fourth_epoch() -> bool:
            assert process.poll() is None
            return any(row["step"] >= 3 * STEPS + EVERY for row in read_rows(run / "metrics.jsonl"))

        wait_until(in_the_fourth_epoch, "the fourth epoch", 0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # wandb's own process too
        process.wait()
    first = run_id(run)
    done = subprocess.run(command(tmp_path), env=environment(tmp_path), capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert run_id(run) == first
    assert len(transaction_log.run_files(run, first)) == 2
    check_files(run)

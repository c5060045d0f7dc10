"""Further trackers: what TensorBoard's files and MLflow's store hold is what metrics.jsonl holds, over a stop and a resume."""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from small_runs import StopAt, small_config
from tensorboardX.proto.event_pb2 import Event

from asp_dist.errors import UserError
from asp_dist.tracking import further
from asp_dist.tracking.further import check_further
from asp_dist.tracking.rows import numbers_of, read_rows
from asp_dist.training.hooks import Hooks, Stopped
from asp_dist.training.trainer import train
from asp_dist.training.world import World

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:mlflow.*")


def events(file: Path) -> list[Event]:
    """The records of an event file, each a length, a checksum, a message and a checksum."""
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """As TensorBoard shows them: a file's first record takes back the steps from its own on."""
    shown: dict[str, dict[int, float]] = defaultdict(dict)
    for file in sorted(folder.iterdir()):
        for event in events(file):
            if event.HasField("session_log") and event.session_log.status == 1:
                shown = defaultdict(dict, {k: {s: v for s, v in steps.items() if s < event.step} for k, steps in shown.items()})
            for value in event.summary.value:
                shown[value.tag][event.step] = value.simple_value
    return shown


def recorded(folder: Path) -> dict[str, dict[int, float]]:
    table: dict[str, dict[int, float]] = defaultdict(dict)
    for row in read_rows(folder / "metrics.jsonl"):
        for name, value in numbers_of(row).items():
            table[name][row["step"]] = value
    return table


def test_both_hold_the_numbers_of_the_record_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = small_config(tmp_path, tracking__also=("tensorboard", "mlflow"), training__log_every=1)
    with pytest.raises(Stopped):
        train(config, World(), StopAt(7))
    summary = train(config, World(), Hooks())
    run = tmp_path / "run"
    rows = recorded(run)
    assert len(rows) > 10 and set(rows["train/loss"]) == set(range(1, 13))

    board = scalars(run / "tensorboard")
    assert {k: {s: pytest.approx(v, rel=1e-6) for s, v in steps.items()} for k, steps in rows.items()} == board
    assert len(list((run / "tensorboard").iterdir())) == 2

    client = MlflowClient(tracking_uri=(run / "mlruns").as_uri())
    stored = client.get_run((run / "mlflow_id").read_text().strip())
    assert stored.info.status == "FINISHED" and stored.info.run_name == "run"
    assert stored.data.params["budget.sparsity"] == "None" and stored.data.params["model.name"] == "cifar_resnet20"
    assert stored.data.metrics["summary/top1"] == pytest.approx(summary["top1"])
    for name, steps in rows.items():
        history = client.get_metric_history(stored.info.run_id, name)
        assert sorted((entry.step, entry.value) for entry in history) == sorted(steps.items()), name


class Broken:
    name = "broken"

    def log(self, row: dict[str, Any]) -> None:
        raise ConnectionError("no server")

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        raise AssertionError("it was left out")


def test_one_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(config: Any, run_dir: Path, resume_step: int, name: str) -> Any:
        if name == "mlflow":
            raise ConnectionError("no such host")
        return Broken()

    monkeypatch.setattr("asp_dist.tracking.tracker.start_further", start)
    summary = train(small_config(tmp_path, tracking__also=("tensorboard", "mlflow")), World(), Hooks())
    assert summary["steps"] == 12
    messages = [str(row.get("message")) for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert any("mlflow does not track this run (ConnectionError: no such host)" in text for text in messages)
    assert any("broken failed (ConnectionError: no server)" in text for text in messages)


def test_a_missing_package_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(further.PACKAGES, "mlflow", "nowhere-to-be-found")
    with pytest.raises(UserError, match=r"tracking.also: mlflow needs nowhere-to-be-found.*asp-dist\[trackers\]"):
        check_further(("tensorboard", "mlflow"))

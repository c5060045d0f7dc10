"""The tracker: files, resumption, wandb's offline record, and what it does without a server."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from waiting import HANG_S

from asp_dist.config import Config, TrackingConfig
from asp_dist.errors import UserError
from asp_dist.pruning.names import LayerRow
from asp_dist.tracking import Tail, build_tracker, read_layers, read_rows
from asp_dist.tracking.layer_rows import LayerHistory, read_history
from asp_dist.tracking.rows import MetricsFile
from asp_dist.tracking.schema import METRICS_FILE
from asp_dist.tracking.tracker import Heartbeat
from asp_dist.tracking.wandb import transaction_log, wandb_run
from asp_dist.tracking.wandb.login import api_key
from asp_dist.tracking.wandb.wandb_run import run_id, sync_line

KEY = "0123456789" * 4
TRAIN = {"kind": "train", "epoch": 0.5, "train/loss": 1.5, "train/lr": 0.1, "train/images_per_second": 100.0}
EVAL = {"kind": "eval", "epoch": 1.0, "val/loss": 1.0, "val/top1": 0.5, "val/top5": 0.9, "sparsity/measured": 0.8}


def layer_rows(number: int, sparsity: float = 0.9) -> list[LayerRow]:
    pruned: list[LayerRow] = [
        {
            "name": f"blocks.{i}.conv",
            "type": "Conv2d",
            "shape": [64, 64, 3, 3],
            "weights": 36864,
            "macs": 36864 * 49,
            "threshold": 1.6 + i / 1000,
            "sigma": 0.02,
            "predicted_sparsity": sparsity,
            "measured_sparsity": sparsity - i / 10000,
            "pruned": True,
            "reason": "",
        }
        for i in range(number)
    ]
    dense: LayerRow = {
        "name": "head",
        "type": "Linear",
        "shape": [10, 64],
        "weights": 640,
        "macs": 640,
        "pruned": False,
    }
    return [*pruned, {**dense, "reason": "fewer than 1000 weights"}]


def history(run_dir: Path) -> list[dict[str, Any]]:
    files = transaction_log.run_files(run_dir, run_id(run_dir))
    return [row for path in files for row in transaction_log.history(path)]


@pytest.fixture(autouse=True)
def _no_wandb_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


@contextlib.contextmanager
def server(status: int, body: bytes, seconds: float = 0.0, at_once: int = 0) -> Iterator[str]:
    """A server on this machine that answers every POST alike, the first `at_once` at once, the others after `seconds`."""
    answered = itertools.count()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if next(answered) >= at_once:
                stop.wait(seconds)
            with contextlib.suppress(OSError):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    stop = threading.Event()
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http_server.server_address[1]}"
    finally:
        stop.set()
        http_server.shutdown()
        http_server.server_close()
        thread.join()


def offline(**fields: Any) -> Config:
    return Config(name="trial", tracking=TrackingConfig(wandb="offline", **fields))


def test_metrics_file_drops_rows_after_the_resume_step_and_half_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (10, 20, 30):
        file.append(step, TRAIN)
    file.append(30, EVAL)
    file.close()
    with path.open("a") as raw:
        raw.write('{"step": 40, "ki')
    again = MetricsFile(path, resume_step=20)
    assert [row["step"] for row in again.kept] == [10, 20]
    assert again.append(20, TRAIN) is None
    assert again.append(30, TRAIN | {"train/loss": float("nan")}) is not None
    again.close()
    assert [row["step"] for row in read_rows(path)] == [10, 20, 30]
    assert read_rows(path)[-1]["train/loss"] is None


def test_tail_gives_whole_rows_as_they_come_and_survives_truncation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in tail.read()] == [1, 2]
    path.write_text('{"step": 1}\n')
    assert tail.read() == []
    with path.open("a") as file:
        file.write('{"step": 2}\n')
    assert [row["step"] for row in tail.read()] == [2]


@pytest.mark.parametrize("from_end", [False, True])
def test_tail_gives_all_rows_of_a_run_that_fell_back_and_overtook_it(tmp_path: Path, from_end: bool) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (2, 4, 6):
        file.append(step, {"train/loss": 1.0})
    file.close()
    tail = Tail(path, from_end=from_end)
    assert [row["step"] for row in tail.read()] == ([] if from_end else [2, 4, 6])
    file = MetricsFile(path, resume_step=2)  # cuts 4 and 6 off, and has outgrown them when the tail looks again
    file.append(2, {"event": "resume", "message": "resumed from step-00000002; 2 workers instead of 4" + "." * 200})
    for step in (4, 6, 8):
        file.append(step, {"train/loss": 0.5})
    file.close()
    rows = tail.read()
    assert [(row["step"], row["kind"]) for row in rows] == [(2, "event"), (4, "train"), (6, "train"), (8, "train")]
    assert tail.read() == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with build_tracker(offline(), tmp_path / "run", rank=1) as tracker:
        tracker.log(1, TRAIN)
        tracker.log_layers(1, layer_rows(1))
        tracker.alert("a", "b")
    assert not (tmp_path / "run").exists()


def test_offline_file_holds_every_series_on_its_step_axis(tmp_path: Path) -> None:
    tracker = build_tracker(offline(), tmp_path, rank=0)
    for step in range(10, 60, 10):
        tracker.log(step, TRAIN | {"train/loss": 1 / step, "sparsity/target": 0.9})
        if step in (20, 40):
            tracker.log(step, EVAL)
            tracker.log_layers(step, layer_rows(300, sparsity=step / 50))
    (tmp_path / "config.yaml").write_text("name: trial\n")
    tracker.finish({"top1": 0.5, "sparsity": 0.9, "target_sparsity": 0.9})
    rows = history(tmp_path)
    assert [row["global_step"] for row in rows] == [10, 20, 30, 40, 50]
    assert [row["_step"] for row in rows] == [10, 20, 30, 40, 50]
    assert [row["train/loss"] for row in rows] == [1 / step for step in range(10, 60, 10)]
    assert [row["global_step"] for row in rows if "val/top1" in row] == [20, 40]
    tables = [row["layers/table"] for row in rows if "layers/table" in row]
    assert [(table["nrows"], table["ncols"]) for table in tables] == [(301, 11), (301, 11)]
    assert {"layers/heat_map", "layers/lines_table", "layers/sparsity"} <= rows[1].keys()
    scalars = {key for row in rows for key, value in row.items() if isinstance(value, int | float)}
    assert len(scalars) <= 40, scalars
    assert len({key for row in rows for key in row}) <= 45
    kinds = {record.WhichOneof("record_type") for path in wandb_files(tmp_path) for record in transaction_log.records(path)}
    assert {"run", "summary", "artifact", "exit"} <= kinds
    assert read_history(tmp_path).steps == [20, 40]
    assert len(read_layers(tmp_path)) == 301


def wandb_files(run_dir: Path) -> list[Path]:
    return transaction_log.run_files(run_dir, run_id(run_dir))


def test_more_scalars_than_the_limit_stay_in_the_file_alone(tmp_path: Path) -> None:
    with build_tracker(offline(), tmp_path, rank=0) as tracker:
        tracker.log(1, {f"layer/{i}": float(i) for i in range(300)})
    (row,) = history(tmp_path)
    assert sum(isinstance(value, int | float) for value in row.values()) <= 42  # with wandb's own _step and times
    assert len(read_rows(tmp_path / "metrics.jsonl")[0]) == 303


RUN = """
import os, sys, time
from pathlib import Path
from asp_dist.config import Config, TrackingConfig
from asp_dist.tracking import build_tracker
first, last, resume, kill = map(int, sys.argv[2:])
config = Config(tracking=TrackingConfig(wandb="offline"))
tracker = build_tracker(config, Path(sys.argv[1]), rank=0, resume_step=resume)
for step in range(first, last + 1):
    tracker.log(step, {"train/loss": 1 / step, "train/lr": 0.1})
    if step % 10 == 0:
        tracker.log(step, {"val/loss": 1.0, "val/top1": step / 100})
    time.sleep(0.02)
if kill:
    os.kill(os.getpid(), 9)
tracker.finish({"top1": 1.0})
"""


def start_run(run_dir: Path, *numbers: int) -> int:
    command = [sys.executable, "-c", RUN, str(run_dir), *map(str, numbers)]
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}  # this process's own
    done = subprocess.run(command, timeout=HANG_S, env=environment, capture_output=True, text=True)
    print(done.stderr)
    return done.returncode


@pytest.mark.slow
def test_killed_and_resumed_run_has_one_id_and_every_step_once(tmp_path: Path) -> None:
    assert start_run(tmp_path, 1, 57, 0, 1) == -signal.SIGKILL
    lost = {row["global_step"] for row in history(tmp_path)}
    assert max(lost) >= 1
    assert start_run(tmp_path, 51, 77, 50, 1) == -signal.SIGKILL
    assert start_run(tmp_path, 71, 80, 70, 0) == 0
    assert len(wandb_files(tmp_path)) == 3
    steps = [row["global_step"] for row in history(tmp_path)]
    assert steps == list(range(1, 81))
    assert [row["_step"] for row in history(tmp_path)] == steps
    assert [row["global_step"] for row in history(tmp_path) if "val/top1" in row] == list(range(10, 81, 10))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 81))


def start_without_a_server(run_dir: Path, reason: str, config: Config | None = None) -> None:
    """A run starts within 20 s, is tracked offline, and says so once."""
    began = time.monotonic()
    tracker = build_tracker(config or Config(), run_dir, rank=0)
    assert time.monotonic() - began < 20
    tracker.log(1, TRAIN)
    tracker.finish()
    events = [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "event"]
    assert len(events) == 1
    assert reason in events[0]["message"]
    assert "wandb sync" in events[0]["message"]
    assert [row["global_step"] for row in history(run_dir)] == [1]
    assert sync_line(run_dir) == f"wandb sync {run_dir}/wandb/offline-run-*"


def test_no_key_goes_offline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start_without_a_server(tmp_path, "no API key")
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err == ""


def test_no_network_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    start_without_a_server(tmp_path, "cannot be reached")


@pytest.mark.parametrize(("status", "reason"), [(200, "does not know"), (401, "refused"), (500, "HTTP 500")])
def test_wrong_key_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, reason: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with server(status, b'{"data": {"viewer": null}}') as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        start_without_a_server(tmp_path, reason)


def test_a_key_that_is_none_at_all_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    with server(401, b"") as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        start_without_a_server(tmp_path, "refused")


def test_key_is_found_where_wandb_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai login user password cloud\nmachine here:8080 login user password mine\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert api_key("https://api.forge.coreweave.com") == "cloud"
    assert api_key("http://here:8080") == "mine"
    assert api_key("http://elsewhere") is None
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert api_key("http://elsewhere") == KEY


def test_server_that_never_answers_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with server(200, b"{}", seconds=60) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        start_without_a_server(tmp_path, "did not answer", Config(tracking=TrackingConfig(timeout_s=2)))


@pytest.mark.slow
def test_server_that_hangs_after_the_first_question_goes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # wandb's own process may have died of another test's answers, and is started anew only then
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with server(200, json.dumps({"data": {"viewer": {"id": "me"}}}).encode(), seconds=60, at_once=1) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        start_without_a_server(tmp_path, "did not accept the run", Config(tracking=TrackingConfig(timeout_s=4)))


def test_online_without_a_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no API key"):
        build_tracker(Config(tracking=TrackingConfig(wandb="online")), tmp_path, rank=0)


def test_disabled_writes_the_file_alone(tmp_path: Path) -> None:
    with build_tracker(Config(tracking=TrackingConfig(wandb="disabled")), tmp_path, rank=0) as tracker:
        tracker.log(1, TRAIN)
    assert not (tmp_path / "wandb").exists()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_alerts_on_bad_loss_stalled_input_and_missed_budget(tmp_path: Path) -> None:
    tracker = build_tracker(offline(), tmp_path, rank=0)
    for step in range(1, 9):
        loss = float("nan") if step in (2, 3) else 1.0
        tracker.log(step, {"train/loss": loss, "time/step": 1.0, "time/data": 0.7})
    tracker.finish({"sparsity": 0.85, "target_sparsity": 0.9})
    messages = [row["message"] for row in read_rows(tmp_path / "metrics.jsonl") if row["kind"] == "event"]
    assert [message.split(":")[0] for message in messages] == [
        "Loss is not finite",
        "Input is stalled",
        "Budget missed",
    ]
    alerts = [
        record.alert.title
        for path in wandb_files(tmp_path)
        for record in transaction_log.records(path)
        if record.WhichOneof("record_type") == "alert"
    ]
    assert alerts == ["Loss is not finite", "Input is stalled", "Budget missed"]


def test_silence_is_told_once_and_only_after_a_first_row() -> None:
    told: list[float] = []
    heart = Heartbeat(told.append, least_s=0.1)
    time.sleep(0.3)
    assert told == []
    heart.beat()
    time.sleep(0.5)
    assert told == [0.1]
    heart.beat()
    heart.close()
    assert told == [0.1]


def test_wandb_failing_ends_wandb_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = build_tracker(offline(), tmp_path, rank=0)
    run = tracker._run.run  # type: ignore[attr-defined]

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(run, "log", broken)
        tracker.log(1, TRAIN)
    tracker.log(2, TRAIN)
    tracker.finish({})
    run.finish()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["kind"] for row in rows] == ["train", "event", "train"]
    assert "gone" in rows[1]["message"]


def test_thinned_history_keeps_the_last_evaluation() -> None:
    history = LayerHistory()
    for step in range(100):
        history.add(step, {"name": ["a"], "measured_sparsity": [step / 100]})
    thin = history.thinned(7)
    assert len(thin.steps) <= 7
    assert thin.steps[-1] == 99
    assert thin.series["measured_sparsity"][-1] == [0.99]


def test_a_wandb_that_does_not_start_is_no_reason_not_to_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its service fails in wandb.init; a patched call."""

    def fails(*arguments: Any) -> None:
        raise RuntimeError("the service process is not there")

    monkeypatch.setattr(wandb_run, "_init", fails)
    tracker = build_tracker(offline(), tmp_path, rank=0)
    tracker.log(1, {"kind": "train", "train/loss": 1.0})
    tracker.finish()
    first, second = read_rows(tmp_path / METRICS_FILE)[:2]
    assert "wandb does not track this run (RuntimeError: the service process is not there)" in first["message"]
    assert second["train/loss"] == 1.0


def test_a_damaged_wandb_file_is_read_up_to_the_damage(tmp_path: Path) -> None:
    tracker = build_tracker(offline(), tmp_path, rank=0)
    for step in range(1, 6):
        tracker.log(step, {"kind": "train", "train/loss": 1.0})
    tracker.finish()
    (path,) = transaction_log.run_files(tmp_path, run_id(tmp_path))
    data = path.read_bytes()
    whole = [record.WhichOneof("record_type") for record in transaction_log.records(path)]
    (start,) = {data.index(frame) for frame in list(transaction_log.frames(data))[-3:-2]}
    path.write_bytes(data[:start] + b"\xff" * 8 + data[start + 8 :])
    assert [record.WhichOneof("record_type") for record in transaction_log.records(path)] == whole[:-3]
    again = build_tracker(offline(), tmp_path, rank=0, resume_step=5)
    again.log(6, {"kind": "train", "train/loss": 1.0})
    again.finish()


def test_a_deleted_wandb_run_goes_on_under_a_new_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wandb's server says to such an id, from its source; the server itself is not here."""
    ids: list[str] = []

    def deleted(config: Config, run_dir: Path, mode: str, init_timeout: float) -> str:
        ids.append(wandb_run.run_id(run_dir))
        if len(ids) == 1:
            raise RuntimeError("run me/asp-dist/x was previously created and deleted; try a new run name")
        return "a run"

    monkeypatch.setattr(wandb_run, "_init", deleted)
    assert wandb_run._init_or_replace(offline(), tmp_path, 5.0) == "a run"
    assert len(set(ids)) == 2 and wandb_run.run_id(tmp_path) == ids[1]


@pytest.mark.parametrize("upload", [True, False])
def test_the_network_goes_to_wandb_by_a_switch(tmp_path: Path, upload: bool) -> None:
    tracker = build_tracker(offline(upload_model=upload), tmp_path, rank=0)
    for name in ("config.yaml", "model.safetensors", "layers.json"):
        (tmp_path / name).write_text("{}")
    tracker.log(1, {"kind": "train", "train/loss": 1.0})
    tracker.finish({"top1": 1.0})
    (path,) = transaction_log.run_files(tmp_path, run_id(tmp_path))
    artifacts = [r.artifact.type for r in transaction_log.records(path) if r.WhichOneof("record_type") == "artifact"]
    assert ("model" in artifacts) == upload
    assert "config" in artifacts

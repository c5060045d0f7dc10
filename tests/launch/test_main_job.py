"""The main job, end to end: the commands that a user types, on a real Ray cluster, with real images through DALI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
import timm
import torch
from processes import environment_of, processes
from safetensors.torch import load_file
from waiting import HANG_S, wait_until

from asp_dist.cli import main
from asp_dist.data import prepare_digits
from asp_dist.tracking import read_rows
from asp_dist.tracking.schema import RunSummary
from asp_dist.tracking.wandb import transaction_log
from asp_dist.tracking.wandb.wandb_run import run_id

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
EPOCHS, PER_EPOCH = 5, 22  # of the recipe's twelve epochs, to save minutes
MARK = uuid.uuid4().hex
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "RAY_"))} | {"ASP_DIST_TEST": MARK}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded data set."""
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


def asp_dist(*words: str, launcher: tuple[str, ...] = (sys.executable, "-m", "asp_dist")) -> subprocess.Popen[str]:
    """Start ``asp-dist`` with these words."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*launcher, *words], stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=ENVIRONMENT)


def finish(process: subprocess.Popen[str], timeout_s: float = HANG_S) -> tuple[int, str, str]:
    """Exit code, output and error output, once the process and all that it started are gone."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def train(folder: Path, digits: Path, *words: str) -> tuple[str, ...]:
    """The words of a training command with its data and output in `folder`."""
    return ("train", CONFIG, "--data.root", str(digits), "--output.dir", str(folder), *words)


def left_over() -> list[str]:
    """Command lines of processes that still run, of all that this module's commands started."""
    return [title for number, _, title in processes() if f"ASP_DIST_TEST={MARK}".encode() in environment_of(number)]


def summary_of(run_dir: Path) -> dict[str, Any]:
    """The run's results."""
    result: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return result


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> tuple[Path, str, str]:
    """The quickstart in five of its epochs, interrupted in the second and started again; its folder, and what both print."""
    folder = tmp_path_factory.mktemp("runs")
    command = train(folder, digits, "--schedule.epochs", str(EPOCHS))
    first = asp_dist(*command)
    metrics = folder / "quickstart" / "metrics.jsonl"

    def second_epoch() -> bool:
        assert first.poll() is None, finish(first)
        return any(row["step"] > PER_EPOCH for row in read_rows(metrics))

    wait_until(second_epoch, "the second epoch")
    first.send_signal(signal.SIGINT)
    code, _, interrupted = finish(first)
    assert code == 75, interrupted
    code, out, err = finish(asp_dist(*command))
    assert code == 0, err
    assert left_over() == []
    return folder / "quickstart", out, interrupted


@pytest.mark.slow
class TestQuickstart:
    """Everything that the quickstart promises."""

    def test_it_reaches_its_bounds(self, quickstart: tuple[Path, str, str]) -> None:
        summary = summary_of(quickstart[0])
        assert summary["top1"] >= 0.97
        assert abs(summary["sparsity"] - 0.9) <= 0.0005
        assert summary["nonzero_weights"] == round(0.1 * summary["prunable_weights"])
        assert summary["world_size"] == 2 and summary["epochs"] == EPOCHS
        assert summary["images_per_second"] > 0

    def test_it_went_on_where_it_was(self, quickstart: tuple[Path, str, str]) -> None:
        folder, _, interrupted = quickstart
        assert "SIGINT" in interrupted
        rows = read_rows(folder / "metrics.jsonl")
        resumed = [row for row in rows if row.get("event") == "resume"]
        assert len(resumed) == 1 and PER_EPOCH < resumed[0]["step"] < 2 * PER_EPOCH
        steps = [row["step"] for row in rows if row["kind"] == "train"]
        assert steps == sorted(set(steps)) and steps[-1] == EPOCHS * PER_EPOCH
        assert [row["step"] for row in rows if row["kind"] == "eval"] == [PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]

    def test_it_prints_the_layers_the_results_and_what_to_try_next(self, quickstart: tuple[Path, str, str]) -> None:
        folder, out, _ = quickstart
        assert "layer4.1.conv2" in out and "512×512×3×3" in out
        for word in ("top-1", "top-5", "sparsity", "budget 90.00%", "images/s", "next", str(folder)):
            assert word in out

    def test_wandb_has_every_step_under_one_run(self, quickstart: tuple[Path, str, str]) -> None:
        folder = quickstart[0]
        files = transaction_log.run_files(folder, run_id(folder))
        assert len(files) == 2  # before and after the interruption
        rows = [row for file in files for row in transaction_log.history(file)]
        steps = [row["global_step"] for row in rows if "val/top1" in row]
        assert steps == [PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]
        logged = {key for row in rows for key in row}
        assert {"train/loss", "train/lr", "sparsity/target", "sparsity/predicted", "sparsity/measured"} <= logged

    def test_timm_loads_the_model_and_evaluate_agrees(self, quickstart: tuple[Path, str, str]) -> None:
        folder = quickstart[0]
        file = folder / "model.safetensors"
        model = timm.create_model(
            "resnet18", num_classes=10, pretrained=True, pretrained_cfg_overlay={"file": str(file), "num_classes": 10}
        )
        stored = load_file(file)
        assert model.state_dict().keys() == stored.keys()
        assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
        code, out, err = finish(asp_dist("evaluate", str(folder), "--json"))
        assert code == 0, err
        again, summary = json.loads(out), summary_of(folder)
        assert again["top1"] == pytest.approx(summary["top1"], abs=1e-9)
        assert again["nonzero_weights"] == summary["nonzero_weights"]
        assert set(get_type_hints(RunSummary)) == set(summary)

    def test_the_files_are_there(self, quickstart: tuple[Path, str, str]) -> None:
        names = {path.name for path in quickstart[0].iterdir()}
        assert names >= {"config.yaml", "model.safetensors", "metrics.jsonl", "layers.json", "report.html"}
        assert names >= {"summary.json", "checkpoints", "wandb"}


SHORT = ("--training.max_steps", "6", "--quiet")


@pytest.mark.slow
def test_the_same_command_runs_under_torchrun(tmp_path: Path, digits: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "asp_dist")
    code, _, err = finish(asp_dist(*train(tmp_path, digits, *SHORT), launcher=launcher))
    assert code == 0, err
    summary = summary_of(tmp_path / "quickstart")
    assert summary["world_size"] == 2
    assert summary["nonzero_weights"] == round(0.1 * summary["prunable_weights"])


@pytest.mark.slow
def test_torchruns_script_returns_the_commands_exit_codes_and_one_message(tmp_path: Path, digits: Path) -> None:
    script = (str(ROOT / "launch" / "torchrun.sh"),)
    stopped = asp_dist(*train(tmp_path / "stopped", digits, "--schedule.epochs", "500")[1:], launcher=script)
    metrics = tmp_path / "stopped" / "quickstart" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and any(row["kind"] == "train" for row in read_rows(metrics)), "a row of training")
    stopped.send_signal(signal.SIGTERM)
    code, _, err = finish(stopped)
    assert code == 75, err
    assert err.count("stopped by SIGTERM after step") == 1
    assert list((tmp_path / "stopped" / "quickstart" / "checkpoints").glob("step-*"))
    mistake = asp_dist(*train(tmp_path, digits, "--data.batch_size", "33")[1:], launcher=script)
    code, _, err = finish(mistake)
    assert code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert line.startswith("error: data.batch_size = 33 does not divide among 2 workers × training.accumulate = 1")


@pytest.mark.slow
def test_the_same_command_runs_in_this_process(tmp_path: Path, digits: Path) -> None:
    """On one worker of a Ray cluster: tests/cluster/test_jobs.py."""
    assert main(train(tmp_path, digits, *SHORT, "--cluster.mode", "local")) == 0
    summary = summary_of(tmp_path / "quickstart")
    assert summary["world_size"] == 1
    assert summary["nonzero_weights"] == round(0.1 * summary["prunable_weights"])


BAD_INPUT = {
    "unknown model": (("--model.name", "resnet19"), ("resnet19", "resnet18")),
    "missing data": (("--data.root", "/nowhere/digits"), ("/nowhere/digits",)),
    "sparsity out of range": (("--budget.sparsity", "1.2"), ("budget.sparsity = 1.2", "[0, 1)")),
    "budget below the floor": (("--budget.count", "500", "--budget.sparsity", "null"), ("500", "parameters")),
    "no layer left": (("--pruning.select.min_weights", "100000000"), ("no layer", "min_weights")),
    "batch that does not divide": (("--data.batch_size", "63"), ("63", "2 workers")),
    "more workers than there are": (
        ("--cluster.num_workers", "64", "--cluster.cpus_per_worker", "1", "--data.batch_size", "128"),
        ("cluster.num_workers = 64", "CPU"),
    ),
    "more GPUs than there are": (("--cluster.gpus_per_worker", "9"), ("9", "GPU")),
}


# Runs each command line of the JSON on its input, and prints (exit code, output, error output) of each.
ONE_PROCESS = """
import contextlib, io, json, sys
from asp_dist.cli import main

results = {}
for case, words in json.load(sys.stdin).items():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    results[case] = code, out.getvalue(), err.getvalue()
print(json.dumps(results))
"""


class Refused(NamedTuple):
    """The folder of the data sets, and (exit code, output, error output) of each command line."""

    folder: Path
    answers: dict[str, tuple[int, str, str]]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Refused:
    """What each mistake is answered with; one process for all, which must start nothing that stays."""
    folder = tmp_path_factory.mktemp("refused")
    cases = {case: train(folder / "runs", digits, *words) for case, (words, _) in BAD_INPUT.items()}
    for kind in BAD_FOLDERS:
        cases[kind] = train(folder / "runs", bad_folder(folder / kind, kind))
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    assert left_over() == [] and not (folder / "runs").exists()
    results: dict[str, tuple[int, str, str]] = json.loads(done.stdout)
    return Refused(folder, results)


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_at_once_with_one_message(refused: Refused, case: str) -> None:
    code, out, err = refused.answers[case]
    assert code in (1, 2) and out == ""
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
    assert all(word in err for word in BAD_INPUT[case][1]), err


@pytest.mark.slow
def test_a_mistake_ends_a_process_with_its_code(tmp_path: Path, digits: Path) -> None:
    code, out, err = finish(asp_dist(*train(tmp_path, digits, "--budget.sparsity", "1.2")))
    assert (code, out) == (2, "") and err.startswith("error: budget.sparsity = 1.2")


BAD_FOLDERS = {"empty": ("train",), "one class": ("one class", "zero")}


def bad_folder(folder: Path, kind: str) -> Path:
    """A data folder that no run can use."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        if kind == "one class":
            (folder / split / "zero").mkdir()
            (folder / split / "zero" / "a.png").write_bytes(b"not looked at")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_unfit_data_folders_are_refused(refused: Refused, kind: str) -> None:
    code, _, err = refused.answers[kind]
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert str(refused.folder / kind) in err and all(word in err for word in BAD_FOLDERS[kind]), err


@pytest.mark.slow
def test_a_folder_with_another_run_and_an_unreadable_checkpoint_are_refused(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--cluster.mode", "local", "--training.max_steps", "2", "--tracking.wandb", "disabled", "--quiet"]
    words += ["--model.name", "cifar_resnet20"]
    assert main(train(tmp_path, digits, *words)) == 0
    capsys.readouterr()
    assert main(train(tmp_path, digits, *words, "--optimizer.lr", "0.3")) == 2
    err = capsys.readouterr().err
    assert "optimizer.lr" in err and "0.3" in err and "Traceback" not in err, err
    for checkpoint in (tmp_path / "quickstart" / "checkpoints").iterdir():
        for file in checkpoint.iterdir():
            file.write_bytes(file.read_bytes()[:40])
    for name in ("summary.json", "model.safetensors"):
        (tmp_path / "quickstart" / name).unlink()
    assert main(train(tmp_path, digits, *words)) in (1, 2)
    err = capsys.readouterr().err
    assert "checkpoint" in err and "Traceback" not in err, err

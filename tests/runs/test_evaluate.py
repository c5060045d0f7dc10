"""``asp-dist evaluate``: the run's numbers, again, from the model file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import digits_config, small_config

from asp_dist.checkpoint.record import load_config, run_dir
from asp_dist.cli import main
from asp_dist.data import prepare_digits
from asp_dist.errors import UserError
from asp_dist.export.export_run import export_run
from asp_dist.runs.evaluate_run import evaluate
from asp_dist.tracking.rows import read_rows
from asp_dist.tracking.schema import VAL_EMA
from asp_dist.training.trainer import train
from asp_dist.training.world import World


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_file_has_the_reported_accuracy(tmp_path: Path, ema: float | None) -> None:
    torch.set_num_threads(1)
    root = Path(prepare_digits(tmp_path / "digits"))
    config = digits_config(tmp_path, root, schedule__epochs=2, training__ema_decay=ema)
    summary = train(config, World())
    found = evaluate(run_dir(config), World())
    assert found["samples"] == 359
    assert found["top1"] == summary["top1"] and found["top5"] == summary["top5"]
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    for name in ("nonzero_weights", "prunable_weights", "sparsity"):
        assert found[name] == summary[name]


def test_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        evaluate(tmp_path, World())
    config = small_config(tmp_path)
    train(config, World())
    (run_dir(config) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not finished"):
        evaluate(run_dir(config), World())


def test_a_broken_model_file(tmp_path: Path) -> None:
    config = small_config(tmp_path, schedule__epochs=1)
    train(config, World())
    (run_dir(config) / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        evaluate(run_dir(config), World())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits with an average of its weights."""
    folder = tmp_path_factory.mktemp("trained")
    root = Path(prepare_digits(folder / "digits"))
    train(config := digits_config(folder, root, schedule__epochs=3, training__ema_decay=0.7), World())
    return run_dir(config)


def evaluation(run: Path) -> dict[str, Any]:
    """The last validation in the run's record."""
    return [row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "eval"][-1]


def test_checkpoints_have_the_weights_and_their_average(trained: Path) -> None:
    row = evaluation(trained)
    last = sorted((trained / "checkpoints").iterdir())[-1]
    for given, average, prefix in ((last, False, "val/"), (last, True, VAL_EMA), (trained, True, VAL_EMA)):
        found = evaluate(given, World(), average=average)
        assert found["top1"] == row[f"{prefix}top1"] and found["loss"] == pytest.approx(row[f"{prefix}loss"], rel=1e-6)
        assert found["nonzero_weights"] <= 0.11 * found["prunable_weights"]
        assert last.name in found["what"] and ("average" in found["what"]) == average


def test_files_that_say_what_they_are_and_one_that_does_not(trained: Path, tmp_path: Path) -> None:
    row, root = evaluate(trained, World()), load_config(trained).data.root
    data = {"root": root, "input_size": 8}
    sparse = export_run(trained, "sparse", tmp_path / "sparse.safetensors").file
    copied = shutil.copy(trained / "model.safetensors", tmp_path / "copied.safetensors")
    for file in (sparse, copied):
        assert evaluate(file, World(), data=data)["top1"] == row["top1"]
    torch.save(load_file(trained / "model.safetensors"), tmp_path / "plain.pth")
    with pytest.raises(UserError, match=r"plain\.pth does not say which network it is of: give its name, --model NAME"):
        evaluate(tmp_path / "plain.pth", World(), data=data)
    assert evaluate(tmp_path / "plain.pth", World(), model_name="cifar_resnet20", data=data)["top1"] == row["top1"]


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_classes_of_other_data_are_matched_by_name(trained: Path, tmp_path: Path, backend: str) -> None:
    """Half of the ten classes each, whose numbers are 0 to 4 there: as many images are right as of all together."""
    images = Path(load_config(trained).data.root) / "val"
    right = 0.0
    for half in ("02468", "13579"):
        for name in half:
            shutil.copytree(images / name, tmp_path / half / name)
        found = evaluate(trained, World(), data={"root": str(tmp_path / half), "val": ".", "backend": backend})
        assert found["samples"] == sum(len(list((images / name).iterdir())) for name in half)
        right += found["top1"] * found["samples"]
    whole = evaluate(trained, World(), data={"backend": backend})
    assert right == pytest.approx(whole["top1"] * whole["samples"])
    shutil.copytree(images / "3", tmp_path / half / "three")
    with pytest.raises(UserError, match=r"1 classes that .* does not know, such as 'three': its classes are 0, 1, 2"):
        evaluate(trained, World(), data={"root": str(tmp_path / half), "val": "."})


def test_two_workers_share_the_images(trained: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "asp_dist"]
    result = subprocess.run([*command, "evaluate", str(trained), "--json"], capture_output=True, text=True, check=True)
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("{")]
    together, alone = json.loads(line), evaluate(trained, World())
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert {**together, "loss": 0} == {**alone, "loss": 0}


def test_what_cannot_be_evaluated(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"")
    for arguments, words in (
        (["nosuch"], "'nosuch' is no folder, no file, and no name in timm's registry"),
        (["no/such"], "no/such is not there"),
        (["cifar_resnet20"], "timm has no published weights for cifar_resnet20"),
        (["cifar_resnet20", "--average"], "leave --average out"),
        ([str(tmp_path / "file.safetensors"), "--model", "resnet18"], "cannot be read"),
        ([str(trained), "--data.root", "/nowhere"], "/nowhere"),
    ):
        assert main(["evaluate", *arguments]) == 2
        assert words in capsys.readouterr().err

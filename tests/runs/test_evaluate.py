"""``asp-dist evaluate``: the run's numbers, again, from the model file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import digits_config, small_config

from asp_dist.checkpoint.record import run_dir
from asp_dist.data import prepare_digits
from asp_dist.errors import UserError
from asp_dist.runs.evaluate_run import evaluate
from asp_dist.training.trainer import train
from asp_dist.training.world import World


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_file_has_the_reported_accuracy(tmp_path: Path, ema: float | None) -> None:
    torch.set_num_threads(1)
    root = Path(prepare_digits(tmp_path / "digits"))
    config = digits_config(tmp_path, root, schedule__epochs=2, training__ema_decay=ema)
    summary = train(config, World())
    found = evaluate(run_dir(config))
    assert found["samples"] == 359
    assert found["top1"] == summary["top1"] and found["top5"] == summary["top5"]
    assert found["loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    for name in ("nonzero_weights", "prunable_weights", "sparsity"):
        assert found[name] == summary[name]


def test_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml is missing"):
        evaluate(tmp_path)
    config = small_config(tmp_path)
    train(config, World())
    (run_dir(config) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not finished"):
        evaluate(run_dir(config))


def test_a_broken_model_file(tmp_path: Path) -> None:
    config = small_config(tmp_path, schedule__epochs=1)
    train(config, World())
    (run_dir(config) / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        evaluate(run_dir(config))

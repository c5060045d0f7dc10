"""Which weights a run leaves behind: output.select."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import digits_config, small_config

from asp_dist.checkpoint.format import read_checkpoint
from asp_dist.checkpoint.record import run_dir
from asp_dist.checkpoint.storage import LocalStore
from asp_dist.config import Config, DataConfig
from asp_dist.data import inspect_data, open_data_set, prepare_digits
from asp_dist.errors import UserError
from asp_dist.pruning import Ramp
from asp_dist.runs.evaluate_run import evaluate as evaluate_run
from asp_dist.training.evaluation import evaluate_models
from asp_dist.training.trainer import train
from asp_dist.training.world import World

TOP1 = [(0.2, 0.1), (0.9, 0.8), (0.3, 0.4), (0.5, 0.6)]  # of the weights and of their average, after each epoch


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations that find these accuracies; the second epoch's is the best."""
    torch.set_num_threads(1)
    found = evaluate_models
    calls = iter(TOP1)

    def evaluate(models: Any, *arguments: Any) -> list[dict[str, Any]]:
        numbers = found(models, *arguments)
        return [{**one, "val/top1": top1} for one, top1 in zip(numbers, next(calls))]

    monkeypatch.setattr("asp_dist.training.validation.evaluate_models", evaluate)


def config_of(folder: Path, select: str, **changes: Any) -> Config:
    return small_config(folder, schedule__epochs=4, training__ema_decay=0.5, output__select=select, output__keep=4, **changes)


DENSE: dict[str, Any] = {"pruning__enabled": False}
PRUNED: dict[str, Any] = {"pruning__control": "track", "pruning__ramp": Ramp("cubic", 0.0, 0.2, freeze_at=0.25)}


@pytest.mark.parametrize("changes", [DENSE, PRUNED], ids=["dense", "pruned"])
@pytest.mark.parametrize(
    ("select", "part", "step", "top1"),
    [
        ("auto", "ema", 16, 0.6),
        ("last", "model", 16, 0.5),
        ("average", "ema", 16, 0.6),
        ("best", "model", 8, 0.9),
        ("best-average", "ema", 8, 0.8),
    ],
)
def test_the_file_holds_the_selected_weights(
    tmp_path: Path, changes: dict[str, Any], select: str, part: str, step: int, top1: float
) -> None:
    config = config_of(tmp_path, select, **changes)
    summary = train(config, World())
    on = None if select in ("last", "average") else "validation"
    assert summary["selected"] == {"by": select, "step": step, "on": on}
    assert (summary["weights"], summary["top1"], summary["steps"]) == ("average" if part == "ema" else "model", top1, 16)
    _, state = read_checkpoint(LocalStore(run_dir(config) / "checkpoints"), f"step-{step:08d}")
    weights, masks = load_file(run_dir(config) / "model.safetensors"), state["model"]
    for name, tensor in weights.items():
        expected = state[part][name]
        if changes is PRUNED and part == "ema" and tensor.dim() > 1:
            expected = expected * (masks[name] != 0) if (masks[name] == 0).any() else expected
        assert torch.equal(tensor, expected), name
    if changes is PRUNED:
        assert summary["nonzero_weights"] == round(0.1 * summary["prunable_weights"])


def test_an_average_that_is_not_kept_cannot_be_selected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output.select = best-average needs an average .*: set training.ema_decay"):
        small_config(tmp_path, output__select="best-average")


def test_without_a_validation_at_the_budget_the_last_weights_are_taken(tmp_path: Path) -> None:
    late = {"pruning__control": "track", "pruning__ramp": Ramp("cubic", 0.0, 0.9, freeze_at=1.0)}
    summary = train(config_of(tmp_path, "best", **late), World())
    assert summary["selected"]["step"] == 16


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


def test_images_held_out_choose_and_the_validation_split_is_read_once(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    looked: list[int] = []

    def evaluate(models: Any, batches: Any, *arguments: Any) -> list[dict[str, Any]]:
        looked.append(batches.num_samples)
        return evaluate_models(models, batches, *arguments)

    monkeypatch.setattr("asp_dist.training.validation.evaluate_models", evaluate)
    fields: dict[str, Any] = {
        "data__select_fraction": 0.1,
        "output__select": "best",
        "pruning__enabled": False,
        "schedule__epochs": 2,
    }
    config = digits_config(tmp_path, digits, **fields)
    info, whole = inspect_data(config.data), inspect_data(DataConfig(root=str(digits)))
    held = whole.num_train - info.num_train
    assert held == round(0.1 * whole.num_train) and info.num_val == whole.num_val
    data_set = open_data_set(config.data)
    assert data_set.select is not None
    names = {samples.names[index] for samples in (data_set.train, data_set.select) for index in range(len(samples))}
    assert len(names) == whole.num_train, "the two share no image"

    summary = train(config, World())
    assert looked == [held, held, whole.num_val]
    assert summary["selected"]["on"] == "held-out training images"
    assert summary["val_samples"] == whole.num_val
    again = evaluate_run(tmp_path / "run", World())
    assert (again["top1"], again["samples"]) == (summary["top1"], whole.num_val)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"select_fraction": 1.0}, "select_fraction = 1.0 is outside"),
        ({"select_fraction": 0.1, "backend": "synthetic"}, "data.backend = synthetic has none"),
    ],
)
def test_fractions_that_make_no_sense_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DataConfig(**fields)


def test_a_fraction_that_holds_out_nothing_or_all_is_refused(digits: Path) -> None:
    for fraction in (1e-5, 0.9999):
        with pytest.raises(UserError, match=r"data.select_fraction = .* holds out \d+ of 1438 training images"):
            open_data_set(DataConfig(root=str(digits), select_fraction=fraction))

"""A run that starts from another one's state: its weights, optimizer and thresholds, on its own schedule and budget."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import StopAt, small_config
from test_resume import assert_same_run, last_state

from asp_dist.checkpoint.record import run_dir
from asp_dist.config import BudgetConfig, Config
from asp_dist.errors import UserError
from asp_dist.pruning import Budget, Ramp
from asp_dist.pruning.names import MEASURED_SPARSITY
from asp_dist.tracking import read_rows
from asp_dist.training.hooks import Hooks, Stopped
from asp_dist.training.preflight import preflight
from asp_dist.training.run import Run
from asp_dist.training.trainer import train
from asp_dist.training.world import World

TWO_BUDGETS = BudgetConfig(sparsity=0.95, also=(Budget.macs(density=0.5, bound="at_most"),))
RAMP = Ramp("cubic", 0.1, 0.5, freeze_at=0.75)


def first_config(folder: Path, **changes: Any) -> Config:
    """80 % sparsity."""
    return small_config(
        folder, "first", budget=BudgetConfig(sparsity=0.8), pruning__control="track", pruning__ramp=RAMP, **changes
    )


def second_config(folder: Path, **changes: Any) -> Config:
    """95 %, from 80 % on."""
    settings: dict[str, Any] = {
        "budget": BudgetConfig(sparsity=0.95),
        "pruning__control": "track",
        "pruning__ramp": dataclasses.replace(RAMP, initial=0.8 / 0.95),
        "resume__from_run": str(folder / "first"),
        **changes,
    }
    return small_config(folder, **{"name": "second", **settings})


class FirstStep(Hooks):
    """What the first step made of the network."""

    def after_step(self, run: Run) -> None:
        if run.step == 1:
            assert run.pruner is not None
            self.snapshot = run.pruner.snapshot()
            self.lr = run.optimizer.param_groups[0]["lr"]
            self.momentum = run.optimizer.state[run.model.get_parameter("conv1.weight")]["momentum_buffer"].clone()
            with run.pruner.dense():
                self.dense = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the first run's folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    train(first_config(folder), World())
    return folder


@pytest.fixture
def runs(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "runs"))


@pytest.mark.parametrize("source", ["finished", "stopped"])
def test_a_run_starts_from_the_state_of_another(tmp_path: Path, source: str) -> None:
    torch.set_num_threads(1)
    if source == "finished":
        train(first_config(tmp_path), World())
    else:
        with pytest.raises(Stopped):
            train(first_config(tmp_path), World(), StopAt(9))
    state, hooks = last_state(tmp_path / "first"), FirstStep()
    # A rate too small to move anything: what the first step leaves is what the run began with.
    still = second_config(tmp_path, optimizer__lr=1e-9, optimizer__weight_decay=0.001)
    train(still, World(), hooks)
    assert hooks.lr == 1e-9
    sparsity = hooks.snapshot.metrics()[MEASURED_SPARSITY]
    assert abs(sparsity - 0.8) < 0.01, sparsity
    names = {f"{layer}.weight": weights for layer, weights in state["pruner"]["dense"].items()}
    for name, dense in names.items():
        kept = state["model"][name]
        expected = torch.where(kept != 0, kept, dense) if state["pruner"]["frozen"] else dense
        torch.testing.assert_close(hooks.dense[name], expected, rtol=0, atol=1e-6)
    assert hooks.momentum.abs().max() > 0.01
    events = [str(row["message"]) for row in read_rows(tmp_path / "second" / "metrics.jsonl") if row["kind"] == "event"]
    assert any(message.startswith(f"started from {tmp_path / 'first'}, step ") for message in events)


def test_it_ends_at_its_own_budget_and_resumes_without_the_other(runs: Path, tmp_path: Path) -> None:
    whole = second_config(runs)
    assert train(whole, World())["nonzero_weights"] == 13_363  # 5 % of ResNet-20's 267,264
    parts = dataclasses.replace(whole, output=dataclasses.replace(whole.output, dir=str(tmp_path / "parts")))
    with pytest.raises(Stopped):
        train(parts, World(), StopAt(3))
    shutil.rmtree(runs / "first")
    preflight(parts)
    train(parts, World())
    assert_same_run(run_dir(whole), run_dir(parts))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resume__from_run": "nowhere"}, "is not a run folder"),
        ({"model__name": "cifar_resnet32"}, "has model.name = 'cifar_resnet20', this run 'cifar_resnet32'"),
        (
            {"optimizer__name": "adamw"},
            r"has optimizer.name = 'sgd', .*--model.weights .*first/model.safetensors",
        ),
        ({"pruning__control": "loss"}, "pruning.control = 'track', this run 'loss'"),
        (
            {"budget": BudgetConfig(sparsity=0.95, also=(Budget.macs(density=0.5, bound="at_most"),))},
            "has 1 budgets, this run 2",
        ),
        ({"pruning__ramp": RAMP}, "set pruning.ramp.initial"),
        ({"model__weights": "first/model.safetensors"}, "leave model.weights and model.pretrained out"),
        ({"name": "first"}, "this run's own folder"),
    ],
)
def test_what_cannot_be_a_start_is_refused_before_anything_starts(runs: Path, changes: dict[str, Any], reason: str) -> None:
    config = second_config(runs, **changes)
    if config.name == "first":
        shutil.rmtree(runs / "first" / "checkpoints")
        (runs / "first" / "config.yaml").unlink()
    with pytest.raises(UserError, match=reason):
        preflight(config)


def test_torn_checkpoints_are_passed_over_and_none_is_an_error(runs: Path) -> None:
    checkpoints = runs / "first" / "checkpoints"
    *_, before, last = sorted(checkpoints.iterdir())
    (last / "manifest.json").write_text("{}")
    hooks = FirstStep()
    train(second_config(runs, training__max_steps=1), World(), hooks)
    events = [str(row["message"]) for row in read_rows(runs / "second" / "metrics.jsonl") if row["kind"] == "event"]
    assert any(f"step {int(before.name.split('-')[1])}:" in message for message in events)
    shutil.rmtree(checkpoints)
    with pytest.raises(UserError, match=r"of checkpoints in .*first/checkpoints, there is none"):
        preflight(dataclasses.replace(second_config(runs), name="third"))


def test_pruning_may_begin_from_a_dense_run(tmp_path: Path) -> None:
    train(small_config(tmp_path, "first", pruning__enabled=False), World())
    hooks = FirstStep()
    summary = train(second_config(tmp_path, pruning__ramp=RAMP), World(), hooks)
    assert summary["nonzero_weights"] == 13_363
    assert hooks.snapshot.metrics()[MEASURED_SPARSITY] < 0.1

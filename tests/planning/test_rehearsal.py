"""``asp-dist rehearse``: every recipe on a small sibling of its network, and a rehearsal that finds a fault which is put in."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from recipes import CONFIGS, RECIPES, load, quick_precision
from torch import Tensor

from asp_dist import cli
from asp_dist.config import Config, OutputConfig
from asp_dist.data import prepare_digits
from asp_dist.errors import UserError
from asp_dist.planning import rehearsal
from asp_dist.planning.rehearsal import Rehearsal, rehearse
from asp_dist.planning.squeeze import squeeze
from asp_dist.pruning.control import track
from asp_dist.pruning.control.controller import StepStats

# The smallest network of each recipe's family.
SIBLINGS = {
    "alexnet": "test_byobnet",
    "vit_small": "test_vit",
    "convnext": "test_convnext",
    "efficientnet": "test_efficientnet",
    "mobilenetv3": "test_efficientnet",
}
# Half of its blocks show the same.
FEWER_BLOCKS = {"test_convnext": '{"depths": [1, 1, 2, 1]}'}
STEPS = 75
DONE: dict[str, Rehearsal] = {}


def sibling(recipe: str, folder: Path, *overrides: str) -> Config:
    network = next((small for part, small in SIBLINGS.items() if part in recipe), "test_resnet")
    model = ("--model.name", network, "--model.kwargs", FEWER_BLOCKS.get(network, "{}"))
    changes = ("--data.root", "/nowhere", "--output.dir", str(folder), *model)
    quick = (word for name, value in quick_precision(recipe).items() for word in (f"--{name}", value))
    return load(recipe, *changes, "--training.device", "cpu", "--pruning.select.min_weights", "500", *quick, *overrides)


def said(found: Rehearsal) -> str:
    return "\n".join(f"{one.good} {one.name}: {one.found} ({one.limit})" for one in found.verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_keeps_the_invariants(recipe: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = sibling(recipe, tmp_path)
    # Three recipes are the same but for their names and networks.
    key = repr(dataclasses.replace(config, name="any", output=OutputConfig()))
    found = DONE[key] = DONE.get(key) or rehearse(config, steps=STEPS)
    print(said(found))
    assert found.good, said(found)
    assert len(found.steps) == found.steps[-1].step >= 0.9 * STEPS
    assert (Path(found.folder) / "report.html").is_file()


@pytest.mark.slow
def test_the_allocations_rate_over_the_warm_ups_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of commit 07ed64b: its rate was relative to the first learning rate, a warm-up's."""
    first: list[Tensor] = []
    move, learn = track.TrackController.move, track.TrackController._learn

    def remember(self: track.TrackController, thresholds: Tensor, stats: StepStats) -> Tensor:
        first.append(stats.lr)
        return move(self, thresholds, stats)

    def learn_by_the_first(self: track.TrackController, thresholds: Tensor, rate: Tensor) -> None:
        learn(self, thresholds, rate * self.peak_lr / first[0])

    monkeypatch.setattr(track.TrackController, "move", remember)
    monkeypatch.setattr(track.TrackController, "_learn", learn_by_the_first)
    found = rehearse(sibling("imagenet_resnet50", tmp_path, "--training.precision", "float32"), steps=STEPS)
    broken = {one.name for one in found.verdicts if not one.good}
    print(said(found))
    assert "layers with the allocation at its bound" in broken
    assert "restart equals no restart" not in broken


def test_the_schedule_keeps_its_shape(tmp_path: Path) -> None:
    config = load("imagenet_resnet50", "--data.root", "/nowhere", "--training.ema_decay", "0.9999")
    squeezed, changes = squeeze(config, tmp_path, steps=300, batch_size=32, input_size=32)
    assert (squeezed.schedule.epochs, squeezed.schedule.warmup_epochs) == (10, 0.5)  # of 100 and 5
    assert squeezed.optimizer.lr == pytest.approx(1.024 * 32 / 1024)
    assert squeezed.schedule.warmup_lr == pytest.approx(1e-5 * 32 / 1024)
    assert squeezed.pruning == config.pruning and squeezed.budget == config.budget
    assert squeezed.training.precision == "bfloat16" and squeezed.training.channels_last
    assert squeezed.training.ema_decay == pytest.approx(1 - 1e-4 * (100 * 1_281_167 / 1024) / 300)
    assert changes[0].startswith("data: 960 images of handwritten digits")
    assert len(list((tmp_path / "data" / "train").rglob("*.png"))) == 960
    adam, _ = squeeze(load("imagenet_vit_small", "--data.root", "/nowhere"), tmp_path, steps=60, batch_size=64, input_size=32)
    full = load("imagenet_vit_small")
    assert adam.optimizer.lr == pytest.approx(full.optimizer.lr * (64 / full.data.batch_size) ** 0.5)


def test_the_runs_own_images_are_used(tmp_path: Path) -> None:
    digits = prepare_digits(tmp_path / "mine")
    config = load("imagenet_resnet18", "--data.root", str(digits))
    squeezed, changes = squeeze(config, tmp_path / "out", steps=40, batch_size=20, input_size=32)
    assert changes[0].startswith(f"data: 800 images of 10 classes of {digits}")
    linked = next(Path(squeezed.data.root).rglob("train/*/*"))
    assert linked.resolve().is_relative_to(digits) and not (tmp_path / "out" / "digits").exists()


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"training.accumulate": 3}, {}, "--batch-size 32 does not divide into training.accumulate = 3"),
        ({"pruning.enabled": False}, {}, "nothing to rehearse"),
        ({}, {"steps": 10}, "--steps 10: give at least 40"),
        ({"model.name": "resnet19"}, {}, "resnet18"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused(
    tmp_path: Path, changes: dict[str, object], options: dict[str, int], words: str
) -> None:
    overrides = [f"--{name}={json.dumps(value)}" for name, value in changes.items()]
    config = load("imagenet_resnet50", "--data.root", "/nowhere", "--output.dir", str(tmp_path), *overrides)
    with pytest.raises(UserError, match=re.escape(words)):
        rehearse(config, **options)


@pytest.mark.slow
def test_the_command_prints_its_verdicts_and_says_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["rehearse", str(CONFIGS / "quickstart.yaml"), "--data.root", "/nowhere", "--output.dir", str(tmp_path)]
    words += ["--steps", "60", "--model.name", "test_resnet", "--pruning.select.min_weights", "500"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["steps"]) == 60 and all(verdict["good"] for verdict in found["verdicts"])
    monkeypatch.setattr(rehearsal, "MOST_FLIPS", -1.0)  # a second time: the first one's folder is used again
    assert cli.main(words) == 1
    out = capsys.readouterr().out
    assert "BROKEN" in out and "verdict     broken: mask bits flipped per step after the ramp" in out

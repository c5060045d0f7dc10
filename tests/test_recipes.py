"""The recipes under configs/: each has a header, loads, is planned, and trains three steps at toy size to its exact budget."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from recipes import CONFIGS, RECIPES, load
from safetensors.torch import load_file

from asp_dist import cli
from asp_dist.checkpoint.record import run_dir
from asp_dist.config import Config
from asp_dist.tracking import read_layers, read_rows
from asp_dist.training import checkpointing
from asp_dist.training.trainer import train
from asp_dist.training.world import World

SIZES = {"alexnet": 64}  # image sides that the network needs; 32 does for the others


@functools.cache
def plan(recipe: str) -> dict[str, Any]:
    """What ``asp-dist plan`` says of it where its data is not, without the measured step."""
    arguments = [str(CONFIGS / f"{recipe}.yaml"), "--data.root", "/nowhere", "--json", "--measure_s", "0"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["plan", *arguments]) == 0
    planned: dict[str, Any] = json.loads(out.getvalue())
    return planned


def toy(recipe: str, folder: Path) -> Config:
    """The recipe with two images per micro-batch, small, random and on one worker; what it trains and prunes by is kept."""
    config = load(recipe)
    batch = 2 * config.training.accumulate
    overrides = {
        "data.backend": "synthetic",
        "data.batch_size": batch,
        "data.eval_batch_size": 4,
        "data.input_size": SIZES.get(config.model.name, 32),
        "data.synthetic_samples": [4 * batch, 4],
        "model.pretrained": False,  # it would be downloaded
        "training.device": "cpu",
        "training.max_steps": 3,
        "training.log_every": 1,
        "cluster.mode": "local",
        "tracking.wandb": "disabled",
        "output.dir": folder,
    }
    return load(recipe, *(f"--{name}={value}" for name, value in overrides.items()))


def header(recipe: str) -> dict[str, str]:
    """The fields of the comment that opens the file, by name."""
    lines = []
    for line in (CONFIGS / f"{recipe}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    fields = re.split(r"^(\w+): +", "\n".join(lines), flags=re.MULTILINE)
    return dict(zip(["Title", *fields[1::2]], [fields[0], *fields[2::2]]))


def test_the_papers_networks_and_those_of_today_have_recipes() -> None:
    networks = {load(recipe).model.name.split(".")[0] for recipe in RECIPES}
    paper = {f"cifar_resnet{depth}" for depth in (20, 32, 56)} | {"cifar_wrn16_8", "alexnet", "resnet18", "resnet50"}
    today = {"deit_small_patch16_224", "convnext_tiny", "efficientnet_b0", "mobilenetv3_large_100"}
    assert networks >= paper | today


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_header_says_where_it_comes_from_and_what_to_expect(recipe: str) -> None:
    fields, config = header(recipe), load(recipe)
    assert fields["Title"].strip()
    assert fields["Source"].strip()
    assert f"asp-dist train configs/{recipe}.yaml" in fields["Command"]
    assert f"asp-dist prepare {Path(config.data.root).name} " in fields["Command"]
    assert fields["Hardware"].strip()
    assert config.name == recipe
    sparsity = f"sparsity {100 * config.budget.all()[0].sparsity:g} %"  # type: ignore[operator]
    assert sparsity in fields["Expected"] and sparsity.split()[1] in fields["Title"]
    assert "top-1 not measured here" in fields["Expected"] or re.search(
        r"top-1 \d+\.\d+ %.* measured 20\d\d-\d\d-\d\d", fields["Expected"]
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_planned_without_data(recipe: str) -> None:
    planned = plan(recipe)
    totals = planned["totals"]
    pruned = sum(row["weights"] for row in planned["layers"] if row["pruned"])
    assert totals["prunable_weights"] == pruned
    assert pruned > 0.95 * totals["parameters"]  # norms, biases and what stays dense are a small part
    assert 0 < totals["macs"] < totals["dense_macs"]
    images = 50_000 if load(recipe).model.name.startswith("cifar") else 1_281_167
    assert planned["schedule"]["train_images"] == images and "/nowhere" in planned["assumptions"][0]
    # Planned as if the budget held at once, by the Gaussian estimate; AlexNet's fresh weights are not normal but uniform.
    off = 0.06 if load(recipe).model.name == "alexnet" else 0.02
    assert totals["sparsity"] == pytest.approx(totals["target_sparsity"], abs=off)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_three_steps_at_toy_size_end_at_exactly_the_budget(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Checkpoints would be gigabytes in all, and are no part of a recipe.
    monkeypatch.setattr(checkpointing, "save", lambda run, best=False: None)
    config = toy(recipe, tmp_path)
    summary, folder = train(config, World()), run_dir(config)
    assert summary["steps"] == 3 and summary["bad_steps"] == 0
    losses = [row["train/loss"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    (term,) = config.budget.all()
    assert term.sparsity is not None
    budget = round((1.0 - term.sparsity) * summary["prunable_weights"])
    assert summary["nonzero_weights"] == budget
    # Counted in the file as well.
    weights = load_file(folder / "model.safetensors")
    pruned = [weights[f"{row['name']}.weight"] for row in read_layers(folder) if row["pruned"]]
    assert sum(w.numel() for w in pruned) == summary["prunable_weights"]
    assert sum(int(w.count_nonzero()) for w in pruned) == budget
    shutil.rmtree(folder)

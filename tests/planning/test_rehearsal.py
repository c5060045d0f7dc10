"""``asp-dist rehearse``: every recipe on a small sibling of its network, and a rehearsal that finds a fault which is put in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recipes import RECIPES, load

from asp_dist.config import Config
from asp_dist.planning import Rehearsal, rehearse

# The smallest network of each recipe's family.
SIBLINGS = {
    "alexnet": "test_byobnet",
    "vit_small": "test_vit",
    "convnext": "test_convnext",
    "efficientnet": "test_efficientnet",
    "mobilenetv3": "test_efficientnet",
}
STEPS = 100


def sibling(recipe: str, folder: Path, *overrides: str) -> Config:
    network = next((small for part, small in SIBLINGS.items() if part in recipe), "test_resnet")
    changes = ("--data.root", "/nowhere", "--output.dir", str(folder), "--model.name", network, "--model.kwargs", "{}")
    return load(recipe, *changes, "--training.device", "cpu", "--pruning.select.min_weights", "500", *overrides)


def said(found: Rehearsal) -> str:
    return "\n".join(f"{one.good} {one.name}: {one.found} ({one.limit})" for one in found.verdicts)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_keeps_the_invariants(recipe: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found = rehearse(sibling(recipe, tmp_path), steps=STEPS)
    print(said(found))
    assert found.good, said(found)
    assert len(found.steps) == found.steps[-1].step >= 0.9 * STEPS
    assert (tmp_path / f"{recipe}-rehearsal" / "report.html").is_file()

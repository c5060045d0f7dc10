"""Accuracy per layer: the layer that was destroyed ranks first, and nothing is left changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from asp_dist.config import TrainingConfig
from asp_dist.pruning import Budget, Pruner, Select, Track
from asp_dist.pruning.names import LayerRow
from asp_dist.training.layer_accuracy import add_to_rows, layer_accuracy, pick_subset
from asp_dist.training.world import World

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Sequential, Pruner, list[tuple[Tensor, Tensor]]]:
    """A small network that learned to tell which half of the inputs is larger, pruned to 50 %."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruner(model, optimizer, Budget.parameters(sparsity=0.5), control=Track(), select=Select(min_weights=0))
    inputs = torch.randn(512, 32)
    targets = (inputs[:, :16].sum(1) > inputs[:, 16:].sum(1)).long()
    for _ in range(150):
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, pruner, list(zip(inputs.split(100), targets.split(100)))


@pytest.mark.parametrize("destroyed", ["0", "2", "4", "6"])
def test_the_destroyed_layer_ranks_first(
    trained: tuple[nn.Sequential, Pruner, list[tuple[Tensor, Tensor]]], destroyed: str
) -> None:
    model, pruner, batches = trained
    weight = model.get_submodule(destroyed).weight
    assert isinstance(weight, nn.Parameter)
    whole = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = layer_accuracy(model, pruner, batches, TrainingConfig(), ALONE)
    assert max(found, key=lambda name: found[name]["dense_gain"]) == destroyed
    assert found[destroyed]["dense_top1"] > 0.9
    assert found[destroyed]["dense_gain"] > 0.3
    assert all(abs(found[name]["dense_gain"]) < 0.05 for name in found if name != destroyed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        weight.copy_(whole)


def test_pruning_a_layer_further_costs_accuracy_and_is_undone(
    trained: tuple[nn.Sequential, Pruner, list[tuple[Tensor, Tensor]]],
) -> None:
    model, pruner, batches = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = layer_accuracy(model, pruner, batches, TrainingConfig(), ALONE, extra_sparsity=0.99)
    assert min(row["extra_pruned_top1"] for row in found.values()) < 0.9
    assert min(row["dense_top1"] for row in found.values()) > 0.95
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows: list[LayerRow] = [{"name": "0"}, {"name": "elsewhere"}]
    add_to_rows(rows, found)
    assert rows[0]["dense_top1"] == found["0"]["dense_top1"]
    assert rows[1] == {"name": "elsewhere"}


def test_the_subset_is_spread_over_all_samples_and_the_same_each_time() -> None:
    numbers = torch.arange(1000.0)
    batches = [(chunk[:, None], chunk.long()) for chunk in (*numbers.split(64), numbers[:0])]
    first = pick_subset(batches, 100, ALONE, 1000)
    targets = torch.cat([targets for _, targets in first])
    assert targets.tolist() == list(range(0, 1000, 10))
    assert len(first) == 2
    assert all(torch.equal(inputs[:, 0].long(), targets) for inputs, targets in first)

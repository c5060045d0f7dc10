"""Budgets: what they allow on a small network, computed by hand, and every error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asp_dist.pruning import Budget
from asp_dist.pruning.budget import NetworkCosts, ResolvedBudget, check_floors, resolve_budget

# Two layers: 100 weights of 4 bytes used 4 times each, 300 weights of 2 bytes used once. 50 other parameters.
COSTS = NetworkCosts(
    names=("first", "second"),
    numel=(100, 300),
    macs_per_weight=(4.0, 1.0),
    itemsize=(4, 2),
    other_parameters=50,
    other_macs=10.0,
    other_bytes=200,
)


def allowed(limit: ResolvedBudget) -> Any:
    return limit.allowed.tolist()


def test_parameters_of_the_network() -> None:
    for budget in (
        Budget.parameters(sparsity=0.9),
        Budget.parameters(density=0.1),
        Budget.parameters(count=90),  # 50 of them are outside the layers.
    ):
        limit = resolve_budget(budget, COSTS)
        assert allowed(limit) == 40.0
        assert float(limit.target_density) == pytest.approx(0.1)
        assert limit.dense.tolist() == [100.0, 300.0]


def test_whole_weights() -> None:
    thirty = NetworkCosts(("a",), (30,), None, (4,))
    assert allowed(resolve_budget(Budget.parameters(density=0.1, bound="at_most"), thirty)) == 3.0
    assert allowed(resolve_budget(Budget.parameters(density=0.12, bound="at_most"), thirty)) == 3.0  # 3.6
    assert allowed(resolve_budget(Budget.parameters(density=0.12), thirty)) == 4.0
    assert float(resolve_budget(Budget.parameters(density=0.12), thirty).target_density) == pytest.approx(0.12)


def test_parameters_per_layer() -> None:
    limit = resolve_budget(Budget.parameters(sparsity=0.9, scope="layer"), COSTS)
    assert allowed(limit) == [10.0, 30.0]
    assert limit.target_density.tolist() == pytest.approx([0.1, 0.1])
    densities = torch.tensor([0.2, 0.4], dtype=torch.float64)
    assert limit.density(densities).tolist() == [0.2, 0.4]


def test_macs() -> None:
    limit = resolve_budget(Budget.macs(density=0.5), COSTS)
    assert allowed(limit) == 350.0  # of 4·100 + 300
    assert allowed(resolve_budget(Budget.macs(count=360), COSTS)) == 350.0
    densities = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert float(limit.density(densities)) == pytest.approx(400 / 700)


def test_bytes_pay_for_the_bitmap() -> None:
    # Dense: 4·100 + 2·300 = 1000 bytes. The bitmaps take 13 + 38 bytes whatever is kept.
    limit = resolve_budget(Budget.bytes(density=0.5), COSTS)
    assert allowed(limit) == 500 - 51
    assert float(limit.target_density) == pytest.approx(0.449)
    assert allowed(resolve_budget(Budget.bytes(count=700), COSTS)) == 700 - 200 - 51
    assert allowed(resolve_budget(Budget.bytes(density=0.5, scope="layer"), COSTS)) == [200 - 13, 300 - 38]


def test_counts_above_the_dense_network() -> None:
    assert allowed(resolve_budget(Budget.parameters(count=1000, bound="at_most"), COSTS)) == 400.0
    with pytest.raises(ValueError, match=r"1,000 parameters.*only 450"):
        resolve_budget(Budget.parameters(count=1000), COSTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of sparsity, density and count"),
        ({"sparsity": 0.5, "density": 0.5}, "exactly one of sparsity, density and count"),
        ({"sparsity": 1.0}, "sparsity = 1.0 is outside"),
        ({"sparsity": -0.1}, "sparsity = -0.1 is outside"),
        ({"sparsity": float("nan")}, "sparsity = nan is outside"),
        ({"density": 0.0}, "density = 0.0 is outside"),
        ({"density": 90.0}, "density = 90.0 is outside"),
        ({"count": 0}, "count = 0 must be greater"),
        ({"count": 5, "scope": "layer"}, "scope is 'layer'"),
        ({"sparsity": 0.5, "bound": "about"}, "bound = 'about'"),
        ({"sparsity": 0.5, "scope": "block"}, "scope = 'block'"),
    ],
)
@pytest.mark.parametrize("make", [Budget.parameters, Budget.macs, Budget.bytes])
def test_errors(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("budget", [Budget.parameters(count=50), Budget.bytes(density=0.05), Budget.bytes(count=251)])
def test_budgets_below_what_cannot_be_pruned(budget: Budget) -> None:
    with pytest.raises(ValueError, match=r"cannot be met: with every prunable weight gone the network still costs"):
        resolve_budget(budget, COSTS)


def test_macs_need_a_trace() -> None:
    untraced = NetworkCosts(("a",), (30,), None, (4,))
    with pytest.raises(ValueError, match="input_shape"):
        resolve_budget(Budget.macs(density=0.5), untraced)


def test_floors_against_budgets() -> None:
    floors = torch.tensor([10.0, 30.0], dtype=torch.float64)
    check_floors([resolve_budget(Budget.parameters(density=0.1), COSTS)], floors, COSTS.names)
    with pytest.raises(ValueError, match=r"allows 39 parameters.*alone cost 40: lower min_density"):
        check_floors([resolve_budget(Budget.parameters(count=89), COSTS)], floors, COSTS.names)
    per_layer = resolve_budget(Budget.parameters(density=0.09, scope="layer"), COSTS)
    with pytest.raises(ValueError, match=r"layer 'second'.*allows 27 parameters.*costs 30"):
        check_floors([per_layer], torch.tensor([1.0, 30.0], dtype=torch.float64), COSTS.names)

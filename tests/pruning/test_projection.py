"""The exact projection: integer counts, ties, floors, several budgets, and that nothing more would have fitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from asp_dist.pruning import Budget, WeightInfo
from asp_dist.pruning.budget import NetworkCosts, ResolvedBudget, resolve_budget
from asp_dist.pruning.projection import SortedMagnitudes, keep_counts, keep_masks
from asp_dist.pruning.weights import LayerWeights, RankReducer


def magnitudes(*layers: Tensor) -> SortedMagnitudes:
    infos = [WeightInfo(str(i), str(i), nn.Parameter(layer), "Linear") for i, layer in enumerate(layers)]
    shards = [LayerWeights(info, 1) for info in infos]
    return SortedMagnitudes(shards, RankReducer(shards, None, torch.device("cpu")))


def limits_of(budgets: Sequence[Budget], sizes: Sequence[int], macs: Sequence[float]) -> list[ResolvedBudget]:
    costs = NetworkCosts(tuple(map(str, sizes)), tuple(sizes), tuple(macs), (4,) * len(sizes))
    return [resolve_budget(budget, costs) for budget in budgets]


def project(
    layers: Sequence[Tensor],
    budgets: Sequence[Budget],
    *,
    thresholds: Sequence[float] | None = None,
    macs: Sequence[float] | None = None,
    floors: Sequence[float] | None = None,
) -> tuple[list[int], list[Tensor], list[ResolvedBudget]]:
    """Kept weights per layer, masks, and the limits."""
    sizes = [layer.numel() for layer in layers]
    limits = limits_of(budgets, sizes, macs or [1.0] * len(sizes))
    bounds = torch.tensor(thresholds or [1.0] * len(sizes), dtype=torch.float64)
    least = torch.tensor(floors or [1.0] * len(sizes), dtype=torch.float64)
    sorted_layers = magnitudes(*layers)
    kept = keep_counts(sorted_layers, bounds, limits, least)
    masks = keep_masks(sorted_layers, kept)
    assert [int(mask.sum()) for mask in masks] == kept.int().tolist()
    return [int(k) for k in kept], masks, limits


def slack_is_spent(kept: Sequence[int], layers: Sequence[Tensor], limits: Sequence[ResolvedBudget]) -> bool:
    """Whether every limit holds, and no layer could take one weight more."""
    counts = torch.tensor(kept, dtype=torch.float64)
    slack = [float(limit.allowed) - float((limit.per_weight * counts).sum()) for limit in limits]
    growable = [i for i, layer in enumerate(layers) if kept[i] < layer.numel()]
    fits = [i for i in growable if all(float(limit.per_weight[i]) <= s + 1e-9 for limit, s in zip(limits, slack))]
    return min(slack) >= -1e-9 and not fits


def test_the_largest_weights_of_the_network_stay() -> None:
    first, second = torch.tensor([1.0, -9.0, 3.0, -4.0]), torch.tensor([[0.5, 8.0], [-7.0, 2.0], [6.0, -0.1]])
    kept, masks, _ = project([first, second], [Budget.parameters(count=5)])
    assert kept == [2, 3]
    assert masks[0].tolist() == [False, True, False, True]
    assert masks[1].tolist() == [False, True, True, False, True, False]


def test_weights_count_in_units_of_their_threshold() -> None:
    """A layer with ten times the threshold must be ten times as large."""
    first, second = torch.tensor([10.0, 20.0, 30.0, 40.0]), torch.tensor([1.5, 2.5, 3.5, 4.5])
    assert project([first, second], [Budget.parameters(count=4)], thresholds=[10.0, 1.0])[0] == [2, 2]
    assert project([first, second], [Budget.parameters(count=5)], thresholds=[10.0, 1.0])[0] == [2, 3]
    assert project([first, second], [Budget.parameters(count=4)])[0] == [3, 1]  # The floor: one weight.


def test_ties_break_in_the_order_of_the_index() -> None:
    kept, masks, _ = project([torch.ones(7), torch.ones(5)], [Budget.parameters(count=6)])
    assert sum(kept) == 6
    for count, mask in zip(kept, masks):
        assert mask.nonzero().flatten().tolist() == list(range(count))
    again = project([torch.ones(7), torch.ones(5)], [Budget.parameters(count=6)])
    assert again[0] == kept


def test_zeros_can_be_kept() -> None:
    """A layer that starts at zero still gets its share of an exact budget."""
    kept, masks, _ = project([torch.zeros(6), torch.tensor([1.0, 2.0])], [Budget.parameters(count=5)])
    assert kept == [3, 2]
    assert masks[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_floors_hold() -> None:
    small, large = torch.full((10,), 1e-6), torch.arange(1.0, 21.0)
    assert project([small, large], [Budget.parameters(count=8)], floors=[4.0, 4.0])[0] == [4, 4]
    assert project([small, large], [Budget.parameters(count=10)], floors=[3.0, 2.0])[0] == [3, 7]
    assert project([small, large], [Budget.parameters(count=10)], floors=[0.0, 0.0])[0] == [1, 9]  # never empty


def test_per_layer_budgets() -> None:
    layers = [torch.randn(30), torch.randn(50)]
    assert project(layers, [Budget.parameters(density=0.1, scope="layer")])[0] == [3, 5]
    both = [Budget.parameters(count=6), Budget.parameters(density=0.1, scope="layer", bound="at_most")]
    kept = project(layers, both)[0]
    assert sum(kept) == 6
    assert kept[0] <= 3
    assert kept[1] <= 5


def test_cheap_weights_fill_what_costly_ones_leave() -> None:
    # 100 weights at 50 multiply-adds, 100 at 3. The magnitudes prefer the costly layer.
    layers = [torch.arange(101.0, 201.0), torch.arange(1.0, 101.0)]
    kept, masks, limits = project(layers, [Budget.macs(count=1023)], macs=[50.0, 3.0])
    spent = 50 * kept[0] + 3 * kept[1]
    assert 1023 - 3 < spent <= 1023
    assert kept[0] == 20  # 1000, and the floor's one cheap weight, leave 20: six more cheap ones.
    assert kept[1] == 7
    assert masks[1].nonzero().flatten().tolist() == list(range(93, 100))
    assert slack_is_spent(kept, layers, limits)


def test_two_budgets_hold_together() -> None:
    generator = torch.Generator().manual_seed(1)
    layers = [torch.randn(n, generator=generator) for n in (200, 1000, 300)]
    budgets = [Budget.parameters(density=0.1), Budget.macs(density=0.05, bound="at_most")]
    macs = [100.0, 2.0, 10.0]
    kept, _, limits = project(layers, budgets, macs=macs)
    # The first alone would spend 2,500 multiply-adds or so; the second allows 1,250.
    alone = project(layers, budgets[:1], macs=macs)[0]
    assert sum(m * k for m, k in zip(macs, alone)) > 1.5 * float(limits[1].allowed)
    assert sum(kept) == 150
    assert sum(m * k for m, k in zip(macs, kept)) <= float(limits[1].allowed)


def test_kth_largest_over_all_magnitudes() -> None:
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = torch.randn(257, generator=generator).mul(1e-3).to(dtype)
        layer[:5] = 0.0
        expected = layer.abs().sort(descending=True).values
        found = magnitudes(layer)
        for k in (1, 2, 128, 252, 253, 257):
            assert float(found.kth_largest(torch.tensor([float(k)]))[0]) == float(expected[k - 1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    density=st.floats(0.05, 1.0),
    mac_density=st.none() | st.floats(0.3, 1.0),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_budget_is_exact(sizes: list[int], density: float, mac_density: float | None, ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(n, generator=generator) for n in sizes]
    if ties:
        layers = [(layer * 2).round() for layer in layers]
    macs = torch.randint(1, 50, (len(sizes),), generator=generator).tolist()
    wanted = max(round(density * sum(sizes)), len(sizes))
    budgets = [Budget.parameters(count=wanted)]
    if mac_density is not None:
        floor = sum(macs)
        whole = sum(m * n for m, n in zip(macs, sizes))
        budgets.append(Budget.macs(count=max(floor, int(mac_density * whole)), bound="at_most"))
    kept, _, limits = project(layers, budgets, macs=macs)
    assert all(1 <= k <= n for k, n in zip(kept, sizes))
    assert slack_is_spent(kept, layers, limits)
    if mac_density is None:
        assert sum(kept) == wanted
        if not ties:  # Every kept weight but the one that a floor keeps is at least as large as every removed one.
            cut = torch.cat(layers).abs().sort(descending=True).values[wanted - 1]
            above = [int((layer.abs() >= cut).sum()) for layer in layers]
            assert all(k <= max(a, 1) for k, a in zip(kept, above))

"""Weights that share a mask: whole blocks, the exact budget, the same thresholds as single weights for the same density."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from pruning_helpers import small_batch
from torch import Tensor, nn

from asp_dist.config import Config, from_dict
from asp_dist.pruning import Budget, Hard, Operator, Pattern, Power, Pruner, Ramp, Select, Soft, SparsityLoss, Track
from asp_dist.pruning.density import gaussian_density
from asp_dist.pruning.kernels.device_passes import fits
from asp_dist.pruning.patterns import GroupScale, grouped, norms

STEPS = 60
RAMP = Ramp("cubic", 0.0, 0.5, freeze_at=0.75, total_steps=STEPS)
CONTROLS = {"published": SparsityLoss(), "loss": SparsityLoss(density="measured", multiplier=True), "track": Track()}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Output channels of 12, 24, 18 and 10, the second layer in channels_last order; blocks of 4 fit the first two alone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(12, 24, 3, padding=1, stride=2).to(memory_format=torch.channels_last), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(216, 18), nn.ReLU(), nn.Linear(18, 10)),
    )
    return model.to(dtype)


def pruned(
    pattern: Pattern, budget: Any = None, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Pruner, nn.Module]:
    model = network(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = Pruner(
            model,
            optimizer,
            budget or Budget.parameters(density=0.1),
            pattern=pattern,
            **{"select": Select(min_weights=100), "ramp": RAMP, "input_shape": (3, 6, 6), **options},
        )
    return pruner, model


def train(pruner: Pruner, model: nn.Module, start: int = 0, end: int = STEPS) -> None:
    for step in range(start, end):
        images, labels = small_batch(step, dtype=next(model.parameters()).dtype)
        pruner.optimizers[0].zero_grad()
        nn.functional.cross_entropy(model(images).float(), labels).backward()
        pruner.optimizers[0].step()


def are_whole(weights: Tensor, block: int) -> bool:
    kept = grouped(weights != 0, block).sum(1)
    return bool(((kept == 0) | (kept == block)).all())


@pytest.mark.parametrize("size", [2, 4, 7, 16])
def test_a_threshold_keeps_the_same_share_of_groups_as_of_weights(size: int) -> None:
    scale = GroupScale([1, size])
    weights = torch.randn(200_000 * size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for r in (0.1, 0.7, 1.645, 2.5):
        thresholds = torch.full((2,), r, dtype=torch.float64)
        alone, together = scale.of_groups(thresholds).tolist()
        assert alone == r
        share = float((norms(weights.view(-1, 1), size) > together).double().mean())
        expected = float(gaussian_density(thresholds)[0])
        assert abs(share - expected) < 5 * (expected * (1 - expected) / 200_000) ** 0.5
        assert torch.allclose(scale.of_weights(scale.of_groups(thresholds)), thresholds, atol=1e-12)
    rising = torch.linspace(0, 7, 500, dtype=torch.float64)
    of_groups = torch.stack([scale.of_groups(torch.full((2,), float(r), dtype=torch.float64)) for r in rising])[:, 1]
    assert bool((of_groups.diff() >= 0).all()) and of_groups[0] == 0


@pytest.mark.parametrize("operator", [Hard(), Soft(), Power(3.0)])
def test_each_block_is_scaled_as_the_operator_changes_its_norm(operator: Operator) -> None:
    pruner, _ = pruned(Pattern(4), ramp=Ramp(), operator=operator)
    for layer, b in zip(pruner.layers, pruner._written_at.tolist()):
        if layer.block == 1:
            continue
        dense = layer.dense
        for group in range(dense.shape[0] // 4):
            rows = slice(4 * group, 4 * group + 4)
            size = dense[rows].square().mean(0).sqrt()
            shrunk = {"Hard": size, "Soft": size - b, "Power": (size**3 - b**3).clamp_min(0) ** (1 / 3)}[
                type(operator).__name__
            ]
            expected = torch.where(size > b, dense[rows] * shrunk / size, 0.0)
            assert torch.allclose(layer.pruned[rows], expected, rtol=1e-6, atol=1e-12)
            if isinstance(operator, Hard):
                assert torch.equal(layer.pruned[rows], torch.where(size > b, dense[rows], 0.0))
    assert [layer.block for layer in pruner.layers] == [4, 4, 1, 1]


@pytest.mark.parametrize("operator", [Hard(), Power(3.0)])
@pytest.mark.parametrize("control", CONTROLS)
def test_the_budget_is_exact_in_whole_blocks(control: str, operator: Operator) -> None:
    pruner, model = pruned(Pattern(4), control=CONTROLS[control], operator=operator)
    train(pruner, model)
    total = sum(layer.info.numel for layer in pruner.layers)
    kept = pruner.snapshot().summary()["nonzero_weights"]
    assert kept == round(0.1 * total)  # single weights of the other layers fill what blocks leave over
    for layer in pruner.layers:
        assert are_whole(layer.pruned, layer.block)


def test_blocks_alone_leave_less_than_a_block_of_the_budget() -> None:
    budgets = [Budget.parameters(density=0.2), Budget.macs(density=0.25, bound="at_most")]
    pruner, model = pruned(Pattern(4), budgets, control=Track(), select=Select(min_weights=100, last=False, exclude=("5",)))
    assert {layer.block for layer in pruner.layers} == {4}
    train(pruner, model)
    total = sum(layer.info.numel for layer in pruner.layers)
    summary = pruner.snapshot().summary()
    kept, macs = summary["nonzero_weights"], summary["macs"]
    assert kept is not None and macs is not None and summary["dense_macs"] is not None
    others = 216 * 18 + 18 * 10  # multiply-adds of the two layers that stay dense
    assert kept % 4 == 0 and 0 <= round(0.2 * total) - kept < 4
    assert macs - others <= 0.25 * (summary["dense_macs"] - others)


@pytest.mark.parametrize("control", ["loss", "track"])
def test_densities_follow_the_ramp_before_the_freeze(control: str) -> None:
    ramp = Ramp("cubic", 0.0, 0.5, total_steps=STEPS)
    pruner, model = pruned(Pattern(4), control=CONTROLS[control], ramp=ramp, budget=Budget.parameters(density=0.2))
    train(pruner, model)
    assert 1 - pruner.snapshot().metrics()["sparsity/measured"] == pytest.approx(0.2, abs=0.02 if control == "loss" else 0.004)


@pytest.mark.parametrize("stop", [20, 50])
def test_a_resumed_run_continues_bit_for_bit(stop: int) -> None:
    """Before and after the freeze."""
    whole, model = pruned(Pattern(4), control=Track(), operator=Power())
    train(whole, model)
    first, first_model = pruned(Pattern(4), control=Track(), operator=Power())
    train(first, first_model, 0, stop)
    states = copy.deepcopy((first_model.state_dict(), first.optimizers[0].state_dict(), first.state_dict()))
    second, second_model = pruned(Pattern(4), control=Track(), operator=Power())
    second_model.load_state_dict(states[0])
    second.optimizers[0].load_state_dict(states[1])
    second.load_state_dict(states[2])
    train(second, second_model, stop)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), second_model.state_dict().values()))
    assert torch.equal(whole.thresholds, second.thresholds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_of_weights(dtype: torch.dtype) -> None:
    pruner, model = pruned(Pattern(4), dtype=dtype, control=Track(), operator=Power())
    train(pruner, model)
    total = sum(layer.info.numel for layer in pruner.layers)
    assert pruner.snapshot().summary()["nonzero_weights"] == round(0.1 * total)
    assert all(are_whole(layer.pruned, layer.block) for layer in pruner.layers)


def test_the_signal_is_the_product_over_pruned_blocks() -> None:
    """Σ g·w over the pruned weights, by the operator that keeps values and by one that does not."""
    found = []
    for operator in (Hard(), Power(1e6)):  # so high a power is the hard operator
        pruner, model = pruned(Pattern(4), ramp=Ramp(), operator=operator)
        images, labels = small_batch(0)
        nn.functional.cross_entropy(model(images), labels).backward()
        pruner.passes.take_products(range(4), pruner._written_at, 1.0, None)
        found.append(pruner.passes._products.clone())  # type: ignore[union-attr]
        for layer, product, b in zip(pruner.layers, found[-1], pruner._written_at.tolist()):
            gradient = layer.gradient()
            assert gradient is not None
            removed = layer.dense.abs() <= b if layer.block == 1 else layer.pruned == 0
            assert float(product) == pytest.approx(float((gradient * layer.dense * removed).sum()), abs=1e-9)
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_layers_that_do_not_fit_are_named_and_globs_choose() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"pattern\.block = 4 does not divide the output channels of 5, 7"):
        Pruner(model, optimizer, Budget.parameters(density=0.5), pattern=Pattern(4), select=Select(min_weights=100)).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pattern = Pattern(4, include=("*",), exclude=("5", "7", "0"))
        pruner = Pruner(model, optimizer, Budget.parameters(density=0.5), pattern=pattern, select=Select(min_weights=100))
    assert [layer.block for layer in pruner.layers] == [1, 4, 1, 1]


def test_kernels_leave_blocks_to_the_plain_passes() -> None:
    pruner, _ = pruned(Pattern(4))
    assert not fits(pruner.layers, pruner.operator)
    assert fits([layer for layer in pruner.layers if layer.block == 1], pruner.operator)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="block = 0 must be at least 1"):
        Pattern(0)
    with pytest.raises(ValueError, match="must be a sequence of globs"):
        Pattern(4, include="layer*")  # type: ignore[arg-type]
    config: Config = from_dict({"pruning": {"pattern": {"block": 4, "exclude": ["fc"]}}})
    assert config.pruning.pattern == Pattern(4, exclude=("fc",))

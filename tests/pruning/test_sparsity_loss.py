"""The sparsity losses, the density model and the schedule, against numbers by hand and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from asp_dist.pruning import Budget, Ramp, SparsityLoss
from asp_dist.pruning.budget import NetworkCosts, resolve_budget
from asp_dist.pruning.control.controller import Problem, RampPosition, StepStats
from asp_dist.pruning.control.sparsity_loss import SparsityLossController, sparsity_loss
from asp_dist.pruning.density import (
    NEARBY,
    DensityModel,
    LayerCounts,
    gaussian_density,
    gaussian_density_gradient,
    threshold_for_density,
    weight_threshold,
)

COSTS = NetworkCosts(("a", "b"), (100, 300), (4.0, 1.0), (4, 4))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Densities 0.2 and 0.4: the network's is (20 + 120) / 400 = 0.35; of the multiply-adds, (80 + 120) / 700.
@pytest.mark.parametrize(
    ("budget", "value", "gradient"),
    [
        (Budget.parameters(density=0.1), 0.0625, [0.125, 0.375]),
        (Budget.parameters(density=0.1, bound="at_most"), 0.25, [0.25, 0.75]),
        (Budget.parameters(density=0.5, bound="at_most"), 0.0, [0.0, 0.0]),
        (Budget.parameters(density=0.5), 0.0225, [-0.075, -0.225]),
        (Budget.parameters(density=0.1, scope="layer"), 0.05, [0.1, 0.3]),
        (Budget.parameters(density=0.3, scope="layer", bound="at_most"), 0.05, [0.0, 0.5]),
        (Budget.macs(density=0.1, bound="at_most"), 200 / 700 - 0.1, [4 / 7, 3 / 7]),
    ],
)
def test_losses_by_hand(budget: Budget, value: float, gradient: list[float]) -> None:
    limit = resolve_budget(budget, COSTS)
    densities = vector(0.2, 0.4).requires_grad_()
    loss = sparsity_loss(limit, densities, limit.target_density)
    assert loss.value.item() == pytest.approx(value, abs=1e-12)
    assert loss.gradient.detach().tolist() == pytest.approx(gradient, abs=1e-12)
    (automatic,) = torch.autograd.grad(loss.value, densities)
    torch.testing.assert_close(automatic, loss.gradient.detach())


def test_gaussian_density() -> None:
    assert gaussian_density(vector(0.0, 1.0, 2.0)).tolist() == pytest.approx([1.0, 0.317310508, 0.045500264])
    assert threshold_for_density(vector(0.1, 0.317310508)).tolist() == pytest.approx([1.644853627, 1.0])
    assert gaussian_density(vector(-1.0)).item() == pytest.approx(2 - 0.317310508)  # r is not clamped here, as published
    assert gaussian_density(vector(8.0)).item() == pytest.approx(math.erfc(8 / math.sqrt(2)), rel=1e-9)


def test_weight_threshold_is_clamped() -> None:
    sigmas = vector(2.0, 2.0, 2.0)
    assert weight_threshold(vector(-1.0, 1.5, 7.0), sigmas).tolist() == pytest.approx([1e-6, 3.0 + 1e-6, 10.0 + 1e-6])


@pytest.mark.parametrize("corrected", [False, True])
def test_density_gradient_by_finite_differences(corrected: bool) -> None:
    numel = torch.full((4,), 1e6, dtype=torch.float64)
    model = DensityModel(numel, corrected=corrected)
    thresholds, measured, nearby = (
        vector(0.1, 0.8, 1.6, 2.5),
        vector(0.95, 0.3, 0.2, 0.001),
        vector(0.94, 0.28, 0.1, 0.0),
    )
    counts = LayerCounts(measured * numel, nearby * numel, vector(3.0, 3.0, 3.0, 3.0))
    model.observe(thresholds, counts, torch.tensor([True, True, True, False]))
    h = 1e-6
    slope = (model.density(thresholds + h) - model.density(thresholds - h)) / (2 * h)
    torch.testing.assert_close(model.gradient(thresholds), slope, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(model.threshold(model.density(thresholds)), thresholds, rtol=1e-7, atol=1e-7)
    if corrected:
        assert model.density(thresholds)[:3].tolist() == pytest.approx([0.95, 0.3, 0.2], rel=1e-4)
        assert model.density(NEARBY * thresholds)[:3].tolist() == pytest.approx([0.94, 0.28, 0.1], rel=1e-3)
        assert model.density(thresholds)[3].item() == pytest.approx(float(gaussian_density(thresholds)[3]))
    else:
        torch.testing.assert_close(model.gradient(thresholds), gaussian_density_gradient(thresholds))


@pytest.mark.parametrize("outlier", [30.0, 1000.0])
def test_the_measured_density_of_a_layer_with_outliers(outlier: float) -> None:
    """One weight in a hundred makes σ: 1 % is kept at 4.9 σ as at 0.1 σ, far from what the Gaussian says of either."""
    weights = torch.cat([torch.linspace(-0.01, 0.01, 9900), torch.full((100,), outlier)]).double()
    for r in (4.9, 0.1):
        count = (weights.abs() > r * weights.std()).double().sum().reshape(1)
        model = DensityModel(vector(1e4), corrected=True)
        for _ in range(10):
            model.observe(vector(r), LayerCounts(count, count, vector(10.0)), torch.tensor([True]))
        assert model.density(vector(r)).item() == pytest.approx(0.01)


def stats(products: Tensor, lr: float = 0.1, ramp: Ramp = Ramp()) -> StepStats:
    sigmas, position = vector(2.0, 4.0), RampPosition.at(ramp, 0)
    return StepStats(products, sigmas, sigmas, vector(lr, lr), vector(0.0, 0.0), 0, position)


def controller(ramp: Ramp = Ramp(), **options: Any) -> SparsityLossController:
    budget = resolve_budget(Budget.parameters(density=0.1), COSTS)
    model = DensityModel(vector(100, 300), corrected=False)
    problem = Problem((budget,), ramp, model, ((100,), (300,)), vector(0.01, 0.01))
    return SparsityLossController(SparsityLoss(**options), problem)


def test_published_move_by_hand() -> None:
    """r ← r − lr·v, v ← 0.9·v + ∇; ∇ = −(σ/b)·Σ g·w + λ·∂loss/∂d·d'(r)."""
    published = controller(threshold_lr=0.01)
    thresholds, products = vector(1.0, 2.0), vector(3.0, -5.0)
    density = 0.25 * 0.317310508 + 0.75 * 0.045500264
    slopes = [-math.sqrt(2 / math.pi) * math.exp(-r * r / 2) for r in (1.0, 2.0)]
    sparsity = [10 * 2 * (density - 0.1) * share * slope for share, slope in zip((0.25, 0.75), slopes)]
    task = [-2.0 / (2.0 + 1e-6) * 3.0, -4.0 / (8.0 + 1e-6) * -5.0]
    gradient = [s + t for s, t in zip(sparsity, task)]
    moved = published.move(thresholds, stats(products))
    assert moved.tolist() == pytest.approx([1.0 - 0.01 * gradient[0], 2.0 - 0.01 * gradient[1]], abs=1e-8)
    # The same numbers again: the velocity is 1.9 gradients (the first thresholds are passed again).
    again = published.move(thresholds, stats(products))
    assert again.tolist() == pytest.approx([1.0 - 0.019 * gradient[0], 2.0 - 0.019 * gradient[1]], abs=1e-8)


def test_threshold_learning_rate_follows_the_optimizer() -> None:
    assert controller().learning_rate(vector(0.1, 0.3)).tolist() == pytest.approx([0.001, 0.003])
    low, high = (controller().move(vector(1.0, 1.0), stats(vector(0.0, 0.0), lr)) for lr in (0.1, 0.3))
    assert not torch.equal(low, high)


def test_no_task_gradient_where_the_threshold_is_clamped() -> None:
    moved = controller(weight=0.0, threshold_lr=1.0).move(vector(-0.1, 5.1), stats(vector(7.0, 7.0)))
    assert moved.tolist() == [-0.1, 5.1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_products_leave_thresholds_finite(bad: float) -> None:
    for ramp in (Ramp(), Ramp("cubic", total_steps=10)):
        control, moved = controller(ramp), vector(1.0, 1.0)
        for _ in range(3):
            moved = control.move(moved, stats(vector(bad, 1.0), ramp=ramp))
            assert torch.isfinite(moved).all()


def test_ramps() -> None:
    linear = Ramp("linear", start=0.25, end=0.75, freeze_at=0.8, total_steps=100)
    assert [linear.share(s) for s in (0, 25, 50, 75, 100)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert (linear.arrival_step(), linear.freeze_step()) == (75, 80)
    cubic = Ramp("cubic", end=0.5, total_steps=100)
    assert [cubic.share(s) for s in (0, 25, 50, 99)] == [0.0, 0.875, 1.0, 1.0]
    assert cubic.freeze_step() is None
    assert Ramp().share(0) == 1.0
    assert (Ramp().arrival_step(), Ramp().freeze_step()) == (0, None)
    assert Ramp("cubic", start=0.5, end=0.5, total_steps=100).share(50) == 1.0  # a jump


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "cosine"}, "shape = 'cosine' is not one of 'constant', 'linear', 'cubic'"),
        ({"shape": "linear", "start": 0.6, "end": 0.5, "total_steps": 10}, "start = 0.6 must not exceed end = 0.5"),
        ({"shape": "linear", "end": 1.2, "total_steps": 10}, "end = 1.2"),
        ({"shape": "linear", "end": 0.5, "freeze_at": 0.4, "total_steps": 10}, "must not exceed freeze_at = 0.4"),
        ({"total_steps": 0}, "total_steps = 0 must be at least 1"),
    ],
)
def test_ramp_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ramp(**arguments)

"""Exact budgets after `finalize`, the frozen mask, and runs that continue from a saved state without changing a bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from pruning_helpers import published_sgd, small_network, train_step
from torch import Tensor, nn

from asp_dist.pruning import Budget, Control, Hard, Operator, Power, Pruner, Ramp, Select, Soft, SparsityLoss, Track

LAYERS = ("2.weight", "5.weight")
SIZES = torch.tensor([1152, 2304])
INPUT = (3, 6, 6)


def masks(model: nn.Module) -> list[Tensor]:
    return [model.get_parameter(name).detach() != 0 for name in LAYERS]


def kept(model: nn.Module) -> Tensor:
    return torch.stack([mask.sum() for mask in masks(model)])


def build(model: nn.Module, budget: Any, **options: Any) -> tuple[torch.optim.Optimizer, Pruner]:
    optimizer = published_sgd(model)
    return optimizer, Pruner(model, optimizer, budget, input_shape=INPUT, **options)


@pytest.mark.parametrize("control", [SparsityLoss(density="measured"), Track()])
@pytest.mark.parametrize("operator", [Hard(), Soft(), Power()])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_exact_and_frozen(control: Control, operator: Operator, sparsity: float) -> None:
    model = small_network(dtype=torch.float32)
    ramp = Ramp("cubic", end=0.4, freeze_at=0.5, total_steps=24)
    budget = Budget.parameters(sparsity=sparsity)
    optimizer, pruner = build(model, budget, control=control, operator=operator, ramp=ramp)
    wanted = round((1.0 - sparsity) * 3456)
    frozen: list[Tensor] = []
    for step in range(32):
        train_step(model, optimizer, step)
        assert pruner.frozen == (step >= 11)
        if pruner.frozen:  # 20 steps more, with momentum and weight decay, and no weight off.
            assert int(kept(model).sum()) == wanted
            frozen = frozen or masks(model)
            assert all(torch.equal(a, b) for a, b in zip(frozen, masks(model)))
    assert pruner.snapshot().summary()["nonzero_weights"] == wanted
    assert pruner.snapshot().summary()["sparsity"] == pytest.approx(1.0 - wanted / 3456, abs=1e-12)


@pytest.mark.parametrize(
    "budgets",
    [
        Budget.parameters(count=1000),
        Budget.parameters(sparsity=0.9, scope="layer"),
        Budget.macs(sparsity=0.8),
        Budget.bytes(sparsity=0.7),
        Budget.bytes(count=8000, bound="at_most"),
        (Budget.parameters(density=0.1), Budget.macs(density=0.08, bound="at_most")),
    ],
)
@pytest.mark.parametrize("control", [SparsityLoss(), Track()])
def test_every_kind_of_budget(budgets: Any, control: Control) -> None:
    model = small_network(dtype=torch.float32)
    optimizer, pruner = build(model, budgets, control=control, ramp=Ramp("linear", end=0.6, total_steps=10))
    for step in range(10):
        train_step(model, optimizer, step)
    pruner.finalize()
    counts, costs = kept(model), []
    for limit in pruner.budgets:
        if limit.scope == "layer":
            assert torch.equal(limit.per_weight * counts, limit.allowed)
            continue
        cost = float((limit.per_weight * counts).sum())
        assert cost <= float(limit.allowed)
        costs.append((float(limit.allowed) - cost, limit.per_weight.tolist()))
    # Nothing more fits: one weight of either layer breaks a limit.
    if costs:
        for layer in range(2):
            assert any(slack < per_weight[layer] for slack, per_weight in costs)
    assert (counts >= (0.001 * SIZES).ceil()).all()
    if pruner.budgets[0].cost == "parameters" and pruner.budgets[0].scope == "network":
        assert int(counts.sum()) == int(pruner.budgets[0].allowed)
    assert pruner.snapshot().summary()["nonzero_weights"] == int(counts.sum())


def test_finalize_keeps_the_largest_weights_at_the_learned_ratio() -> None:
    model = small_network()
    control = SparsityLoss(threshold_lr=0.01, initial_threshold=1.0)
    optimizer, pruner = build(model, Budget.parameters(density=0.1), control=control)
    for step in range(5):
        train_step(model, optimizer, step)
    with pruner.dense():
        dense = [model.get_parameter(name).detach().abs().clone() for name in LAYERS]
    bounds = pruner.thresholds * pruner.sigmas + 1e-6
    ratio = torch.cat([(w / b).flatten() for w, b in zip(dense, bounds)])
    cut = ratio.sort(descending=True).values[345]
    pruner.finalize()
    for w, b, mask in zip(dense, bounds, masks(model)):
        assert torch.equal(mask, w / b >= cut)


def test_zero_weights_still_count() -> None:
    """A layer that starts at zero keeps its share: a kept weight is the smallest normal number at least."""
    model = small_network(dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("5.weight").zero_()
    _, pruner = build(model, Budget.parameters(density=0.1, scope="layer"))
    pruner.finalize()
    assert kept(model).tolist() == [115, 230]
    assert float(model.get_parameter("5.weight").detach().abs().max()) < 1e-30


def saved_and_loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "published": {"control": SparsityLoss(threshold_lr=0.01, initial_threshold=0.8)},
    "loss": {
        "control": SparsityLoss(density="measured", multiplier=True),
        "ramp": Ramp("cubic", end=0.5, freeze_at=0.7, total_steps=20),
    },
    "track": {"control": Track(), "ramp": Ramp("cubic", end=0.5, freeze_at=0.7, total_steps=20)},
    "power": {
        "control": Track("erk"),
        "operator": Power(),
        "gradient_scale": 0.5,
        "ramp": Ramp("cubic", end=0.5, freeze_at=0.7, total_steps=20),
    },
    "two budgets": {"control": Track(), "ramp": Ramp("linear", end=0.3, freeze_at=0.7, total_steps=20)},
}


@pytest.mark.parametrize("at", [7, 16], ids=["before the freeze", "after the freeze"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_changes_no_bit(name: str, at: int) -> None:
    budgets = [Budget.parameters(density=0.1)]
    if name == "two budgets":
        budgets.append(Budget.macs(density=0.05, bound="at_most"))
    options = OPTIONS[name]
    model = small_network(dtype=torch.float32)
    optimizer, pruner = build(model, budgets, **options)
    states: Any = None
    for step in range(20):
        if step == at:
            # Taken without a copy, then saved at once: what follows must not reach into it.
            held = pruner.state_dict()
            states = saved_and_loaded((model.state_dict(), optimizer.state_dict(), held))
        train_step(model, optimizer, step)
    for before, after in zip(_tensors(states[2]), _tensors(held)):
        assert torch.equal(before, after)

    resumed = small_network(seed=5, dtype=torch.float32)
    optimizer, again = build(resumed, budgets, **options)
    resumed.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    again.load_state_dict(states[2])
    assert again.frozen == (name != "published" and at == 16)
    for step in range(at, 20):
        train_step(resumed, optimizer, step)
    assert again.steps == pruner.steps == 20
    assert torch.equal(again.thresholds, pruner.thresholds)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    with pruner.dense(), again.dense():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    assert pruner.snapshot().summary() == again.snapshot().summary()


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [t for item in state for t in _tensors(item)] if isinstance(state, list | tuple) else []


def test_a_state_of_other_layers_is_refused() -> None:
    _, pruner = build(small_network(), Budget.parameters(density=0.1))
    _, other = build(small_network(), Budget.parameters(density=0.1), select=Select(exclude=("5",)))
    with pytest.raises(ValueError, match="of other layers; first difference: '5'"):
        other.load_state_dict(pruner.state_dict())
    state = pruner.state_dict()
    state["dense"]["5"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"layer '5'.*\(3, 3\) does not fit"):
        pruner.load_state_dict(state)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_loaded_before_the_pruner_was_built(frozen: bool) -> None:
    """Building a pruner prunes: before the freeze the state repairs that, afterwards it cannot, and says so."""
    model = small_network()
    optimizer, pruner = build(
        model, Budget.parameters(density=0.5), control=SparsityLoss(threshold_lr=0.01, initial_threshold=0.1)
    )
    for step in range(3):
        train_step(model, optimizer, step)
    if frozen:
        pruner.finalize()
    state, weights = pruner.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = small_network(seed=5)
    other.load_state_dict(weights)
    _, again = build(other, Budget.parameters(density=0.5), control=SparsityLoss(initial_threshold=2.0))
    if frozen:
        with pytest.raises(ValueError, match=r"layer '2'.*load the model's state after that"):
            again.load_state_dict(state)
        other.load_state_dict(weights)
    again.load_state_dict(state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in other.state_dict().items())


def test_runs_repeat_bitwise() -> None:
    def train() -> list[Tensor]:
        model = small_network(dtype=torch.float32)
        optimizer, pruner = build(model, Budget.parameters(density=0.1), **OPTIONS["track"])
        for step in range(20):
            train_step(model, optimizer, step)
        return [*(p.detach() for p in model.parameters()), pruner.thresholds]

    assert all(torch.equal(a, b) for a, b in zip(train(), train()))

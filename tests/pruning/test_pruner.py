"""The pruner beside what a training loop may hold: optimizers, scalers, accumulation, clipping, averages, compilation."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from pruning_helpers import published_sgd, small_batch, small_network, train_step
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from asp_dist.pruning import (
    Budget,
    Control,
    Hard,
    Operator,
    Power,
    Pruner,
    Ramp,
    Select,
    Soft,
    SparsityLoss,
    Track,
)
from asp_dist.training.health import FLAGS

TENTH = Budget.parameters(density=0.1)


def weight(model: nn.Module, index: int) -> nn.Parameter:
    return model.get_parameter(f"{index}.weight")


def gradient(model: nn.Module, index: int) -> Tensor:
    found = weight(model, index).grad
    assert found is not None
    return found


def shrunk(dense: Tensor, r: float) -> Tensor:
    return torch.where(dense.abs() > r * dense.std() + 1e-6, dense, 0.0)


def autograd_nodes(output: Tensor) -> list[str]:
    seen, queue = set(), [output.grad_fn]
    names = []
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            queue.extend(following for following, _ in node.next_functions)
    return sorted(names)


def test_the_model_stays_a_plain_timm_model() -> None:
    torch.manual_seed(0)
    plain, pruned = timm.create_model("resnet18"), timm.create_model("resnet18")
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    Pruner(pruned, optimizer, TENTH)
    images = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        optimizer.zero_grad()
        pruned(images).square().mean().backward()
        optimizer.step()
    assert [(n, t.shape, t.dtype) for n, t in plain.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in pruned.state_dict().items()
    ]
    assert autograd_nodes(pruned(images)) == autograd_nodes(plain(images))
    assert [type(m) for m in plain.modules()] == [type(m) for m in pruned.modules()]
    assert not [name for name, m in pruned.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not [name for name, p in pruned.named_parameters() if p._backward_hooks]
    # The file of a pruned network is a file of the plain one, with its zeros.
    plain.load_state_dict(pruned.state_dict())
    assert float((plain.get_parameter("layer4.1.conv2.weight") == 0).float().mean()) > 0.8


def groups(model: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "sgd": lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9, nesterov=True, foreach=False),
    "sgd-foreach": lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9, foreach=True),
    "sgd-fused": lambda g: torch.optim.SGD(g, lr=0.05, momentum=0.9, fused=True),
    "adamw": lambda g: torch.optim.AdamW(g, lr=0.003, foreach=True),
    "adamw-fused": lambda g: torch.optim.AdamW(g, lr=0.003, fused=True),
    **{
        name: lambda g, name=name: create_optimizer_v2(g, opt=name, lr=0.003)  # type: ignore[misc]
        for name in ("lamb", "lion", "adafactor", "sgdp", "lookahead_adamw")
    },
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_the_dense_weights(name: str) -> None:
    """Against the plain form of the straight-through estimator, computed in the forward pass, with thresholds held."""
    r, steps = 1.2, 8
    model, reference = small_network(), small_network()
    optimizer = OPTIMIZERS[name](groups(model))
    pruner = Pruner(model, optimizer, TENTH, control=SparsityLoss(initial_threshold=r, threshold_lr=0.0), center=False)
    plain = OPTIMIZERS[name](groups(reference))
    layers = [layer.name + ".weight" for layer in pruner.snapshot().layers]
    for step in range(steps):
        train_step(model, optimizer, step)
        images, labels = small_batch(step)
        plain.zero_grad()
        weights = {n: p for n, p in reference.named_parameters() if n in layers}
        through = {n: p + (shrunk(p.detach(), r) - p).detach() for n, p in weights.items()}
        output = torch.func.functional_call(reference, through, (images,))
        nn.functional.cross_entropy(output, labels).backward()
        plain.step()
    with pruner.dense():
        for (key, mine), theirs in zip(model.named_parameters(), reference.parameters()):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12, msg=key)
    for key in layers:
        torch.testing.assert_close(
            model.get_parameter(key), shrunk(reference.get_parameter(key), r).detach(), rtol=0, atol=1e-12
        )
    assert pruner.steps == steps


def test_threshold_gradient_comes_from_the_final_gradients() -> None:
    """After clipping: r moves by −lr·(−(σ/b)·Σ_{|w| <= b} g·w), with the g that the optimizer sees."""
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(
        model, optimizer, TENTH, control=SparsityLoss(initial_threshold=1.0, threshold_lr=0.5, weight=0.0), center=False
    )
    with pruner.dense():
        dense = [weight(model, 2).detach().clone(), weight(model, 5).detach().clone()]
    images, labels = small_batch(0)
    nn.functional.cross_entropy(model(images), labels).backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    assert norm > 0.1
    expected = []
    for index, w in zip((2, 5), dense):
        b = w.std() + 1e-6
        expected.append(1.0 + 0.5 * float(w.std() / b * (gradient(model, index) * w)[w.abs() <= b].sum()))
    optimizer.step()
    assert pruner.thresholds.tolist() == pytest.approx(expected, abs=1e-12)
    assert max(abs(r - 1.0) for r in expected) > 1e-5


def state_of(model: nn.Module, pruner: Pruner) -> list[Tensor]:
    with pruner.dense():
        dense = [p.detach().clone() for p in model.parameters()]
    return [*dense, *(p.detach().clone() for p in model.parameters()), pruner.thresholds.clone(), pruner.sigmas.clone()]


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler_with_an_injected_inf(fused: bool) -> None:
    """A skipped step changes nothing, and scaling by a power of two changes no bit."""

    def train(scaled: bool, inf_at: int | None) -> tuple[list[Tensor], Pruner]:
        model = small_network(dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        pruner = Pruner(model, optimizer, TENTH, control=SparsityLoss(threshold_lr=0.01, initial_threshold=0.8))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000, enabled=scaled)
        for step in range(6):
            attempts = 2 if step == inf_at else 1
            for attempt in range(attempts):
                images, labels = small_batch(step, dtype=torch.float32)
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
                before = state_of(model, pruner)
                if attempts == 2 and attempt == 0:
                    gradient(model, 5)[0, 0] = torch.inf
                scaler.step(optimizer)
                scaler.update()
                if attempts == 2 and attempt == 0:
                    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, pruner)))
                    assert pruner.steps == step
        return state_of(model, pruner), pruner

    plain, _ = train(False, None)
    scaled, pruner = train(True, None)
    interrupted, after = train(True, 3)
    assert all(torch.equal(a, b) for a, b in zip(plain, scaled))
    assert all(torch.equal(a, b) for a, b in zip(plain, interrupted))
    assert (pruner.steps, pruner.skipped) == (6, 0)
    assert (after.steps, after.skipped) == (6, int(fused))  # An optimizer that is not called cannot be counted.


def test_accumulated_gradients_equal_one_batch() -> None:
    def train(parts: int) -> list[Tensor]:
        model = small_network()
        optimizer = published_sgd(model)
        pruner = Pruner(model, optimizer, TENTH, control=SparsityLoss(threshold_lr=0.01, initial_threshold=0.8))
        for step in range(5):
            images, labels = small_batch(step)
            optimizer.zero_grad()
            for x, y in zip(images.chunk(parts), labels.chunk(parts)):
                (nn.functional.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
        assert pruner.steps == 5
        return state_of(model, pruner)

    for whole, split in zip(train(1), train(4)):
        torch.testing.assert_close(whole, split, rtol=0, atol=1e-12)


def test_an_averaged_model_is_sparse_to_the_same_budget() -> None:
    model = small_network(dtype=torch.float32)
    optimizer = published_sgd(model)
    pruner = Pruner(model, optimizer, TENTH, control=Track(), ramp=Ramp("cubic", end=0.5, freeze_at=0.8, total_steps=20))
    average = ModelEmaV3(model, decay=0.5)
    for step in range(20):
        train_step(model, optimizer, step)
        average.update(model)
    layers = [layer.name for layer in pruner.snapshot().layers]
    dense = sum(int(average.module.get_parameter(f"{n}.weight").count_nonzero()) for n in layers)
    pruner.apply_masks_(average.module)
    for name in layers:
        mine, theirs = model.get_parameter(f"{name}.weight"), average.module.get_parameter(f"{name}.weight")
        assert torch.equal(mine == 0, theirs == 0)
        assert not torch.equal(mine, theirs)
    kept = sum(int(average.module.get_parameter(f"{n}.weight").count_nonzero()) for n in layers)
    assert kept == round(0.1 * 3456) < dense


@pytest.mark.filterwarnings("ignore:.*was called without the:UserWarning")
def test_compiled_whole_and_once() -> None:
    def train(compiled: bool) -> list[Tensor]:
        model = small_network()
        optimizer = published_sgd(model)
        run: nn.Module = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model  # type: ignore[assignment]
        pruner = Pruner(run, optimizer, TENTH, control=SparsityLoss(threshold_lr=0.01, initial_threshold=0.8))
        assert [layer.name for layer in pruner.snapshot().layers] == ["2", "5"]
        for step in range(5):
            train_step(run, optimizer, step)
        return state_of(model, pruner)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train(True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for eager, other in zip(train(False), compiled):
        torch.testing.assert_close(eager, other, rtol=0, atol=1e-12)


class Checkpointed(nn.Module):
    """`small_network` that recomputes its convolutions in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small_network()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[4:](checkpoint(self.layers[:4], x, use_reentrant=False))


def test_activation_checkpointing_changes_no_bit() -> None:
    def train(model: nn.Module) -> list[Tensor]:
        optimizer = published_sgd(model)
        pruner = Pruner(
            model,
            optimizer,
            TENTH,
            control=SparsityLoss(threshold_lr=0.01, initial_threshold=0.8),
            input_shape=(3, 6, 6),
        )
        for step in range(5):
            train_step(model, optimizer, step)
        return state_of(model, pruner)

    assert all(torch.equal(a, b) for a, b in zip(train(small_network()), train(Checkpointed())))


def test_copies_and_pickles_of_the_model_are_plain() -> None:
    model = small_network()
    optimizer = published_sgd(model)
    Pruner(model, optimizer, TENTH)
    train_step(model, optimizer, 0)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_step(model, optimizer, 1)
    for other in copies:
        assert all(torch.equal(expected[name], tensor) for name, tensor in other.state_dict().items())
        assert not torch.equal(weight(other, 2), weight(model, 2))
        zeros = float((weight(other, 2) == 0).double().mean())
        train_step(other, torch.optim.SGD(other.parameters(), lr=0.1), 1)
        assert float((weight(other, 2) == 0).double().mean()) < zeros  # Nobody prunes the copy.


@pytest.mark.parametrize("theta", [1.0, 0.5, 0.0])
def test_channels_last_equals_contiguous(theta: float) -> None:
    def train(channels_last: bool) -> list[Tensor]:
        model = small_network()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
            assert not weight(model, 2).is_contiguous()
        optimizer = published_sgd(model)
        pruner = Pruner(
            model,
            optimizer,
            TENTH,
            control=SparsityLoss(threshold_lr=0.01, initial_threshold=0.8),
            gradient_scale=theta,
        )
        for step in range(5):
            images, labels = small_batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            if channels_last:  # A gradient of other strides than its weight: autograd allows it.
                weight(model, 2).grad = gradient(model, 2).contiguous()
            optimizer.step()
        pruner.finalize()
        return state_of(model, pruner)

    for contiguous, other in zip(train(False), train(True)):
        torch.testing.assert_close(contiguous, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("control", [SparsityLoss(density="measured"), Track(), Track("uniform")])
@pytest.mark.parametrize("shape", ["constant", "cubic"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradients_leave_thresholds_finite(control: Control, shape: Any, bad: float) -> None:
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(
        model,
        optimizer,
        TENTH,
        control=control,
        ramp=Ramp(shape, total_steps=20),
    )
    for step in range(3):
        train_step(model, optimizer, step)
    for step in range(3):
        images, labels = small_batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        gradient(model, 5)[3, 3] = bad
        optimizer.step()
        assert torch.isfinite(pruner.thresholds).all()


def test_a_layer_without_a_gradient() -> None:
    """It is pruned all the same; its threshold follows the sparsity loss alone, and its dense weights stay."""

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = small_network(), nn.Linear(50, 50).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Partial()
    before = model.unused.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, TENTH, control=SparsityLoss(initial_threshold=0.8, threshold_lr=0.1), center=False)
    for step in range(5):
        train_step(model, optimizer, step)
    with pruner.dense():
        assert torch.equal(model.unused.weight, before)
    layer = pruner.snapshot().layers[2]
    assert layer.name == "unused"
    assert layer.threshold > 0.8
    assert torch.equal(model.unused.weight, shrunk(before, layer.threshold))


@pytest.mark.parametrize("operator", [Hard(), Soft(), Power()])
def test_half_precision_weights(operator: Operator) -> None:
    model = small_network(dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruner(model, optimizer, TENTH, control=SparsityLoss(initial_threshold=1.0, threshold_lr=0.1), operator=operator)
    for step in range(10):
        train_step(model, optimizer, step)
    with pruner.dense():
        for i, index in enumerate((2, 5)):
            assert float(pruner.sigmas[i]) == pytest.approx(float(weight(model, index).detach().double().std()), rel=1e-4)
    pruner.finalize()
    for step in range(5):
        train_step(model, optimizer, step)
    assert pruner.snapshot().summary()["nonzero_weights"] == round(0.1 * 3456)
    assert weight(model, 2).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_schedulers_drive_the_thresholds_too() -> None:
    model = small_network()
    optimizer = published_sgd(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    pruner = Pruner(model, optimizer, TENTH, control=SparsityLoss(initial_threshold=0.8))
    rates = []
    for step in range(4):
        rates.append(pruner.snapshot().metrics()["train/threshold_lr"])
        train_step(model, optimizer, step)
        schedule.step()
    assert rates == pytest.approx([0.001, 0.001 * (2 + 2**0.5) / 4, 0.0005, 0.001 * (2 - 2**0.5) / 4])


@pytest.fixture
def trained() -> tuple[nn.Sequential, Optimizer, Pruner]:
    model = small_network()
    optimizer = published_sgd(model)
    pruner = Pruner(model, optimizer, TENTH, control=SparsityLoss(initial_threshold=0.8, threshold_lr=0.01))
    for step in range(3):
        train_step(model, optimizer, step)
    return model, optimizer, pruner


def test_dense_weights_in_a_context(trained: tuple[nn.Sequential, Optimizer, Pruner]) -> None:
    model, _, pruner = trained
    pruned = [weight(model, i).detach().clone() for i in (2, 5)]
    with pruner.dense():
        dense = [weight(model, i).detach().clone() for i in (2, 5)]

    def fail_inside() -> None:
        with pruner.dense(["5"]):
            assert torch.equal(weight(model, 2), pruned[0])
            assert torch.equal(weight(model, 5), dense[1])
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    for i, d, p, r in zip((2, 5), dense, pruned, pruner.thresholds.tolist()):
        assert torch.equal(weight(model, i), p)
        assert int(d.count_nonzero()) == d.numel()
        torch.testing.assert_close(shrunk(d, r), p, rtol=0, atol=0)
    pruner.finalize()
    with pruner.dense():
        for i, d in zip((2, 5), dense):
            assert torch.equal(weight(model, i), d)


def test_remove_ends_it(trained: tuple[nn.Sequential, Optimizer, Pruner]) -> None:
    model, optimizer, pruner = trained
    pruner.remove()
    before = weight(model, 5).detach().clone()
    assert int((before == 0).sum()) > 0
    train_step(model, optimizer, 3)
    assert pruner.steps == 3
    momentum = optimizer.state[weight(model, 5)]["momentum_buffer"]
    torch.testing.assert_close(weight(model, 5).detach(), before - 0.1 * momentum, rtol=0, atol=1e-15)


def test_user_errors(trained: tuple[nn.Sequential, Optimizer, Pruner]) -> None:
    model, optimizer, _ = trained
    with pytest.raises(ValueError, match="step without one"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(RuntimeError, match=r"layer '2'.*moved or converted"):
        train_step(model.float(), optimizer, 3)
    other = small_network()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    for message, arguments in (
        (r"control = 'track' is not of type Control: give an object such as Track\(\)", {"control": "track"}),
        ("operator = 'power' is not of type Operator", {"operator": "power"}),
        ("no layer of Sequential can be pruned", {"select": Select(min_weights=10_000)}),
        (r"floors on their densities .* lower min_density", {"min_density": 0.2}),
        (r"min_density = 1.5 is outside \[0, 1\]", {"min_density": 1.5}),
        ("needs total_steps", {"ramp": Ramp("cubic")}),
        ("needs total_steps", {"ramp": Ramp(freeze_at=0.5)}),
    ):
        with pytest.raises(ValueError, match=message):
            Pruner(other, sgd, TENTH, **arguments)
    with pytest.raises(TypeError, match="multiplier"):
        Pruner(other, sgd, TENTH, control=Track(), multiplier=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="multiplier"):
        Track(multiplier=True)  # type: ignore[call-arg]
    for message, wrong in (("allocation = 'flat'", {"allocation": "flat"}), ("rate = -1", {"rate": -1})):
        with pytest.raises(ValueError, match=message):
            Track(**wrong)
    with pytest.raises(ValueError, match="input_shape"):
        Pruner(other, sgd, Budget.macs(density=0.1))


def test_one_copy_of_the_weights(trained: tuple[nn.Sequential, Optimizer, Pruner]) -> None:
    """All that the pruner keeps beside the model and the optimizer: the dense weights and a few numbers per layer."""
    model, _, pruner = trained
    weights = sum(weight(model, i).nbytes for i in (2, 5))
    vectors = [
        value
        for part in (pruner, pruner.controller, pruner.density_model, pruner.passes)
        for value in vars(part).values()
        if isinstance(value, Tensor)
    ]
    extra = sum(shard.dense.nbytes for shard in pruner.layers) + sum(v.nbytes for v in vectors)
    assert weights <= extra <= 1.05 * weights


def test_no_more_numbers_are_carried_than_there_is_room_for(trained: tuple[nn.Sequential, Optimizer, Pruner]) -> None:
    pruner = trained[2]
    assert pruner.carry(torch.ones(FLAGS)) is None, "a training step's flags have room; on the CPU no all-reduce takes them"
    with pytest.raises(ValueError, match="room for 16 numbers, not for 17"):
        pruner.carry(torch.ones(17))

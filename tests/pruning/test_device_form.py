"""The pruner as it is on a GPU: numbers on the device, one pass for all layers. Here on CPU tensors, or on fake CUDA ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from device_form import CONTROLS, RAMP, build, on_the_device, train
from fake_cuda import Launches, as_fake_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from asp_dist.pruning import Budget, Hard, Power, Pruner, Ramp, SparsityLoss, Track
from asp_dist.pruning.control.controller import Controller, Problem
from asp_dist.pruning.control.track import TrackController
from asp_dist.pruning.kernels import device_control
from asp_dist.pruning.kernels.device_passes import DevicePasses
from asp_dist.pruning.kernels.tiles import TILE
from asp_dist.pruning.passes import HostPasses


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CONTROLS)
def test_it_follows_the_form_of_the_cpu(name: str) -> None:
    """In float64, to 1e-7: `track` finds its root to 1e-9 of the density, by another sequence of evaluations."""
    host, device = (train(name, torch.float64, on_device=on_device) for on_device in (False, True))
    for one, other in zip(host.thresholds, device.thresholds):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-7)
    assert device.losses == pytest.approx(host.losses, abs=1e-7)
    assert host.pruner.frozen == device.pruner.frozen == (CONTROLS[name].get("ramp") is RAMP)
    summaries = [one.pruner.snapshot().summary() for one in (host, device)]
    assert summaries[0]["nonzero_weights"] == summaries[1]["nonzero_weights"]


@pytest.mark.parametrize("name", CONTROLS)
def test_a_resumed_training_is_bit_for_bit_the_same(name: str) -> None:
    whole = train(name, torch.float32, on_device=True)
    for stop in (1, 12, 28):  # before the ramp, on it, frozen
        first = train(name, torch.float32, on_device=True, steps=stop)
        states = copy.deepcopy([first.model.state_dict(), first.pruner.optimizers[0].state_dict(), first.pruner.state_dict()])
        model, optimizer, pruner = build(name, torch.float32, on_device=True)
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        pruner.load_state_dict(states[2])
        resumed = train(name, torch.float32, on_device=True, start=(model, optimizer, pruner), first=stop)
        assert all(torch.equal(a, b) for a, b in zip(whole.thresholds[stop:], resumed.thresholds))
        for key, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[key]), key


@pytest.mark.parametrize("name", ["loss, published", "track"])
def test_a_step_that_the_optimizer_skips_changes_nothing(name: str) -> None:
    model, _, pruner = build(name, torch.float32, on_device=True)
    fused = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    pruner.remove()
    with on_the_device():
        pruner = Pruner(model, fused, **{"input_shape": (3, 8, 8), **CONTROLS[name]})
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        bad = step in (5, 9)
        before = copy.deepcopy((model.state_dict(), pruner.state_dict()))
        scaled: Any = fused  # as a gradient scaler leaves it
        scaled.grad_scale, scaled.found_inf = torch.tensor(1.0), torch.tensor(float(bad))
        fused.step()
        after = model.state_dict(), pruner.state_dict()
        same = all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values()))
        assert same == bad
        if bad:
            for key in ("thresholds", "sigmas", "dense", "controller", "density_model"):
                torch.testing.assert_close(after[1][key], before[1][key], rtol=0, atol=0, equal_nan=True)
    pruner.snapshot()
    assert pruner.skipped == 2


def test_a_controller_of_ones_own_stays_on_the_cpu() -> None:
    """What it decides by a value, or by the step's number, could not be recorded."""

    class Mine(TrackController):
        pass

    class MyTrack(Track):
        def controller(self, problem: Problem) -> Controller:
            return Mine(self, problem)

    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 40))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with on_the_device():
        pruners = [Pruner(model, optimizer, Budget.parameters(density=0.2), control=one) for one in (MyTrack(), Track())]
    assert [type(pruner.passes) for pruner in pruners] == [HostPasses, DevicePasses]


def network(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=1000)


def engine(model: nn.Module, control: Any, *, frozen: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A fused SGD with the engine's device form at its 30th step, and its FakeTensorMode: all on a fake CUDA device."""
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    ramp = Ramp("cubic", 0.0, 0.5, freeze_at=0.75, total_steps=100)
    operator = Hard() if isinstance(control, SparsityLoss) else Power()
    with on_the_device():
        pruner = Pruner(model, optimizer, Budget.parameters(sparsity=0.9), control=control, operator=operator, ramp=ramp)
    pruner.steps = 30
    if frozen:
        pruner.finalize()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer, as_fake_cuda(model, optimizer, pruner)


@pytest.fixture
def fake_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors know neither pinned memory nor fused optimizers."""
    monkeypatch.setattr(device_control, "to_device", lambda values, device: values.to(device))
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *tensors, **options: None)


def launches(optimizer: Any, mode: Any) -> list[str]:
    """What one step launches, without the optimizer's own; with the flag of a trainer that decides late."""
    with mode:
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device="cuda")
    with warnings.catch_warnings(), mode, Launches() as seen:
        warnings.simplefilter("ignore", UserWarning)  # a fake tensor has no address
        optimizer.step()
    return [name for name in seen.names if not name.startswith("_foreach")]


CONTROL = {"loss": SparsityLoss(), "track": Track(), "loss, measured": SparsityLoss(density="measured", multiplier=True)}


@pytest.mark.usefixtures("fake_upload")
@pytest.mark.parametrize(
    ("name", "control"),
    [("resnet50", "loss"), ("resnet50", "track"), ("deit_small_patch16_224", "loss"), ("convnext_tiny", "track")],
)
def test_launches_per_step(name: str, control: str) -> None:
    """Counted on fake CUDA tensors: each of the engine's operators is one launch of a kernel, and one copy sends the rates."""
    model = network(name)
    found = launches(*engine(model, CONTROL[control]))
    print(name, control, found)
    assert found == ["threshold_products", "layer_moments", "combine_tiles", "_to_copy", "run_program", "write_layers"]
    if name != "resnet50":
        assert launches(*engine(network(name), CONTROL[control], frozen=True)) == ["clear_removed", "clear_removed", "add_"]


@pytest.mark.usefixtures("fake_upload")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("control", CONTROL)
def test_the_control_reads_nothing_from_the_device(control: str, dtype: torch.dtype) -> None:
    """The program's operations, one by one on fake CUDA tensors: a read, or a tensor of the CPU, would raise an error."""
    optimizer, mode = engine(timm.create_model("resnet18"), CONTROL[control], dtype=dtype)
    hooks = next(iter(optimizer._optimizer_step_post_hooks.values())).__self__
    moving = hooks.after.__self__._device_control
    with mode:
        inputs = [moving.passes.packed, torch.zeros(5, len(moving.passes.layers), dtype=torch.float64, device="cuda")]
        outputs = moving.compute(*inputs, moving._zero, moving.skips, *moving._changing())
    assert {(one.device.type, one.dtype) for one in outputs} == {("cuda", torch.float64)}


@pytest.mark.usefixtures("fake_upload")
def test_a_read_in_the_control_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    learn = TrackController._learn

    def reads(self: TrackController, thresholds: Tensor, rate: Tensor) -> None:
        if thresholds.sum().item() > 0:
            learn(self, thresholds, rate)

    monkeypatch.setattr(TrackController, "_learn", reads)
    with pytest.raises(DataDependentOutputException):
        test_the_control_reads_nothing_from_the_device("track", torch.float32)


def test_bytes_per_step() -> None:
    """From the kernels' arguments: gradients and weights read for the products, weights for the moments, read and written."""
    model = network("resnet50")
    with on_the_device():
        pruner = Pruner(model, torch.optim.SGD(model.parameters(), lr=0.1), Budget.parameters(sparsity=0.9), control=Track())
    weights = sum(layer.dense.nbytes for layer in pruner.layers)
    tables = pruner.passes.tiles.layer.numel() * (4 + 8) * 4 + pruner.passes.tiles.partials.nbytes * 2  # type: ignore[union-attr]
    moved = {"products": 2 * weights, "moments": weights, "write": 2 * weights, "tables and sums": tables}
    centered = weights
    total = sum(moved.values())
    print({key: f"{value / 1e6:.1f} MB" for key, value in moved.items()}, f"centered: {centered / 1e6:.1f} MB more")
    for bandwidth in (2.0e12, 3.3e12):
        print(f"estimate at {bandwidth / 1e12} TB/s: {total / bandwidth * 1e3:.2f} ms, not measured")
    assert len(pruner.passes.tiles.layer) < 2 * weights / 4 / TILE  # type: ignore[union-attr]
    assert total <= 0.6e9

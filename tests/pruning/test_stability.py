"""What differs at full size and must do no harm: a warm-up, other initializations, trained weights, other optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from pruning_helpers import small_network
from sklearn.datasets import load_digits
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from asp_dist.pruning import Budget, Power, Pruner, Ramp, Select, Track
from asp_dist.pruning.control.track import MAX_ALPHA


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def convolutions(*, norms: bool, normal: bool) -> nn.Sequential:
    """Five prunable layers for images of 12 pixels; with torch's default initialization, which is uniform, or a normal one."""
    torch.manual_seed(0)

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if norms else nn.Identity()

    network = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), norm(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1, stride=2), norm(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, stride=2), norm(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
    )
    for module in network.modules() if normal else ():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def batches(count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random images of a fixed set of 256 with random labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(256, 3, 12, 12, generator=generator)
    labels = torch.randint(0, 10, (256,), generator=generator)
    for _ in range(count):
        index = torch.randint(0, 256, (size,), generator=generator)
        yield images[index], labels[index]


def masks(pruner: Pruner) -> list[Tensor]:
    return [info.parameter.detach() != 0 for info in pruner.pruned_weights]


def share(parts: list[Tensor]) -> float:
    """Share of ones over all layers."""
    return sum(int(part.sum()) for part in parts) / sum(part.numel() for part in parts)


def warmed_up_by_timm(optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=20,
        warmup_epochs=1,
        warmup_lr=1e-5,
        step_on_epochs=False,
        updates_per_epoch=steps // 20,
    )
    return lambda step: scheduler.step_update(step)


def one_cycle(optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps + 1, pct_start=0.1)
    return lambda step: scheduler.step() if step else None


def warmed_up_by_hand(optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    def set_rate(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, (step + 1e-4) / 6)

    return set_rate


def train_with(schedule: Any, rate: float) -> tuple[Pruner, list[Tensor], float]:
    """The pruner, the allocation after each step, and the mean loss between the ramp and the freeze."""
    network, steps = convolutions(norms=True, normal=True), 120
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    set_rate = schedule(optimizer, steps)
    pruner = Pruner(
        network,
        optimizer,
        Budget.parameters(sparsity=0.9),
        control=Track(rate=rate),
        operator=Power(),
        select=Select(min_weights=500),
        ramp=Ramp("cubic", 0.05, 0.5, freeze_at=0.75, total_steps=steps),
    )
    controller: Any = pruner.controller
    allocations, losses = [controller.alpha.clone()], []
    for step, (images, labels) in enumerate(batches(89, 32)):
        set_rate(step)
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        allocations.append(controller.alpha.clone())
        losses.append(loss.item())
    return pruner, allocations, sum(losses[60:]) / len(losses[60:])


@pytest.mark.parametrize("schedule", [warmed_up_by_timm, one_cycle, warmed_up_by_hand])
def test_the_learned_allocation_follows_the_schedules_peak_not_its_warm_up(schedule: Any) -> None:
    rate = 0.003
    pruner, allocations, loss = train_with(schedule, rate)
    _, _, loss_without = train_with(schedule, 0.0)
    controller: Any = pruner.controller
    largest = torch.stack(allocations).diff(dim=0).abs().max().item()
    print(f"largest move {largest:.4f}; mean loss after the ramp {loss:.3f}, with a fixed allocation {loss_without:.3f}")
    assert 0.0 < largest <= 3 * rate + 1e-12  # three standard deviations
    assert float(controller.alpha.abs().max()) < MAX_ALPHA
    assert loss <= loss_without + 0.2  # chance is 2.303


def test_uniform_weights_are_held_at_the_budget() -> None:
    network, steps, density = convolutions(norms=False, normal=False), 200, 0.1
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    ramp = Ramp("cubic", 0.05, 0.5, freeze_at=0.75, total_steps=steps)
    budget = Budget.parameters(density=density)
    pruner = Pruner(network, optimizer, budget, control=Track(), select=Select(min_weights=500), ramp=ramp)
    errors, flips, before = [], [], masks(pruner)
    for images, labels in batches(149, 8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        now = masks(pruner)
        errors.append(abs(share(now) - density))
        flips.append(share([a != b for a, b in zip(now, before)]))
        before = now
    print(f"off by at most {max(errors[100:]):.4f}, at most {max(flips[100:]):.2%} of the mask's bits flipped in a step")
    assert max(errors[100:]) <= 0.002
    assert max(flips[100:]) <= 0.01
    assert min(float(mask.double().mean()) for mask in before) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.75, 0.9])
@pytest.mark.parametrize("name", ["mobilenetv3_large_100", "efficientnet_b0", "resnet50", "regnety_032"])
def test_no_layer_of_a_fresh_network_oscillates(name: str, sparsity: float) -> None:
    """Held still at their initialization; most of these classifiers are uniform, and end below the largest threshold."""
    torch.manual_seed(0)
    network, steps = timm.create_model(name), 80
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    budget, ramp = Budget.parameters(sparsity=sparsity), Ramp("cubic", 0.0, 0.5, total_steps=steps)
    pruner = Pruner(network, optimizer, budget, control=Track(rate=0.0), ramp=ramp)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    totals, layers = [], []
    for step in range(steps):
        optimizer.step()
        if step >= steps // 2:
            counts = torch.tensor([float(mask.sum()) for mask in masks(pruner)], dtype=torch.float64)
            totals.append(float(counts.sum() / pruner.numel.sum()))
            layers.append(counts / pruner.numel)
    swing = torch.stack(layers).amax(dim=0) - torch.stack(layers).amin(dim=0)
    print(f"off by at most {max(abs(t - 1 + sparsity) for t in totals):.5f}, a layer's swing {float(swing.max()):.4f}")
    assert max(abs(total - (1.0 - sparsity)) for total in totals) <= 0.002
    assert float(swing.max()) <= 0.01
    assert float(torch.stack(layers).min()) > 0.0


class NestedSGD(torch.optim.SGD):
    """An optimizer of the user's own, on top of torch's, which has taken the place of `SGD.step` with hooks before."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class FailingSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise MemoryError("no memory for the step")


def one_step(network: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    images, labels = next(batches(1, 8))
    nn.functional.cross_entropy(network(images[:, :, :6, :6]), labels).backward()
    optimizer.step()


def test_an_optimizer_that_calls_its_base_class_takes_one_step() -> None:
    results = []
    for kind in (torch.optim.SGD, NestedSGD):
        network = small_network(dtype=torch.float32)
        optimizer = kind(network.parameters(), lr=0.1, momentum=0.9)
        pruner = Pruner(network, optimizer, Budget.parameters(sparsity=0.5), control=Track())
        for _ in range(5):
            one_step(network, optimizer)
        assert pruner.steps == 5
        results.append(network.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_step_that_failed_is_named_at_the_next_one() -> None:
    network = small_network(dtype=torch.float32)
    optimizer = FailingSGD(network.parameters(), lr=0.1)
    Pruner(network, optimizer, Budget.parameters(sparsity=0.5))
    with pytest.raises(MemoryError):
        one_step(network, optimizer)
    with pytest.raises(RuntimeError, match="the last step of FailingSGD raised an error"):
        one_step(network, optimizer)


def test_layers_that_the_optimizer_does_not_train_are_refused_by_name() -> None:
    network = small_network(dtype=torch.float32)
    matrices = [parameter for name, parameter in network.named_parameters() if name == "2.weight"]
    optimizer = torch.optim.SGD(matrices, lr=0.1)
    budget = Budget.parameters(sparsity=0.5)
    with pytest.raises(ValueError, match=r"does not train 1 of the 2 layers to prune \('5'\)"):
        Pruner(network, optimizer, budget)
    Pruner(network, optimizer, budget, select=Select(exclude=("5",)))
    network[5].requires_grad_(False)
    Pruner(network, optimizer, budget)


def first_moves(*lr: float | Tensor) -> list[float]:
    """How far the first step moves the thresholds of two layers with learning rates of their own."""
    network = small_network(dtype=torch.float32)
    groups: list[dict[str, Any]] = [
        {"params": layer.parameters(), "lr": rate} for layer, rate in zip((network[2], network[5]), lr)
    ]
    rest = [p for name, p in network.named_parameters() if name.split(".")[0] not in ("2", "5")]
    optimizer = torch.optim.SGD([*groups, {"params": rest}], lr=0.1)
    pruner = Pruner(network, optimizer, Budget.parameters(sparsity=0.5))
    before = pruner.thresholds.clone()
    one_step(network, optimizer)
    return [float(move) for move in pruner.thresholds - before]


def test_a_threshold_follows_the_learning_rate_of_its_own_layer() -> None:
    """As under layer decay; in a frozen group it stays, and a rate may be a tensor."""
    same, unlike = first_moves(0.1, 0.1), first_moves(torch.tensor(0.2), 0.0)
    assert unlike[0] == pytest.approx(2.0 * same[0], rel=1e-6) and same[0] != 0.0
    assert unlike[1] == 0.0 and same[1] != 0.0


def digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 8.0 - 1.0
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].repeat(1, 3, 1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3), torch.from_numpy(labels)[order]


def test_building_a_pruner_leaves_a_trained_network_as_good_as_it_was() -> None:
    """The published method subtracts each layer's mean; that of trained weights belongs to what they have learned."""
    torch.manual_seed(0)
    network = convolutions(norms=True, normal=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    images, labels = digits()
    for _ in range(200):
        index = torch.randint(0, 1400, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
        optimizer.step()

    def accuracy() -> float:
        network.eval()
        with torch.no_grad():
            right = (network(images[1400:]).argmax(dim=1) == labels[1400:]).double().mean().item()
        network.train()
        return right

    before = accuracy()
    ramp = Ramp("cubic", 0.0, 0.5, total_steps=100)
    pruner = Pruner(network, optimizer, Budget.parameters(sparsity=0.9), select=Select(min_weights=500), ramp=ramp)
    after = accuracy()
    print(f"top-1 {before:.2%} before, {after:.2%} after")
    assert before > 0.9
    assert after >= before - 0.005
    # And the run goes on like that after a restart, whose Pruner is built on a fresh network.
    state, fresh = pruner.state_dict(), convolutions(norms=True, normal=True)
    again = Pruner(
        fresh,
        torch.optim.SGD(fresh.parameters(), lr=0.05),
        Budget.parameters(sparsity=0.9),
        select=Select(min_weights=500),
        ramp=ramp,
    )
    assert again.center
    again.load_state_dict(state)
    assert not again.center

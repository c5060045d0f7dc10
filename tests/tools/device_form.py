"""Short trainings with the pruner as it is on a GPU, numbers on the device and one pass for all layers, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from asp_dist.pruning import Budget, Hard, Power, Pruner, Ramp, Select, Soft, SparsityLoss, Track, pruner
from asp_dist.pruning.kernels.device_passes import DevicePasses

STEPS = 30
RAMP = Ramp("cubic", 0.1, 0.6, freeze_at=0.9, total_steps=STEPS)
TWO = [Budget.parameters(density=0.1), Budget.macs(density=0.15, bound="at_most")]
# Every way through the controls: published and derived moves, one network and each layer, one budget and two.
CONTROLS: dict[str, dict[str, Any]] = {
    "loss, published": {"control": SparsityLoss(), "budget": Budget.parameters(sparsity=0.8)},
    "loss, multiplier": {
        "control": SparsityLoss(multiplier=True),
        "budget": Budget.parameters(sparsity=0.8),
        "operator": Soft(),
    },
    "loss, two budgets": {"control": SparsityLoss(density="measured", multiplier=True), "budget": TWO, "ramp": RAMP},
    "loss, each layer": {
        "control": SparsityLoss(density="measured", multiplier=True),
        "budget": Budget.parameters(density=0.2, scope="layer", bound="at_most"),
        "operator": Soft(),
        "ramp": RAMP,
    },
    "track": {"control": Track(), "budget": Budget.parameters(sparsity=0.9), "operator": Power(), "ramp": RAMP},
    "track, two budgets": {
        "control": Track(allocation="erk", rate=0.01),
        "budget": TWO,
        "operator": Power(2.0),
        "ramp": RAMP,
        "gradient_scale": 0.5,
    },
    "track, each layer": {
        "control": Track(allocation="uniform"),
        "budget": Budget.parameters(density=0.2, scope="layer"),
        "ramp": RAMP,
    },
}


@contextmanager
def on_the_device() -> Iterator[None]:
    """Pruners that are built here work as on a GPU."""
    with patch.object(pruner, "runs_on_device", lambda device: True):
        yield


@dataclass(frozen=True)
class Training:
    """A short training.

    Attributes:
        pruner: the pruner after it.
        model: the model after it.
        thresholds: those after each step, on the CPU.
        losses: the loss before each step.
    """

    pruner: Pruner
    model: nn.Module
    thresholds: list[Tensor]
    losses: list[float]


def build(name: str, dtype: torch.dtype, *, on_device: bool, **optimizer: Any) -> tuple[nn.Module, torch.optim.SGD, Pruner]:
    """A small convolutional network with a pruner of the control `name`, see `CONTROLS`."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 9, 40), nn.ReLU(), nn.Linear(40, 10),
    ).to(dtype)  # fmt: skip
    sgd = torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "nesterov": True, **optimizer})
    options = {"operator": Hard(), "select": Select(min_weights=100), "input_shape": (3, 8, 8), **CONTROLS[name]}
    if on_device:
        with on_the_device():
            built = Pruner(model, sgd, **options)
        assert isinstance(built.passes, DevicePasses)
    else:
        built = Pruner(model, sgd, **options)
    return model, sgd, built


def train(
    name: str,
    dtype: torch.dtype,
    *,
    on_device: bool,
    steps: int = STEPS,
    start: tuple[nn.Module, torch.optim.SGD, Pruner] | None = None,
    first: int = 0,
) -> Training:
    """Train on noise: steps `first` to `steps`, from the start or from what `start` has."""
    model, optimizer, built = start or build(name, dtype, on_device=on_device)
    thresholds, losses = [], []
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(16, 3, 8, 8, generator=generator).to(dtype)
        labels = torch.randint(10, (16,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        thresholds.append(built.thresholds.cpu().clone())
        losses.append(loss.item())
    return Training(built, model, thresholds, losses)

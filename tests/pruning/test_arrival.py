"""The budget is reached in time: a ResNet-20 on CIFAR-10 images, 400 steps from scratch, at four targets."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import asp_dist.models  # noqa: F401  (registers cifar_resnet20)
from asp_dist.pruning import Budget, Control, Pruner, Ramp, SparsityLoss, Track

STEPS, BATCH, EVERY = 400, 8, 50
ARRIVAL, FREEZE = 200, 300
TARGETS = (0.5, 0.9, 0.95, 0.99)

LOSS, TRACK = SparsityLoss(density="measured", multiplier=True), Track()

pytestmark = pytest.mark.slow


def archive() -> Path | None:
    roots = [os.environ.get("ASP_DIST_DATA"), Path(__file__).parents[3] / "shared" / "data"]
    files = [Path(root) / "cifar10-jpeg.tar.xz" for root in roots if root]
    return next((file for file in files if file.is_file()), None)


@cache
def images() -> tuple[Tensor, Tensor]:
    """Every fiftieth training image of the archive (1,000), normalized, and its label, by folder."""
    file = archive()
    if file is None:
        pytest.skip("no cifar10-jpeg.tar.xz: set ASP_DIST_DATA")
    pixels, folders = [], []
    with tarfile.open(file, "r|xz") as tar:
        members = (member for member in tar if member.name.startswith("train/") and member.isfile())
        for index, member in enumerate(members):
            if index % EVERY == 0:
                stream = tar.extractfile(member)
                assert stream is not None
                pixels.append(np.asarray(Image.open(io.BytesIO(stream.read())).convert("RGB")))
                folders.append(Path(member.name).parent.name)
    classes = {name: index for index, name in enumerate(sorted(set(folders)))}
    values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float()
    return (values - 120.0) / 64.0, torch.tensor([classes[name] for name in folders])


def training(budget: Any, **options: Any) -> Iterator[Pruner]:
    """Trains, and hands out the pruner after every step."""
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    ramp = Ramp("cubic", end=ARRIVAL / STEPS, freeze_at=FREEZE / STEPS, total_steps=STEPS)
    pruner = Pruner(model, optimizer, budget, ramp=ramp, input_shape=(3, 32, 32), **options)
    pixels, labels = images()
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        index = torch.randint(0, len(pixels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(pixels[index]), labels[index]).backward()
        optimizer.step()
        schedule.step()
        yield pruner


def measured(pruner: Pruner) -> float:
    zeros = sum(int((info.parameter == 0).sum()) for info in pruner.pruned_weights)
    return zeros / sum(info.numel for info in pruner.pruned_weights)


@pytest.mark.parametrize("sparsity", TARGETS)
def test_track_holds_the_budget_from_the_ramps_end_on(sparsity: float) -> None:
    errors, kept = [], set()
    for pruner in training(Budget.parameters(sparsity=sparsity), control=TRACK):
        if pruner.frozen:
            kept.add(pruner.snapshot().summary()["nonzero_weights"] - int(pruner.budgets[0].allowed))
        elif pruner.steps >= ARRIVAL:
            errors.append(measured(pruner) - sparsity)
    assert len(errors) == FREEZE - ARRIVAL
    assert max(abs(error) for error in errors) <= 0.002
    assert kept == {0}


@pytest.mark.parametrize("sparsity", TARGETS)
def test_loss_with_its_options_arrives_before_the_freeze(sparsity: float) -> None:
    last, kept = 0.0, set()
    budget = Budget.parameters(sparsity=sparsity)
    for pruner in training(budget, control=LOSS):
        if pruner.frozen:
            kept.add(pruner.snapshot().summary()["nonzero_weights"] - int(pruner.budgets[0].allowed))
        else:
            last = measured(pruner)
    assert abs(last - sparsity) <= 0.01
    assert kept == {0}


@pytest.mark.parametrize(("control", "sparsity"), [(TRACK, 0.9), (TRACK, 0.99), (LOSS, 0.9)])
def test_a_multiply_adds_budget_is_met_in_time_and_then_within_a_channels_cost(control: Control, sparsity: float) -> None:
    errors, slacks = [], []
    for pruner in training(Budget.macs(sparsity=sparsity), control=control):
        (limit,) = pruner.budgets
        kept = torch.tensor([float((info.parameter != 0).sum()) for info in pruner.pruned_weights], dtype=torch.float64)
        left = float((limit.per_weight * kept).sum())
        if pruner.frozen:
            slacks.append(float(limit.allowed) - left)
        elif pruner.steps >= ARRIVAL:
            prunable = float((limit.per_weight * pruner.numel).sum())
            errors.append(1.0 - left / prunable - sparsity)
    channel = min(
        per_weight * info.numel / info.parameter.shape[0]
        for per_weight, info in zip(limit.per_weight.tolist(), pruner.pruned_weights)
    )
    assert len(errors) == FREEZE - ARRIVAL
    print(f"{control}: {max(map(abs, errors)):.5f} at worst, {errors[-1]:+.5f} at the freeze, {max(slacks):.0f} MACs free")
    if control == TRACK:
        assert max(abs(error) for error in errors) <= 0.002
    assert abs(errors[-1]) <= 0.01
    assert len(slacks) == STEPS - FREEZE + 1
    assert min(slacks) >= 0.0 and max(slacks) < channel

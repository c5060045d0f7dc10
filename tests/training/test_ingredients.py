"""What recipes take from timm: the same objects with the same parameters, by field of the configuration."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from small_runs import small_config, with_changes
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2

from asp_dist.config import Config
from asp_dist.tracking import read_rows
from asp_dist.training import trainer
from asp_dist.training.build import build_loss, build_mixup, build_optimizer
from asp_dist.training.hooks import Stopped
from asp_dist.training.run import Run
from asp_dist.training.trainer import train
from asp_dist.training.world import World


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("mixed", [False, True])
def test_binary_cross_entropy_is_timms(threshold: float | None, mixed: bool) -> None:
    """As timm's train.py builds it: with mixup, the targets come smoothed."""
    config = with_changes(
        Config(),
        training__loss="bce",
        training__bce_threshold=threshold,
        training__label_smoothing=0.1,
        data__augment__mixup=0.8 if mixed else 0.0,
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator)
    targets = torch.rand(6, 5, generator=generator) if mixed else torch.randint(5, (6,), generator=generator)
    theirs = BinaryCrossEntropy(target_threshold=threshold) if mixed else BinaryCrossEntropy(0.1, target_threshold=threshold)
    assert build_loss(config)(logits, targets) == theirs(logits, targets)


def test_mixup_is_timms_with_its_probabilities() -> None:
    config = with_changes(
        Config(),
        data__augment__mixup=0.8,
        data__augment__cutmix=1.0,
        data__augment__mixup_prob=0.6,
        data__augment__mixup_switch_prob=0.3,
        training__label_smoothing=0.1,
    )
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.6, switch_prob=0.3, label_smoothing=0.1, num_classes=4)
    ours = build_mixup(config, 4)
    assert ours is not None
    images, targets = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    for seed in range(5):
        results = []
        for mixup in (ours, theirs):
            np.random.seed(seed)
            results.append(mixup(images.clone(), targets))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_rates_by_layer_are_timms() -> None:
    config = with_changes(Config(), optimizer__name="adamw", optimizer__layer_decay=0.75, optimizer__lr=0.01)
    model = timm.create_model("test_vit", num_classes=5)
    theirs = create_optimizer_v2(model, opt="adamw", lr=0.01, weight_decay=5e-4, layer_decay=0.75)
    ours = build_optimizer(config.optimizer, model)

    def rates(optimizer: torch.optim.Optimizer) -> dict[int, tuple[float, float]]:
        return {
            id(parameter): (group["lr_scale"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    assert rates(ours) == rates(theirs)
    assert len({scale for scale, _ in rates(ours).values()}) > 2


def test_mixup_ends_with_its_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed: dict[int, set[bool]] = {}
    step = trainer.forward_backward

    def look(run: Run, images: torch.Tensor, targets: torch.Tensor, **more: Any) -> torch.Tensor:
        assert run.mixup is not None
        mixed.setdefault(run.step // run.steps_per_epoch, set()).add(run.mixup.mixup_enabled)
        return step(run, images, targets, **more)

    monkeypatch.setattr(trainer, "forward_backward", look)
    train(small_config(tmp_path, data__augment__mixup=0.5, data__augment__mixup_off_epoch=2), World())
    assert mixed == {0: {True}, 1: {True}, 2: {False}}


def test_a_run_stops_at_its_time_limit_and_goes_on(tmp_path: Path) -> None:
    config = small_config(tmp_path, schedule__epochs=100000, training__max_minutes=1.0 / 60, training__log_every=1)
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(Stopped, match="stopped by its time limit after step"):
            train(config, World())
    assert time.monotonic() - began >= 2.0
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 2

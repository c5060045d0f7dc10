"""What recipes take from timm: the same objects with the same parameters, by field of the configuration."""

from __future__ import annotations

import copy
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from small_runs import small_config, with_changes
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad

from asp_dist.config import Config
from asp_dist.errors import UserError
from asp_dist.pruning import Ramp
from asp_dist.tracking import read_rows
from asp_dist.training import trainer
from asp_dist.training.build import build_erasing, build_loss, build_mixup, build_optimizer, scaled
from asp_dist.training.hooks import Stopped
from asp_dist.training.preflight import preflight
from asp_dist.training.run import Run, build_average
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


@pytest.mark.parametrize(
    ("name", "expected"), [("sgd", 0.1 * 64 / 256), ("adamw", 0.1 * (64 / 256) ** 0.5), ("lamb", 0.05), ("rmsproptf", 0.025)]
)
def test_the_rate_is_scaled_to_the_batch_as_timm_does(name: str, expected: float) -> None:
    """timm's train.py: with the root where the optimizer's name contains ``ada`` or ``lamb``."""
    config = with_changes(Config(), optimizer__name=name, optimizer__lr_base_size=256, data__batch_size=64)
    assert scaled(config).lr == pytest.approx(expected)
    assert scaled(with_changes(config, optimizer__lr_base_size=None)).lr == 0.1


@pytest.mark.parametrize(("mode", "clip"), [("value", 0.01), ("agc", 0.02), ("norm", 0.1)])
def test_gradients_are_clipped_as_timm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, clip: float) -> None:
    seen: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    take_step = trainer.take_step

    def look(run: Run, norm: torch.Tensor) -> None:
        ours = run.model
        theirs = copy.deepcopy(ours)
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            assert mine.grad is not None
            other.grad = mine.grad.clone()
        head = model_parameters(theirs, exclude_head=mode == "agc")
        dispatch_clip_grad(head, clip, mode=mode)
        take_step(run, norm)
        seen.append(([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()]))  # type: ignore[misc]

    monkeypatch.setattr(trainer, "take_step", look)
    options: dict[str, Any] = {"optimizer__clip_grad": clip, "optimizer__clip_mode": mode, "training__max_steps": 2}
    train(small_config(tmp_path, pruning__enabled=False, **options), World())
    assert len(seen) == 2
    for ours, theirs in seen:
        assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(ours, theirs, strict=True))


def test_the_average_is_timms_with_its_warm_up_and_start() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    for warmup, start in ((True, 0), (False, 0), (False, 2), (True, 3)):
        training = with_changes(
            Config(), training__ema_decay=0.9, training__ema_warmup=warmup, training__ema_start=start
        ).training
        ours = build_average(training, model)
        theirs = ModelEmaV3(model, decay=0.9, use_warmup=warmup, update_after_step=start)
        assert ours is not None
        for step in range(1, 6):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1)
            ours.update(model, step)
            theirs.update(model, step)
            pairs = zip(ours.module.parameters(), theirs.module.parameters())
            assert all(torch.equal(a, b) for a, b in pairs), (warmup, start, step)


@pytest.mark.parametrize(("mode", "count"), [("pixel", 1), ("rand", 1), ("const", 3)])
def test_erasing_is_timms_where_dali_has_it_not(mode: str, count: int) -> None:
    fields: dict[str, Any] = {
        "data__augment__erase": 0.7,
        "data__augment__erase_mode": mode,
        "data__augment__erase_count": count,
    }
    ours = build_erasing(with_changes(Config(), **fields), torch.device("cpu"))
    theirs = RandomErasing(0.7, mode=mode, max_count=count, device="cpu")
    assert ours is not None
    results = []
    for erasing in (ours, theirs):
        random.seed(3)
        torch.manual_seed(3)
        results.append(erasing(torch.ones(8, 3, 16, 16)))
    assert torch.equal(*results) and not results[0].eq(1).all()
    assert build_erasing(with_changes(Config(), data__augment__erase=0.7), torch.device("cpu")) is None, "DALI erases"


def test_gradient_checkpointing_computes_the_same_and_is_refused_where_there_is_none(tmp_path: Path) -> None:
    results = []
    for number, enabled in enumerate((False, True)):
        changes: dict[str, Any] = {"training__grad_checkpointing": enabled, "training__max_steps": 2, "model__kwargs": {}}
        config = small_config(tmp_path, f"run{number}", model__name="test_vit", data__input_size=160, **changes)
        train(config, World())
        results.append(load_file(tmp_path / f"run{number}" / "model.safetensors"))
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-6) for name in results[0])
    with pytest.raises(UserError, match=r"training\.grad_checkpointing"):
        preflight(small_config(tmp_path, "no", training__grad_checkpointing=True, model__name="alexnet", data__input_size=64))


def test_a_run_ends_when_nothing_gets_better(tmp_path: Path) -> None:
    ramp = Ramp("linear", 0.0, 0.2, freeze_at=0.25)
    fields: dict[str, Any] = {"schedule__epochs": 40, "optimizer__lr": 1e-7, "training__patience": 3, "pruning__ramp": ramp}
    summary = train(small_config(tmp_path, pruning__control="track", **fields), World())
    best = summary["best"]["step"]
    assert summary["steps"] == best + 3 * 4 < 160
    assert summary["nonzero_weights"] == round(summary["prunable_weights"] * 0.1)
    messages = [
        row.get("message", "") for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row.get("event") == "early stop"
    ]
    assert messages == [f"no better validation for 3 epochs: the run ends after step {summary['steps']}"]
    again = train(small_config(tmp_path, pruning__control="track", **fields), World())
    assert again == summary

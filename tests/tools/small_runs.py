"""Runs small enough for tests, and hooks that stop them."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

from asp_dist.config import (
    AugmentConfig,
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from asp_dist.training.hooks import Hooks, SignalHooks


def small_config(folder: Path, name: str = "run", **changes: Any) -> Config:
    """ResNet-20 on synthetic images of 8 pixels: 3 epochs of 4 steps; `changes` are dotted names with ``__`` for the dot."""
    config = Config(
        name=name,
        model=ModelConfig(name="cifar_resnet20"),
        data=DataConfig(
            backend="synthetic", synthetic_samples=(64, 30), synthetic_classes=4, batch_size=16, input_size=8, threads=1
        ),
        schedule=ScheduleConfig(epochs=3),
        training=TrainingConfig(device="cpu", log_every=2),
        tracking=TrackingConfig(wandb="disabled"),
        cluster=ClusterConfig(mode="local"),
        output=OutputConfig(dir=str(folder)),
    )
    return with_changes(config, **changes)


def digits_config(folder: Path, root: Path, name: str = "run", **changes: Any) -> Config:
    """ResNet-20 on the handwritten digits through DALI, with augmentation, an average of the weights and dropout."""
    config = small_config(folder, name)
    config = dataclasses.replace(
        config,
        data=DataConfig(
            root=str(root),
            batch_size=128,
            input_size=8,
            threads=1,
            augment=AugmentConfig(scale=(0.7, 1.0), hflip=0.0, mixup=0.2),
        ),
        training=TrainingConfig(device="cpu", log_every=3, ema_decay=0.9),
    )
    return with_changes(config, **changes)


def with_changes(config: Config, **changes: Any) -> Config:
    """`config` with fields replaced, as in ``data__batch_size=32``."""

    def replaced(part: Any, path: list[str], value: Any) -> Any:
        name, *rest = path
        return dataclasses.replace(part, **{name: replaced(getattr(part, name), rest, value) if rest else value})

    for name, value in changes.items():
        config = replaced(config, name.split("__"), value)
    return config


class StopAt(Hooks):
    """Asks to stop at the n-th step of this process."""

    def __init__(self, step: int, reason: str = "SIGTERM") -> None:
        self.left = step
        self.reason = reason
        self.reports: list[dict[str, Any]] = []

    def report(self, metrics: dict[str, Any]) -> None:
        self.reports.append(metrics)

    def stop_requested(self) -> str | None:
        self.left -= 1
        return self.reason if self.left <= 0 else None


class SignalAt(SignalHooks):
    """Sends this process a real signal at its n-th step."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__()
        self.left = step
        self.number = number

    def stop_requested(self) -> str | None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().stop_requested()

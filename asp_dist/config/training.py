"""The optimizer, its schedule and the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from asp_dist.config.checks import check, check_fraction, check_positive


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, by its name in timm's registry (``sgd`` is Nesterov SGD, ``momentum`` is not).

    Args:
        name: any of ``timm.optim.list_optimizers()``.
        lr: learning rate at the start of the schedule, after warm-up.
        weight_decay: weight decay; timm keeps it off biases and norms.
        momentum: momentum, or the first beta.
        kwargs: further arguments of the optimizer.
        clip_grad: largest gradient norm; None: no clipping.
    """

    name: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9
    kwargs: dict[str, Any] = field(default_factory=dict)
    clip_grad: float | None = None

    def __post_init__(self) -> None:
        check(self.lr > 0, f"optimizer.lr = {self.lr} must be greater than 0")
        check_positive("optimizer.clip_grad", self.clip_grad)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate's schedule, by its name in timm (``cosine``, ``step``, ``multistep``, ``poly``, ...).

    Args:
        name: timm scheduler name.
        epochs: length of the training in epochs.
        warmup_epochs: epochs of linear warm-up, inside `epochs`.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end.
        decay_epochs: epochs between decays, or the milestones of ``multistep``.
        decay_rate: factor at each decay.
    """

    name: str = "cosine"
    epochs: int = 12
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_epochs: tuple[float, ...] = (30.0,)
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        check(self.epochs >= 1, f"schedule.epochs = {self.epochs} must be at least 1")
        check(
            0 <= self.warmup_epochs < self.epochs,
            f"schedule.warmup_epochs = {self.warmup_epochs} must lie in [0, schedule.epochs = {self.epochs})",
        )


Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop.

    Args:
        seed: seed of the weights, the order of the samples and the augmentation.
        device: ``auto`` (CUDA where there is some, else the CPU), ``cpu`` or ``cuda``.
        precision: autocast type of forward and backward; ``float16`` uses a gradient scaler.
        channels_last: keep images and convolutions in channels_last memory order.
        compile: compile the model with ``torch.compile``.
        accumulate: micro-batches per optimizer step.
        label_smoothing: label smoothing, in [0, 1).
        ema_decay: decay of the exponential moving average of the weights; None: no average is kept.
        sync_batch_norm: use batch norm statistics of all workers.
        parallel: ``ddp`` (replicated weights) or ``fsdp`` (sharded by ``fully_shard``).
        eval_every: epochs between validations; the last epoch is always validated.
        log_every: optimizer steps between logged rows.
        max_bad_steps: steps with a non-finite loss or gradient in a row that end the run.
        max_steps: end after so many optimizer steps, whatever the epochs; for trials.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    sync_batch_norm: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    eval_every: int = 1
    log_every: int = 10
    max_bad_steps: int = 10
    max_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("accumulate", "eval_every", "log_every", "max_bad_steps", "max_steps"):
            check_positive(f"training.{name}", getattr(self, name))
        check_fraction("training.label_smoothing", self.label_smoothing, upper_open=True)
        check_fraction("training.ema_decay", self.ema_decay, upper_open=True)

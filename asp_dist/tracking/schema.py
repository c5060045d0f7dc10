"""The names in a run's record: files, kinds of rows, metrics and the summary's keys, each written here and nowhere else.

The names that a pruner gives are in `asp_dist.pruning.names`, which knows nothing of this package.
"""

from __future__ import annotations

from typing import Any, Final

from asp_dist.pruning.names import (
    BYTES,
    COST_SPARSITY,
    MACS_DENSITY,
    MEASURED_SPARSITY,
    PREDICTED_SPARSITY,
    SPARSITY_LOSS,
    TARGET_SPARSITY,
    THRESHOLD_LR,
    TOTAL_SPARSITY,
    PruningSummary,
)

__all__ = [
    "BYTES",
    "CONFIG_FILE",
    "COST_SPARSITY",
    "DATA_TIME",
    "DEPLOY_FILE",
    "EVAL",
    "EVENT",
    "FASTEST_TIME",
    "FORWARD_BACKWARD_TIME",
    "GPU_MEMORY",
    "GPU_UTILIZATION",
    "GRAD_NORM",
    "IDENTITY_FILE",
    "IMAGES_PER_SECOND",
    "LAYERS",
    "LAYERS_FILE",
    "LAYERS_HEAT_MAP",
    "LAYERS_HISTORY_FILE",
    "LAYERS_LINES",
    "LAYERS_SPARSITY",
    "LAYERS_TABLE",
    "LR",
    "MACS_DENSITY",
    "MEASURED_SPARSITY",
    "METRICS_FILE",
    "MODEL_FILE",
    "PREDICTED_SPARSITY",
    "REPORT_FILE",
    "SLOWEST_RANK",
    "SLOWEST_TIME",
    "SPARSITY_LOSS",
    "STEP_TIME",
    "SUMMARY_FILE",
    "TARGET_SPARSITY",
    "THRESHOLD_LR",
    "TOTAL_SPARSITY",
    "TRAIN",
    "TRAIN_LOSS",
    "VAL",
    "VAL_EMA",
    "VAL_EMA_TOP1",
    "VAL_LOSS",
    "VAL_SAMPLES",
    "VAL_TOP1",
    "VAL_TOP5",
    "WARNING",
    "RunSummary",
]

# Files of a run's folder
CONFIG_FILE: Final = "config.yaml"
DEPLOY_FILE: Final = "deploy.json"
IDENTITY_FILE: Final = "run.json"
LAYERS_FILE: Final = "layers.json"
LAYERS_HISTORY_FILE: Final = "layers.jsonl"
METRICS_FILE: Final = "metrics.jsonl"
MODEL_FILE: Final = "model.safetensors"
REPORT_FILE: Final = "report.html"
SUMMARY_FILE: Final = "summary.json"

# Kinds of rows
TRAIN: Final = "train"
EVAL: Final = "eval"
EVENT: Final = "event"
LAYERS: Final = "layers"

# The event that a user is warned of; every other one is for information.
WARNING: Final = "warning"

# Metrics of training steps, means since the row before: the task's loss, norms, rates, and seconds per step
TRAIN_LOSS: Final = "train/loss"
LR: Final = "train/lr"
GRAD_NORM: Final = "train/grad_norm"
IMAGES_PER_SECOND: Final = "train/images_per_second"
STEP_TIME: Final = "time/step"
DATA_TIME: Final = "time/data"
FORWARD_BACKWARD_TIME: Final = "time/forward_backward"
# Of several ranks: whose images and forward passes took longest, how long, and how long the fastest rank's
SLOWEST_RANK: Final = "ranks/slowest"
SLOWEST_TIME: Final = "ranks/slowest_time"
FASTEST_TIME: Final = "ranks/fastest_time"
# On a GPU, of rank 0: bytes allocated at most since the last row, and the share of the time that some kernel ran
GPU_MEMORY: Final = "gpu/memory"
GPU_UTILIZATION: Final = "gpu/utilization"

# Metrics of a validation; accuracies are fractions
VAL: Final = "val/"
VAL_EMA: Final = "val/ema_"  # of the averaged weights
VAL_LOSS: Final = "val/loss"
VAL_TOP1: Final = "val/top1"
VAL_TOP5: Final = "val/top5"
VAL_SAMPLES: Final = "val/samples"
VAL_EMA_TOP1: Final = "val/ema_top1"

# What wandb shows of the layers
LAYERS_TABLE: Final = "layers/table"
LAYERS_SPARSITY: Final = "layers/sparsity"
LAYERS_HEAT_MAP: Final = "layers/heat_map"
LAYERS_LINES: Final = "layers/lines"


class RunSummary(PruningSummary, total=False):
    """``summary.json``: a finished run's results, in plain JSON types, with what `PruningSummary` has.

    Attributes:
        model: timm name.
        top1: accuracy on the validation images, a fraction, as is the next.
        top5: the same, with the label among the five likeliest classes.
        val_loss: cross-entropy on them.
        val_samples: their number.
        best: the best validation at the budget: ``{"step": ..., "val/top1": ...}``; None: there was none.
        weights: whose weights are in ``model.safetensors``: ``model`` or ``average``.
        selected: how they were chosen: ``{"by": output.select, "step": ..., "on": ...}``, on ``validation``, on ``held-out
            training images`` (``data.select_fraction``), or on nothing (None).
        images_per_second: throughput of all workers.
        epochs: length of the run.
        steps: optimizer steps.
        bad_steps: steps that were skipped for a loss or a gradient that is not finite.
        seconds: time spent training, over all restarts.
        world_size: workers at the end.
        device: ``cpu`` or ``cuda``.
        precision: of the forward and backward passes.
        batch_size: images per optimizer step, over all workers.
        data_root: the data set.
        num_classes: its number of classes.
        classes: their names, by label.
        wandb_run_id: None without wandb.
        config_hash: of the configuration.
        finished: when, in seconds since 1970.
    """

    model: str
    top1: float
    top5: float
    val_loss: float
    val_samples: int
    best: dict[str, Any] | None
    weights: str
    selected: dict[str, Any]
    images_per_second: float
    epochs: int
    steps: int
    bad_steps: int
    seconds: float
    world_size: int
    device: str
    precision: str
    batch_size: int
    data_root: str | None
    num_classes: int
    classes: list[str]
    wandb_run_id: str | None
    config_hash: str
    finished: float

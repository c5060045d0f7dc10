"""Makes run folders for the tests of tracking and report: plausible numbers, in the trainer's own format."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.layer_rows import LayerFile, write_json
from asp_dist.tracking.rows import MetricsFile


def layer_rows(shapes: list[tuple[int, ...]], share: float) -> list[LayerRow]:
    """Layer rows at `share` of the training: sparsities that rise towards 0.9, the later layers' more."""
    rows: list[LayerRow] = []
    for i, shape in enumerate(shapes):
        weights = math.prod(shape)
        sparsity = share * (0.8 + 0.19 * i / max(1, len(shapes) - 1))
        rows.append(
            {
                "name": f"layer{i // 12 + 1}.{i % 12}.conv{i % 3 + 1}",
                "type": "Conv2d",
                "shape": list(shape),
                "weights": weights,
                "macs": weights * 49,
                "threshold": round(2 * share, 4),
                "sigma": 0.02 + i / 1000,
                "predicted_sparsity": min(0.999, sparsity * 1.01),
                "measured_sparsity": sparsity,
                "pruned": True,
                "reason": "",
            }
        )
    head: LayerRow = {"name": "head", "type": "Linear", "shape": [10, 64], "weights": 640, "macs": 640, "pruned": False}
    return [*rows, {**head, "measured_sparsity": 0.0, "reason": "fewer than 1000 weights"}]


def make_run(
    run_dir: Path,
    *,
    epochs: int = 10,
    rows_per_epoch: int = 20,
    layers: int = 8,
    top1: float = 0.76,
    sparsity: float = 0.9,
) -> Path:
    """A finished run in `run_dir`: metrics, layers, summary, configuration and a checkpoint with weights."""
    run_dir.mkdir(parents=True)
    shapes: list[tuple[int, ...]] = [(16, 8, 3, 3)] * layers
    metrics, layer_file = MetricsFile(run_dir / "metrics.jsonl"), LayerFile(run_dir)
    total = epochs * rows_per_epoch
    for i in range(1, total + 1):
        share = i / total
        step, epoch = 10 * i, i / rows_per_epoch
        now = {"sparsity/measured": sparsity * share, "sparsity/predicted": sparsity * share * 0.99}
        now |= {
            "sparsity/target": sparsity,
            "sparsity/all": sparsity * share * 0.95,
            "cost/macs_density": 1 - 0.8 * share,
        }
        times = {"time/data": 0.02, "time/forward_backward": 0.2, "time/step": 0.25}
        train = {
            "train/loss": 7 * math.exp(-3 * share),
            "train/lr": 0.1 * (1 - share) + 1e-5,
            "train/threshold_lr": 1e-3,
        }
        metrics.append(step, {"epoch": epoch, **train, "train/images_per_second": 2900.0, **now, **times})
        if i % rows_per_epoch == 0:
            accuracy = {"val/loss": 4 - 3 * share, "val/top1": top1 * share**0.3, "val/top5": 0.93 * share**0.2}
            metrics.append(step, {"kind": "eval", "epoch": epoch, "val/samples": 50000, **accuracy, **now})
            layer_file.add(step, layer_rows(shapes, share))
            metrics.append(step, {"event": "checkpoint", "message": f"checkpoints/step-{step:08d}"})
    metrics.append(10 * total, {"event": "warning", "message": "Input is stalled: <b>not HTML</b>"})
    metrics.close()
    layer_file.close()
    summary: dict[str, Any] = {
        "top1": top1,
        "top5": 0.93,
        "sparsity": sparsity,
        "target_sparsity": 0.9,
        "nonzero_weights": 2_500_000,
    }
    summary |= {"macs": 8e8, "dense_macs": 4.1e9, "images_per_second": 2900.0, "model": "resnet50", "seconds": 45000.0}
    write_json(run_dir / "summary.json", summary)
    (run_dir / "config.yaml").write_text(
        f"name: made\nmodel:\n  name: resnet50\nbudget:\n  sparsity: {sparsity}\n", encoding="utf-8"
    )
    _checkpoint(run_dir / "checkpoints" / f"step-{10 * total:08d}", shapes)
    return run_dir


def _checkpoint(folder: Path, shapes: list[tuple[int, ...]]) -> None:
    """A checkpoint as `asp_dist.checkpoint.format` lays it out, of a frozen mask that keeps |w| > σ."""
    folder.mkdir(parents=True)
    names = [row["name"] for row in layer_rows(shapes, 1.0) if row["pruned"]]
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in zip(names, shapes)}
    save_file({f"{n}.weight": torch.where(w.abs() > 1, w, 0.0) for n, w in weights.items()}, folder / "model.safetensors")
    save_file({f"dense.{n}": torch.where(w.abs() > 1, 0.0, w) for n, w in weights.items()}, folder / "pruner.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"step": 1}), encoding="utf-8")

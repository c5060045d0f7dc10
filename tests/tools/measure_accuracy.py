"""Accuracy at the same exact budget, by method: ResNet-20 on CIFAR-10 images, at equal steps, over several seeds.

    python tests/tools/measure_accuracy.py DATA [--sparsity 0.9 0.95] [--seeds 1 2 3] [--methods feather track] [--file FILE]

DATA is an image folder with train/ and val/ (or test/). Each run is appended to FILE as one JSON row and not run again; at the
end all rows are shown as a table. A run takes about three minutes on one core that computes in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from asp_dist.config import Config, from_dict
from asp_dist.training.trainer import train
from asp_dist.training.world import init_world

# Multiply-adds that `track` may keep in the prunable layers: a sixth less, or a fifth, than Feather's form ends with.
MACS = {0.9: 0.15, 0.95: 0.08}
# Where the published code starts the thresholds: at 0.6 × the target.
STARTS = {0.9: 0.739, 0.95: 0.789}


def methods(sparsity: float) -> dict[str, dict[str, Any]]:
    """The ``pruning`` and ``budget`` parts of each method's configuration."""
    ramp = {"shape": "cubic", "end": 0.5, "freeze_at": 0.75}
    published = {"control": "loss", "ramp": {"shape": "constant", "freeze_at": 0.75}}
    limit = {"cost": "macs", "density": MACS[sparsity], "bound": "at_most"}
    track = {"control": "track", "ramp": ramp, "track": {"rate": 0.0}}
    return {
        "dense": {"pruning": {"enabled": False}},
        "published loss": {"pruning": {**published, "loss": {"initial_threshold": STARTS[sparsity]}}},
        "published loss, started at the target": {"pruning": published},
        "gradual magnitude pruning": {"pruning": {**track, "gradient_scale": 0.0}},
        "Feather's form": {"pruning": {**track, "operator": "power"}},
        "Feather's form, blocks of 4": {"pruning": {**track, "operator": "power", "pattern": {"block": 4}}},
        "track, learned allocation": {"pruning": {**track, "operator": "power", "track": {"rate": 0.003}}},
        "track, two budgets": {"pruning": {**track, "operator": "power"}, "budget": {"also": [limit]}},
        "track, two budgets, learned allocation": {
            "pruning": {**track, "operator": "power", "track": {"rate": 0.003}},
            "budget": {"also": [limit]},
        },
        "loss with its options": {
            "pruning": {
                "control": "loss",
                "ramp": {**ramp, "start": 0.02},
                "operator": "power",
                "loss": {"density": "measured", "multiplier": True},
            }
        },
    }


def build_config(data: Path, method: str, sparsity: float, seed: int, folder: Path) -> Config:
    """One run: 2,000 steps of 50 images, every training image twice."""
    parts = methods(sparsity)[method]
    config: Config = from_dict(
        {
            "name": f"{method}-{sparsity}-{seed}".replace(" ", "_"),
            "model": {"name": "cifar_resnet20"},
            "data": {
                "root": str(data),
                "val": "val" if (data / "val").is_dir() else "test",
                "batch_size": 50,
                "eval_batch_size": 500,
                "input_size": 32,
                "threads": 1,
                "augment": {"scale": [0.6, 1.0], "ratio": [0.9, 1.1]},
            },
            "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4},
            "schedule": {"epochs": 2},
            "training": {
                "device": "cpu",
                "seed": seed,
                "precision": "bfloat16",
                "channels_last": True,
                "log_every": 50,
            },
            "tracking": {"wandb": "disabled"},
            "cluster": {"mode": "local"},
            "output": {"dir": str(folder)},
            "pruning": parts["pruning"],
            "budget": {"sparsity": sparsity, **parts.get("budget", {})},
        }
    )
    return config


def show(rows: list[dict[str, Any]]) -> None:
    """Print mean, spread over the seeds, weights and multiply-adds of each method."""
    table = Table(title="ResNet-20, CIFAR-10 images, 2,000 steps of 50 images")
    for heading in ("sparsity", "method", "seeds", "top-1", "lowest to highest", "weights kept", "multiply-adds kept"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for sparsity, method in dict.fromkeys((row["sparsity"], row["method"]) for row in rows):
        own = [row for row in rows if (row["sparsity"], row["method"]) == (sparsity, method)]
        top1 = [100 * row["top1"] for row in own]
        macs = statistics.mean(row["macs_density"] for row in own)
        kept = {row["nonzero_weights"] for row in own}
        spread = f"{min(top1):.1f} to {max(top1):.1f}"
        mean = f"{statistics.mean(top1):.2f} %"
        weights = " ".join(f"{count:,}" for count in sorted(kept))
        table.add_row(f"{sparsity:.0%}", method, str(len(own)), mean, spread, weights, f"{macs:.1%}")
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95], choices=list(MACS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=list(methods(0.9))[1:], choices=list(methods(0.9)))
    parser.add_argument("--file", type=Path, default=Path("runs/accuracy/rows.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.touch()
    rows = [json.loads(line) for line in options.file.read_text().splitlines()]
    done = {(row["sparsity"], row["method"], row["seed"]) for row in rows}
    for sparsity in options.sparsity:
        for seed in options.seeds:
            for method in options.methods:
                if (sparsity, method, seed) in done:
                    continue
                config = build_config(options.data, method, sparsity, seed, options.file.parent)
                summary = train(config, init_world("cpu"))
                pruned = method != "dense"
                row = {
                    "sparsity": sparsity,
                    "method": method,
                    "seed": seed,
                    "top1": summary["top1"],
                    "nonzero_weights": summary["nonzero_weights"],
                    "macs_density": summary["macs"] / summary["dense_macs"] if pruned else 1.0,
                }
                rows.append(row)
                with options.file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    show(rows)


if __name__ == "__main__":
    main()

"""``asp-dist evaluate``: accuracy and sparsity of a run's saved model."""

from __future__ import annotations

import json as json_
from pathlib import Path

from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``evaluate``."""
    parser.add_argument("run_dir", type=str, help="folder of a finished run, such as runs/quickstart.")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON.")


def run(run_dir: str, *, json: bool = False) -> int:
    """Evaluate a run's ``model.safetensors`` and print its accuracy and sparsity."""
    from asp_dist.runs.evaluate_run import evaluate

    result = evaluate(Path(run_dir))
    if json:
        print(json_.dumps(result))
    else:
        print(f"top-1     {result['top1']:.2%}\ntop-5     {result['top5']:.2%}")
        print(f"sparsity  {result['sparsity']:.4%}  ({result['nonzero_weights']:,} nonzero prunable weights)")
    return 0

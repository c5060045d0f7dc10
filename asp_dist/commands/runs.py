"""What is done with finished runs: measure, export, report, compare, and their wandb dashboard."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser


def _run_dir_argument(parser: ArgumentParser) -> None:
    parser.add_argument("run_dir", type=str, help="folder of a finished run, such as runs/quickstart.")


def add_evaluate_arguments(parser: ArgumentParser) -> None:
    _run_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON.")


def evaluate(run_dir: str, *, json: bool = False) -> int:
    """Accuracy and sparsity of a run's ``model.safetensors``, measured again from the file."""
    from asp_dist.training.evaluate import evaluate as evaluate_run

    result = evaluate_run(Path(run_dir))
    if json:
        print(json_.dumps(result))
    else:
        print(f"top-1     {result['top1']:.2%}\ntop-5     {result['top5']:.2%}")
        print(f"sparsity  {result['sparsity']:.4%}  ({result['nonzero_weights']:,} nonzero prunable weights)")
    return 0


def add_export_arguments(parser: ArgumentParser) -> None:
    _run_dir_argument(parser)
    parser.add_argument("--format", type=Literal["sparse", "onnx"], default="sparse", help="form of the file.")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: in the run's folder.")


def export(run_dir: str, *, format: Any = "sparse", output: str | None = None) -> int:
    """Write a run's model for another program."""
    from asp_dist.export.run import export_run

    path = export_run(Path(run_dir), format, Path(output) if output else None)
    print(f"{path}  ({path.stat().st_size:,} bytes)")
    return 0


def add_report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_dirs", type=str, nargs="+", help="folders of runs; several are shown side by side.")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: report.html there.")


def report(run_dirs: list[str], *, output: str | None = None) -> int:
    """Write the report of one run, or of several side by side."""
    from asp_dist.tracking.report import write_report

    print(write_report(run_dirs, output))
    return 0


def add_compare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_dirs", type=str, nargs="+", help="folders of finished runs.")
    parser.add_argument("--json", action="store_true", help="print the summaries as JSON lines.")


def compare(run_dirs: list[str], *, json: bool = False) -> int:
    """Print the results of several runs side by side."""
    from asp_dist.tracking.compare import print_comparison

    print_comparison([Path(run_dir) for run_dir in run_dirs], as_json=json)
    return 0


def add_dashboard_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--project", type=str, default="asp-dist", help="wandb project.")
    parser.add_argument("--entity", type=str | None, default=None, help="wandb user or team.")
    parser.add_argument(
        "--output", type=str | None, default=None, help="write the definitions here, and ask no server."
    )


def dashboard(*, project: str, entity: str | None = None, output: str | None = None) -> int:
    """Create the wandb workspace and report of a project."""
    from asp_dist.tracking.dashboard import create_dashboard

    for address in create_dashboard(project, entity, out=output):
        print(address)
    return 0

"""The final results table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.layer_rows import is_pruned
from asp_dist.tracking.schema import LAYERS_FILE, METRICS_FILE, MODEL_FILE, REPORT_FILE, SUMMARY_FILE
from asp_dist.tracking.wandb.wandb_run import sync_line

FILES = (MODEL_FILE, REPORT_FILE, METRICS_FILE, LAYERS_FILE, SUMMARY_FILE)


def print_results(
    summary: dict[str, Any],
    layer_rows: Sequence[LayerRow],
    run_dir: Path,
    *,
    next_command: str | None = None,
    file: IO[str] | None = None,
) -> None:
    """Print the layers, accuracy, sparsity against the budget, speed, where the files are, and what to try next.

    Args:
        summary: the keys of ``summary.json``; a missing one is left out.
        layer_rows: the rows of ``layers.json``.
        run_dir: the run's folder.
        next_command: command to suggest; None: ``asp-dist evaluate``.
        file: where to print instead of the standard output.
    """
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=120)
    console.print(layer_table(layer_rows))
    for name, value in (*dense_lines(layer_rows), *summary_lines(summary, run_dir)):
        console.print(f"{name:<16}{value}", markup=False, soft_wrap=True)
    console.print(f"{'next':<16}{next_command or f'asp-dist evaluate {run_dir}'}", markup=False, soft_wrap=True)


def layer_table(rows: Sequence[LayerRow]) -> Table:
    """One line per layer."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("shape", "weights", "threshold", "predicted", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shape = "×".join(map(str, row.get("shape", ())))
        cells = [_number(row.get("threshold"), ".4f"), *(_number(row.get(k), ".2%") for k in _SPARSITIES)]
        if not is_pruned(row):
            cells = ["", "", "dense"]
        table.add_row(str(row["name"]), shape, f"{row.get('weights', 0):,}", *cells)
    return table


_SPARSITIES = ("predicted_sparsity", "measured_sparsity")


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def dense_lines(rows: Sequence[LayerRow]) -> list[tuple[str, str]]:
    """For each reason to leave layers dense, how many do and which."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not is_pruned(row):
            reasons.setdefault(str(row.get("reason") or "not selected"), []).append(str(row["name"]))
    shown = {reason: ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") for reason, names in reasons.items()}
    return [("dense", f"{len(reasons[reason])}: {reason} ({names})") for reason, names in shown.items()]


def summary_lines(summary: dict[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    """Name and text of each line below the table."""
    lines = [(key, f"{summary[key]:.2%}") for key in ("top1", "top5") if summary.get(key) is not None]
    lines = [({"top1": "top-1", "top5": "top-5"}[key], text) for key, text in lines]
    if summary.get("sparsity") is not None:
        target = summary.get("target_sparsity")
        budget = "" if target is None else f"  (budget {target:.2%})"
        counts = ""
        if summary.get("nonzero_weights") is not None and summary.get("prunable_weights"):
            counts = f", {summary['nonzero_weights']:,} of {summary['prunable_weights']:,} prunable weights are nonzero"
        lines.append(("sparsity", f"{summary['sparsity']:.4%}{budget}{counts}"))
    if summary.get("images_per_second") is not None:
        lines.append(("images/s", f"{summary['images_per_second']:,.1f}"))
    present = [name for name in FILES if (run_dir / name).exists()]
    lines.append(("files", f"{run_dir}: {', '.join(present)}" if present else str(run_dir)))
    sync = sync_line(run_dir)
    if sync:
        lines.append(("wandb", f"offline; upload with: {sync}"))
    return lines

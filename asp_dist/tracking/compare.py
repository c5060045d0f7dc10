"""Several finished runs side by side, in the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from asp_dist.config import UserError


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The ``summary.json`` of a run.

    Raises:
        UserError: the folder holds no finished run.
    """
    file = run_dir / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: {run_dir} holds no finished run") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    return {"run": run_dir.name, **summary}


def print_comparison(run_dirs: Sequence[Path], *, as_json: bool = False, file: IO[str] | None = None) -> None:
    """Print accuracy, sparsity, multiply-adds and speed of each run, the most accurate first.

    Args:
        run_dirs: folders of finished runs.
        as_json: print each run's whole summary as one JSON line.
        file: where to print instead of the standard output.

    Raises:
        UserError: a folder holds no finished run.
    """
    summaries = [read_summary(run_dir) for run_dir in run_dirs]
    console = Console(file=file, highlight=False, soft_wrap=True)
    if as_json:
        for summary in summaries:
            console.print(json.dumps(summary), markup=False)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run")
    for name in ("model", "top-1", "top-5", "sparsity", "nonzero", "MACs", "images/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for summary in sorted(summaries, key=lambda s: -s.get("top1", 0.0)):
        macs, dense = summary.get("macs"), summary.get("dense_macs")
        table.add_row(
            summary["run"],
            str(summary.get("model", "")),
            f"{summary.get('top1', 0.0):.2%}",
            f"{summary.get('top5', 0.0):.2%}",
            f"{summary.get('sparsity', 0.0):.3%}",
            f"{summary.get('nonzero_weights', 0):,}",
            f"{macs / dense:.2%}" if macs and dense else "",
            f"{summary.get('images_per_second', 0.0):,.1f}",
        )
    console.print(table)

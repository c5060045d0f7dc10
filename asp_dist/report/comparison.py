"""`print_comparison`: the results of several runs in one table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from asp_dist.errors import UserError
from asp_dist.report.curves import pareto
from asp_dist.report.fronts import HEADER, settings, settings_table
from asp_dist.tracking.schema import CONFIG_FILE, DEPLOY_FILE, SUMMARY_FILE

# Key of the summary, heading, format.
SHOWN = (
    ("model", "model", ""),
    ("top1", "top-1", ".2%"),
    ("top5", "top-5", ".2%"),
    ("sparsity", "sparsity", ".4%"),
    ("target_sparsity", "budget", ".2%"),
    ("nonzero_weights", "weights left", ",d"),
    ("macs_density", "multiply-adds left", ".2%"),
    ("epochs", "epochs", "d"),
    ("deploy_gain", "speed-up", ".2f"),
    ("world_size", "workers", "d"),
    ("images_per_second", "images/s", ",.0f"),
)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """``summary.json`` of a finished run.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = run_dir / SUMMARY_FILE
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{run_dir} is not a finished run: {path} is missing") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    sizes = read_deploy(run_dir).get("sizes")
    if sizes:
        summary["deploy_gain"] = sizes[0]["gain"]
    if summary.get("macs") and summary.get("dense_macs"):
        summary["macs_density"] = summary["macs"] / summary["dense_macs"]
    return summary


def read_deploy(run_dir: Path) -> dict[str, Any]:
    """What ``asp-dist bench deploy`` measured last of the run; empty if nothing."""
    path = run_dir / DEPLOY_FILE
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; asp-dist bench deploy writes it anew") from error
    return found


def runs_among(run_dirs: Sequence[Path], file: str) -> Sequence[Path]:
    """The folders that have a `file`; the others are named on the standard error. All of them, if none has it."""
    found = [run_dir for run_dir in run_dirs if (run_dir / file).is_file()]
    if not found:
        return run_dirs
    others = [str(run_dir) for run_dir in run_dirs if run_dir not in found]
    if others:
        print(f"passed over, without {file}: {', '.join(others)}", file=sys.stderr)
    return found


def print_comparison(run_dirs: Sequence[Path], *, as_json: bool = False, file: IO[str] | None = None) -> None:
    """Print one line per run, the best top-1 first; a star marks the runs that no other beats in top-1 and sparsity.

    Args:
        run_dirs: folders of finished runs; among several, such as ``runs/*``, others are passed over, and named.
        as_json: one JSON object per run and line instead: its summary, with ``run`` (its folder) and ``front``.
        file: where to print instead of the standard output.

    Raises:
        UserError: none is a finished run, or a summary cannot be read.
    """
    found = [(run_dir, read_summary(run_dir)) for run_dir in runs_among(run_dirs, SUMMARY_FILE)]
    points = [(s["sparsity"], s["top1"]) for _, s in found if "sparsity" in s and "top1" in s]
    best = set(pareto(points))
    found.sort(key=lambda item: -float(item[1].get("top1", 0.0)))
    marked = [(run_dir, s, (s.get("sparsity"), s.get("top1")) in best) for run_dir, s in found]
    console = Console(file=file, highlight=False)
    if as_json:
        for run_dir, summary, front in marked:
            line = json.dumps({"run": str(run_dir), "front": front, **summary})
            console.print(line, markup=False, soft_wrap=True)
        return
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=160)
    columns = [column for column in SHOWN if any(s.get(column[0]) is not None for _, s in found)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run", overflow="fold")
    for _, heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for run_dir, summary, front in marked:
        cells = [_cell(summary.get(key), form) for key, _, form in columns]
        table.add_row(f"{run_dir.name}{' *' if front and len(found) > 1 else ''}", *cells)
    console.print(table)
    _print_settings(console, [run_dir for run_dir, _, _ in marked], [summary for _, summary, _ in marked])


def _print_settings(console: Console, run_dirs: Sequence[Path], summaries: Sequence[dict[str, Any]]) -> None:
    """Means and spreads, where some runs differ in nothing but their seed."""
    texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in (d / CONFIG_FILE for d in run_dirs)]
    found = settings(list(zip((run_dir.name for run_dir in run_dirs), texts, summaries)))
    if len(found) == len(run_dirs):
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for position, heading in enumerate(HEADER):
        table.add_column(heading, justify="right" if position else "left", no_wrap=position > 0)
    for row in settings_table(found):
        table.add_row(*row)
    console.print()
    console.print(table)


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)

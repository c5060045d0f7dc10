"""``asp-dist compare``: the results of several runs side by side."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``compare``."""
    parser.add_argument("run_dirs", type=str, nargs="+", help="folders of finished runs.")
    parser.add_argument("--json", action="store_true", help="print the summaries as JSON lines.")


def run(run_dirs: list[str], *, json: bool = False) -> int:
    """Print the results of several runs side by side."""
    from asp_dist.report import print_comparison

    print_comparison([Path(run_dir) for run_dir in run_dirs], as_json=json)
    return 0

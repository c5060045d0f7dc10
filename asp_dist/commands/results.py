"""``asp-dist compare`` and ``asp-dist report``: the results of runs, side by side."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser


def add_compare_arguments(parser: ArgumentParser) -> None:
    """Options of ``compare``."""
    parser.add_argument("run_dirs", type=str, nargs="+", help="folders of finished runs.")
    parser.add_argument("--json", action="store_true", help="print the summaries as JSON lines.")


def compare(run_dirs: list[str], *, json: bool = False) -> int:
    """Print the results of several runs side by side."""
    from asp_dist.report import print_comparison

    print_comparison([Path(run_dir) for run_dir in run_dirs], as_json=json)
    return 0


def add_report_arguments(parser: ArgumentParser) -> None:
    """Options of ``report``."""
    parser.add_argument("run_dirs", type=str, nargs="+", help="folders of runs; several are shown side by side.")
    parser.add_argument(
        "--output", type=str | None, default=None, help="file to write; default: report.html next to the run's files."
    )


def report(run_dirs: list[str], *, output: str | None = None) -> int:
    """Write the report of one run, or of several side by side."""
    from asp_dist.report import write_report

    print(write_report(run_dirs, output))
    return 0

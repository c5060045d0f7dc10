"""``asp-dist report``: one HTML file about one run, or several side by side."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``report``."""
    parser.add_argument("run_dirs", type=str, nargs="+", help="folders of runs; several are shown side by side.")
    parser.add_argument(
        "--output", type=str | None, default=None, help="file to write; default: report.html next to the run's files."
    )


def run(run_dirs: list[str], *, output: str | None = None) -> int:
    """Write the report of one run, or of several side by side."""
    from asp_dist.report import write_report

    print(write_report(run_dirs, output))
    return 0

"""``asp-dist sweep``: one configuration with several values of some fields, a run for each combination."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from asp_dist.config import Config
from asp_dist.errors import EXIT_STOPPED, UserError, check
from asp_dist.quick_checks import check_quickly

if TYPE_CHECKING:
    from asp_dist.tracking.rows import Row

BRACKETS = {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}
NAME = re.compile(r"[^\w.+-]+")


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``sweep``."""
    parser.add_argument(
        "--set",
        type=str,
        nargs="+",
        action="append",
        metavar="FIELD=V1,V2",
        help="the values that a field takes; may be repeated.",
    )
    parser.add_argument("--concurrent", type=int, default=1, help="runs at a time.")
    parser.add_argument("--quiet", action="store_true", help="show no progress.")
    parser.add_argument("--json", action="store_true", help="print the summaries of the runs as JSON lines.")


def variants(sets: Sequence[str], known: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of the values in `sets`, each by its fields' dotted names, in the order given.

    Args:
        sets: texts such as ``budget.sparsity=0.8,0.9``; a comma within brackets separates nothing.
        known: the fields that there are.

    Raises:
        UserError: a text has another form, or a field is unknown or given twice.
    """
    fields: dict[str, list[str]] = {}
    for text in sets:
        field, equals, values = text.lstrip("-").partition("=")
        check(bool(equals and values), f"--set {text}: write FIELD=V1,V2, such as budget.sparsity=0.8,0.9")
        if field not in known:
            raise UserError(f"--set {text}: there is no field {field}; asp-dist train --help-all lists them")
        check(field not in fields, f"--set gives {field} twice: write all of its values in one list")
        check(field not in ("name", "output.dir") and not field.startswith("cluster."), f"--set cannot change {field}")
        fields[field] = split(values)
    return [dict(zip(fields, values)) for values in itertools.product(*fields.values())]


def split(text: str) -> list[str]:
    """The values of a list with commas; those within brackets belong to a value."""
    values, depth = [""], 0
    for letter in text:
        depth += BRACKETS.get(letter, 0)
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values if value.strip()]


def name_of(base: str, settings: Mapping[str, str]) -> str:
    """A run's name: that of the configuration, and the values of its own."""
    lasts = [field.rpartition(".")[2] for field in settings]
    shown = (
        f"{last if lasts.count(last) == 1 else field}={NAME.sub('_', value)}"
        for last, (field, value) in zip(lasts, settings.items())
    )
    return "-".join((base, *shown))


def run(points: Sequence[Config], *, name: str, concurrent: int = 1, quiet: bool = False, json: bool = False) -> int:
    """Train and prune every point of a sweep that is not finished yet, and show them side by side.

    Args:
        points: the runs.
        name: of the configuration that they vary.
        concurrent: runs at a time.
        quiet: print nothing meanwhile.
        json: print the summaries as JSON lines, and nothing else to the standard output.
    """
    check(concurrent >= 1, f"--concurrent {concurrent} must be at least 1")
    for point in points:
        check_quickly(point)
    from asp_dist.checkpoint.record import run_dir
    from asp_dist.cluster.sweep_runs import check_points, run_sweep, sweep_dir
    from asp_dist.report import print_comparison, write_report
    from asp_dist.tracking.schema import REPORT_FILE

    done = check_points(points)
    folder = sweep_dir(points[0], name)
    say = _silent if quiet else _say
    say(f"{len(points)} runs, {len(done)} of them finished before; their configurations and logs: {folder}")
    codes = run_sweep(points, folder, concurrent=concurrent, on_row=_row_shower(say), on_end=_end_shower(say, folder))
    finished = [run_dir(point) for point in points if codes[point.name] == 0]
    if finished:
        print_comparison(finished, as_json=json)
        say(f"report: {write_report(finished, folder / REPORT_FILE)}")
    failed = [name for name, code in codes.items() if code not in (0, EXIT_STOPPED)]
    left = [name for name, code in codes.items() if code == EXIT_STOPPED]
    if failed:
        say(f"error: {len(failed)} of {len(points)} runs failed; the same command tries them again")
        return 1
    if left:
        say(f"stopped: {len(left)} of {len(points)} runs are not finished; start the same command again to go on")
        return EXIT_STOPPED
    return 0


def _silent(text: str) -> None:
    """Print nothing."""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _row_shower(say: Callable[[str], None]) -> Callable[[str, Row], None]:
    """Says what a validation found."""
    from asp_dist.tracking.schema import MEASURED_SPARSITY, VAL_TOP1

    def show(name: str, row: Row) -> None:
        if row.get(VAL_TOP1) is not None:
            sparsity = row.get(MEASURED_SPARSITY)
            zeros = "" if sparsity is None else f", sparsity {sparsity:.2%}"
            say(f"{name}: epoch {row['epoch']:g}, top-1 {row[VAL_TOP1]:.2%}{zeros}")

    return show


def _end_shower(say: Callable[[str], None], folder: Path) -> Callable[[str, int, str], None]:
    """Says how a run has ended."""

    def show(name: str, code: int, message: str) -> None:
        if code == 0:
            say(f"{name}: finished")
        else:
            say(f"{name}: exit code {code}: {message} (log: {folder / 'logs' / name}.log)")

    return show

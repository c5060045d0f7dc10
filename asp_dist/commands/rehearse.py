"""``asp-dist rehearse``: a recipe's whole schedule in a few hundred small steps."""

from __future__ import annotations

import dataclasses
import json as json_
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from asp_dist.config import Config
from asp_dist.quick_checks import check_quickly

if TYPE_CHECKING:
    from asp_dist.planning.rehearsal import Rehearsal


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``rehearse``."""
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps, about.")
    parser.add_argument("--batch-size", type=int, default=32, help="images per optimizer step.")
    parser.add_argument("--input-size", type=int, default=32, help="image side in pixels.")
    parser.add_argument("--json", action="store_true", help="print the verdicts and every step's record as JSON.")


def run(config: Config, *, steps: int = 300, batch_size: int = 32, input_size: int = 32, json: bool = False) -> int:
    """Run the whole schedule, pruned and dense, in small steps on this machine; exit code 1 if an invariant is broken."""
    check_quickly(config, here=False)
    from asp_dist.planning.rehearsal import rehearse

    found = rehearse(config, steps=steps, batch_size=batch_size, input_size=input_size)
    if json:
        print(json_.dumps(dataclasses.asdict(found)))
    else:
        _print(found)
    return 0 if found.good else 1


def _print(found: Rehearsal) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "invariant", "found", "allowed"):
        table.add_column(name, overflow="fold")
    for verdict in found.verdicts:
        mark = "[green]ok[/]" if verdict.good else "[red]BROKEN[/]"
        table.add_row(mark, verdict.name, verdict.found, verdict.limit)
    for change in found.changes:
        console.print(f"{'squeezed':<12}{change}", markup=False, soft_wrap=True)
    console.print(table)
    console.print(f"{'top-1':<12}{found.top1[0]:.2%} pruned, {found.top1[1]:.2%} dense", soft_wrap=True)
    console.print(f"{'files':<12}{found.folder}: report.html, pruned/, dense/", markup=False, soft_wrap=True)
    broken = [verdict.name for verdict in found.verdicts if not verdict.good]
    outcome = f"broken: {'; '.join(broken)}" if broken else "the recipe keeps every invariant"
    console.print(f"{'verdict':<12}{outcome}", markup=False, soft_wrap=True)

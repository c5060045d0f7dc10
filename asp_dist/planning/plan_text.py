"""A plan as text for a terminal."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console
from rich.table import Table

from asp_dist.planning.estimate import Estimate


def print_plan(plan: Estimate, file: IO[str] | None = None) -> None:
    """Print the layers, the totals, memory, traffic, the schedule, times and what they rest on."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=120)
    console.print(_layers(plan))

    def line(name: str, text: str) -> None:
        console.print(f"{name:<12}{text}", markup=False, soft_wrap=True)

    totals, schedule = plan.totals, plan.schedule
    height, width = plan.input_size
    line("model", f"{plan.model} at {height}×{width}: {totals['parameters']:,} parameters")
    if "prunable_weights" in totals:
        left, prunable = totals["nonzero_weights"], totals["prunable_weights"]
        line("weights", f"{left:,} of {prunable:,} prunable ones left, {1 - left / prunable:.2%} sparse")
        line("per image", f"{totals['macs'] / 1e9:.3f} of {totals['dense_macs'] / 1e9:.3f} G multiply-adds left")
        line("file", f"{totals['bytes'] / 1e6:.1f} MB as a sparse file")
    line("memory", f"{plan.memory['all'] / 1e9:.2f} GB per worker{_parts(plan.memory, 1e9, 'GB')}")
    line("traffic", f"{plan.traffic['all'] / 1e6:.1f} MB per worker and step{_parts(plan.traffic, 1e6, 'MB')}")
    line(
        "schedule",
        f"{schedule['epochs']} epochs of {schedule['steps_per_epoch']:,} steps of {schedule['batch_size']:,} images: "
        f"{schedule['steps']:,} steps on {schedule['workers']} worker{'s' if schedule['workers'] != 1 else ''}",
    )
    if plan.scaling:
        console.print(_scaling(plan.scaling, "here"))
    if plan.gpu is not None:
        for name, text in _other(plan.gpu, plan):
            line(name, text)
        console.print(_scaling(plan.gpu["scaling"], plan.gpu["name"]))
    for text in plan.warnings:
        line("warning", text)
    for text in plan.assumptions:
        line("assumed", text)
    if "prunable_weights" in totals:
        line("next", "asp-dist rehearse with the same arguments: the whole schedule in a few hundred small steps")


def _parts(values: dict[str, float], unit: float, name: str) -> str:
    parts = ", ".join(f"{key} {value / unit:.3g} {name}" for key, value in values.items() if key != "all" and value)
    return f": {parts}" if parts else ""


def _layers(plan: Estimate) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("type", "shape", "weights", "multiply-adds", "sparsity", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("stays dense because", overflow="fold")
    for row in plan.layers:
        shape, macs = "×".join(map(str, row["shape"])), row["macs"]
        counts = [f"{row['weights']:,}", "" if macs is None else f"{macs:,.0f}"]
        sparsity = row["measured_sparsity"]
        state = [f"{sparsity:.2%}", f"{round(row['weights'] * (1 - sparsity)):,}"] if row["pruned"] else ["", ""]
        table.add_row(row["name"], row["type"], shape, *counts, *state, row["reason"])
    return table


def _other(gpu: dict[str, Any], plan: Estimate) -> list[tuple[str, str]]:
    """Name and text of each line about a GPU that is not here."""
    workers, shares = plan.schedule["workers"], gpu["shares"]
    cost = "" if gpu["dollars"] is None else f", {gpu['dollars']:,.0f} dollars; a sweep of n sparsities takes n times that"
    peaks = f"{shares['arithmetic']:.0%} of its peak, {shares['memory']:.0%} of its bandwidth"
    lines = [
        (gpu["name"], f"{gpu['images_per_second']:,.0f} images/s each, by a roofline at {peaks} ({gpu['source']})"),
        ("run", f"{gpu['hours']:,.1f} hours on {workers} of them{cost}"),
        ("card", f"{plan.memory['all'] / 1e9:.1f} of {gpu['memory'] / 1e9:.0f} GB"),
        (
            "decoding",
            f"{gpu['images_per_second'] * gpu['gpus_per_machine']:,.0f} images/s on a machine of {gpu['gpus_per_machine']}: "
            f"{gpu['decoding_cores']:.0f} CPU cores, or fewer where the GPUs' decoders help",
        ),
    ]
    if plan.step is not None:
        here = plan.schedule["batch_size"] / workers
        seconds = plan.step.fixed + plan.step.per_image * here
        lines.append(("measured", f"{here / seconds:,.0f} images/s on {plan.step.device}, which is here"))
    return lines


def _scaling(rows: list[dict[str, Any]], where: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.title = f"{where}, workers: the same batch over more of them | the same images per worker, a larger batch"
    for name in (
        "workers",
        "exchange",
        "images",
        "step",
        "efficiency",
        "hours",
        "|",
        "batch",
        "images/s",
        "eff.",
        "hours",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        strong, weak = row["strong"], row["weak"]
        first = ["", "", "", ""]
        if strong:
            times = [f"{1e3 * strong['step']:,.0f} ms", f"{strong['efficiency']:.0%}", f"{strong['hours']:,.1f}"]
            first = [f"{strong['images']:g}", *times]
        second = [f"{weak['batch_size']:,.0f}", f"{weak['images_per_second']:,.0f}", f"{weak['efficiency']:.0%}"]
        exchange = f"{1e3 * row['exchange']:.1f} ms"
        table.add_row(str(row["workers"]), exchange, *first, "|", *second, f"{weak['hours']:,.1f}")
    return table

"""`write_report`: one self-contained HTML file about one run, or several side by side."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asp_dist.errors import UserError
from asp_dist.pruning.names import LayerRow
from asp_dist.report import curves, fronts, plots
from asp_dist.report.comparison import read_deploy, runs_among
from asp_dist.report.histograms import BINS, RANGE, Histogram, histograms
from asp_dist.report.page import Page
from asp_dist.report.plots import color
from asp_dist.tracking.console import duration
from asp_dist.tracking.heat_map import Figure, axis, heat_map
from asp_dist.tracking.layer_rows import LayerHistory, estimate_error, is_pruned, read_history, read_layers
from asp_dist.tracking.rows import Row, kind_of, read_rows
from asp_dist.tracking.schema import (
    CONFIG_FILE,
    IMAGES_PER_SECOND,
    MEASURED_SPARSITY,
    METRICS_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    TARGET_SPARSITY,
    VAL_TOP1,
    VAL_TOP5,
)

HEAT_COLUMNS = 120
EVENTS = 400

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """What the report shows of a run directory."""

    dir: Path
    name: str
    rows: list[Row]
    layers: list[LayerRow]
    history: LayerHistory
    summary: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    histograms: list[Histogram] = field(default_factory=list)
    deploy: dict[str, Any] = field(default_factory=dict)

    def of(self, kind: str) -> list[Row]:
        """The rows of one kind."""
        return [row for row in self.rows if kind_of(row) == kind]

    def last(self, key: str) -> Any:
        """The latest value of `key` in the rows, or None."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    def result(self, key: str, row_key: str) -> Any:
        """`key` of the summary; of an unfinished run, the latest `row_key`."""
        value = self.summary.get(key)
        return self.last(row_key) if value is None else value


def load_run(run_dir: Path) -> RunRecord:
    """Read a run directory; a run that is not finished is read as far as it came.

    Raises:
        UserError: there is no run in that folder.
    """
    rows = read_rows(run_dir / METRICS_FILE)
    if not rows:
        raise UserError(f"{run_dir} contains no run: {run_dir / METRICS_FILE} is missing or empty")
    summary = run_dir / SUMMARY_FILE
    config = run_dir / CONFIG_FILE
    return RunRecord(
        dir=run_dir,
        name=run_dir.resolve().name,
        rows=rows,
        layers=read_layers(run_dir),
        history=read_history(run_dir),
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {},
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        histograms=histograms(run_dir),
        deploy=read_deploy(run_dir),
    )


def write_report(run_dirs: Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write the report of one run, or of several side by side, as one HTML file that loads nothing.

    Args:
        run_dirs: folders of runs, finished or not; among several, those that are none are passed over.
        out: the file; None: ``report.html`` in the run's folder, for several runs next to their folders.

    Returns:
        The file's path.

    Raises:
        UserError: no folder contains a run, or none is given.
    """
    if not run_dirs:
        raise UserError("a report needs at least one run folder, such as runs/quickstart")
    runs = [load_run(run_dir) for run_dir in runs_among([Path(run_dir) for run_dir in run_dirs], METRICS_FILE)]
    if out is None:
        folder = runs[0].dir if len(runs) == 1 else runs[0].dir.resolve().parent
        out = folder / REPORT_FILE
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(build_page(runs).render(), encoding="utf-8")
    return path


def try_report(run_dir: Path) -> None:
    """Write a finished run's ``report.html``. A report that fails is logged; the run's results are kept."""
    try:
        write_report([run_dir])
    except Exception as error:
        log.warning("%s is not written: %s: %s", run_dir / REPORT_FILE, type(error).__name__, error)


def build_page(runs: list[RunRecord]) -> Page:
    """The page about `runs`: key figures, curves, layers, the step's time, events, configurations."""
    names = title_of([run.name for run in runs])
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime())
    models = ", ".join(dict.fromkeys(str(run.summary["model"]) for run in runs if run.summary.get("model")))
    page = Page(title=names, subtitle=f"asp-dist report, {written}" + (f", {models}" if models else ""))
    if len(runs) == 1:
        page.tiles(tiles(runs[0]))
    else:
        table = [tiles(run) for run in runs]
        labels = list(dict.fromkeys(label for row in table for _, label in row))
        found = [{label: value for value, label in row} for row in table]
        page.table(["run", *labels], [[r.name, *(f.get(x, "") for x in labels)] for r, f in zip(runs, found)])
        _fronts(page, runs)
    _training(page, runs)
    _layers(page, runs)
    _deployment(page, runs)
    _running(page, runs)
    return page


def title_of(names: list[str], most: int = 3) -> str:
    """The runs' names; of more than `most` what they begin with alike, and how many they are."""
    if len(names) <= most:
        return ", ".join(names)
    low, high = min(names), max(names)
    alike = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(low, high))).rstrip("-_.=0123456789")
    return f"{alike}: {len(names)} runs" if alike else f"{len(names)} runs"


def tiles(run: RunRecord) -> list[tuple[str, str]]:
    """A run's key figures: (value, what it is)."""
    shown: list[tuple[str, str]] = []
    for key, row_key, label in (("top1", VAL_TOP1, "top-1"), ("top5", VAL_TOP5, "top-5")):
        value = run.result(key, row_key)
        if value is not None:
            shown.append((f"{value:.2%}", label))
    sparsity, target = run.result("sparsity", MEASURED_SPARSITY), run.result("target_sparsity", TARGET_SPARSITY)
    if sparsity is not None:
        shown.append((f"{sparsity:.2%}", "sparsity"))
    if target is not None:
        shown.append((f"{target:.2%}", "budget"))
    if run.summary.get("nonzero_weights") is not None:
        shown.append((f"{run.summary['nonzero_weights']:,}", "weights left"))
    if run.summary.get("macs") and run.summary.get("dense_macs"):
        shown.append((f"{run.summary['macs'] / run.summary['dense_macs']:.1%}", "multiply-adds left"))
    speed = run.result("images_per_second", IMAGES_PER_SECOND)
    if speed is not None:
        shown.append((f"{speed:,.0f}", "images/s"))
    if run.summary.get("seconds") is not None:
        shown.append((duration(run.summary["seconds"]), "training time"))
    return shown


def _fronts(page: Page, runs: list[RunRecord]) -> None:
    found = fronts.settings([(run.name, run.config, run.summary) for run in runs if run.summary])
    if len(found) < 2:
        return
    page.section("Accuracy and size")
    page.table(fronts.HEADER, fronts.settings_table(found))
    caption = "Up and to the left is better; the bars are one standard deviation over seeds."
    page.plots(
        [
            ("Accuracy against weights", caption, fronts.front_by(found, "nonzero_weights", "weights left")),
            ("Accuracy against multiply-adds", caption, fronts.front_by(found, "macs", "multiply-adds of one image")),
        ]
    )


def _training(page: Page, runs: list[RunRecord]) -> None:
    everything = [(run.name, run.rows) for run in runs]
    evaluations = [(run.name, run.of("eval")) for run in runs]
    training = [(run.name, run.of("train")) for run in runs]
    ends = [(r.name, r.result("sparsity", MEASURED_SPARSITY), r.result("top1", VAL_TOP1)) for r in runs]
    page.section("Training")
    page.plots(
        [
            ("Accuracy", "On the validation images, after each evaluation.", curves.accuracy(evaluations)),
            ("Sparsity", "Share of zero weights against the target.", curves.sparsities(training)),
            ("Loss", "Long series are averaged over neighboring rows.", curves.losses(everything)),
            ("Accuracy against sparsity", "Up and to the right is better.", curves.front(evaluations, ends)),
            ("Multiply-adds", "Of one image, as a share of the dense network's.", curves.costs(training)),
            ("Learning rates", "Of the weights and of the thresholds.", curves.rates(training)),
        ]
    )


def _layers(page: Page, runs: list[RunRecord]) -> None:
    layered = [(run.name, run.layers) for run in runs if run.layers]
    if not layered:
        page.note("No layer statistics were recorded: the run was not pruned, or was not evaluated yet.")
        return
    page.section("Layers")
    maps = []
    for run in runs:
        if run.history.steps:
            figure = heat_map(run.history.thinned(HEAT_COLUMNS))
            title = "Sparsity of the layers over time" + (f": {run.name}" if len(runs) > 1 else "")
            maps.append((title, "One row per layer, one column per evaluation.", figure))
    page.plots(maps, wide=len(maps) == 1)
    page.plots(
        [
            ("Allocation", "What the budget gave to each layer.", plots.allocation(layered)),
            ("Estimate", "Each point is a layer.", plots.predicted_against_measured(layered)),
            ("Costly layers", "Top-1 gained with one layer dense again.", plots.layer_gains(layered)),
            *(_weights(run, several=len(runs) > 1) for run in runs if run.histograms),
        ]
    )
    for run in runs:
        if run.layers:
            if len(runs) > 1:
                page.note(run.name)
            page.table(*layer_table(run.layers), text_columns=(1, 10))


def _weights(run: RunRecord, *, several: bool) -> tuple[str, str, Figure]:
    """Histogram of the weights before and after, of the network and, by choice, of each layer."""
    found = run.histograms
    width = 2 * RANGE / BINS
    x = [round(-RANGE + (i + 0.5) * width, 4) for i in range(BINS)]
    whole = [[sum(column) for column in zip(*(getattr(h, key) for h in found))] for key in ("before", "after")]
    choices = [{"name": "all pruned layers", "y": whole}, *({"name": h.name, "y": [h.before, h.after]} for h in found)]
    data = [
        {
            "type": "bar",
            "x": x,
            "y": y,
            "name": name,
            "marker": {"color": shade},
            "hovertemplate": "%{x:.2f} σ<br>%{y:,} weights<extra></extra>",
        }
        for y, name, shade in zip(whole, ("dense", "left after pruning"), ("#cbd5e1", color(0)))
    ]
    layout = {"barmode": "overlay", "bargap": 0, "xaxis": axis("weight, in the layer's σ"), "yaxis": axis("weights")}
    figure = {"data": data, "layout": layout, "choices": choices}
    return ("Weights" + (f": {run.name}" if several else ""), "Dense weights, and those left after pruning.", figure)


LAYER_HEADER = (
    *(
        "layer",
        "type",
        "shape",
        "weights",
        "multiply-adds",
        "threshold r",
        "σ",
        "predicted",
        "measured",
        "estimate error",
    ),
    *("kept dense because", "top-1 with it dense"),
)


def layer_table(rows: list[LayerRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of layers."""

    def number(value: Any, form: str) -> str:
        return "" if value is None else format(value, form)

    table = []
    for row in rows:
        counts = [number(row.get("weights"), ",.0f"), number(row.get("macs"), ",.0f")]
        state = [number(row.get("threshold"), ".4f"), number(row.get("sigma"), ".3g")]
        shares = [number(row.get("predicted_sparsity"), ".2%"), number(row.get("measured_sparsity"), ".2%")]
        error = number(estimate_error(row) if is_pruned(row) else None, "+.2%")
        shape = "×".join(map(str, row.get("shape", ())))
        dense = number(row.get("dense_gain"), "+.2%")
        table.append([row["name"], row.get("type", ""), shape, *counts, *state, *shares, error, row.get("reason", ""), dense])
    return list(LAYER_HEADER), table


def _deployment(page: Page, runs: list[RunRecord]) -> None:
    """What ``asp-dist bench deploy`` measured of the runs, if anything."""
    measured = [run for run in runs if run.deploy]
    if measured:
        page.section("Deployment")
    for run in measured:
        found, several = run.deploy, len(runs) > 1
        how = f"{found['machine']}, {found['threads']} thread(s), batch {found['batch_size']}"
        page.note((f"{run.name}: " if several else "") + f"{how}. " + "; ".join(at["verdict"] for at in found["sizes"]) + ".")
        cells = []
        for at in found["sizes"]:
            for row in sorted(at["rows"], key=lambda row: row["median"]):
                size = "" if row["size"] is None else f"{row['size'] / 1e6:.2f}"
                times = [f"{row[key] * 1e3:.2f}" for key in ("median", "fastest", "slowest")]
                cells.append(["×".join(map(str, at["input"][1:])), row["runtime"], row["network"], *times, size])
        page.table(["image", "runtime", "network", "ms", "fastest", "slowest", "file, MB"], cells, text_columns=(1, 2))


def _running(page: Page, runs: list[RunRecord]) -> None:
    training = [(run.name, run.of("train")) for run in runs]
    page.section("Running")
    page.plots(
        [
            ("Where a step's time goes", "Mean over the later half of the run.", curves.step_time(training)),
            ("Speed", "Images per second over all workers.", curves.speed(training)),
        ]
    )
    page.section("Checkpoints, warnings and other events")
    events = [(run.name, row) for run in runs for row in run.of("event")][-EVENTS:]
    if events:
        cells = [
            [name, row["step"], _clock(row.get("time")), row.get("event", ""), row.get("message", "")] for name, row in events
        ]
        page.table(["run", "step", "time", "event", "message"], cells, text_columns=(3, 4))
    else:
        page.note("None were recorded.")
    page.section("Configuration")
    for run in runs:
        page.folded(f"{run.name}: {CONFIG_FILE}", run.config or "not found")
        if run.summary:
            page.folded(f"{run.name}: {SUMMARY_FILE}", json.dumps(run.summary, indent=1))


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))

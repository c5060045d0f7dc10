"""The layers over time: compact rows per evaluation in ``layers.jsonl``, the latest rows whole in ``layers.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from asp_dist.files import write_text
from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.rows import MetricsFile, outliving, plain, read_rows
from asp_dist.tracking.schema import LAYERS, LAYERS_FILE, LAYERS_HISTORY_FILE

# One row per layer, in this order in every table that is shown.
COLUMNS = ("name", "type", "shape", "weights", "macs", "threshold", "sigma", "predicted_sparsity", "measured_sparsity")
SERIES = ("measured_sparsity", "predicted_sparsity", "threshold", "sigma")


class LayerHistory:
    """Steps, and for each pruned layer its sparsities, threshold and sigma at those steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.names: list[str] = []
        self.series: dict[str, list[list[float | None]]] = {key: [] for key in SERIES}

    def add(self, step: int, columns: dict[str, Any]) -> None:
        """Add one evaluation: `columns` maps ``name`` and each of `SERIES` to one value per pruned layer.

        A changed list of layers starts anew: a heat map has one set of rows.
        """
        if columns["name"] != self.names:
            self.names, self.steps = list(columns["name"]), []
            self.series = {key: [] for key in SERIES}
        self.steps.append(step)
        for key in SERIES:
            self.series[key].append(columns.get(key) or [None] * len(self.names))

    def until(self, step: int) -> LayerHistory:
        """The evaluations up to `step`."""
        count = sum(s <= step for s in self.steps)
        early = LayerHistory()
        early.names, early.steps = self.names, self.steps[:count]
        early.series = {key: values[:count] for key, values in self.series.items()}
        return early

    def rows_at(self, step: int, latest: list[LayerRow]) -> list[LayerRow]:
        """The layer rows of an earlier evaluation: its numbers, with the rest (types, shapes) from the `latest` rows."""
        at = self.steps.index(step)
        then = {name: {key: self.series[key][at][i] for key in SERIES} for i, name in enumerate(self.names)}
        rows = []
        for row in latest:
            fixed = {key: row.get(key) for key in (*COLUMNS, "pruned", "reason")}
            rows.append(cast(LayerRow, {**fixed, **then.get(row["name"], {})}))
        return rows

    def thinned(self, points: int) -> LayerHistory:
        """At most `points` evaluations, spread evenly, the last one always among them."""
        stride = max(1, -(-len(self.steps) // max(1, points)))
        keep = range(len(self.steps) - 1, -1, -stride)[::-1]
        thin = LayerHistory()
        thin.names, thin.steps = self.names, [self.steps[i] for i in keep]
        thin.series = {key: [values[i] for i in keep] for key, values in self.series.items()}
        return thin


def read_history(run_dir: Path) -> LayerHistory:
    """The rows of a run's ``layers.jsonl``; empty if there is none."""
    history = LayerHistory()
    for row in read_rows(run_dir / LAYERS_HISTORY_FILE):
        history.add(int(row["step"]), row)
    return history


def read_layers(run_dir: Path) -> list[LayerRow]:
    """The latest layer rows of a run, unpruned layers included; empty if there are none."""
    path = run_dir / LAYERS_FILE
    if not path.exists():
        return []
    rows: list[LayerRow] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def is_pruned(row: LayerRow) -> bool:
    """Whether the row is of a layer that is pruned."""
    return bool(row.get("pruned", True))


def estimate_error(row: LayerRow) -> float | None:
    """Predicted minus measured sparsity: the error of the Gaussian estimate; None for an unpruned layer."""
    predicted, measured = row.get("predicted_sparsity"), row.get("measured_sparsity")
    return None if predicted is None or measured is None else predicted - measured


class LayerFile:
    """Keeps ``layers.jsonl`` and ``layers.json`` of a run, and the history that the charts are drawn from."""

    def __init__(self, run_dir: Path, resume_step: int = 0) -> None:
        self.run_dir = run_dir
        self._file = MetricsFile(run_dir / LAYERS_HISTORY_FILE, resume_step)
        self.history = LayerHistory()
        for row in self._file.kept:
            self.history.add(int(row["step"]), row)

    def add(self, step: int, rows: list[LayerRow]) -> bool:
        """Record the layers at `step`; False if that step is recorded already."""
        pruned = [row for row in rows if is_pruned(row)]
        columns = {key: [_rounded(row.get(key)) for row in pruned] for key in ("name", *SERIES)}
        written = self._file.append(step, {"kind": LAYERS, **columns})
        if written is None:
            return False
        self.history.add(step, written)
        with outliving(self.run_dir / LAYERS_FILE):  # the next evaluation writes it anew
            write_json(self.run_dir / LAYERS_FILE, rows)
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _rounded(value: Any) -> Any:
    value = plain(value)
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as strict JSON, so that a reader never sees half of it."""
    write_text(path, json.dumps(plain(value), indent=1) + "\n", durable=False)

"""What wandb shows of the layers: four objects per evaluation, not four charts per layer."""

from __future__ import annotations

from typing import Any

from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.heat_map import heat_map
from asp_dist.tracking.layer_rows import COLUMNS, LayerHistory, estimate_error, is_pruned
from asp_dist.tracking.schema import LAYERS_HEAT_MAP, LAYERS_LINES, LAYERS_SPARSITY, LAYERS_TABLE

EXTRA = ("dense_top1", "dense_gain", "extra_pruned_top1", "reason")
CHART_ROWS = 10_000  # wandb draws no more rows of a custom chart's table
HEAT_COLUMNS = 64


def table_columns(rows: list[LayerRow]) -> list[str | int]:
    """The columns of the layer table: the fixed ones, the estimate's error, and what else some row has."""
    extra = [key for key in EXTRA if any(row.get(key) not in (None, "") for row in rows)]
    return [*COLUMNS, "estimate_error", *extra]


def table_rows(rows: list[LayerRow]) -> list[list[Any]]:
    """The rows of the layer table, as `table_columns` names them."""
    columns = table_columns(rows)
    full = [{**row, "shape": "x".join(map(str, row.get("shape", ()))), "estimate_error": estimate_error(row)} for row in rows]
    return [[row.get(str(key)) for key in columns] for row in full]


def charts(rows: list[LayerRow], history: LayerHistory) -> dict[str, Any]:
    """One table, one histogram, one heat map and one line chart.

    Args:
        rows: the layers now, unpruned ones included (which are only in the table).
        history: the pruned layers over the evaluations so far.
    """
    import plotly.graph_objects as go
    import wandb

    sparsities = [row["measured_sparsity"] for row in rows if is_pruned(row) and row.get("measured_sparsity") is not None]
    logged: dict[str, Any] = {LAYERS_TABLE: wandb.Table(columns=table_columns(rows), data=table_rows(rows))}
    if sparsities:
        logged[LAYERS_SPARSITY] = wandb.Histogram(sparsities, num_bins=32)
    if history.steps:
        logged[LAYERS_HEAT_MAP] = wandb.Plotly(go.Figure(heat_map(history.thinned(HEAT_COLUMNS))))
        lines = history.thinned(max(2, CHART_ROWS // max(1, len(history.names))))
        logged[LAYERS_LINES] = wandb.plot.line_series(
            xs=lines.steps,
            ys=[list(layer) for layer in zip(*lines.series["measured_sparsity"])],
            keys=lines.names,
            title="Sparsity per layer",
            xname="global_step",
        )
    return logged

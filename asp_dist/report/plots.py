"""The pictures of the layers, as plotly's plain dictionaries: a figure is ``{"data": [...], "layout": {...}}``."""

from __future__ import annotations

from typing import Any

from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.heat_map import PERCENT, Figure, axis, short
from asp_dist.tracking.layer_rows import is_pruned

COLORS = ("#2563eb", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d", "#b91c1c")
GREY = "#6b7280"


def color(index: int) -> str:
    """The color of the run or series number `index`."""
    return COLORS[index % len(COLORS)]


def allocation(runs: list[tuple[str, list[LayerRow]]]) -> Figure:
    """Sparsity of each layer against its depth, above; its dense and remaining weights, below."""
    data: list[dict[str, Any]] = []
    for index, (name, rows) in enumerate(runs):
        pruned = [(i, row) for i, row in enumerate(rows) if is_pruned(row)]
        x = [i for i, _ in pruned]
        text = [row["name"] for _, row in pruned]
        sparsity = [short(row.get("measured_sparsity")) for _, row in pruned]
        data.append(_layers(x, sparsity, text, name, index, "y", "%{text}<br>%{y:.2%} zeros"))
        if index == 0:
            dense = [row["weights"] for _, row in pruned]
            data.append(_layers(x, dense, text, "weights, dense", -1, "y2", "%{text}<br>%{y:,} weights"))
        left = [round(row["weights"] * (1 - (row.get("measured_sparsity") or 0.0))) for _, row in pruned]
        data.append(_layers(x, left, text, f"{name}: weights left", index, "y2", "%{text}<br>%{y:,} left"))
    layout = {
        "height": 560,
        "xaxis": axis("layer, from input to output", anchor="y2"),
        "yaxis": axis("measured sparsity", tickformat=PERCENT, domain=[0.45, 1]),
        "yaxis2": axis("weights", type="log", domain=[0, 0.38], dtick=1),
    }
    return {"data": data, "layout": layout}


def _layers(x: list[int], y: list[Any], text: list[str], name: str, index: int, yaxis: str, hover: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": x,
        "y": y,
        "text": text,
        "name": name,
        "yaxis": yaxis,
        "line": {"color": GREY if index < 0 else color(index), "width": 1, "dash": "dot" if yaxis == "y2" else "solid"},
        "marker": {"size": 6},
        "hovertemplate": f"{hover}<extra></extra>",
    }


def predicted_against_measured(runs: list[tuple[str, list[LayerRow]]]) -> Figure:
    """One point per layer; on the diagonal the Gaussian estimate is right."""
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, 1],
            "y": [0, 1],
            "name": "estimate = count",
            "line": {"color": GREY, "dash": "dot", "width": 1},
        }
    ]
    for index, (name, rows) in enumerate(runs):
        pruned = [row for row in rows if is_pruned(row)]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [short(row.get("predicted_sparsity")) for row in pruned],
                "y": [short(row.get("measured_sparsity")) for row in pruned],
                "text": [row["name"] for row in pruned],
                "name": name,
                "marker": {"size": 8, "color": color(index), "opacity": 0.75},
                "hovertemplate": "%{text}<br>predicted %{x:.2%}<br>measured %{y:.2%}<extra></extra>",
            }
        )
    values = [v for trace in data[1:] for v in (*trace["x"], *trace["y"]) if v is not None]
    low = max(0.0, min(values, default=0.0) - 0.05)
    layout = {
        "xaxis": axis("predicted sparsity, erf(r/√2)", tickformat=PERCENT, range=[low, 1.01]),
        "yaxis": axis("measured sparsity", tickformat=PERCENT, range=[low, 1.01]),
    }
    return {"data": data, "layout": layout}


def layer_gains(runs: list[tuple[str, list[LayerRow]]], most: int = 25) -> Figure | None:
    """What top-1 gains when one layer gets its dense weights back, the costliest layers first; None if not measured."""
    data = []
    for index, (name, rows) in enumerate(runs):
        measured = [row for row in rows if row.get("dense_gain") is not None]
        ranked = sorted(measured, key=lambda row: -row["dense_gain"])[:most]
        if ranked:
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "x": [short(row["dense_gain"]) for row in ranked],
                    "y": [row["name"] for row in ranked],
                    "name": name,
                    "marker": {"color": color(index)},
                    "hovertemplate": "%{y}<br>%{x:+.2%} top-1<extra></extra>",
                }
            )
    if not data:
        return None
    yaxis = {"autorange": "reversed", "automargin": True, "tickfont": {"size": 10}}
    layout = {"height": 480, "xaxis": axis("gain in top-1 with the layer dense", tickformat="+.1%"), "yaxis": yaxis}
    return {"data": data, "layout": layout}

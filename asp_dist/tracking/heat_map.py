"""The heat map of sparsity over layers and time, as plotly's plain dictionaries: ``{"data": [...], "layout": {...}}``."""

from __future__ import annotations

import math
from typing import Any

from asp_dist.tracking.layer_rows import LayerHistory

Figure = dict[str, Any]
PERCENT = ".0%"


def short(value: Any, digits: int = 5) -> Any:
    """A number with `digits` significant digits, so that the file stays small; anything not finite becomes None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


def heat_map(history: LayerHistory, key: str = "measured_sparsity") -> Figure:
    """One row per layer from the input on top to the output, one column per evaluation; sparsity as color."""
    trace = {
        "type": "heatmap",
        "z": [[short(value, 4) for value in layer] for layer in zip(*history.series[key])],
        "x": [str(step) for step in history.steps],
        "y": history.names,
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "sparsity"}, "tickformat": PERCENT, "thickness": 12},
        "hovertemplate": "%{y}<br>step %{x}<br>sparsity %{z:.2%}<extra></extra>",
    }
    height = max(320, min(1400, 90 + 13 * len(history.names)))
    layout = {
        "height": height,
        "xaxis": axis("optimizer step", type="category", nticks=10),
        "yaxis": {"autorange": "reversed", "automargin": True, "tickfont": {"size": 9}},
    }
    return {"data": [trace], "layout": layout}

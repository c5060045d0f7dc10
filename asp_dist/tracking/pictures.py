"""Plotly pictures that wandb and the report share."""

from __future__ import annotations

from typing import Any

from asp_dist.tracking.layers import LayerHistory


def heat_map(history: LayerHistory, key: str = "measured_sparsity") -> Any:
    """One row per layer from the input on top to the output, one column per evaluation; sparsity as colour."""
    import plotly.graph_objects as go

    values = [[None if v is None else round(v, 4) for v in layer] for layer in zip(*history.series[key])]
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=[str(step) for step in history.steps],
            y=history.names,
            zmin=0,
            zmax=1,
            colorscale="Viridis",
            colorbar={"title": {"text": "sparsity"}, "tickformat": ".0%"},
            hovertemplate="%{y}<br>step %{x}<br>sparsity %{z:.2%}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="optimizer step")
    return figure

"""The pictures over time, and of the step's time: one trace per run and quantity."""

from __future__ import annotations

from typing import Any

from asp_dist.report.plots import GREY, color
from asp_dist.tracking.heat_map import Figure, axis, short
from asp_dist.tracking.rows import Row
from asp_dist.tracking.schema import (
    DATA_TIME,
    FORWARD_BACKWARD_TIME,
    IMAGES_PER_SECOND,
    LR,
    MACS_DENSITY,
    MEASURED_SPARSITY,
    PREDICTED_SPARSITY,
    STEP_TIME,
    TARGET_SPARSITY,
    THRESHOLD_LR,
    TOTAL_SPARSITY,
    TRAIN_LOSS,
    VAL_EMA_TOP1,
    VAL_LOSS,
    VAL_TOP1,
    VAL_TOP5,
)

POINTS = 600  # per trace; a longer series is averaged over neighboring rows

Rows = list[tuple[str, list[Row]]]  # name of the run, and its rows

# key, name, dash
Quantity = tuple[str, str, str]


def thinned(x: list[float], y: list[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Means over equal runs of neighbors, `points` of them at most; the last point is kept as it is."""
    width = -(-len(x) // max(1, points - 1)) if len(x) > points else 1
    if width <= 1:
        return x, y
    return _means(x, width), _means(y, width)


def _means(values: list[float], width: int) -> list[float]:
    groups = [values[i : i + width] for i in range(0, len(values) - 1, width)]
    return [*(sum(group) / len(group) for group in groups), values[-1]]


def series(rows: list[Row], key: str) -> tuple[list[Any], list[Any]]:
    """Epochs and values of `key`, thinned and rounded; rows without it are passed over."""
    points: list[tuple[Any, Any]] = [
        (row.get("epoch", row["step"]), row[key]) for row in rows if short(row.get(key)) is not None
    ]
    x, y = thinned([p[0] for p in points], [p[1] for p in points])
    return [short(value, 6) for value in x], [short(value) for value in y]


def lines(runs: Rows, quantities: list[Quantity], title: str, *, form: str = "", log: bool = False) -> Figure | None:
    """Quantities over epochs. One run: a color per quantity. Several: a color per run, a dash per quantity.

    Args:
        runs: the rows of each run.
        quantities: keys to draw; a key that no row has is left out.
        title: title of the vertical axis.
        form: its number format.
        log: logarithmic vertical axis.

    Returns:
        The figure, or None if there is nothing to draw.
    """
    data: list[dict[str, Any]] = []
    for r, (name, rows) in enumerate(runs):
        for q, (key, label, dash) in enumerate(quantities):
            x, y = series(rows, key)
            if not y:
                continue
            alone = len(runs) == 1
            shade = (GREY if label == "target" else color(q)) if alone else color(r)
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(x) > 60 else "lines+markers",
                    "x": x,
                    "y": y,
                    "name": label if alone else f"{name}: {label}",
                    "line": {"color": shade, "width": 2, "dash": dash},
                    "marker": {"size": 5},
                    "hovertemplate": f"epoch %{{x:.2f}}<br>{label} %{{y{':' + form if form else ''}}}<extra>{name}</extra>",
                }
            )
    if not data:
        return None
    yaxis = axis(
        title,
        **({"tickformat": form} if form else {}),
        **({"type": "log", "dtick": 1, "exponentformat": "power"} if log else {}),
    )
    return {"data": data, "layout": {"xaxis": axis("epoch"), "yaxis": yaxis}}


def accuracy(runs: Rows) -> Figure | None:
    """Validation accuracy over epochs."""
    return lines(
        runs,
        [
            (VAL_TOP1, "top-1", "solid"),
            (VAL_TOP5, "top-5", "dot"),
            (VAL_EMA_TOP1, "top-1 of the average", "dash"),
        ],
        "accuracy",
        form=".1%",
    )


def losses(runs: Rows) -> Figure | None:
    """Training and validation loss over epochs."""
    return lines(runs, [(TRAIN_LOSS, "training", "solid"), (VAL_LOSS, "validation", "dash")], "loss")


def sparsities(runs: Rows) -> Figure | None:
    """Target, predicted and measured sparsity over epochs."""
    quantities: list[Quantity] = [
        (MEASURED_SPARSITY, "measured", "solid"),
        (PREDICTED_SPARSITY, "predicted", "dash"),
        (TOTAL_SPARSITY, "over all weights", "dashdot"),
        (TARGET_SPARSITY, "target", "dot"),
    ]
    # Of several runs only what was reached and what was asked for: more lines could not be told apart.
    return lines(runs, quantities if len(runs) == 1 else quantities[::3], "sparsity", form=".1%")


def costs(runs: Rows) -> Figure | None:
    """Multiply-adds left, as a share of the dense network's."""
    return lines(runs, [(MACS_DENSITY, "multiply-adds left", "solid")], "share of the dense network", form=".1%")


def rates(runs: Rows) -> Figure | None:
    """Learning rates."""
    quantities: list[Quantity] = [(LR, "weights", "solid"), (THRESHOLD_LR, "thresholds", "dash")]
    return lines(runs, quantities, "learning rate", log=True)


def speed(runs: Rows) -> Figure | None:
    """Images per second over epochs."""
    return lines(runs, [(IMAGES_PER_SECOND, "images/s", "solid")], "images per second")


PHASES = ((DATA_TIME, "waiting for images"), (FORWARD_BACKWARD_TIME, "forward and backward"))


def step_time(runs: Rows) -> Figure | None:
    """Where a step's time goes, the mean over the later half of the run, in milliseconds."""
    later = [(name, [row for row in rows if short(row.get(STEP_TIME))]) for name, rows in runs]
    later = [(name, rows[len(rows) // 2 :]) for name, rows in later if rows]
    if not later:
        return None
    means = {}
    for key in (DATA_TIME, FORWARD_BACKWARD_TIME, STEP_TIME):
        means[key] = [1e3 * sum(row.get(key) or 0.0 for row in rows) / len(rows) for _, rows in later]
    rest = [max(0.0, t - d - f) for t, d, f in zip(means[STEP_TIME], means[DATA_TIME], means[FORWARD_BACKWARD_TIME])]
    bars = [(label, means[key]) for key, label in PHASES] + [("optimizer, pruning, the rest", rest)]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [name for name, _ in later],
            "x": [short(value) for value in values],
            "name": label,
            "marker": {"color": color(i)},
            "hovertemplate": f"{label}<br>%{{x:.1f}} ms<extra></extra>",
        }
        for i, (label, values) in enumerate(bars)
    ]
    yaxis = {"automargin": True, "autorange": "reversed"}
    layout = {
        "barmode": "stack",
        "height": 170 + 40 * len(later),
        "xaxis": axis("milliseconds per step"),
        "yaxis": yaxis,
    }
    return {"data": data, "layout": layout}


def front(runs: Rows, finals: list[tuple[str, float | None, float | None]]) -> Figure | None:
    """Accuracy against sparsity: each run's trajectory and end point, and the Pareto front.

    Args:
        runs: the evaluation rows of each run.
        finals: name, final sparsity and final top-1 of each run.
    """
    data: list[dict[str, Any]] = []
    for index, (name, rows) in enumerate(runs):
        points = [
            (r[MEASURED_SPARSITY], r[VAL_TOP1])
            for r in rows
            if short(r.get(MEASURED_SPARSITY)) is not None and short(r.get(VAL_TOP1)) is not None
        ]
        if points:
            data.append(_way(name, points, index))
    ends = [(name, s, a) for name, s, a in finals if s is not None and a is not None]
    if ends:
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [short(s) for _, s, _ in ends],
                "y": [short(a) for _, _, a in ends],
                "text": [name for name, _, _ in ends],
                "textposition": "top center",
                "name": "end of the run",
                "marker": {
                    "size": 11,
                    "color": [color(i) for i in range(len(ends))],
                    "line": {"width": 1, "color": "#111"},
                },
                "hovertemplate": "%{text}<br>sparsity %{x:.2%}<br>top-1 %{y:.2%}<extra></extra>",
            }
        )
    best = pareto([(s, a) for _, s, a in ends])
    if len(best) > 1:
        shape = {"color": GREY, "shape": "vh", "width": 1}
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "front",
                "line": shape,
                "x": [p[0] for p in best],
                "y": [p[1] for p in best],
            }
        )
    if not data:
        return None
    layout = {"xaxis": axis("measured sparsity", tickformat=".1%"), "yaxis": axis("top-1", tickformat=".1%")}
    return {"data": data, "layout": layout}


def _way(name: str, points: list[tuple[float, float]], index: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [short(p[0]) for p in points],
        "y": [short(p[1]) for p in points],
        "name": f"{name}: evaluations",
        "opacity": 0.45,
        "line": {"color": color(index), "width": 1},
        "marker": {"size": 4},
        "hovertemplate": "sparsity %{x:.2%}<br>top-1 %{y:.2%}<extra></extra>",
    }


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats in both coordinates, by rising first coordinate."""
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]

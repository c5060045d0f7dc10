"""Several runs as a front: those that differ in nothing but their seed are one setting, with a mean and a spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from asp_dist.config import FREE_ON_RESUME, flatten, is_among
from asp_dist.report.curves import pareto
from asp_dist.report.plots import GREY, color
from asp_dist.tracking.heat_map import Figure, axis, short

SEED = "training.seed"
MOST_FIELDS = 3  # in a setting's name; where more differ, it has the name of its first run

# A run's name, the text of its config.yaml, and its summary.
Finished = tuple[str, str, dict[str, Any]]


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed.

    Attributes:
        name: what sets it apart from the others.
        runs: their names.
        summaries: theirs.
    """

    name: str
    runs: tuple[str, ...]
    summaries: tuple[dict[str, Any], ...]

    def mean(self, key: str) -> float | None:
        """The mean of a key of the summaries; None where one has it not."""
        values = [summary.get(key) for summary in self.summaries]
        numbers = [float(value) for value in values if value is not None]
        return statistics.fmean(numbers) if len(numbers) == len(values) else None

    def spread(self, key: str) -> float | None:
        """The sample standard deviation of a key; None of a single run."""
        values = [float(summary[key]) for summary in self.summaries if summary.get(key) is not None]
        return statistics.stdev(values) if len(values) > 1 else None


def settings(found: Sequence[Finished]) -> list[Setting]:
    """The settings of these runs, in their order; the first seed's position counts."""
    trees = [_compared(config) for _, config, _ in found]
    groups: dict[str, list[int]] = {}
    for index, tree in enumerate(trees):
        key = repr(sorted((name, repr(value)) for name, value in tree.items())) if tree else found[index][0]
        groups.setdefault(key, []).append(index)
    first = [trees[members[0]] for members in groups.values()]
    names = dict.fromkeys(name for tree in first for name in tree)
    differing = [name for name in names if len({repr(tree.get(name)) for tree in first}) > 1]
    result = []
    for members, tree in zip(groups.values(), first):
        runs, summaries = tuple(found[i][0] for i in members), tuple(found[i][2] for i in members)
        label = ", ".join(f"{name.rpartition('.')[2]} {_word(tree.get(name))}" for name in differing)
        result.append(Setting(label if 0 < len(differing) <= MOST_FIELDS else runs[0], runs, summaries))
    return result


def _compared(config: str) -> dict[str, Any]:
    """The fields of a stored configuration that tell settings apart."""
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    flat = flatten(tree) if isinstance(tree, dict) else {}
    return {name: value for name, value in flat.items() if not is_among(name, (*FREE_ON_RESUME, "name", SEED))}


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def front_by(found: Sequence[Setting], key: str, title: str) -> Figure | None:
    """Top-1 against a cost: a point per setting, with its spread over seeds, and the front.

    Args:
        found: the settings; those without the cost are left out.
        key: the cost, a key of the summary; less of it is better.
        title: of the horizontal axis.

    Returns:
        The figure; None for fewer than two points.
    """
    points = [(s, s.mean(key), s.mean("top1"), s.spread("top1")) for s in found]
    shown = [(s, x, y, spread) for s, x, y, spread in points if x is not None and y is not None]
    if len(shown) < 2:
        return None
    ends = {
        "type": "scatter",
        "mode": "markers+text",
        "name": "mean of the seeds",
        "x": [short(x) for _, x, _, _ in shown],
        "y": [short(y) for _, _, y, _ in shown],
        "text": [s.name for s, _, _, _ in shown],
        "textposition": "top center",
        "cliponaxis": False,
        "marker": {"size": 11, "color": [color(i) for i in range(len(shown))], "line": {"width": 1, "color": "#111"}},
        "error_y": {"type": "data", "array": [short(spread or 0.0) for *_, spread in shown], "thickness": 1, "color": GREY},
        "hovertemplate": "%{text}<br>" + title + " %{x:,}<br>top-1 %{y:.2%}<extra></extra>",
    }
    best = front([(x, y) for _, x, y, _ in shown])
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "front",
        "x": [short(x) for x, _ in best],
        "y": [short(y) for _, y in best],
        "line": {"color": GREY, "shape": "hv", "width": 1},
    }
    return {"data": [ends, line], "layout": {"xaxis": axis(title), "yaxis": axis("top-1", tickformat=".1%")}}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (cost, accuracy) that none of the others beats in both, by rising cost."""
    return [(-saved, accuracy) for saved, accuracy in reversed(pareto([(-cost, accuracy) for cost, accuracy in points]))]


HEADER = ("setting", "runs", "top-1", "± over seeds", "weights left", "multiply-adds", "bytes as a sparse file")


def settings_table(found: Sequence[Setting]) -> list[list[str]]:
    """A row for each setting, under `HEADER`."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        [
            setting.name,
            str(len(setting.runs)),
            number(setting.mean("top1"), ".2%"),
            number(setting.spread("top1"), ".2%"),
            number(setting.mean("nonzero_weights"), ",.0f"),
            number(setting.mean("macs"), ",.0f"),
            number(setting.mean("bytes"), ",.0f"),
        ]
        for setting in found
    ]

"""Several runs as a front: seeds together, means, spreads, and which settings are on it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from make_run import make_run

from asp_dist.config import Config, to_dict
from asp_dist.report import write_report
from asp_dist.report.comparison import print_comparison
from asp_dist.report.fronts import front, front_by, settings, settings_table
from asp_dist.report.run_report import title_of


def finished(name: str, sparsity: float, seed: int, top1: float, weights: int) -> tuple[str, str, dict[str, Any]]:
    tree = to_dict(Config(name=name))
    tree["budget"]["sparsity"] = sparsity
    tree["training"]["seed"] = seed
    return name, yaml.safe_dump(tree), {"top1": top1, "nonzero_weights": weights, "macs": 10 * weights}


RUNS = [
    finished("a1", 0.8, 1, 0.70, 200),
    finished("a2", 0.8, 2, 0.74, 200),
    finished("b1", 0.9, 1, 0.75, 100),
    finished("b2", 0.9, 2, 0.71, 100),
    finished("c1", 0.95, 1, 0.60, 50),
]


def test_runs_that_differ_in_their_seed_alone_are_one_setting() -> None:
    found = settings(RUNS)
    assert [(s.name, s.runs) for s in found] == [
        ("sparsity 0.8", ("a1", "a2")),
        ("sparsity 0.9", ("b1", "b2")),
        ("sparsity 0.95", ("c1",)),
    ]
    assert found[0].mean("top1") == pytest.approx(0.72)
    assert found[0].spread("top1") == pytest.approx(0.04 / math.sqrt(2))
    assert found[2].spread("top1") is None and found[2].mean("bytes") is None
    assert settings_table(found)[1] == ["sparsity 0.9", "2", "73.00%", "2.83%", "100", "1,000", ""]


def test_runs_without_a_configuration_stand_for_themselves() -> None:
    found = settings([("a", "", {"top1": 0.5}), ("b", ": no yaml", {"top1": 0.6})])
    assert [s.runs for s in found] == [("a",), ("b",)]
    assert found[0].name == "a"


def test_the_front_has_what_nothing_beats_at_less_cost() -> None:
    assert front([(200, 0.72), (100, 0.73), (50, 0.60), (50, 0.5), (300, 0.73)]) == [(50, 0.60), (100, 0.73)]
    figure = front_by(settings(RUNS), "nonzero_weights", "weights left")
    assert figure is not None
    ends, line = figure["data"]
    assert list(zip(ends["x"], ends["y"])) == [(200, pytest.approx(0.72)), (100, pytest.approx(0.73)), (50, 0.6)]
    assert ends["error_y"]["array"] == [pytest.approx(0.02828, abs=1e-4)] * 2 + [0]
    assert list(zip(line["x"], line["y"])) == [(50, 0.6), (100, pytest.approx(0.73))]
    assert front_by(settings(RUNS)[:1], "macs", "") is None and front_by(settings(RUNS), "latency", "") is None


def test_many_runs_have_a_short_title() -> None:
    assert title_of(["a", "b", "c"]) == "a, b, c"
    assert title_of([f"sw-sparsity=0.{n}-seed=1" for n in range(4)]) == "sw-sparsity: 4 runs"
    assert title_of(["a", "b", "c", "d"]) == "4 runs"


def test_the_report_and_the_table_show_settings(tmp_path: Path) -> None:
    runs = []
    for name, config, summary in RUNS:
        run = make_run(tmp_path / name, epochs=1, rows_per_epoch=2, layers=2)
        (run / "config.yaml").write_text(config)
        old = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**old, **summary}))
        runs.append(run)
    page = write_report(runs).read_text()
    assert "Accuracy against weights" in page and "Accuracy against multiply-adds" in page and "sparsity 0.95" in page
    out = io.StringIO()
    print_comparison(runs, file=out)
    assert "± over seeds" in out.getvalue() and "sparsity 0.8" in out.getvalue()

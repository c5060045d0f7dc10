"""What a running job and a finished one print."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from asp_dist.config import Config
from asp_dist.pruning.names import LayerRow
from asp_dist.report import print_results
from asp_dist.tracking import Console
from asp_dist.tracking.console import Style, duration


def rows() -> list[dict[str, Any]]:
    """40 train rows, a second apart, with a validation every 10 rows and one warning."""
    made: list[dict[str, Any]] = []
    for i in range(1, 41):
        step = 10 * i
        train = {"train/loss": 2 / step, "train/images_per_second": 1234.5, "sparsity/target": 0.9}
        base = {"step": step, "epoch": step / 100, "time": 1000.0 + i}
        made.append({**base, "kind": "train", "sparsity/measured": 0.5 + step / 1000, **train})
        if i % 10 == 0:
            made.append({**base, "kind": "eval", "val/top1": 0.9, "val/loss": 0.3})
        if i == 20:
            made.append({**base, "kind": "event", "event": "warning", "message": "[x] careful"})
    return made


def shown(style: Style, given: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    with Console(Config(), 800, style=style, file=out) as console:
        for row in given:
            console.update(row)
    return out.getvalue()


def test_plain_output_is_few_lines() -> None:
    lines = shown("auto", rows()).splitlines()
    assert len(lines) == 6  # the first row, four validations, one warning
    assert lines[-1] == (
        "epoch 4.0/12  step 400/800  loss 0.0050  top-1 90.00%  sparsity 90.00% of 90.00%  images/s 1,234  left 40 s"
    )
    assert "[x] careful" in lines
    assert "\x1b" not in "".join(lines)


def test_json_prints_each_row_and_quiet_nothing() -> None:
    assert [json.loads(line) for line in shown("json", rows()).splitlines()] == rows()
    assert shown("quiet", rows()) == ""


def test_live_screen_shows_the_largest_layers_on_request(tmp_path: Path) -> None:
    layers: list[dict[str, Any]] = [
        {"name": name, "weights": weights, "measured_sparsity": sparsity, "threshold": 0.5, "pruned": name != "fc"}
        for name, weights, sparsity in (("stem", 100, 0.1), ("wide", 9000, 0.95), ("body", 5000, 0.5), ("fc", 9999, None))
    ]
    (tmp_path / "layers.json").write_text(json.dumps(layers))
    out = io.StringIO()
    with Console(Config(), 800, style="live", file=out, layers=2, folder=tmp_path) as console:
        console.update(rows()[0])
        layers[1]["measured_sparsity"] = 0.97
        (tmp_path / "layers.json").write_text(json.dumps(layers))
        console.update(rows()[1])
    text = out.getvalue()
    assert "wide" in text and "97.00%" in text and text.index("wide") < text.index("body")
    assert "stem" not in text and "fc" not in text
    assert "wide" not in shown("live", rows())


def test_live_screen_shows_the_last_state() -> None:
    text = shown("live", rows())
    header = next(line for line in text.splitlines() if "images/s" in line)
    assert "━" not in header and header.index("epoch") < 10  # the bar has a line of its own
    for part in ("400/800", "90.00% of 90.00%", "1,234", "40 s", "warning: [x] careful"):
        assert part in text


def test_time_left_starts_anew_after_a_resume() -> None:
    console = Console(Config(), 100, style="plain", file=io.StringIO())
    console.update({"step": 10, "kind": "train", "time": 0.0})
    console.update({"step": 10, "kind": "event", "event": "resume", "message": "from step 10", "time": 1000.0})
    console.update({"step": 20, "kind": "train", "time": 1000.0})
    assert console.time_left() is None
    console.update({"step": 40, "kind": "train", "time": 1010.0})
    assert console.time_left() == pytest.approx(30.0)


@pytest.mark.parametrize("style", ["plain", "live"])
def test_rows_without_values_do_not_break_the_screen(style: Style) -> None:
    text = shown(style, [{"step": 3, "kind": "eval", "train/loss": None}, {"step": 3, "event": "frozen"}])
    assert "3/800" in text
    assert "None" not in text


def test_results_table(tmp_path: Path) -> None:
    layers: list[LayerRow] = [
        {
            "name": "layer1.0.conv1",
            "shape": [64, 64, 3, 3],
            "weights": 36864,
            "threshold": 1.64,
            "predicted_sparsity": 0.899,
            "measured_sparsity": 0.9012,
            "pruned": True,
        },
        {"name": "fc", "shape": [10, 64], "weights": 640, "pruned": False, "reason": "fewer than 1000 weights"},
    ]
    summary = {"top1": 0.97314, "top5": 1.0, "sparsity": 0.9, "target_sparsity": 0.9, "nonzero_weights": 3686}
    summary |= {"prunable_weights": 36864, "images_per_second": 812.34}
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    out = io.StringIO()
    print_results(summary, layers, tmp_path, file=out)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[1] == ["layer1.0.conv1", "64×64×3×3", "36,864", "1.6400", "89.90%", "90.12%"]
    assert lines[2] == ["fc", "10×64", "640", "dense"]
    text = " ".join(" ".join(line) for line in lines)
    for part in (
        "fewer than 1000 weights (fc)",
        "top-1 97.31%",
        "sparsity 90.0000% (budget 90.00%), 3,686 of 36,864",
        "images/s 812.3",
        f"{tmp_path}: metrics.jsonl",
        f"wandb sync {tmp_path}/wandb/offline-run-*",
        f"next asp-dist evaluate {tmp_path}",
    ):
        assert part in text


@pytest.mark.parametrize(("seconds", "text"), [(12.4, "12 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text

"""The HTML report: what it holds, that it stays small, and that a browser draws all of it without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from make_run import make_run
from waiting import HANG_S

from asp_dist.errors import UserError
from asp_dist.report import write_report
from asp_dist.report.curves import pareto, thinned
from asp_dist.report.histograms import BINS, histograms
from asp_dist.tracking.rows import MetricsFile

TITLES = {
    *("Accuracy", "Sparsity", "Loss", "Accuracy against sparsity", "Multiply-adds", "Learning rates"),
    *(
        "Sparsity of the layers over time",
        "Allocation",
        "Estimate",
        "Weights",
        "Where a step&#x27;s time goes",
        "Speed",
    ),
}


def figures(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="figures" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    parsed: dict[str, Any] = json.loads(found.group(1))
    return parsed


def test_no_name_ends_the_pages_data(tmp_path: Path) -> None:
    """In a script element, ``<!--<script>`` hides the end of the element; a browser would show no picture."""
    run = make_run(tmp_path / "a<!--<script>b")
    page = write_report([run]).read_text(encoding="utf-8")
    data = page.split('type="application/json">')[1].split("</script>")[0]
    assert "<" not in data
    assert len(figures(page)) == 12


def test_report_holds_every_picture_and_the_events(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = write_report([run]).read_text(encoding="utf-8")
    assert page == (run / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r"<figcaption><b>(.*?)</b>", page)) == TITLES
    drawn = figures(page)
    assert len(drawn) == 12
    (heat,) = [f["data"][0] for f in drawn.values() if f["data"][0]["type"] == "heatmap"]
    assert (len(heat["z"]), len(heat["z"][0]), len(heat["x"])) == (8, 10, 10)
    assert heat["z"][-1][-1] == pytest.approx(0.99, abs=1e-4)
    assert drawn["figure1"]["data"][0]["y"][-1] == pytest.approx(0.76)
    assert "&lt;b&gt;not HTML&lt;/b&gt;" in page
    assert "step-00002000" in page
    assert "fewer than 1000 weights" in page
    for loaded in re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']([^\"']+)", page[:5000]):
        assert loaded.startswith("data:")


def test_several_runs_stand_side_by_side_with_their_front(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", top1=0.76, sparsity=0.9),
        make_run(tmp_path / "b", top1=0.71, sparsity=0.95, layers=5),
        make_run(tmp_path / "c", top1=0.70, sparsity=0.85),
    ]
    path = write_report(runs)
    assert path == tmp_path / "report.html"
    drawn = figures(path.read_text(encoding="utf-8"))
    heats = [f for f in drawn.values() if f["data"][0]["type"] == "heatmap"]
    assert [len(f["data"][0]["z"]) for f in heats] == [8, 5, 8]
    *_, front = [t for f in drawn.values() for t in f["data"] if t.get("name") == "front"]
    assert list(zip(front["x"], front["y"])) == [(0.9, 0.76), (0.95, 0.71)]


def test_an_unfinished_run_has_a_report_and_no_run_an_error(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    file.append(10, {"train/loss": 1.0, "epoch": 0.1})
    file.close()
    page = write_report([tmp_path / "run"]).read_text(encoding="utf-8")
    assert len(figures(page)) == 1
    assert "No layer statistics" in page
    with pytest.raises(UserError, match=r"contains no run: .*metrics.jsonl is missing"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(UserError, match="at least one run"):
        write_report([])


@pytest.mark.slow
def test_a_log_of_100_epochs_of_resnet50_stays_below_8_mb(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=100, rows_per_epoch=500, layers=54)
    assert write_report([run]).stat().st_size <= 8e6


def test_histograms_put_the_dense_weights_together_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", layers=2)
    found = histograms(run)
    assert [h.name for h in found] == ["layer1.0.conv1", "layer1.1.conv2"]
    for h in found:
        assert sum(h.before) == 16 * 8 * 9
        middle = h.after[BINS // 2 - 9 : BINS // 2 + 9]
        assert sum(middle) == 0  # the mask removed |w| <= sigma
        assert h.after[:20] == h.before[:20]
        assert h.sigma == pytest.approx(1.0, rel=0.1)


def test_thinning_keeps_means_and_the_last_point() -> None:
    x, y = thinned(list(range(1000)), [float(i % 2) for i in range(1000)], points=100)
    assert len(x) == len(y) <= 100
    assert (x[-1], y[-1]) == (999, 1.0)
    assert all(0.3 < value < 0.7 for value in y[:-1])
    assert x == sorted(x)


def test_pareto_front() -> None:
    assert pareto([(0.9, 0.7), (0.8, 0.75), (0.85, 0.6), (0.95, 0.5)]) == [(0.8, 0.75), (0.9, 0.7), (0.95, 0.5)]
    assert pareto([]) == []


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
    *("--enable-logging=stderr", "--virtual-time-budget=10000", "--window-size=1300,4000", "--dump-dom"),
)
MARKS = r'class="trace (?:scatter|bars)|<image[^>]*href="data:image/png'


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("several", [False, True])
def test_a_browser_draws_every_trace_from_disk_without_a_network(tmp_path: Path, several: bool) -> None:
    runs = [make_run(tmp_path / "a", layers=20)]
    if several:
        runs.append(make_run(tmp_path / "b", layers=20, top1=0.7, sparsity=0.95))
    path = write_report(runs)
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert "CONSOLE" not in done.stderr, done.stderr
    expected = {name: len(figure["data"]) for name, figure in figures(path.read_text(encoding="utf-8")).items()}
    blocks = re.split(r'<div id="(figure\d+)"', done.stdout)[1:]
    drawn = {name: len(re.findall(MARKS, body)) for name, body in zip(blocks[::2], blocks[1::2])}
    assert drawn == expected

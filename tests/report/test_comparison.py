"""The table of several runs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from make_run import make_run

from asp_dist.errors import UserError
from asp_dist.report.comparison import print_comparison
from asp_dist.report.run_report import write_report


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    results = {"worse": (0.70, 0.85), "sparse": (0.71, 0.95), "accurate": (0.76, 0.9)}
    return [make_run(tmp_path / n, epochs=1, rows_per_epoch=1, top1=t, sparsity=s) for n, (t, s) in results.items()]


def test_runs_stand_by_accuracy_with_the_front_marked(runs: list[Path]) -> None:
    out = io.StringIO()
    print_comparison(runs, file=out)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert [line[0] for line in lines] == ["run", "accurate", "sparse", "worse"]
    assert [line[1] == "*" for line in lines[1:]] == [True, True, False]
    assert lines[1][2:7] == ["resnet50", "76.00%", "93.00%", "90.0000%", "90.00%"]


def test_json_lines_hold_the_summaries(runs: list[Path]) -> None:
    out = io.StringIO()
    print_comparison(runs, as_json=True, file=out)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [(Path(row["run"]).name, row["front"], row["top1"]) for row in rows] == [
        ("accurate", True, 0.76),
        ("sparse", True, 0.71),
        ("worse", False, 0.7),
    ]


def test_folders_beside_the_runs_are_passed_over(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``runs/*`` brings them: the folders of a sweep or a rehearsal, a file, a run that goes on."""
    (tmp_path / "worse-sweep").mkdir()
    (tmp_path / "report.html").write_text("")
    everything = sorted(tmp_path.iterdir())
    out = io.StringIO()
    print_comparison(everything, file=out)
    assert len(out.getvalue().splitlines()) == 4
    assert "report.html" in capsys.readouterr().err
    assert write_report(everything, tmp_path / "all.html").is_file()


def test_a_folder_without_a_finished_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"summary.json is missing"):
        print_comparison([tmp_path])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        print_comparison([tmp_path])

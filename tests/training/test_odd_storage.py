"""Output folders on storages that lack calls, answer late or fail for a while, by patched calls in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import small_config
from waiting import HANG_S

from asp_dist.checkpoint.record import run_dir
from asp_dist.config import to_dict
from asp_dist.tracking import read_rows

TOOL = Path(__file__).parents[1] / "tools" / "odd_storage.py"
# A storage may take longer: tried by hand with ASP_DIST_ODD_STORAGE=30, 60 s late and 60 s away.
TIMES = float(os.environ.get("ASP_DIST_ODD_STORAGE", "1"))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "seconds"), [("bare", 0.0), ("late", 2.0 * TIMES), ("failing", 2.0 * TIMES)])
def test_a_run_ends_right(tmp_path: Path, how: str, seconds: float) -> None:
    epochs = 60 if how == "failing" else 10
    config = small_config(
        tmp_path / "odd",
        schedule__epochs=int(epochs * max(1.0, TIMES / 2)),
        output__checkpoint_epochs=1000,
        output__checkpoint_steps=10,
        training__log_every=1,
        training__eval_every=10,
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, str(TOOL), how, str(seconds), str(tmp_path / "odd"), "train", str(file), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split("struck ")[1].split()[0]) > 0
    summary = json.loads((run_dir(config) / "summary.json").read_text())
    assert summary["nonzero_weights"] == round(0.1 * summary["prunable_weights"])
    steps = [row["step"] for row in read_rows(run_dir(config) / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == list(range(1, summary["steps"] + 1))
    assert (run_dir(config) / "checkpoints" / f"step-{summary['steps']:08d}" / "manifest.json").is_file()

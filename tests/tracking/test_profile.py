"""Profiles of a run's steps: a trace with the engine's and the data's names in it, and a table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from small_runs import small_config

from asp_dist.tracking.rows import read_rows
from asp_dist.training.hooks import Hooks
from asp_dist.training.trainer import train
from asp_dist.training.world import World

NAMES = ("asp_dist: data", "asp_dist: forward_backward", "asp_dist: pruning")


def traced(folder: Path) -> list[dict[str, object]]:
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        events: list[dict[str, object]] = json.load(file)["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and event.get("cat") in ("user_annotation", "cpu_op")]


def test_the_steps_parts_are_in_the_trace_and_the_share_of_pruning_can_be_read(tmp_path: Path) -> None:
    train(small_config(tmp_path, training__profile_steps=2, schedule__epochs=4), World(), Hooks())
    run = tmp_path / "run"
    found = {name: [event for event in traced(run) if event["name"] == name] for name in NAMES}
    # Two steps: the images and the pass once each; the engine before and after the optimizer's own work.
    assert [len(found[name]) for name in NAMES] == [2, 2, 4]
    steps = [event for event in traced(run) if str(event["name"]).startswith("Optimizer.step")]
    assert len(steps) == 2
    pruning = sum(float(str(event["dur"])) for event in found["asp_dist: pruning"])
    assert 0 < pruning < sum(float(str(event["dur"])) for event in steps)
    assert "aten::convolution_backward" in (run / "profile" / "kernels.txt").read_text()
    events = [row for row in read_rows(run / "metrics.jsonl") if row.get("event") == "profile"]
    assert len(events) == 1 and events[0]["step"] == 12 and str(run / "profile") in events[0]["message"]


def test_a_run_that_ends_sooner_leaves_what_was_seen_and_one_without_leaves_none(tmp_path: Path) -> None:
    train(small_config(tmp_path, "short", training__profile_steps=50), World(), Hooks())
    assert [event for event in traced(tmp_path / "short") if event["name"] == NAMES[2]]
    train(small_config(tmp_path, "plain"), World(), Hooks())
    assert not (tmp_path / "plain" / "profile").exists()

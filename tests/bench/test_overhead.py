"""`bench overhead`: its figures are consistent, and the wrapper that it compares with computes the published method."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_helpers import CASES, Recorded, published_sgd
from torch import nn

from asp_dist.bench import bench_overhead, print_overhead
from asp_dist.bench.published import PublishedLoss
from asp_dist.pruning import Pruner, SparsityLoss


@pytest.mark.parametrize(("control", "operator"), [("loss", "hard"), ("track", "hard"), ("track", "power")])
def test_figures(control: Any, operator: Any) -> None:
    options = {"control": control, "operator": operator}
    result = bench_overhead("cifar_resnet20", batch_size=4, input_size=32, steps=3, warmup=1, **options)
    seconds = result["seconds"]
    assert set(seconds) == {"dense", "engine", "wrapper"}
    assert set(result["ratios"]) == {"engine", "wrapper"}
    assert 0 < result["own"] < seconds["engine"]
    assert 0 < result["optimizer"] < seconds["engine"]
    assert result["own_over_optimizer"] == pytest.approx(result["own"] / result["optimizer"])
    assert result["extra_bytes"] == 4 * result["prunable_weights"]
    # Time is bytes over bandwidth.
    assert result["passes"] == pytest.approx(result["own"] * result["copy_bandwidth"] / result["extra_bytes"])
    file = io.StringIO()
    print_overhead(result, file)
    assert f"{result['prunable_weights']:,} prunable weights" in file.getvalue()
    assert f"engine ({control}, {operator})" in file.getvalue()
    assert "parametrization wrapper" in file.getvalue()


def test_without_the_wrapper() -> None:
    result = bench_overhead("cifar_resnet20", batch_size=2, input_size=32, steps=2, warmup=0, wrapper=False)
    assert set(result["seconds"]) == {"dense", "engine"}


@pytest.mark.slow
def test_two_workers_print_one_result_and_one_trace(tmp_path: Path) -> None:
    """As `launch/gpu_check.sh` starts it, but on CPUs."""
    trace = tmp_path / "trace.json"
    options = ["--device", "cpu", "--channels-last", "--model", "cifar_resnet20", "--input-size", "32", "--batch-size", "4"]
    options += ["--steps", "2", "--control", "track", "--operator", "power", "--json", "--trace", str(trace)]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "asp_dist", "bench", "overhead"]
    done = subprocess.run([*start, *options], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert result["workers"] == 2 and set(result["seconds"]) == {"dense", "engine"}
    assert any("SGD.step" in str(event.get("name")) for event in json.loads(trace.read_text())["traceEvents"])


def test_the_wrapper_is_the_published_method() -> None:
    """It follows the engine, which follows the recorded trajectories."""
    recorded = Recorded()
    one, other = recorded.network(), recorded.network()
    optimizer = published_sgd(one)
    pruner = Pruner(one, optimizer, CASES["asl_budget_equal"], control=SparsityLoss(initial_threshold=0.8, threshold_lr=1e-3))
    published = PublishedLoss(other, 0.1, 10.0, 0.8)
    for wrapper in published.wrappers:
        wrapper.double()
        nn.init.constant_(wrapper.threshold, 0.8)
    groups = published.parameter_groups(other, 0.1)
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(10):
        images, labels = recorded.inputs[step], recorded.labels[step]
        optimizer.zero_grad()
        nn.functional.cross_entropy(one(images), labels).backward()
        optimizer.step()
        sgd.zero_grad()
        (nn.functional.cross_entropy(other(images), labels) + published()).backward()
        sgd.step()
    thresholds = [float(wrapper.threshold.detach()) for wrapper in published.wrappers]
    assert pruner.thresholds.tolist() == pytest.approx(thresholds, abs=1e-12)

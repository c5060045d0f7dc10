"""`bench overhead`: its figures are consistent, and the wrapper that it compares with computes the published method."""

from __future__ import annotations

import io
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

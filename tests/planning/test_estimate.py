"""The plan: counts that an independent counter confirms, and a model of time that can be checked by hand."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from asp_dist.config import (
    BudgetConfig,
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    PruningConfig,
    ScheduleConfig,
    TrainingConfig,
)
from asp_dist.errors import UserError
from asp_dist.planning.estimate import Estimate, estimate_run
from asp_dist.planning.plan_text import print_plan
from asp_dist.planning.step_time import Network, StepTime, scale
from asp_dist.pruning import Ramp, Select


def config(name: str, **fields: Any) -> Config:
    data = DataConfig(root="/nowhere", batch_size=256)
    return Config(model=ModelConfig(name=name), data=data, cluster=ClusterConfig(num_workers=8), **fields)


def independent_count(name: str, size: int) -> tuple[dict[str, int], dict[str, int], int]:
    """Per layer: weights, and multiply-adds of one image as torch's own counter sees them; and all parameters."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, size, size))
    counted = {
        module.removeprefix(f"{type(model).__name__}."): sum(by_operator.values()) // 2
        for module, by_operator in counter.get_flop_counts().items()
    }
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    weights = {n: m.weight.numel() for n, m in layers.items()}
    return weights, {n: counted[n] for n in layers}, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet50", "vit_small_patch16_224", "convnext_tiny"])
def test_parameters_and_macs_agree_with_torchs_counter(name: str) -> None:
    plan = estimate_run(config(name), measure_s=0)
    weights, macs, parameters = independent_count(name, 224)
    assert {row["name"]: row["weights"] for row in plan.layers} == weights
    assert {row["name"]: row["macs"] for row in plan.layers} == macs
    assert plan.totals["parameters"] == parameters
    assert plan.totals["dense_macs"] == sum(macs.values())


@pytest.fixture(scope="module")
def small() -> Estimate:
    data = DataConfig(backend="synthetic", batch_size=64, input_size=32, synthetic_samples=(640, 128))
    budget, pruning = BudgetConfig(sparsity=0.8), PruningConfig(control="track", ramp=Ramp("cubic"))
    schedule, cluster = ScheduleConfig(epochs=3), ClusterConfig(num_workers=4)
    model = ModelConfig(name="cifar_resnet20")
    return estimate_run(
        Config(model=model, data=data, budget=budget, pruning=pruning, schedule=schedule, cluster=cluster),
        measure_s=0.5,
    )


def test_plan_of_a_small_run(small: Estimate) -> None:
    assert small.schedule["steps"] == 30
    assert small.schedule["steps_per_epoch"] == 10
    dense = [(row["name"], row["reason"]) for row in small.layers if not row["pruned"]]
    assert dense == [("conv1", "fewer than 1000 weights"), ("fc", "fewer than 1000 weights")]
    assert small.totals["sparsity"] == pytest.approx(0.8, abs=0.02)
    parameters = small.totals["parameters"]
    assert parameters == 269_722  # ResNet-20 with parameter-free shortcuts
    memory = small.memory
    assert memory["parameters"] == memory["gradients"] == memory["optimizer"] == 4 * parameters
    assert memory["dense weights"] == 4 * small.totals["prunable_weights"]
    # Every convolution keeps its input, batch norm its input, ReLU its output: some megabytes for an image.
    assert 0.5e6 < memory["activations"] / 16 < 10e6
    assert memory["all"] == pytest.approx(sum(v for k, v in memory.items() if k != "all"))
    assert small.traffic["gradients"] == pytest.approx(1.5 * 4 * parameters)
    assert small.traffic["thresholds"] == pytest.approx(1.5 * 32 * (len(small.layers) - 2))


def test_the_first_and_the_last_layer_stay_dense_where_a_run_says_so() -> None:
    pruning = PruningConfig(select=Select(first=False, last=False))
    data = DataConfig(backend="synthetic", batch_size=8, input_size=64, synthetic_samples=(16, 8))
    plan = estimate_run(Config(model=ModelConfig(name="resnet18"), data=data, pruning=pruning), measure_s=0)
    dense = [(row["name"], row["reason"]) for row in plan.layers if not row["pruned"]]
    assert dense == [("conv1", "the first layer"), ("fc", "the last layer")]


def test_plan_is_json_and_text(small: Estimate) -> None:
    tree = json.loads(json.dumps(dataclasses.asdict(small)))
    assert [row["workers"] for row in tree["scaling"]] == [2**i for i in range(11)]
    assert tree["scaling"][7]["strong"] is None  # 64 images do not divide among 128 workers
    out = io.StringIO()
    print_plan(small, file=out)
    text = out.getvalue()
    for part in (
        "fewer than 1000 weights",
        "30 steps on 4 workers",
        "GB per worker",
        "measured here",
        "α = 30 µs",
        "1024",
    ):
        assert part in text


def test_missing_data_is_assumed_and_said() -> None:
    plan = estimate_run(config("resnet18"), measure_s=0)
    assert plan.schedule["train_images"] == 1_281_167
    assert plan.schedule["steps_per_epoch"] == 5004
    assert "ImageNet-1k's" in plan.assumptions[0]
    assert plan.scaling == []


def test_a_budget_that_cannot_be_met_and_an_unknown_model_are_errors() -> None:
    with pytest.raises(UserError, match="resnet50"):
        estimate_run(config("resnet5o"), measure_s=0)
    with pytest.raises(UserError, match=r"min_density|floor|cannot"):
        estimate_run(
            config("resnet18", budget=BudgetConfig(sparsity=0.9999), pruning=PruningConfig(min_density=0.01)),
            measure_s=0,
        )


def test_sharded_weights_take_a_share_of_the_memory(small: Estimate) -> None:
    data = DataConfig(backend="synthetic", batch_size=64, input_size=32, synthetic_samples=(640, 128))
    made = Config(
        model=ModelConfig(name="cifar_resnet20"),
        data=data,
        training=TrainingConfig(parallel="fsdp"),
        cluster=ClusterConfig(num_workers=4),
    )
    sharded = estimate_run(made, measure_s=0)
    assert sharded.memory["parameters"] == small.memory["parameters"] / 4
    assert sharded.memory["buffers"] == small.memory["buffers"]
    with pytest.raises(UserError, match="does not divide among 4 workers"):
        estimate_run(dataclasses.replace(made, data=dataclasses.replace(data, batch_size=66)), measure_s=0)


def test_network_model_by_hand() -> None:
    network = Network(workers_per_node=4, node_latency=1e-5, node_bandwidth=1e11, latency=1e-4, bandwidth=1e10)
    assert network.all_reduce(1e9, 1, 5) == 0
    assert network.all_reduce(1e9, 4, 5) == pytest.approx(5 * 1e-5 * 4 + 1.5 * 1e9 / 1e11)
    inside, between = 5 * 1e-5 * 4 + 0.015, 5 * 1e-4 * 4 + 1.5 * 1e9 / 1e10
    assert network.all_reduce(1e9, 16, 5) == pytest.approx(inside + between)


def test_scaling_by_hand() -> None:
    schedule = {"batch_size": 64, "workers": 4, "epochs": 1, "val_images": 0, "steps": 3600}
    row = scale(schedule, StepTime("test", fixed=0.1, per_image=0.01, activation_bytes=0, images=(1, 2)), 8, exchange=0.02)
    assert row["strong"] == pytest.approx({"images": 8, "step": 0.2, "efficiency": 0.74 / 1.6, "hours": 0.2})
    assert row["weak"]["batch_size"] == 128
    assert row["weak"]["step"] == pytest.approx(0.28)
    assert row["weak"]["images_per_second"] == pytest.approx(128 / 0.28)
    assert row["weak"]["hours"] == pytest.approx(0.14)

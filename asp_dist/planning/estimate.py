"""`estimate_run`: what a run would prune, need and cost, before it is paid for. Nothing is trained and no data is needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from asp_dist.config import Config, OptimizerConfig
from asp_dist.data import DataInfo, inspect_data
from asp_dist.data.images import build_spec
from asp_dist.errors import UserError
from asp_dist.models import build_model
from asp_dist.planning.gpus import Gpu, Shares
from asp_dist.planning.roofline import Counted, count_step, step_on
from asp_dist.planning.step_time import BUCKET, Network, StepTime, measure_step, scale
from asp_dist.pruning import Pruner, Ramp, Snapshot
from asp_dist.pruning.names import LayerRow
from asp_dist.training import build
from asp_dist.training.preflight import check_batch, planned_world_size
from asp_dist.training.run import count_steps
from asp_dist.training.world import World

# Training images, validation images and classes of the data set that a network with this many classes suggests.
DATA_SETS = {10: ("CIFAR-10", 50_000, 10_000), 1000: ("ImageNet-1k", 1_281_167, 50_000)}
WORKERS = tuple(2**i for i in range(11))
# Training crops of ImageNet photographs that a CPU core decodes and resizes in a second, by DALI: 2.6 ms each, measured on a
# server's core (configs/README.md).
CROPS_PER_CORE = 385


@dataclass
class Estimate:
    """What `estimate_run` found; `dataclasses.asdict` makes it plain JSON types. Sizes are bytes, times seconds.

    Attributes:
        layers: a row per matrix of weights, as in ``layers.json``: what is pruned, what is not and why, and each layer's
            sparsity at the start.
        totals: parameters, prunable weights, multiply-adds of one image, dense and at the budget.
        memory: bytes per worker, by what takes them.
        traffic: bytes that each worker sends per optimizer step, by what sends them.
        schedule: images, steps, epochs, workers.
        step: the measured step; None if it was not measured.
        scaling: a row per number of workers; empty if the step was not measured.
        gpu: the same for a GPU that is not here, by a roofline; None: none was asked for. Keys: ``name``, ``source``,
            ``shares``, ``memory`` (of the card), ``step``, ``scaling``, ``images_per_second`` (of one worker), ``hours`` (of
            the run), ``dollars`` (None without a price) and ``decoding_cores`` (of a machine, if its CPUs decoded).
        warnings: what will hardly be meant.
        assumptions: what the numbers rest on.
    """

    model: str
    input_size: tuple[int, int]
    layers: list[LayerRow]
    totals: dict[str, Any]
    memory: dict[str, float]
    traffic: dict[str, float]
    schedule: dict[str, Any]
    step: StepTime | None = None
    scaling: list[dict[str, Any]] = field(default_factory=list)
    gpu: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OtherMachine:
    """A machine that is not here.

    Args:
        gpu: its GPUs, one for each worker.
        shares: of their peaks that are reached.
        price: dollars for an hour of one.
    """

    gpu: Gpu
    shares: Shares = Shares()
    price: float | None = None


def estimate_run(
    config: Config, *, measure_s: float = 8.0, network: Network | None = None, other: OtherMachine | None = None
) -> Estimate:
    """Plan a run.

    Args:
        config: the run; where its data is not there, the numbers of the data set that the network was made for, ImageNet-1k's
            or CIFAR-10's, are taken, and the plan says so.
        measure_s: about how long to measure the training step on this machine, seconds; 0: not at all. A run for GPUs, by its
            precision or by `other`, is measured on a GPU alone.
        network: the cluster; None: the defaults of `Network`.
        other: a machine to plan for besides this one.

    Raises:
        UserError: unknown model, a budget that it cannot meet, or a batch that does not divide among the workers.
    """
    network = network or Network()
    assumptions: list[str] = []
    info = _data(config, assumptions)
    fresh = dataclasses.replace(config.model, pretrained=False)
    if config.model.pretrained and config.model.weights is None:
        assumptions.append("weights: fresh ones for model.pretrained, as a plan downloads nothing")
    model = build_model(fresh, len(info.classes), config.data.input_size)
    size = build_spec(config.data, resolve_model_data_config(model)).size
    device = torch.device("cuda" if torch.cuda.is_available() and config.training.device != "cpu" else "cpu")
    images = config.data.batch_size // max(1, planned_world_size(config) * config.training.accumulate)
    model = build.place_model(config.training, model, World(0, 0, 1, device))
    optimizer = build.build_optimizer(build.scaled(config), model)
    workers = planned_world_size(config)
    batch = config.data.batch_size
    check_batch(config, info)
    steps_per_epoch = info.num_train // batch
    steps = count_steps(config, steps_per_epoch)
    # The budget as it would be met at once; the run learns another allocation.
    loss = dataclasses.replace(config.pruning.loss, initial_threshold=None)
    start = dataclasses.replace(config.pruning, ramp=Ramp(), loss=loss)
    at_once = dataclasses.replace(config, pruning=start)
    pruner = build.build_pruner(at_once, model, optimizer, total_steps=steps, input_size=(3, *size))
    now = pruner.snapshot() if pruner else None
    layers = now.rows() if now else []
    totals = _totals(model, now)
    state = _state_per_weight(config.optimizer)
    counted = count_step(
        model,
        size,
        config.training.precision,
        state=state,
        average=config.training.ema_decay is not None,
        pruned=totals.get("prunable_weights", 0),
    )
    if device.type == "cpu" and (
        other is not None or (config.training.precision != "float32" and config.training.device != "cpu")
    ):
        measure_s = 0.0
        if other is None:
            assumptions.append("times: none, for there is no GPU here; asp-dist plan --gpu A100 (or another) estimates them")
    step = measure_step(config, model, optimizer, device, size, len(info.classes), measure_s) if measure_s > 0 else None
    if pruner is not None:
        assumptions.append("layer sparsities: as if the budget held from step 0; training will change them")
    plan = Estimate(
        model=config.model.name,
        input_size=size,
        layers=layers,
        totals=totals,
        memory=_memory(config, model, state, pruner, counted.saved if step is None else step.activation_bytes, images),
        traffic=_traffic(config, model, pruner, workers),
        schedule={
            "train_images": info.num_train,
            "val_images": info.num_val,
            "batch_size": batch,
            "workers": workers,
            "steps_per_epoch": steps_per_epoch,
            "epochs": config.schedule.epochs,
            "steps": steps,
        },
        step=step,
        warnings=_warnings(layers),
        assumptions=assumptions,
    )
    _explain(plan, network)
    gradients = plan.memory["gradients"]
    exchanged = gradients + 32.0 * (len(pruner.layers) if pruner else 0)
    collectives = math.ceil(gradients / BUCKET) + 2  # with the pruner's and the loop's own all-reduce
    exchange = {n: network.all_reduce(exchanged, n, collectives) for n in {*WORKERS, workers}}
    if step is not None:
        plan.scaling = [scale(plan.schedule, step, n, exchange[n]) for n in WORKERS]
    if other is not None or device.type == "cuda":
        plan.warnings += build.advice_for_gpus(config, model, min(size), workers)
    if other is not None:
        plan.gpu = _on_another(plan, config, other, counted, network, exchange)
    return plan


def _state_per_weight(config: OptimizerConfig) -> float:
    """How many numbers the optimizer keeps for a weight, as it shows after a step on a few."""
    probe = nn.Linear(64, 64, bias=False)
    optimizer = build.build_optimizer(config, probe)
    probe.weight.grad = torch.zeros_like(probe.weight)
    optimizer.step()
    kept = (value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor))
    return sum(value.numel() for value in kept) / probe.weight.numel()


def _warnings(layers: list[LayerRow]) -> list[str]:
    """Layers that the budget would leave with no weights at all."""
    empty = [row["name"] for row in layers if row["pruned"] and round(row["weights"] * (1 - row["measured_sparsity"])) == 0]
    if not empty:
        return []
    return [
        f"{', '.join(empty)}: no weights would be left with the budget held from step 0, and no signal would pass. A rehearsal "
        "shows whether training gets there; if so, raise pruning.min_density, name the layer in pruning.select.exclude, or ask "
        "for less sparsity"
    ]


def _on_another(
    plan: Estimate, config: Config, other: OtherMachine, counted: Counted, network: Network, exchange: dict[int, float]
) -> dict[str, Any]:
    """What the run would take on a machine that is not here; see `Estimate.gpu`."""
    gpu, precision, workers = other.gpu, config.training.precision, plan.schedule["workers"]
    accumulate = config.training.accumulate
    images = plan.schedule["batch_size"] / workers
    step = step_on(gpu, counted, max(1, round(images / accumulate)), other.shares, precision)
    step = dataclasses.replace(step, fixed=step.fixed * accumulate)
    rows = {n: scale(plan.schedule, step, n, exchange[n]) for n in exchange}
    weak = rows[workers]["weak"]
    speed = weak["images_per_second"] / workers
    per_machine = min(workers, network.workers_per_node)
    if precision == "bfloat16" and not gpu.bfloat16:
        plan.warnings.append(f"{gpu.name} does not compute in bfloat16: set training.precision to float16")
    if plan.memory["all"] > gpu.memory:
        plan.warnings.append(
            f"{plan.memory['all'] / 1e9:.1f} GB per worker do not fit the {gpu.memory / 1e9:.0f} GB of {gpu.name}: raise "
            "training.accumulate or cluster.num_workers"
        )
    return {
        "name": gpu.name,
        "source": gpu.source,
        "shares": dataclasses.asdict(other.shares),
        "memory": gpu.memory,
        "step": dataclasses.asdict(step),
        "scaling": [rows[n] for n in WORKERS],
        "images_per_second": speed,
        "hours": weak["hours"],
        "dollars": None if other.price is None else other.price * workers * weak["hours"],
        "decoding_cores": speed * per_machine / CROPS_PER_CORE,
        "gpus_per_machine": per_machine,
    }


def suggested_data_set(model: str) -> tuple[int, tuple[str, int, int]]:
    """(classes, entry of `DATA_SETS`) of the data set that timm's `model` is for; ImageNet where that is not known."""
    default = timm.get_pretrained_cfg(model, allow_unregistered=True)
    classes = default.num_classes if default is not None and default.num_classes in DATA_SETS else 1000
    return classes, DATA_SETS[classes]


def _data(config: Config, assumptions: list[str]) -> DataInfo:
    try:
        return inspect_data(config.data)
    except UserError as error:
        classes, (name, train, val) = suggested_data_set(config.model.name)
        assumptions.append(f"data: {name}'s {train:,} + {val:,} images of {classes} classes, because {error}")
        names = tuple(str(i) for i in range(classes))
        return DataInfo(train, val, names, names, "assumed")


def _totals(model: nn.Module, snapshot: Snapshot | None) -> dict[str, Any]:
    parameters = sum(p.numel() for p in model.parameters())
    if snapshot is None:
        return {"parameters": parameters}
    summary: dict[str, Any] = {**snapshot.summary()}
    keys = ("prunable_weights", "nonzero_weights", "sparsity", "target_sparsity", "dense_macs", "macs", "bytes")
    return {"parameters": parameters, **{key: summary[key] for key in keys}}


def _bytes(tensors: Iterator[Tensor]) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def _memory(
    config: Config, model: nn.Module, state: float, pruner: Pruner | None, activations: float, images: int
) -> dict[str, float]:
    """Bytes per worker, of weights that are replicated or sharded.

    Args:
        config: the run.
        model: the network.
        state: numbers that the optimizer keeps for a weight.
        pruner: None: nothing is pruned.
        activations: bytes kept for backward, per image.
        images: a micro-batch of one worker.
    """
    shards = planned_world_size(config) if config.training.parallel == "fsdp" else 1
    parameters = _bytes(iter(model.parameters()))
    memory = {
        "parameters": parameters,
        "buffers": _bytes(iter(model.buffers())),
        "gradients": _bytes(p for p in model.parameters() if p.requires_grad),
        "optimizer": state * parameters,
        "dense weights": _bytes(layer.dense for layer in pruner.layers) if pruner else 0.0,
        "average": parameters if config.training.ema_decay is not None else 0.0,
    }
    memory = {name: size if name == "buffers" else size / shards for name, size in memory.items()}
    memory["activations"] = activations * max(1, images)
    return {**memory, "all": sum(memory.values())}


def _traffic(config: Config, model: nn.Module, pruner: Pruner | None, workers: int) -> dict[str, float]:
    """Bytes that one worker sends per optimizer step; an all-reduce of B bytes over n workers sends 2·(n−1)/n·B."""
    share = 2 * (workers - 1) / max(1, workers)
    gradients = _bytes(p for p in model.parameters() if p.requires_grad)
    sharded = config.training.parallel == "fsdp"
    traffic = {
        "gradients": gradients * share * (1.5 if sharded else 1.0),  # two gathers and a reduce-scatter
        "buffers": 0.0 if sharded else _bytes(iter(model.buffers())) * (workers > 1),
        "thresholds": 4 * 8 * len(pruner.layers) * share if pruner else 0.0,
    }
    return {**traffic, "all": sum(traffic.values())}


def _explain(plan: Estimate, network: Network) -> None:
    """Add what memory, traffic and times rest on."""
    say = plan.assumptions.append
    say("memory: without the allocator's reserve and the libraries' work space")
    if plan.step is None:
        return
    say(
        f"step: measured here ({plan.step.device}) with {' and '.join(map(str, plan.step.images))} random images: "
        f"{1e3 * plan.step.fixed:.1f} ms + {1e3 * plan.step.per_image:.2f} ms per image; best of several; not compiled"
    )
    say(
        f"network: {network.workers_per_node} workers per machine; α = {1e6 * network.node_latency:g} µs, β = "
        f"{network.node_bandwidth / 1e9:g} GB/s within a machine; α = {1e6 * network.latency:g} µs, β = "
        f"{network.bandwidth / 1e9:g} GB/s between machines; trees; nothing overlaps with backward, so it is an upper bound"
    )
    say(
        "hours: training and one validation per epoch (a third of a training image's time); assumes data loading "
        "is not the bottleneck"
    )

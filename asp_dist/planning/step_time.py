"""How long a step takes: measured on this machine, and carried to many workers by an α–β model of the network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asp_dist.config import Config
from asp_dist.training import build

BUCKET = 25 * 2**20  # bytes of one of DDP's gradient buckets


@dataclass(frozen=True)
class Network:
    """The α–β model of the cluster: a collective over n takes latency · 2·log2(n) + 2·(n−1)/n · bytes / bandwidth.

    Attributes:
        workers_per_node: workers (GPUs) in one machine.
        node_latency: α within a machine, seconds.
        node_bandwidth: β within a machine, bytes per second and worker.
        latency: α between machines, seconds.
        bandwidth: β between machines, bytes per second and machine.
    """

    workers_per_node: int = 8
    node_latency: float = 10e-6
    node_bandwidth: float = 200e9
    latency: float = 30e-6
    bandwidth: float = 12.5e9

    def all_reduce(self, size: float, workers: int, collectives: int) -> float:
        """Seconds of `collectives` all-reduces of `size` bytes in all: within each machine, then between the machines."""
        inside = min(workers, self.workers_per_node)
        nodes = math.ceil(workers / self.workers_per_node)
        first = _alpha_beta(size, inside, collectives, self.node_latency, self.node_bandwidth)
        return first + _alpha_beta(size, nodes, collectives, self.latency, self.bandwidth)


def _alpha_beta(size: float, count: int, collectives: int, latency: float, bandwidth: float) -> float:
    if count == 1:
        return 0.0
    return collectives * latency * 2 * math.log2(count) + 2 * (count - 1) / count * size / bandwidth


@dataclass(frozen=True)
class StepTime:
    """A training step's seconds on this machine: `fixed` + `per_image` · images on the worker.

    Attributes:
        device: where it was measured.
        fixed: seconds independent of the number of images: optimizer, pruner, launches.
        per_image: seconds per image on one worker.
        activation_bytes: bytes kept for backward, per image.
        images: numbers of images at which it was measured.
    """

    device: str
    fixed: float
    per_image: float
    activation_bytes: float
    images: tuple[int, ...]


@contextmanager
def counting_saved(model: nn.Module) -> Iterator[list[float]]:
    """Counts the bytes that autograd keeps for backward, each storage once, parameters left out; on the meta device too."""
    kept = [p.untyped_storage() for p in model.parameters()]  # kept, or another could get its number
    seen = {storage._cdata for storage in kept}
    total = [0.0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(storage)
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def measure_step(
    config: Config,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    size: tuple[int, int],
    classes: int,
    seconds: float,
) -> StepTime:
    """Time whole training steps on random images at two batch sizes, for about `seconds`."""
    dtype = build.DTYPES[config.training.precision]
    saved = {}

    def step(images: int) -> float:
        start = time.perf_counter()
        inputs = torch.randn(images, 3, *size, device=device)
        if config.training.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        targets = torch.randint(classes, (images,), device=device)
        with counting_saved(model) as total, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(model(inputs).float(), targets)
        saved[images] = total[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    model.train()
    small, large = (8, 64) if device.type == "cuda" else (2, 4)
    first = step(small)
    if first > seconds:  # a slow machine, or a busy one: the first step has to do, and all of its time is the images'
        best, per_image = {small: first}, first / small
        saved[large] = large / small * saved[small]
    else:
        best = {images: _repeat(step, images, seconds / 2 - first) for images in (small, large)}
        per_image = max(0.0, (best[large] - best[small]) / (large - small))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    kept = (saved[large] - saved[small]) / (large - small)
    return StepTime(name, max(0.0, best[small] - small * per_image), per_image, kept, tuple(best))


def _repeat(step: Callable[[int], float], images: int, seconds: float) -> float:
    """The shortest of the steps that fit into `seconds`, at least one."""
    began, best = time.perf_counter(), step(images)
    while time.perf_counter() - began < seconds:
        best = min(best, step(images))
    return best


def scale(schedule: dict[str, Any], step: StepTime, workers: int, exchange: float) -> dict[str, Any]:
    """Times with `workers` workers: the same batch over more workers, and the same images per worker.

    Args:
        schedule: of the plan.
        step: the measured step.
        workers: number of workers.
        exchange: seconds that the collectives of a step take.
    """
    batch, planned = schedule["batch_size"], schedule["workers"]
    evaluation = schedule["epochs"] * schedule["val_images"] * step.per_image / 3 / workers

    def hours(images: float, steps: float) -> float:
        return (steps * (step.fixed + step.per_image * images + exchange) + evaluation) / 3600

    row: dict[str, Any] = {"workers": workers, "exchange": exchange, "strong": None}
    if batch % workers == 0:
        images = batch / workers
        seconds = step.fixed + step.per_image * images + exchange
        efficiency = (step.fixed + step.per_image * batch) / (workers * seconds)
        row["strong"] = {"images": images, "step": seconds, "efficiency": efficiency}
        row["strong"]["hours"] = hours(images, schedule["steps"])
    images = batch / planned
    seconds = step.fixed + step.per_image * images + exchange
    row["weak"] = {
        "batch_size": images * workers,
        "step": seconds,
        "efficiency": (seconds - exchange) / seconds,
        "images_per_second": images * workers / seconds,
        "hours": hours(images, schedule["steps"] * planned / workers),
    }
    return row

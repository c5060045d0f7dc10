"""`asp-dist bench overhead`: what pruning costs per step, in steps that alternate so that a busy machine hits them alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import IO, Any, Literal

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import asp_dist.models  # noqa: F401  (registers the paper's networks)
from asp_dist.bench.published import PublishedLoss
from asp_dist.config import Precision, PruningConfig, TrainingConfig
from asp_dist.pruning import Budget, Pruner, SparsityLoss
from asp_dist.training import build
from asp_dist.training.build import DTYPES
from asp_dist.training.world import World

LR = 1e-3  # Small: the steps are timed, not learned from.
OPTIONS: dict[str, Any] = {"lr": LR, "momentum": 0.9, "weight_decay": 1e-4}
# Steps that the profiler sees.
PROFILED = 3
# What the driver calls a launch, and what makes the host wait.
LAUNCHES = ("LaunchKernel", "GraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")


class _Clock:
    """Seconds, on a GPU after all that was launched has ended; or the processor time that this process took."""

    def __init__(self, device: torch.device, cpu_time: bool) -> None:
        self.device = device
        self.read = time.process_time if cpu_time else time.perf_counter

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.read()


class _HookTimes:
    """Times the hooks that are registered on an optimizer between two calls of `mark`, and the step between them."""

    def __init__(self, optimizer: Optimizer, clock: _Clock) -> None:
        self.optimizer, self.clock = optimizer, clock
        self.stamps: list[float] = []
        self.hooks: list[float] = []
        self.steps: list[float] = []

    def mark(self) -> None:
        self.optimizer.register_step_pre_hook(self._stamp)
        self.optimizer.register_step_post_hook(self._stamp)

    def _stamp(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.stamps.append(self.clock())
        if len(self.stamps) == 4:  # before and after the pre-hooks, before and after the post-hooks
            a, b, c, d = self.stamps
            self.hooks.append((b - a) + (d - c))
            self.steps.append(c - b)
            self.stamps.clear()


def _step(
    model: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
    extra: Callable[[], Tensor] | None,
    precision: torch.dtype,
) -> None:
    optimizer.zero_grad()
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        loss = nn.functional.cross_entropy(model(images), labels)
    if extra is not None:
        loss = loss + extra()
    loss.backward()
    optimizer.step()


def _in_world(model: nn.Module, world: World) -> nn.Module:
    """Under DDP, as the trainer wraps it, where there are several workers."""
    return build.wrap_model(TrainingConfig(), model, world)


def _copy_bandwidth(weights: list[Tensor], clock: _Clock, repeats: int) -> float:
    """Bytes per second that are read and written when the weights are copied: the best of `repeats`."""
    targets = [torch.empty_like(weight) for weight in weights]
    best = float("inf")
    for _ in range(repeats):
        start = clock()
        for target, weight in zip(targets, weights):
            target.copy_(weight)
        best = min(best, clock() - start)
    return 2 * sum(weight.nbytes for weight in weights) / best


def _profile(step: Callable[[], None], world: World, trace: str | None) -> dict[str, float] | None:
    """Launches and waits of the host per step on a GPU; None on the CPU. Rank 0 writes `trace`, for chrome://tracing."""
    device = world.device
    if device.type != "cuda" and trace is None:
        return None
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            step()
    if trace is not None and world.is_main:
        profiler.export_chrome_trace(trace)
    if device.type != "cuda":
        return None
    counts = {event.key: event.count for event in profiler.key_averages()}

    def of(names: tuple[str, ...]) -> float:
        return sum(count for key, count in counts.items() if any(name in key for name in names)) / PROFILED

    return {"launches": of(LAUNCHES), "waits": of(WAITS)}


def bench_overhead(
    model: str = "resnet50",
    *,
    batch_size: int = 8,
    input_size: int = 224,
    steps: int = 10,
    warmup: int = 2,
    sparsity: float = 0.9,
    control: Literal["loss", "track"] = "loss",
    operator: Literal["hard", "soft", "power"] = "hard",
    wrapper: bool = True,
    cpu_time: bool = False,
    world: World = World(),
    precision: Precision = "float32",
    channels_last: bool = False,
    trace: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time dense training, training with the engine, and with a parametrization-style wrapper, one step of each in turn.

    Args:
        model: a timm name.
        batch_size: images per step.
        input_size: image side, pixels.
        steps: timed rounds; each is one step of each form.
        warmup: rounds before.
        sparsity: the budget.
        control: the engine's control.
        operator: the engine's pruning operator; the wrapper's is always ``hard``.
        wrapper: also time the published form, which prunes in each forward pass; in one process.
        cpu_time: count processor time, over all threads, in place of the clock's: what others do on a busy machine then
            matters less. Meant for one thread (OMP_NUM_THREADS=1), as threads that wait count too.
        world: this process's device, and the ranks that train together under DDP.
        precision: autocast type of forward and backward.
        channels_last: memory order of images and convolutions.
        trace: file for a profiler's trace of the engine's steps; None: none is written.
        seed: of the weights and images, which are noise.

    Returns:
        Medians in seconds (``dense``, ``engine``, ``wrapper``), the medians of the rounds' ratios to the dense step, the
        engine's own time per step (``own``), the optimizer's (``optimizer``) and the ratio of the two, the copy bandwidth in
        bytes per second, and ``passes``: how often the engine's own time would read the prunable weights once at it. On a
        GPU, ``launches`` and ``waits`` of the host per step, of the dense and of the engine's steps.
    """
    torch.manual_seed(seed)
    place = world.device
    clock = _Clock(place, cpu_time)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    dense = timm.create_model(model).to(place).to(memory_format=layout).train()
    images = torch.randn(batch_size, 3, input_size, input_size, device=place).contiguous(memory_format=layout)
    sgd: dict[str, Any] = {**OPTIONS, ("fused" if place.type == "cuda" else "foreach"): True}
    labels = torch.randint(0, dense.get_classifier().out_features, (batch_size,), device=place)
    pruned, wrapped = copy.deepcopy(dense), copy.deepcopy(dense)
    threshold = float(torch.special.erfinv(torch.tensor(sparsity)) * 2**0.5)

    optimizer = SGD(pruned.parameters(), **sgd)
    times = _HookTimes(optimizer, clock)
    times.mark()
    budget = Budget.parameters(sparsity=sparsity)
    options = PruningConfig(control=control, operator=operator)
    chosen = SparsityLoss(initial_threshold=threshold) if control == "loss" else options.build_control()
    pruner = Pruner(pruned, optimizer, budget, control=chosen, operator=options.build_operator())
    times.mark()
    forms: dict[str, tuple[nn.Module, Optimizer, Callable[[], Tensor] | None]] = {
        "dense": (_in_world(dense, world), SGD(dense.parameters(), **sgd), None),
        "engine": (_in_world(pruned, world), optimizer, None),
    }
    if wrapper and world.world_size == 1:
        published = PublishedLoss(wrapped, 1.0 - sparsity, 10.0, threshold)
        forms["wrapper"] = (wrapped, SGD(published.parameter_groups(wrapped, LR), **OPTIONS), published)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for index in range(warmup + steps):
        order = list(forms) if index % 2 else list(forms)[::-1]
        for name in order:
            start = clock()
            _step(*forms[name][:2], images, labels, forms[name][2], DTYPES[precision])
            seconds[name].append(clock() - start)
    seconds = {name: values[warmup:] for name, values in seconds.items()}
    profiled = {}
    for name in ("dense", "engine"):
        form = forms[name]
        step = partial(_step, *form[:2], images, labels, form[2], DTYPES[precision])
        profiled[name] = _profile(step, world, trace if name == "engine" else None)
    weights = [info.parameter.detach() for info in pruner.pruned_weights]
    size = sum(weight.nbytes for weight in weights)
    bandwidth = _copy_bandwidth(weights, clock, steps)
    own, optimizer_time = median(times.hooks[warmup:]), median(times.steps[warmup:])
    return {
        "model": model,
        "batch_size": batch_size,
        "input_size": input_size,
        "steps": steps,
        "control": control,
        "operator": operator,
        "clock": "processor time" if cpu_time else "clock",
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "workers": world.world_size,
        "precision": precision,
        "channels_last": channels_last,
        "per_step": {name: found for name, found in profiled.items() if found is not None},
        "threads": torch.get_num_threads(),
        "prunable_weights": sum(weight.numel() for weight in weights),
        "seconds": {name: median(values) for name, values in seconds.items()},
        "ratios": {
            name: median(a / b for a, b in zip(values, seconds["dense"])) for name, values in seconds.items() if name != "dense"
        },
        "own": own,
        "optimizer": optimizer_time,
        "own_over_optimizer": own / optimizer_time,
        "own_over_dense": own / median(seconds["dense"]),
        "copy_bandwidth": bandwidth,
        "passes": own * bandwidth / size,
        "extra_bytes": sum(layer.dense.nbytes for layer in pruner.layers),
    }


def print_overhead(result: dict[str, Any], file: IO[str] | None = None) -> None:
    """Print what `bench_overhead` returned as a table and two sentences."""
    console = Console(file=file, highlight=False, soft_wrap=True)
    table = Table(
        title=f"{result['model']} at {result['input_size']}², batch {result['batch_size']}, {result['device']}, "
        f"{result['precision']}, "
        f"{result['threads']} threads, {result['clock']}, medians of {result['steps']} alternating steps"
    )
    for heading in ("training", "ms per step", "over dense"):
        table.add_column(heading, justify="left" if heading == "training" else "right")
    labels = {
        "dense": "dense",
        "engine": f"engine ({result['control']}, {result['operator']})",
        "wrapper": "parametrization wrapper",
    }
    for name, value in result["seconds"].items():
        table.add_row(labels[name], f"{value * 1e3:.1f}", f"{result['ratios'].get(name, 1.0):.3f}")
    console.print(table)
    console.print(
        f"The engine's own time: {result['own'] * 1e3:.1f} ms per step, {result['own_over_optimizer']:.2f} × the foreach SGD "
        f"step ({result['optimizer'] * 1e3:.1f} ms), {result['own_over_dense']:.1%} of a dense step."
    )
    console.print(
        f"At the copy bandwidth of {result['copy_bandwidth'] / 1e9:.1f} GB/s that is {result['passes']:.1f} passes over the "
        f"{result['prunable_weights']:,} prunable weights, of which it keeps one copy ({result['extra_bytes'] / 1e6:.0f} MB)."
    )
    for name, found in result["per_step"].items():
        console.print(
            f"{labels[name]}: {found['launches']:.0f} launches per step, and the host waits {found['waits']:.1f} times."
        )

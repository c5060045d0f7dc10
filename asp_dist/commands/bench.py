"""``asp-dist bench``: measurements, as ratios of things measured in turn in one run."""

from __future__ import annotations

import json as json_
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from jsonargparse import ArgumentParser

from asp_dist.commands.command import Command


def _add_common(parser: ArgumentParser, batch_size: int, input_size: int | None = 224) -> None:
    parser.add_argument("--model", type=str, default="resnet50", help="timm model.")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images per batch.")
    if input_size is None:
        parser.add_argument("--input-size", type=int | None, default=None, help="image side; default: the model's.")
    else:
        parser.add_argument("--input-size", type=int, default=input_size, help="image side in pixels.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to measure.")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON.")


def add_overhead_arguments(parser: ArgumentParser) -> None:
    """Options of ``bench overhead``."""
    _add_common(parser, batch_size=8)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each kind.")
    parser.add_argument("--control", type=Literal["loss", "track"], default="loss", help="what moves the thresholds.")
    parser.add_argument("--operator", type=Literal["hard", "soft", "power"], default="hard", help="pruning operator.")
    parser.add_argument(
        "--precision", type=Literal["float32", "bfloat16", "float16"], default="float32", help="type of forward and backward."
    )
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory order.")
    parser.add_argument("--trace", type=str | None, default=None, help="file for a profiler's trace of three steps.")
    parser.add_argument("--cpu-time", action="store_true", help="measure processor time, for busy machines.")


def overhead(*, json: bool, device: str, **options: Any) -> int:
    """Overhead of pruning relative to dense training."""
    import torch

    from asp_dist.bench.overhead import bench_overhead, print_overhead
    from asp_dist.models import check_model_name
    from asp_dist.training.world import World, init_world, started_by_torchrun

    check_model_name(options["model"])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    world = init_world(device) if started_by_torchrun() else World(device=torch.device(device))
    try:
        result = bench_overhead(world=world, **options)
    finally:
        world.close()
    return _show(result, print_overhead, json) if world.is_main else 0


def add_data_arguments(parser: ArgumentParser) -> None:
    """Options of ``bench data``."""
    parser.add_argument("data", type=str, help="the data set.")
    _add_common(parser, batch_size=64, input_size=None)
    parser.add_argument("--interpolation", type=str | None, default=None, help="resampling; default: the model's.")
    parser.add_argument("--samples", type=int, default=2000, help="images of each timed run.")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each loader.")
    parser.add_argument("--threads", type=int | None, default=None, help="decoding threads; default: all cores.")


def data(data: str, *, json: bool, **options: Any) -> int:
    """Compare this project's loaders with bare DALI and torchvision."""
    from asp_dist.bench.loader_speed import bench_data, print_bench

    return _show(bench_data(data, **options), print_bench, json)


def add_extra_arguments(parser: ArgumentParser) -> None:
    """Options of ``bench saving`` and ``bench tracking``."""
    _add_common(parser, batch_size=8)
    parser.add_argument("--steps", type=int, default=50, help="steps of each timed stretch.")
    parser.add_argument("--rounds", type=int, default=3, help="timed stretches of each kind.")


def extra(what: str, *, json: bool, **options: Any) -> int:
    """Overhead of saving checkpoints, or of tracking."""
    from asp_dist.bench.saving_and_tracking import bench_extra, print_extra

    return _show(bench_extra(what, **options), print_extra, json)


def add_deploy_arguments(parser: ArgumentParser) -> None:
    """Options of ``bench deploy``."""
    parser.add_argument("run_dir", type=str, help="folder of a finished run, such as runs/quickstart.")
    parser.add_argument("--input-size", type=int, nargs="+", default=[], help="image sides in pixels; default: the run's.")
    parser.add_argument("--threads", type=int, default=1, help="threads of each runtime.")
    parser.add_argument("--batch-size", type=int, default=1, help="images per call.")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each.")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON.")


def deploy(run_dir: str, *, json: bool, input_size: list[int], **options: Any) -> int:
    """A run's network, dense and pruned, in every runtime that is installed."""
    from pathlib import Path

    from asp_dist.bench.deploy import bench_deploy, print_deploy
    from asp_dist.report import try_report

    result = bench_deploy(Path(run_dir), input_sizes=input_size, **options)
    try_report(Path(run_dir))
    return _show(result, print_deploy, json)


def _show(result: dict[str, Any], show: Callable[[dict[str, Any]], None], as_json: bool) -> int:
    if as_json:
        print(json_.dumps(result))
    else:
        show(result)
    return 0


GROUP = {
    "overhead": Command("Overhead of pruning relative to dense training.", add_overhead_arguments, overhead),
    "data": Command("Speed of the loaders relative to bare DALI and to torchvision.", add_data_arguments, data),
    "deploy": Command("Speed of a pruned network, and of its dense twin, where it will run.", add_deploy_arguments, deploy),
    "saving": Command("Overhead of saving checkpoints.", add_extra_arguments, partial(extra, "saving")),
    "tracking": Command("Overhead of tracking a run.", add_extra_arguments, partial(extra, "tracking")),
}

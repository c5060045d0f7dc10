"""``asp-dist bench``: measurements, as ratios of things measured in turn in one run."""

from __future__ import annotations

import json as json_
from typing import Any, Literal

from jsonargparse import ArgumentParser

from asp_dist.errors import UserError


def add_bench_arguments(parser: ArgumentParser) -> None:
    """Options of ``bench``."""
    parser.add_argument(
        "what",
        type=Literal["overhead", "data", "saving", "tracking"],
        help="overhead: training with the engine over dense training; data: the loaders beside one another; "
        "saving, tracking: training with a checkpoint, or with the run's record, over training without.",
    )
    parser.add_argument("data", type=str | None, nargs="?", default=None, help="the data set, for data.")
    parser.add_argument("--model", type=str, default="resnet50", help="timm model.")
    parser.add_argument("--batch-size", type=int | None, default=None, help="images per step (8) or per batch (64).")
    parser.add_argument("--input-size", type=int | None, default=None, help="image side; default: 224, or the model's.")
    parser.add_argument("--steps", type=int | None, default=None, help="timed steps (10), or of each stretch (50).")
    parser.add_argument("--control", type=Literal["loss", "track"], default="loss", help="control of overhead.")
    parser.add_argument(
        "--operator", type=Literal["hard", "soft", "power"], default="hard", help="pruning operator of overhead."
    )
    parser.add_argument("--cpu-time", action="store_true", help="processor time of overhead, for busy machines.")
    parser.add_argument(
        "--interpolation", type=str | None, default=None, help="resampling of data; default: the model's."
    )
    parser.add_argument("--samples", type=int, default=2000, help="images per run of data.")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each source of data, or stretches of each kind.")
    parser.add_argument("--threads", type=int | None, default=None, help="threads of data; default: from the machine.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to measure.")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON.")


def bench(what: str, data: str | None = None, *, json: bool = False, **options: Any) -> int:
    """Measure, and print medians and ratios."""
    if what == "overhead":
        result, show = _overhead(**options)
    elif what == "data":
        result, show = _data(data, **options)
    else:
        result, show = _extra(what, **options)
    if json:
        print(json_.dumps(result))
    else:
        show(result)
    return 0


def _overhead(
    *,
    model: str,
    batch_size: int | None,
    input_size: int | None,
    steps: int | None,
    control: Any,
    operator: Any,
    device: str,
    cpu_time: bool,
    **_: Any,
) -> tuple[dict[str, Any], Any]:
    import torch

    from asp_dist.bench import bench_overhead, print_overhead
    from asp_dist.models import check_model_name

    check_model_name(model)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    result = bench_overhead(
        model,
        batch_size=batch_size or 8,
        input_size=input_size or 224,
        steps=steps or 10,
        control=control,
        operator=operator,
        cpu_time=cpu_time,
        device=device,
    )
    return result, print_overhead


def _extra(
    what: str,
    *,
    model: str,
    batch_size: int | None,
    input_size: int | None,
    steps: int | None,
    rounds: int,
    device: Any,
    **_: Any,
) -> tuple[dict[str, Any], Any]:
    from asp_dist.bench.extras import bench_extra, print_extra

    result = bench_extra(
        what,
        model,
        batch_size=batch_size or 8,
        input_size=input_size or 224,
        steps=steps or 50,
        rounds=rounds,
        device=device,
    )
    return result, print_extra


def _data(
    data: str | None,
    *,
    model: str,
    batch_size: int | None,
    input_size: int | None,
    interpolation: str | None,
    samples: int,
    rounds: int,
    threads: int | None,
    device: str,
    **_: Any,
) -> tuple[dict[str, Any], Any]:
    from asp_dist.data.bench import bench_data, print_bench

    if data is None:
        raise UserError("asp-dist bench data needs the data set: asp-dist bench data FOLDER")
    result = bench_data(
        data,
        model=model,
        input_size=input_size,
        interpolation=interpolation,
        batch_size=batch_size or 64,
        samples=samples,
        rounds=rounds,
        threads=threads,
        device=device,
    )
    return result, print_bench

"""``asp-dist plan``: what a run will prune and what it will cost, before it starts."""

from __future__ import annotations

import dataclasses
import json as json_
from pathlib import Path

from jsonargparse import ArgumentParser

from asp_dist.config import Config
from asp_dist.errors import check
from asp_dist.planning.gpus import Shares, find_gpu
from asp_dist.quick_checks import check_quickly


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``plan``."""
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON.")
    parser.add_argument("--measure-s", type=float, default=8.0, help="seconds to measure a training step for; 0: skip.")
    parser.add_argument("--gpu", type=str | None, default=None, help="plan for this GPU, such as A100, which need not be here.")
    parser.add_argument("--gpu-table", type=str | None, default=None, help="YAML file of further GPUs.")
    parser.add_argument("--share", type=float | None, default=None, help="share of the GPU's peak that is reached, in (0, 1].")
    parser.add_argument(
        "--memory-share", type=float | None, default=None, help="share of its memory's bandwidth that is reached, in (0, 1]."
    )
    parser.add_argument("--price", type=float | None, default=None, help="dollars for an hour of one GPU.")


def run(
    config: Config,
    *,
    json: bool = False,
    measure_s: float = 8.0,
    gpu: str | None = None,
    gpu_table: str | None = None,
    share: float | None = None,
    memory_share: float | None = None,
    price: float | None = None,
) -> int:
    """Estimate what a run will prune and what it will cost, without training."""
    check_quickly(config, here=False)
    given = {"--share": share, "--memory-share": memory_share, "--price": price, "--gpu-table": gpu_table}
    for option, value in given.items():
        check(gpu is not None or value is None, f"{option} {value} is of a GPU: give --gpu, such as --gpu A100")
    check(price is None or price > 0, f"--price {price} must be greater than 0: dollars for an hour of one GPU")
    shares = {name: value for name, value in (("arithmetic", share), ("memory", memory_share)) if value is not None}
    machine = None
    if gpu is not None:
        machine = find_gpu(gpu, None if gpu_table is None else Path(gpu_table)), Shares(**shares)
    from asp_dist.planning.estimate import OtherMachine, estimate_run
    from asp_dist.planning.plan_text import print_plan

    other = None if machine is None else OtherMachine(*machine, price)
    estimate = estimate_run(config, measure_s=measure_s, other=other)
    if json:
        print(json_.dumps(dataclasses.asdict(estimate)))
    else:
        print_plan(estimate)
    return 0

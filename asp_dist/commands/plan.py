"""``asp-dist plan``: what a run will prune and what it will cost, before it starts."""

from __future__ import annotations

import dataclasses
import json as json_

from jsonargparse import ArgumentParser

from asp_dist.config import Config
from asp_dist.quick_checks import check_quickly


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``plan``."""
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON.")
    parser.add_argument("--measure-s", type=float, default=8.0, help="seconds to measure a training step for; 0: skip.")


def run(config: Config, *, json: bool = False, measure_s: float = 8.0) -> int:
    """Estimate what a run will prune and what it will cost, without training."""
    check_quickly(config, here=False)
    from asp_dist.planning import estimate_run, print_plan

    estimate = estimate_run(config, measure_s=measure_s)
    if json:
        print(json_.dumps(dataclasses.asdict(estimate)))
    else:
        print_plan(estimate)
    return 0

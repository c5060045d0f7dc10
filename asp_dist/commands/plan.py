"""``asp-dist plan`` and ``submit``: what comes before a job on a cluster."""

from __future__ import annotations

import dataclasses
import json as json_

from jsonargparse import ArgumentParser

from asp_dist.config import Config


def add_plan_arguments(parser: ArgumentParser) -> None:
    """Options of ``plan``."""
    parser.add_argument("--json", action="store_true", help="print the plan as JSON.")
    parser.add_argument("--measure_s", type=float, default=8.0, help="seconds to measure the training step; 0: do not.")


def plan(config: Config, *, json: bool = False, measure_s: float = 8.0) -> int:
    """Say what a run will prune, need and take, without training."""
    from asp_dist.planning import make_plan
    from asp_dist.planning.text import print_plan

    made = make_plan(config, measure_s=measure_s)
    if json:
        print(json_.dumps(dataclasses.asdict(made)))
    else:
        print_plan(made)
    return 0


def add_submit_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--address", type=str | None, default=None, help="http://HEAD:8265; default: RAY_ADDRESS.")
    parser.add_argument("--root", type=str | None, default=None, help="folder on the cluster that paths start from.")
    parser.add_argument("--no-wait", action="store_true", help="return once the job is submitted.")
    parser.add_argument("--status", type=str | None, default=None, metavar="JOB", help="show how a job stands.")
    parser.add_argument("--stop", type=str | None, default=None, metavar="JOB", help="stop a job behind a checkpoint.")
    parser.add_argument("--tls", type=str | None, default=None, help="certificates to trust for https, or 'off'.")


def submit(
    config: Config,
    *,
    address: str | None = None,
    root: str | None = None,
    no_wait: bool = False,
    status: str | None = None,
    stop: str | None = None,
    tls: str | None = None,
) -> int:
    """Submit a training run to a Ray cluster as a job, or ask after one."""
    from asp_dist.cluster import jobs

    cluster = jobs.Cluster(address, verify=tls is None or (False if tls == "off" else tls))
    if status is not None:
        return jobs.status(status, cluster)
    if stop is not None:
        return jobs.stop(stop, cluster)
    return jobs.submit(config, cluster, root=root, wait=not no_wait)

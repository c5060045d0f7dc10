"""``asp-dist submit``: a training run as a job of a Ray cluster."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from asp_dist.config import Config
from asp_dist.quick_checks import check_quickly


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``submit``."""
    parser.add_argument("--address", type=str | None, default=None, help="http://HEAD:8265; default: RAY_ADDRESS.")
    parser.add_argument("--root", type=str | None, default=None, help="folder on the cluster that paths start from.")
    parser.add_argument("--no-wait", action="store_true", help="return once the job is submitted.")
    parser.add_argument("--status", type=str | None, default=None, metavar="JOB", help="show a job's status.")
    parser.add_argument("--stop", type=str | None, default=None, metavar="JOB", help="stop a job after a checkpoint.")
    parser.add_argument("--tls", type=str | None, default=None, help="certificates to trust for https, or 'off'.")


def run(
    config: Config,
    *,
    address: str | None = None,
    root: str | None = None,
    no_wait: bool = False,
    status: str | None = None,
    stop: str | None = None,
    tls: str | None = None,
) -> int:
    """Submit a training run to a Ray cluster as a job; or show a job's status, or stop it."""
    if status is None and stop is None:
        check_quickly(config, here=False)
    from asp_dist.cluster import jobs

    cluster = jobs.Cluster(address, verify=tls is None or (False if tls == "off" else tls))
    if status is not None:
        return jobs.status(status, cluster)
    if stop is not None:
        return jobs.stop(stop, cluster)
    return jobs.submit(config, cluster, root=root, wait=not no_wait)

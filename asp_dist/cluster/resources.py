"""What a run needs of a cluster and what is there: checked before anything starts, so that no run waits forever."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from asp_dist.cluster.launch_files import LaunchFiles
from asp_dist.cluster.ray_private import get_num_cpus
from asp_dist.config import Config
from asp_dist.errors import UserError, check
from asp_dist.training.world import group_sizes


@dataclass(frozen=True)
class Resources:
    """What is reserved for the workers.

    Args:
        sizes: numbers of workers that the group may have, rising.
        cpus: CPUs per worker.
        gpus: GPUs per worker.
    """

    sizes: tuple[int, ...]
    cpus: float
    gpus: int

    def per_worker(self) -> dict[str, float]:
        """In Ray's names. A worker with a GPU would reserve no CPU, had the CPUs not been named."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}


def plan_resources(config: Config, nodes: list[dict[str, Any]], *, local: bool) -> Resources:
    """Decide what each worker gets and check that the cluster has it.

    Args:
        config: the run.
        nodes: ``ray.nodes()``.
        local: whether the cluster is this machine's own, to be shared out among the workers.

    Raises:
        UserError: the cluster has no room for the workers; the message gives both numbers.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    total_cpus = sum(node.get("CPU", 0) for node in alive)
    total_gpus = sum(node.get("GPU", 0) for node in alive)
    cluster = config.cluster
    gpus = cluster.gpus_per_worker
    if gpus is None:
        gpus = 1 if total_gpus and config.training.device != "cpu" else 0
    check(
        gpus > 0 or config.training.device != "cuda",
        f"training.device = cuda, but the cluster has {total_gpus:g} GPUs and cluster.gpus_per_worker = "
        f"{cluster.gpus_per_worker}: use training.device=cpu or a cluster with GPUs",
    )
    cpus = cluster.cpus_per_worker
    if cpus is None:
        cpus = max(1, total_cpus // cluster.num_workers) if local else 1
    sizes = group_sizes(config)
    check(
        bool(sizes),
        f"data.batch_size = {config.data.batch_size} divides among no number of workers from cluster.min_workers = "
        f"{cluster.min_workers} to cluster.num_workers = {cluster.num_workers}: use a multiple of one of them",
    )
    needed = Resources(tuple(sizes), float(cpus), gpus)
    room = sum(_room(node, needed) for node in alive)
    if room >= sizes[0]:
        return needed
    asked = f"{sizes[0]} x {needed.cpus:g} CPU" + (f" and {gpus} GPU" if gpus else "")
    raise UserError(
        f"cluster.num_workers = {cluster.num_workers} asks for {asked}, but the cluster has {total_cpus:g} CPU and "
        f"{total_gpus:g} GPU on {len(alive)} node(s), room for {room} such worker(s): "
        "lower cluster.num_workers, cluster.cpus_per_worker or cluster.gpus_per_worker, or add nodes"
    )


def check_room(runs: Sequence[Config], nodes: list[dict[str, Any]], concurrent: int, *, local: bool) -> Resources:
    """What each worker of `runs` gets, which are alike in `cluster`, where so many of them run at a time.

    Raises:
        UserError: the cluster has no room for one of them, or for `concurrent`; the message gives the numbers.
    """
    config = runs[0]
    cluster = config.cluster
    concurrent = min(concurrent, len(runs))
    if cluster.cpus_per_worker is None and local:
        total = sum(node["Resources"].get("CPU", 0) for node in nodes if node["Alive"])
        share = max(1, total // (cluster.num_workers * concurrent))
        config = dataclasses.replace(config, cluster=dataclasses.replace(cluster, cpus_per_worker=share))
    needed = plan_resources(config, nodes, local=local)
    for run in runs:
        plan_resources(dataclasses.replace(run, cluster=config.cluster), nodes, local=local)
    room = sum(_room(node["Resources"], needed) for node in nodes if node["Alive"])
    check(
        room >= concurrent * needed.sizes[0],
        f"--concurrent {concurrent} runs of {needed.sizes[0]} workers need room for {concurrent * needed.sizes[0]}, but the "
        f"cluster has room for {room} of {needed.cpus:g} CPU"
        + (f" and {needed.gpus} GPU" if needed.gpus else "")
        + ": lower --concurrent, cluster.num_workers or cluster.cpus_per_worker",
    )
    return needed


def this_machine() -> dict[str, Any]:
    """What Ray will find on this machine, in the form of ``ray.nodes()``."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"Alive": True, "Resources": {"CPU": float(get_num_cpus()), "GPU": float(gpus)}}


def _room(node: dict[str, float], needed: Resources) -> int:
    """How many such workers fit on the node."""
    shares = [node.get(name, 0) / amount for name, amount in needed.per_worker().items() if amount > 0]
    return math.floor(min(shares) + 1e-9)


def check_storage(config: Config, files: LaunchFiles, nodes: list[dict[str, Any]], needed: Resources) -> None:
    """Check that every node that may run a worker sees the data and the output folder.

    Raises:
        UserError: a node does not; the message names it and the folder.
    """
    usable = [node for node in nodes if node["Alive"] and _room(node["Resources"], needed)]
    data = None if config.data.backend == "synthetic" or "://" in config.data.root else config.data.root
    this_node = ray.get_runtime_context().get_node_id()
    look = ray.remote(num_cpus=0, max_retries=0)(_missing_folders)
    pending = {
        node["NodeManagerAddress"]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(data, files)
        for node in usable
        if node["NodeID"] != this_node
    }
    for address, answer in pending.items():
        missing = ray.get(answer, timeout=120)
        check(
            not missing,
            f"node {address} does not see {' and '.join(missing)}: every node needs them under the same path, "
            "on shared storage (set data.root and output.dir to a folder that all nodes mount)",
        )


def _missing_folders(data: str | None, files: LaunchFiles) -> list[str]:
    missing = []
    if data is not None and not Path(data).exists():
        missing.append(f"the data folder {data}")
    if not files.visible():
        missing.append(f"the output folder {files.run_dir}")
    return missing

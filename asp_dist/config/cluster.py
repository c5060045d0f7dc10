"""Where a run takes place, is watched and leaves its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asp_dist.config.checks import check, check_address, check_positive


@dataclass(frozen=True)
class ClusterConfig:
    """Where the workers run.

    Args:
        mode: ``ray`` (Ray Train), or ``local`` (this process, or the ranks that torchrun started).
        address: a running Ray cluster, ``auto``, or None: ``RAY_ADDRESS``, else a cluster on this machine.
        num_workers: number of workers; each is one rank.
        min_workers: with a value, the group is elastic between `min_workers` and `num_workers`.
        cpus_per_worker: CPUs reserved per worker; None: an equal share of this machine's on a local cluster, else 1.
        gpus_per_worker: GPUs reserved per worker; None: 1 where the cluster has some, else 0.
        max_failures: restarts of the worker group after a failure; -1: no limit.
        timeout_s: seconds after which a collective that does not finish ends the run.
    """

    mode: Literal["ray", "local"] = "ray"
    address: str | None = None
    num_workers: int = 2
    min_workers: int | None = None
    cpus_per_worker: float | None = None
    gpus_per_worker: int | None = None
    max_failures: int = 3
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        check(self.num_workers >= 1, f"cluster.num_workers = {self.num_workers} must be at least 1")
        check(
            self.min_workers is None or 1 <= self.min_workers <= self.num_workers,
            f"cluster.min_workers = {self.min_workers} must lie in 1..cluster.num_workers = {self.num_workers}",
        )
        check_positive("cluster.timeout_s", self.timeout_s)
        check_positive("cluster.cpus_per_worker", self.cpus_per_worker)


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run's numbers go, beside ``metrics.jsonl``.

    Args:
        wandb: ``auto`` (online with a key and a network, else offline), ``online``, ``offline`` or ``disabled``.
        project: wandb project.
        entity: wandb user or team.
        group: wandb group.
        tags: wandb tags.
        timeout_s: seconds to wait for the wandb server before going offline.
        layers_every: optimizer steps between logged layer statistics; 0: at evaluations only.
        layer_accuracy_images: images per layer for the accuracy with that layer made dense; 0: off.
        layer_accuracy_every: epochs between those evaluations.
    """

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "asp-dist"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    timeout_s: float = 10.0
    layers_every: int = 0
    layer_accuracy_images: int = 0
    layer_accuracy_every: int = 5


@dataclass(frozen=True)
class OutputConfig:
    """Where the run's files go.

    Args:
        dir: folder of all runs; every worker must see it.
        checkpoint_epochs: epochs between checkpoints.
        checkpoint_steps: optimizer steps between checkpoints as well; None: none within an epoch.
        checkpoint_minutes: minutes between checkpoints as well; None: none within an epoch.
        keep: checkpoints kept, beside the best.
        storage: address of an object store, such as ``s3://bucket/runs``, that holds the checkpoints and copies of the
            results, so that a run goes on where its `dir` is gone; None: the run's folder holds them.
    """

    dir: str = "runs"
    checkpoint_epochs: int = 1
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = None
    keep: int = 2
    storage: str | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoint_epochs", "checkpoint_steps", "checkpoint_minutes", "keep"):
            check_positive(f"output.{name}", getattr(self, name))
        check(
            self.storage is None or "://" in self.storage,
            f"output.storage = {self.storage!r} is no address: give one such as s3://bucket/runs, or use output.dir",
        )
        check_address("output.storage", self.storage)


@dataclass(frozen=True)
class ResumeConfig:
    """What happens when the run directory already holds a run.

    Args:
        enabled: go on from its latest checkpoint; False refuses to touch it.
        allow_changes: dotted names of fields that may differ from the run's own config.
    """

    enabled: bool = True
    allow_changes: tuple[str, ...] = ()

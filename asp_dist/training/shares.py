"""Which numbers of workers the batch of a step can be dealt to."""

from __future__ import annotations

from asp_dist.config import Config


def share_problem(config: Config, world_size: int) -> str:
    """Why `world_size` workers cannot share the batch of a step, with the remedy; empty if they can."""
    batch, accumulate, augment = config.data.batch_size, config.training.accumulate, config.data.augment
    parts = world_size * accumulate
    if batch % parts:
        return (
            f"data.batch_size = {batch} does not divide among {world_size} workers × training.accumulate = {accumulate}: "
            f"{batch} / {parts} = {batch / parts:.2f}; use a multiple of {parts}"
        )
    if (batch // parts) % 2 and (augment.mixup > 0 or augment.cutmix > 0):
        return (
            f"data.augment.mixup and cutmix pair images: data.batch_size = {batch} over {parts} parts leaves "
            f"{batch // parts} per part, which is odd; use a multiple of {2 * parts}"
        )
    return ""


def group_sizes(config: Config) -> list[int]:
    """The sizes that a group of workers on a cluster may have, rising: one unless ``cluster.min_workers`` is set.

    Of an elastic group's sizes, those among which the batch cannot be shared are left out.
    """
    cluster = config.cluster
    if cluster.min_workers is None:
        return [cluster.num_workers]
    sizes = range(cluster.min_workers, cluster.num_workers + 1)
    return [size for size in sizes if not share_problem(config, size)]

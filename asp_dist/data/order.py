"""Which sample goes where: the order of an epoch, and each rank's part of it. Arithmetic alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from asp_dist.data.samples import IndexArray
from asp_dist.errors import check


def permutation(count: int, *key: int) -> IndexArray:
    """A permutation of range(`count`), the same on every machine and for every numpy: the order of Philox's raw words.

    Args:
        count: length.
        key: whole numbers that name the permutation, such as (seed, epoch).
    """
    words = np.random.SeedSequence([k % 2**64 for k in key]).generate_state(2, np.uint64)
    return np.argsort(np.random.Philox(key=words).random_raw(count), kind="stable").astype(np.int64)


def shard_permutation(shard: IndexArray, *key: int) -> IndexArray:
    """A permutation that keeps each shard's samples together: the shards in random order, shuffled inside.

    Args:
        shard: int64 [N], each sample's shard.
        key: as in `permutation`.
    """
    shuffled = permutation(len(shard), *key)
    rank_of_shard = permutation(int(shard.max()) + 1, *key, 1)
    return shuffled[np.argsort(rank_of_shard[shard[shuffled]], kind="stable")]


@dataclass(frozen=True)
class EpochPlan:
    """How an epoch's samples are dealt to steps and ranks; the global batch of a step is the same for every world size.

    Args:
        num_samples: samples of the training split.
        batch_size: samples per optimizer step over all ranks.
        world_size: number of ranks.
        accumulate: micro-batches per optimizer step.
        repeats: how often each image appears in a step (repeated augmentation); 1 is off.

    Raises:
        UserError: the batch is larger than the data set, or does not divide over ranks and micro-batches.
    """

    num_samples: int
    batch_size: int
    world_size: int = 1
    accumulate: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        parts = self.world_size * self.accumulate
        check(
            self.batch_size % parts == 0,
            f"data.batch_size = {self.batch_size} does not divide into {self.world_size} workers x "
            f"{self.accumulate} micro-batches: use a multiple of {parts}",
        )
        check(
            self.num_samples >= self.batch_size,
            f"data.batch_size = {self.batch_size} is larger than the {self.num_samples} training images: use a smaller batch",
        )

    @property
    def micro(self) -> int:
        """Samples per micro-batch of one rank."""
        return self.batch_size // (self.world_size * self.accumulate)

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch; the tail of ``num_samples % batch_size`` samples is left to later epochs."""
        return self.num_samples // self.batch_size

    def order(self, seed: int, epoch: int, shard: IndexArray | None = None) -> IndexArray:
        """The epoch's samples, int64 [steps * batch_size], a function of `seed` and `epoch` alone.

        Without repeats it is a permutation of the data set without its tail. With repeats, each image of the first
        ``1 / repeats`` of the permutation appears `repeats` times, in one step where the batch size allows, and its
        copies lie far apart, so that they reach different ranks (Hoffer et al., arXiv 1901.09335).

        Args:
            shard: each sample's shard, int64 [N], to read shards one by one; None for single files.
        """
        key = (seed, epoch)
        order = permutation(self.num_samples, *key) if shard is None else shard_permutation(shard, *key)
        if self.repeats > 1:
            blocks = np.repeat(order, self.repeats)[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)
            order = np.concatenate([blocks[:, k :: self.repeats] for k in range(self.repeats)], axis=1).reshape(-1)
        return order[: self.steps * self.batch_size]

    def part(self, order: IndexArray, rank: int, first_step: int = 0) -> IndexArray:
        """Rank `rank`'s samples from optimizer step `first_step` on, int64 [remaining steps * accumulate * micro]."""
        dealt = order.reshape(self.steps, self.accumulate, self.world_size, self.micro)
        return np.ascontiguousarray(dealt[first_step:, :, rank]).reshape(-1)


def eval_part(num_samples: int, rank: int, world_size: int) -> IndexArray:
    """Rank `rank`'s validation samples: every sample on exactly one rank, the ranks' counts differ by one at most."""
    return np.arange(rank, num_samples, world_size, dtype=np.int64)


def eval_steps(num_samples: int, batch_size: int, world_size: int) -> int:
    """Validation batches of every rank, some of which may be empty: those of the rank with most samples."""
    per_rank = math.ceil(num_samples / world_size)
    return math.ceil(per_rank / batch_size)

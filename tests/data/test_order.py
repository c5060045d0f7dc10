"""The order of epochs and its parts: arithmetic that must be exact."""

from __future__ import annotations

import numpy as np
import pytest

from asp_dist.data.order import EpochPlan, eval_part, eval_steps, permutation, shard_permutation
from asp_dist.errors import UserError

RECORDED = ([0, 3, 7, 5, 1, 2, 6, 4], [7, 1, 6, 0, 4, 2, 3, 5])


def test_permutation_is_fixed_for_ever() -> None:
    # Recorded numbers: another numpy or machine must give the same, or a resumed run would repeat and lose samples.
    assert permutation(8, 0, 0).tolist() == RECORDED[0]
    assert permutation(8, 7, 3).tolist() == RECORDED[1]
    assert sorted(permutation(1000, 1, 2).tolist()) == list(range(1000))


def test_shard_permutation_keeps_shards_together() -> None:
    shard = np.repeat(np.arange(5), [3, 1, 7, 2, 4])
    order = shard_permutation(shard, 0, 1)
    assert sorted(order.tolist()) == list(range(17))
    changes = int((np.diff(shard[order]) != 0).sum())
    assert changes == 4
    assert shard_permutation(shard, 0, 2).tolist() != order.tolist()
    assert order.tolist() != sorted(order.tolist(), key=lambda i: (shard[i], i))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_batches_do_not_depend_on_the_world_size(world_size: int, accumulate: int) -> None:
    alone = EpochPlan(101, 24)
    plan = EpochPlan(101, 24, world_size, accumulate)
    order = plan.order(seed=5, epoch=2)
    assert order.tolist() == alone.order(seed=5, epoch=2).tolist()
    assert len(order) == 96 and len(set(order.tolist())) == 96
    for step in range(plan.steps):
        size = plan.accumulate * plan.micro
        parts = [plan.part(order, rank)[step * size : (step + 1) * size] for rank in range(world_size)]
        assert sorted(np.concatenate(parts).tolist()) == sorted(order[step * 24 : (step + 1) * 24].tolist())


def test_part_from_a_later_step_is_the_rest() -> None:
    plan = EpochPlan(100, 12, world_size=2, accumulate=3)
    order = plan.order(0, 0)
    whole = plan.part(order, 1)
    assert plan.part(order, 1, first_step=5).tolist() == whole[5 * 6 :].tolist()
    assert plan.part(order, 1, first_step=8).tolist() == []


def test_repeats_put_copies_of_an_image_into_one_step_far_apart() -> None:
    plan = EpochPlan(60, 12, world_size=3, repeats=3)
    order = plan.order(0, 0)
    counts = np.unique(order, return_counts=True)[1]
    assert counts.tolist() == [3] * 20
    for rank in range(3):
        first = plan.part(order, rank)[:4]
        assert len(set(first.tolist())) == 4  # one copy per rank
    for step in order.reshape(5, 12):
        assert len(set(step.tolist())) == 4


@pytest.mark.parametrize(("batch", "world", "accumulate"), [(10, 3, 1), (12, 2, 4), (200, 1, 1)])
def test_impossible_plans_are_refused(batch: int, world: int, accumulate: int) -> None:
    with pytest.raises(UserError, match=f"data.batch_size = {batch}"):
        EpochPlan(100, batch, world, accumulate)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_samples", [1, 7, 101, 256])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_validation_parts_cover_every_sample_once(world_size: int, num_samples: int, batch: int) -> None:
    parts = [eval_part(num_samples, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_samples))
    steps = eval_steps(num_samples, batch, world_size)
    assert max(-(-len(p) // batch) for p in parts) == steps

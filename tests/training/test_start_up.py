"""Starting and resuming on many ranks: who lists the data, who reads the checkpoint, and what the others are told."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from small_runs import StopAt
from start_up import counted, prepared, simulate

from asp_dist.config import Config
from asp_dist.data.samples import Samples
from asp_dist.errors import UserError
from asp_dist.training.build import open_data
from asp_dist.training.hooks import Stopped
from asp_dist.training.trainer import train
from asp_dist.training.world import World, init_world


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return prepared(tmp_path_factory.mktemp("start"))


def test_one_of_1024_simulated_ranks_lists_the_data_and_reads_the_checkpoint(config: Config) -> None:
    one, many = simulate(config, 1), simulate(config, 1024)
    assert many["start"]["splits listed"] == one["start"]["splits listed"] == 2
    assert many["resume"]["bytes read"] == one["resume"]["bytes read"] > 0
    assert many["resume"]["files read"] == one["resume"]["files read"]
    assert many["start"]["messages"] == 1024 * 2  # the list, and its fingerprint
    per_rank = many["resume"]["bytes received"] / 1023
    assert one["resume"]["bytes read"] * 0.9 < per_rank < one["resume"]["bytes read"] * 1.1


def resumed(config: Config) -> tuple[Counter[str], Any]:
    world = init_world("cpu")
    try:
        with counted() as counts, pytest.raises(Stopped):
            train(config, world, StopAt(3))
        return counts, world.rank
    finally:
        world.close()


@pytest.mark.slow
def test_one_of_16_processes_lists_the_data_and_reads_the_checkpoint(config: Config) -> None:
    """A run of one process goes on with 16, for a step."""
    answers = on_ranks(resumed, config, ranks=16)
    assert [counts["splits listed"] for counts, _ in answers] == [2] + [0] * 15
    assert answers[0][0]["bytes read"] > 100_000
    assert [counts["bytes read"] for counts, _ in answers[1:]] == [0] * 15


STATE: dict[str, Any] = {
    "model": {
        "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "last": torch.arange(96.0).reshape(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "mask": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 5),
    },
    "run": {"step": 3, "best": None, "pairs": ((1, 2.5), "x")},
}


def shared_state() -> dict[str, Any]:
    world = init_world("cpu")
    try:
        return world.share_state(STATE if world.is_main else None)
    finally:
        world.close()


def test_a_state_reaches_the_other_ranks_bit_for_bit() -> None:
    for state in on_ranks(shared_state, ranks=3):
        assert state["run"] == STATE["run"]
        for name, tensor in STATE["model"].items():
            assert state["model"][name].dtype == tensor.dtype and torch.equal(state["model"][name], tensor), name
            assert state["model"][name].stride() == tensor.stride(), name


def opened(config: Config, patch_rank: int, size: int | None) -> str:
    world = init_world("cpu")
    alone = World(world.rank, 0, world.world_size)  # as if each were on a node of its own
    stored = Samples.stored_size
    if world.rank == patch_rank:
        Samples.stored_size = lambda self, index: size if index == 0 else stored(self, index)  # type: ignore[method-assign]
    try:
        open_data(config.data, alone)
    except UserError as error:
        return str(error)
    finally:
        world.close()
    return ""


@pytest.mark.parametrize(("size", "words"), [(None, "lacks it"), (17, "has 17 bytes there")])
def test_a_node_with_other_images_is_named_with_a_patched_size(config: Config, size: int | None, words: str) -> None:
    first, second, third = on_ranks(opened, config, 1, size, ranks=3)
    assert first == second == third
    assert "every node needs the same data set under the same path" in first and words in first


MANY_FILES = """
import resource, sys
from asp_dist.files import allow_many_files
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
allow_many_files()
files = [open(sys.executable, "rb") for _ in range(200)]
"""


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 300, reason="the system allows fewer than 300 open files")
def test_more_shards_than_the_soft_limit_of_open_files() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", MANY_FILES], check=True, cwd=Path(__file__).parents[2])

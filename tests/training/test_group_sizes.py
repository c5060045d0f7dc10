"""The same batch of 256 images a step on groups of any size: what is trained does not depend on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from small_runs import small_config, with_changes

from asp_dist.config import AugmentConfig, ClusterConfig, Config, DataConfig
from asp_dist.data import prepare_digits
from asp_dist.training.trainer import train
from asp_dist.training.world import World, group_sizes, init_world

pytestmark = pytest.mark.slow


def config_of(folder: Path, root: Path) -> Config:
    """Without augmentation, which each worker draws anew, and without batch norm, whose statistics are each worker's own."""
    config = small_config(folder, model__name="test_convnext", schedule__epochs=1, training__log_every=1)
    data = DataConfig(
        root=str(root),
        batch_size=256,
        input_size=32,
        threads=1,
        augment=AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0),
    )
    return dataclasses.replace(config, data=data)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


def trained(config: Config) -> dict[str, Any]:
    world = init_world("cpu")
    try:
        return train(config, world)
    finally:
        world.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    train(config_of(folder, digits), World())
    return folder / "run"


@pytest.mark.parametrize("size", [2, 8])
def test_a_group_trains_what_one_process_trains(alone: Path, digits: Path, tmp_path: Path, size: int) -> None:
    summaries = on_ranks(trained, config_of(tmp_path, digits), ranks=size)
    assert [summary["world_size"] for summary in summaries] == [size] * size
    one, many = (load_file(folder / "model.safetensors") for folder in (alone, tmp_path / "run"))
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_sizes_that_cannot_share_the_batch_are_refused_or_leave_workers_idle(digits: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(RuntimeError, match=f"256 does not divide into {size} workers"):
        on_ranks(trained, config_of(tmp_path, digits), ranks=size)
    elastic = with_changes(config_of(tmp_path, digits), cluster=ClusterConfig(num_workers=size, min_workers=1))
    assert max(group_sizes(elastic)) == (2 if size == 3 else 4)

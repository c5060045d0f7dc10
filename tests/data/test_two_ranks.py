"""A bad file in a run of two ranks: both end, soon, and the message names the file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from data_helpers import BAD, jpeg
from ranks import on_ranks

from asp_dist.config import DataConfig
from asp_dist.data import build_loaders
from asp_dist.data.bad_files import DataError


def train(root: Path) -> tuple[float, str | None]:
    """Seconds, and how it ended."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    data = DataConfig(root=str(root), batch_size=8, threads=1)
    loaders = build_loaders(
        data, model_data={"input_size": (3, 32, 32)}, seed=0, rank=rank, world_size=world, device=torch.device("cpu")
    )
    began = time.monotonic()
    try:
        for epoch in range(50):  # a truncated file may survive a crop of its upper part
            for images, _ in loaders.train.start(epoch):
                dist.all_reduce(images.mean())
        return time.monotonic() - began, None
    except DataError as error:
        return time.monotonic() - began, str(error)
    except RuntimeError as error:
        return time.monotonic() - began, f"the other rank is gone: {error}"
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncated", "empty", "not an image"])
def test_two_ranks_end_with_the_name_of_the_file(tmp_path: Path, kind: str) -> None:
    for i in range(17):
        for split in ("train", "val"):
            folder = tmp_path / split / ("cat" if i % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
    bad = tmp_path / "train" / "cat" / "03.jpg"
    bad.write_bytes(BAD[kind] or b"")
    ended = on_ranks(train, tmp_path)
    assert any(f"cannot decode {bad}" in str(message) and str(message).startswith("rank ") for _, message in ended)
    assert all(message for _, message in ended)
    print(f"{kind}: ended {max(seconds for seconds, _ in ended):.1f} s after the training began")
    assert max(seconds for seconds, _ in ended) < 30

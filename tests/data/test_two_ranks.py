"""A bad file in a run of two ranks: both end, soon, and the message names the file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_helpers import BAD, jpeg
from waiting import HANG_S

SCRIPT = """
import sys, time
import torch
import torch.distributed as dist
from asp_dist.config import DataConfig
from asp_dist.data import build_loaders

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
data = DataConfig(root=sys.argv[1], batch_size=8, threads=1)
train = build_loaders(
    data, model_data={"input_size": (3, 32, 32)}, seed=0, rank=rank, world_size=world, device=torch.device("cpu")
).train
sys.stdout.write(f"training since {time.time()}\\n")  # torchrun runs python -u: print would write it in pieces
for epoch in range(50):  # a truncated file may survive a crop of its upper part
    for images, _ in train.start(epoch):
        dist.all_reduce(images.mean())
print("no error")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["truncated", "empty", "not an image"])
def test_two_ranks_end_with_the_name_of_the_file(tmp_path: Path, kind: str) -> None:
    for i in range(17):
        for split in ("train", "val"):
            folder = tmp_path / "data" / split / ("cat" if i % 2 else "dog")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
    bad = tmp_path / "data" / "train" / "cat" / "03.jpg"
    bad.write_bytes(BAD[kind] or b"")
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, str(script), str(tmp_path / "data")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert ended.returncode != 0 and "no error" not in ended.stdout
    assert f"cannot decode {bad}" in ended.stderr, ended.stderr[-2000:]
    assert "asp_dist.data.bad_files.DataError: rank " in ended.stderr
    seconds = time.time() - min(float(t) for t in re.findall(r"training since (\S+)", ended.stdout))
    print(f"{kind}: ended {seconds:.1f} s after the training began")
    assert seconds < 30

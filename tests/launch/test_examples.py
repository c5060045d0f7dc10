"""The examples run as their first lines say, and each ends at its budget."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG_S

EXAMPLES = Path(__file__).parents[2] / "launch" / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher", "last"),
    [
        (
            "own_loop.py",
            (),
            r"done: 3155 of 28960 weights",
        ),  # 10 % of 28,672, and a first layer that is too small to prune
        ("ddp.py", TORCHRUN, r"done: loss 0\.\d+, 3789 weights left, ranks agree: True"),  # 20 % of 18,944
        ("own_control.py", (), r"done: loss 0\.\d+, sparsity 0\.7500"),
    ],
)
def test_an_example_ends_at_its_budget(name: str, launcher: tuple[str, ...], last: str) -> None:
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(last, done.stdout.strip().splitlines()[-1]), done.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"own_loop.py", "ddp.py", "own_control.py"}

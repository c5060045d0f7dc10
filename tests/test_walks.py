"""The five walks through the package are short, as `tests/tools/count_walks.py` counts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import HANG_S


@pytest.mark.slow
def test_no_walk_is_longer_than_it_may_be() -> None:
    script = Path(__file__).parent / "tools" / "count_walks.py"
    environment = {**os.environ, "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("at most") == 5

"""A look into some of a run's steps by torch's profiler: a trace for Perfetto, and a table of what took longest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)

FOLDER = "profile"
FIRST_STEP = 10  # of this process: the steps before it still warm up
ROWS = 40


class StepProfile:
    """Profiles so many steps of this process, after `FIRST_STEP` others. What it finds lies in ``RUN_DIR/profile``.

    ``trace.json.gz`` opens in https://ui.perfetto.dev; the data, forward and backward, the optimizer's step and the pruning in
    it have names. ``kernels.txt`` has the kernels and operators that took longest.

    Args:
        folder: the run's.
        steps: how many steps; 0: nothing is profiled.
        device: where the steps run.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        self.folder, self.device = folder / FOLDER, device
        self._last = FIRST_STEP + steps
        self._done = 0
        self._active = steps > 0
        self._profiler: Any = None

    def step(self) -> str | None:
        """A step has ended. Returns where the result is, once it is written."""
        if not self._active:
            return None
        self._done += 1
        if self._done == FIRST_STEP:
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profiler.start()
        elif self._done == self._last:
            return self.close()
        return None

    def close(self) -> str | None:
        """Write what was seen so far, if anything was; a failure is logged, and the run goes on. Returns where it is."""
        profiler, self._profiler, self._active = self._profiler, None, False
        if profiler is None:
            return None
        try:
            profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
            order = f"self_{'device' if self.device.type == 'cuda' else 'cpu'}_time_total"
            table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
            (self.folder / "kernels.txt").write_text(table, encoding="utf-8")
        except (OSError, RuntimeError) as error:
            log.warning("the profile is not written: %s", error)
            return None
        return f"{self.folder}: trace.json.gz for https://ui.perfetto.dev, kernels.txt"

"""What a run's rows show that its user should be told at once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

Alert = tuple[str, str]

STARVED_SHARE = 0.5  # of a step's time spent waiting for images
STARVED_ROWS = 5  # such rows in a row
BUDGET_TOLERANCE = 5e-4
SILENT_LEAST_S = 600.0  # without a row, and
SILENT_INTERVALS = 20  # times as long as between the last two


class Watch:
    """Looks at rows as they are logged; each kind of trouble is reported once until it has gone."""

    def __init__(self) -> None:
        self._bad_loss = False
        self._starved = 0

    def row(self, row: dict[str, Any]) -> list[Alert]:
        """Alerts that `row` gives rise to: a loss that is not finite, workers that wait for images."""
        alerts: list[Alert] = []
        if "train/loss" in row:
            bad = row["train/loss"] is None or not math.isfinite(row["train/loss"])
            if bad and not self._bad_loss:
                alerts.append(("Loss is not finite", f"train/loss = {row['train/loss']}"))
            self._bad_loss = bad
        if row.get("time/step"):
            share = row.get("time/data", 0.0) / row["time/step"]
            self._starved = self._starved + 1 if share > STARVED_SHARE else 0
            if self._starved == STARVED_ROWS:
                text = f"workers wait for images during {share:.0%} of a step; raise data.threads or data.prefetch"
                alerts.append(("Input is stalled", text))
        return alerts

    def summary(self, summary: dict[str, Any]) -> list[Alert]:
        """Alerts at the end: the budget was missed."""
        measured, target = summary.get("sparsity"), summary.get("target_sparsity")
        if measured is None or target is None or measured >= target - BUDGET_TOLERANCE:
            return []
        return [("Budget missed", f"sparsity {measured:.4%} of the prunable weights, budget {target:.4%}")]


class Heartbeat:
    """Calls `on_silence` with the seconds passed when no row has come for far longer than usual; once per silence.

    A pipeline that hangs, or a worker that waits for another one, gives no row that could be looked at.
    """

    def __init__(self, on_silence: Callable[[float], None], least_s: float = SILENT_LEAST_S) -> None:
        self.least_s = least_s
        self._on_silence = on_silence
        self._interval = 0.0
        self._last: float | None = None
        self._changed = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._wait, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """A row has come."""
        now = time.monotonic()
        self._interval = 0.0 if self._last is None else now - self._last
        self._last = now
        self._changed.set()

    def close(self) -> None:
        """Stop watching."""
        self._closed = True
        self._changed.set()
        self._thread.join()

    def _wait(self) -> None:
        limit: float | None = None  # before the first row anything may take long: start-up, compilation
        while not self._closed:
            came = self._changed.wait(limit)
            self._changed.clear()
            if came:
                limit = None if self._last is None else max(self.least_s, SILENT_INTERVALS * self._interval)
            elif limit is not None:
                self._on_silence(limit)
                limit = None

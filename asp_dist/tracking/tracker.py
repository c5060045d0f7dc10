"""`build_tracker`: where a run's numbers go. The trainer logs rows and never asks whether anybody listens."""

from __future__ import annotations

import math
import threading
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from asp_dist.config import Config
from asp_dist.errors import UserError
from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.console import duration
from asp_dist.tracking.further import FurtherTracker, start_further
from asp_dist.tracking.layer_rows import LayerFile, read_layers
from asp_dist.tracking.rows import MetricsFile, Row
from asp_dist.tracking.schema import (
    DATA_TIME,
    FASTEST_TIME,
    METRICS_FILE,
    SLOWEST_RANK,
    SLOWEST_TIME,
    STEP_TIME,
    TRAIN_LOSS,
    WARNING,
)
from asp_dist.tracking.wandb import wandb_run

Alert = tuple[str, str]

STARVED_SHARE = 0.5  # of a step's time spent waiting for images
STARVED_ROWS = 5  # such rows in a row
SLOW_SHARE = 0.3  # of a step's time that one rank takes longer than the fastest
SLOW_ROWS = 10  # in a row with the same rank
BUDGET_TOLERANCE = 5e-4
SILENT_LEAST_S = 600.0  # without a row, and
SILENT_INTERVALS = 20  # times as long as between the last two


class Watch:
    """Looks at rows as they are logged; each kind of trouble is reported once until it clears."""

    def __init__(self) -> None:
        self._bad_loss = False
        self._starved = 0
        self._slow: dict[int, int] = {}

    def row(self, row: dict[str, Any]) -> list[Alert]:
        """Alerts that `row` gives rise to: a loss that is not finite, workers that wait for images, a slow rank."""
        alerts: list[Alert] = []
        if TRAIN_LOSS in row:
            bad = row[TRAIN_LOSS] is None or not math.isfinite(row[TRAIN_LOSS])
            if bad and not self._bad_loss:
                alerts.append(("Loss is not finite", f"{TRAIN_LOSS} = {row[TRAIN_LOSS]}"))
            self._bad_loss = bad
        if row.get(STEP_TIME):
            share = row.get(DATA_TIME, 0.0) / row[STEP_TIME]
            self._starved = self._starved + 1 if share > STARVED_SHARE else 0
            if self._starved == STARVED_ROWS:
                text = f"workers wait for images during {share:.0%} of a step; raise data.threads or data.prefetch"
                alerts.append(("Input is stalled", text))
        if row.get(SLOWEST_TIME) and row.get(STEP_TIME):
            rank, behind = int(row[SLOWEST_RANK]), row[SLOWEST_TIME] - row[FASTEST_TIME]
            self._slow = {rank: self._slow.get(rank, 0) + 1} if behind > SLOW_SHARE * row[STEP_TIME] else {}
            if self._slow.get(rank) == SLOW_ROWS:
                text = f"its images and forward passes take {behind:.3f} s longer than the fastest rank's, and the others wait"
                alerts.append((f"Rank {rank} is slow", text))
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
        """Record that a row arrived."""
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
        limit: float | None = None  # before the first row anything may be slow: start-up, compilation
        while not self._closed:
            came = self._changed.wait(limit)
            self._changed.clear()
            if came:
                limit = None if self._last is None else max(self.least_s, SILENT_INTERVALS * self._interval)
            elif limit is not None:
                self._on_silence(limit)
                limit = None


class Tracker:
    """Receives a run's rows; this one drops them (ranks other than 0). Usable in a ``with`` block, which finishes it."""

    def log(self, step: int, row: Row) -> None:
        """Record `row` after `step` optimizer steps; duplicate steps of the same kind are dropped."""

    def log_layers(self, step: int, rows: list[LayerRow]) -> None:
        """Record the layers' rows (see `asp_dist.tracking.layer_rows.COLUMNS`) after `step` optimizer steps."""

    def alert(self, title: str, text: str) -> None:
        """Tell the user at once, and leave a warning in the record."""

    def finish(self, summary: dict[str, Any] | None = None, exit_code: int = 0) -> None:
        """Close everything; a second call does nothing. Without it wandb would lose rows."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: types.TracebackType | None) -> None:
        self.finish({}, exit_code=0 if kind is None else 1)


class RunTracker(Tracker):
    """Rank 0's tracker: ``metrics.jsonl``, ``layers.jsonl``, ``layers.json``, wandb and further trackers.

    What went to the metrics file but not into wandb before a kill is given to wandb first.
    """

    def __init__(
        self,
        run_dir: Path,
        metrics: MetricsFile,
        layers: LayerFile,
        run: wandb_run.WandbRun | None,
        further: Sequence[FurtherTracker] = (),
    ) -> None:
        self.run_dir = run_dir
        self._metrics = metrics
        self._layers = layers
        self._run = run
        self._further = list(further)
        self._watch = Watch()
        self._lock = threading.RLock()  # the heartbeat alerts from its own thread
        self._heart = Heartbeat(self._silent)
        self._step = max(metrics.last_step.values(), default=0)
        self._finished = False
        self._to_wandb(lambda run: self._catch_up(run))
        metrics.kept.clear()

    def _silent(self, seconds: float) -> None:
        text = f"no row for {duration(seconds)} since step {self._step}: the input is stalled, or a worker hangs"
        self.alert("No progress", text)

    def _catch_up(self, run: wandb_run.WandbRun) -> None:
        """Give wandb the kept rows and layers that it lost in a kill, by rising steps."""
        history, latest = self._layers.history, read_layers(self.run_dir)
        waiting = list(history.steps) if latest else []
        for row in self._metrics.kept:
            while waiting and waiting[0] <= row["step"]:
                step = waiting.pop(0)
                run.log_layers(step, history.rows_at(step, latest), history.until(step))
            run.log(row)

    @property
    def wandb_id(self) -> str | None:
        """The wandb run's id, None without wandb."""
        return self._run.run.id if self._run else None

    def log(self, step: int, row: Row) -> None:
        """Record `row`, in the file and in wandb, and warn about what it shows."""
        self._heart.beat()
        self._step = max(self._step, step)
        with self._lock:
            written = self._metrics.append(step, row)
        if written is None:
            return
        self._to_wandb(lambda run: run.log(written))
        self._to_further(lambda tracker: tracker.log(written))
        for title, text in self._watch.row(row):
            self.alert(title, text)

    def log_layers(self, step: int, rows: list[LayerRow]) -> None:
        """Record the layers in the files, and as one table, histogram, heat map and line chart in wandb."""
        if self._layers.add(step, rows):
            self._to_wandb(lambda run: run.log_layers(step, rows, self._layers.history))

    def alert(self, title: str, text: str) -> None:
        """A warning row in the record, and an alert in wandb."""
        with self._lock:
            self._metrics.append(self._step, {"event": WARNING, "message": f"{title}: {text}"})
        self._to_wandb(lambda run: run.alert(title, text))

    def finish(self, summary: dict[str, Any] | None = None, exit_code: int = 0) -> None:
        """Check the budget, store summary and artifacts, and close wandb and the files."""
        if self._finished:
            return
        self._finished = True
        self._heart.close()
        summary = summary or {}
        for title, text in self._watch.summary(summary):
            self.alert(title, text)
        self._to_wandb(lambda run: run.finish(self.run_dir, summary, exit_code))
        self._to_further(lambda tracker: tracker.finish(summary, exit_code))
        self._layers.close()
        self._metrics.close()

    def _to_wandb(self, call: Callable[[wandb_run.WandbRun], None]) -> None:
        """Run `call`; a failure of wandb is recorded and ends tracking there, not the training."""
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self._run = None
            text = f"wandb failed ({type(error).__name__}: {error}); the run continues in {self._metrics.path}"
            self._metrics.append(self._step, {"event": WARNING, "message": text})

    def _to_further(self, call: Callable[[FurtherTracker], None]) -> None:
        """Run `call` on each further tracker; one that fails is left out from then on, and recorded."""
        for tracker in list(self._further):
            try:
                call(tracker)
            except Exception as error:
                self._further.remove(tracker)
                text = f"{tracker.name} failed ({type(error).__name__}: {error}); the run continues in {self._metrics.path}"
                self._metrics.append(self._step, {"event": WARNING, "message": text})


def build_tracker(config: Config, run_dir: Path, *, rank: int, resume_step: int = 0) -> Tracker:
    """The tracker of `rank`: one that writes for rank 0, one that drops everything for the others.

    Args:
        config: the run's configuration; its ``tracking`` part says what wandb does.
        run_dir: the run's folder; rows after `resume_step` in its files are cut off, the run writes them again.
        rank: rank of this process.
        resume_step: optimizer steps that the restored checkpoint had done; 0 for a new run.

    Raises:
        UserError: ``tracking.wandb = online`` and the server is not usable.
    """
    if rank != 0:
        return Tracker()
    run_dir.mkdir(parents=True, exist_ok=True)
    run: wandb_run.WandbRun | None = None
    problem = ""
    try:
        run = wandb_run.start(config, run_dir)
    except UserError:
        raise
    except Exception as error:  # its service does not start, or fails: no reason not to train
        problem = f"wandb does not track this run ({type(error).__name__}: {error}); the record is in {run_dir / METRICS_FILE}"
    problems = [problem] if problem else []
    further = []
    for name in config.tracking.also:
        try:
            further.append(start_further(config, run_dir, resume_step, name))
        except Exception as error:
            problems.append(f"{name} does not track this run ({type(error).__name__}: {error})")
    metrics = MetricsFile(run_dir / METRICS_FILE, resume_step)
    tracker = RunTracker(run_dir, metrics, LayerFile(run_dir, resume_step), run, further)
    for text in problems:
        tracker.log(resume_step, {"event": "tracking", "message": text})
    if run and run.mode.reason:
        message = f"wandb tracks this run offline: {run.mode.reason}. Upload it later: {wandb_run.sync_line(run_dir)}"
        tracker.log(resume_step, {"event": "tracking", "message": message})
    return tracker

"""`build_tracker`: where a run's numbers go. The trainer logs rows and never asks whether anybody listens."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from asp_dist.config import Config
from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.alerts import Heartbeat, Watch
from asp_dist.tracking.console import duration
from asp_dist.tracking.layer_rows import LayerFile, read_layers
from asp_dist.tracking.rows import MetricsFile, Row
from asp_dist.tracking.wandb import wandb_run


class Tracker:
    """Takes a run's rows; this one drops them (ranks other than 0). Usable in a ``with`` block, which finishes it."""

    def log(self, step: int, row: Row) -> None:
        """Record `row` after `step` optimizer steps; a step of a kind that stands already is dropped."""

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
    """Rank 0's tracker: ``metrics.jsonl``, ``layers.jsonl``, ``layers.json`` and wandb.

    What went to the metrics file but not into wandb before a kill is given to wandb first.
    """

    def __init__(self, run_dir: Path, metrics: MetricsFile, layers: LayerFile, run: wandb_run.WandbRun | None) -> None:
        self.run_dir = run_dir
        self._metrics = metrics
        self._layers = layers
        self._run = run
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
        for title, text in self._watch.row(row):
            self.alert(title, text)

    def log_layers(self, step: int, rows: list[LayerRow]) -> None:
        """Record the layers in the files, and as one table, histogram, heat map and line chart in wandb."""
        if self._layers.add(step, rows):
            self._to_wandb(lambda run: run.log_layers(step, rows, self._layers.history))

    def alert(self, title: str, text: str) -> None:
        """A warning row in the record, and an alert in wandb."""
        with self._lock:
            self._metrics.append(self._step, {"event": "warning", "message": f"{title}: {text}"})
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
        self._layers.close()
        self._metrics.close()

    def _to_wandb(self, call: Callable[[wandb_run.WandbRun], None]) -> None:
        """Run `call`; wandb failing is said in the record and ends wandb for this run, not the training."""
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:
            self._run = None
            text = f"wandb failed ({type(error).__name__}: {error}); the run goes on in {self._metrics.path}"
            self._metrics.append(self._step, {"event": "warning", "message": text})


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
    run = wandb_run.start(config, run_dir)
    metrics = MetricsFile(run_dir / "metrics.jsonl", resume_step)
    tracker = RunTracker(run_dir, metrics, LayerFile(run_dir, resume_step), run)
    if run and run.mode.reason:
        message = f"wandb tracks this run offline: {run.mode.reason}. Upload it later: {wandb_run.sync_line(run_dir)}"
        tracker.log(resume_step, {"event": "tracking", "message": message})
    return tracker

"""Further trackers beside wandb, fed with the same rows: TensorBoard and MLflow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Protocol

from asp_dist.config import Config, flatten, to_dict
from asp_dist.errors import UserError
from asp_dist.tracking.rows import Row, numbers_of

PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow-skinny"}
MLFLOW_ID_FILE = "mlflow_id"
MLFLOW_VALUE = 6000  # characters of a parameter's value that MLflow takes


class FurtherTracker(Protocol):
    """Takes a run's rows."""

    name: str

    def log(self, row: Row) -> None:
        """Take the numbers of a row at its step."""

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """Take the summary, and close."""


class TensorBoard:
    """Event files in ``RUN_DIR/tensorboard``; every start of a run adds one, and takes back the steps that it repeats."""

    name = "tensorboard"

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from tensorboardX import SummaryWriter

        # The names of its files have seconds alone: two starts within one would write to the same file.
        self._writer = SummaryWriter(
            str(run_dir / self.name),
            purge_step=resume_step + 1 if resume_step else None,
            filename_suffix=f".{resume_step:09d}-{time.time_ns()}",
        )

    def log(self, row: Row) -> None:
        """A scalar for each metric."""
        for name, value in numbers_of(row).items():
            self._writer.add_scalar(name, value, row["step"], walltime=row["time"])
        self._writer.flush()

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """A run in MLflow, where ``MLFLOW_TRACKING_URI`` says, else in ``RUN_DIR/mlruns``; further starts go on in it."""

    name = "mlflow"

    def __init__(self, config: Config, run_dir: Path) -> None:
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if place is None:
            place = (run_dir / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=place)
        file = run_dir / MLFLOW_ID_FILE
        self._last: dict[str, int] = {}
        if file.exists():
            self.id = file.read_text(encoding="utf-8").strip()
            self._client.update_run(self.id, status="RUNNING")
            for key in self._client.get_run(self.id).data.metrics:
                self._last[key] = max(entry.step for entry in self._client.get_metric_history(self.id, key))
            return
        name = config.tracking.project
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self.id = self._client.create_run(experiment, run_name=config.name).info.run_id
        file.write_text(f"{self.id}\n", encoding="utf-8")
        for key, value in flatten(to_dict(config)).items():
            self._client.log_param(self.id, key, str(value)[:MLFLOW_VALUE])

    def log(self, row: Row) -> None:
        """The metrics that MLflow has not at this step already."""
        from mlflow.entities import Metric

        step, now = int(row["step"]), int(1000 * row["time"])
        new = {key: value for key, value in numbers_of(row).items() if step > self._last.get(key, -1)}
        self._last.update(dict.fromkeys(new, step))
        self._client.log_batch(self.id, [Metric(key, value, now, step) for key, value in new.items()])

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        """The numbers of the summary under ``summary/``, and how the run has ended."""
        for key, value in summary.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._client.log_metric(self.id, f"summary/{key}", value)
        self._client.set_terminated(self.id, status="FINISHED" if exit_code == 0 else "KILLED")


def start_further(config: Config, run_dir: Path, resume_step: int, name: str) -> FurtherTracker:
    """The further tracker called `name`.

    Raises:
        Exception: it does not start.
    """
    return TensorBoard(run_dir, resume_step) if name == TensorBoard.name else MLflow(config, run_dir)


def check_further(names: tuple[str, ...]) -> None:
    """Raise `UserError` if the package of one of these trackers is not installed."""
    from importlib.util import find_spec

    for name in names:
        module = PACKAGES[name].split("-")[0]
        if find_spec(module) is None:
            raise UserError(
                f"tracking.also: {name} needs {PACKAGES[name]}, which is not installed: pip install 'asp-dist[trackers]'"
            )

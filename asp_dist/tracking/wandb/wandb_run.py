"""One wandb run over all starts of a training: one id, one step axis, no step twice and none missing."""

from __future__ import annotations

import logging
import os
import secrets
import string
import time
from pathlib import Path
from typing import Any

from asp_dist.config import Config, TrackingConfig, to_dict
from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.layer_rows import LayerHistory
from asp_dist.tracking.rows import Row, numbers_of
from asp_dist.tracking.schema import CONFIG_FILE, EVENT, LAYERS_FILE, MODEL_FILE
from asp_dist.tracking.wandb import layer_charts, transaction_log
from asp_dist.tracking.wandb.login import Mode, resolve

log = logging.getLogger(__name__)

ID_FILE = "wandb_id"
STEP = "global_step"
MAX_SCALARS = 38  # of our own; a web page with hundreds of charts opens slowly (wandb#4759)
FINISH_TIMEOUT_S = 120.0


def run_id(run_dir: Path) -> str:
    """The run's wandb id: kept in `ID_FILE`, made at the first start."""
    path = run_dir / ID_FILE
    if not path.exists():
        letters = string.ascii_lowercase + string.digits
        path.write_text("".join(secrets.choice(letters) for _ in range(8)) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def sync_line(run_dir: Path) -> str | None:
    """The command that uploads the run's offline files in order; None if there are none."""
    offline = sorted((run_dir / "wandb").glob("offline-run-*"))
    return f"wandb sync {run_dir / 'wandb'}/offline-run-*" if offline else None


class WandbRun:
    """Feeds rows to wandb in rank 0. Made by `start`.

    Every row carries `STEP`, and wandb's own step is set to the same number: several files of one run, written
    offline by several starts, stay in order when they are uploaded.
    """

    def __init__(self, run: Any, mode: Mode, last_steps: dict[str, int], *, upload_model: bool = True) -> None:
        self.run = run
        self.mode = mode
        self._upload_model = upload_model
        self._last_steps = last_steps
        self._scalars: set[str] = set()

    def log(self, row: Row) -> None:
        """Log a row's numbers at its step; a step that wandb has already is left as it is."""
        if row["kind"] == EVENT or row["step"] <= self._last_steps.get(row["kind"], -1):
            return
        scalars = numbers_of(row)
        room = MAX_SCALARS - len(self._scalars)
        new = [key for key in scalars if key not in self._scalars]
        self._scalars.update(new[:room])
        self._log(row["step"], {key: value for key, value in scalars.items() if key in self._scalars})

    def log_layers(self, step: int, rows: list[LayerRow], history: LayerHistory) -> None:
        """Log one table, one histogram, one heat map and one line chart of the layers, however many there are."""
        if step > self._last_steps.get("layers", -1):
            self._log(step, layer_charts.charts(rows, history))

    def _log(self, step: int, values: dict[str, Any]) -> None:
        self.run.log({STEP: step, **values}, step=step)

    def alert(self, title: str, text: str) -> None:
        """Send an alert; offline it is sent with the sync."""
        self.run.alert(title=title, text=text, level="WARN", wait_duration=600)

    def finish(self, run_dir: Path, summary: dict[str, Any], exit_code: int) -> None:
        """Store summary and artifacts, and wait for the upload for `FINISH_TIMEOUT_S` at most."""
        self.run.summary.update({key: value for key, value in summary.items() if value is not None})
        if exit_code == 0:
            _log_artifacts(self.run, run_dir, summary, model=self._upload_model)
        self.run.finish(exit_code=exit_code)


def _settings(**values: Any) -> Any:
    """wandb's settings from those of `values` that the installed version knows."""
    import wandb

    known = set(wandb.Settings.model_fields)
    return wandb.Settings(**{key: value for key, value in values.items() if key in known})


def _init(config: Config, run_dir: Path, mode: str, init_timeout: float) -> Any:
    import wandb

    tracking: TrackingConfig = config.tracking
    settings = _settings(
        init_timeout=init_timeout,
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        finish_timeout=FINISH_TIMEOUT_S if mode == "online" else 0.0,
        x_transaction_log_flush_interval=1,  # the default, 15 s, is lost when the process is killed
    )
    return wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        group=tracking.group,
        tags=list(tracking.tags) or None,
        name=config.name,
        id=run_id(run_dir),
        resume="allow",
        config=to_dict(config),
        dir=str(run_dir),
        mode=mode,  # type: ignore[arg-type]
        settings=settings,
    )


def _init_or_replace(config: Config, run_dir: Path, init_timeout: float) -> Any:
    """wandb's run online; under a new id if someone deleted the one before: the server takes none of its name again."""
    import wandb

    try:
        return _init(config, run_dir, "online", init_timeout)
    except Exception as error:
        if "deleted" not in str(error):
            raise
        log.warning("wandb run %s was deleted; going on under a new id", run_id(run_dir))
        wandb.teardown()
        (run_dir / ID_FILE).unlink()
        return _init(config, run_dir, "online", init_timeout)


def start(config: Config, run_dir: Path) -> WandbRun | None:
    """Start or resume the run's wandb run; None if tracking by wandb is disabled.

    A server that is not usable costs `tracking.timeout_s` seconds, and about as much again where it fails between the
    first question and wandb's start; then the run is tracked offline.

    Raises:
        UserError: ``tracking.wandb = online`` and the server is not usable.
    """
    if config.tracking.wandb == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    import wandb

    began = time.monotonic()
    base_url = os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url
    mode = resolve(config.tracking, base_url.rstrip("/"), was_offline=sync_line(run_dir) is not None)
    if mode.name == "disabled":
        return None
    if mode.name == "online":
        left = max(1.0, config.tracking.timeout_s - (time.monotonic() - began) - 2)
        try:
            run = _init_or_replace(config, run_dir, left)
        except Exception as error:  # no answer, or wandb's own process died of the answer
            wandb.teardown()  # else the id counts as in use
            mode = Mode("offline", f"the wandb server {base_url} did not accept the run: {str(error) or type(error).__name__}")
    if mode.name == "offline":
        run = _init(config, run_dir, "offline", 30.0)
    known = transaction_log.last_steps(run_dir, run.id)
    if mode.name == "online" and run.resumed:
        reached = int(run.summary.get(STEP, -1))
        known = {kind: max(reached, known.get(kind, -1)) for kind in ("train", "eval", "layers")}
    run.define_metric(STEP, hidden=True)
    run.define_metric("*", step_metric=STEP)
    return WandbRun(run, mode, known, upload_model=config.tracking.upload_model)


def _log_artifacts(run: Any, run_dir: Path, summary: dict[str, Any], *, model: bool) -> None:
    """The run's config, layer table and, with `model`, network as versioned artifacts; the data set is an input of the run."""
    import wandb

    data = str(summary.get("data_root") or "")
    if data and run.offline is False:
        source = wandb.Artifact(f"data-{Path(data).name}", type="dataset", metadata={"root": data})
        run.use_artifact(source)
    shown = {key: summary.get(key) for key in ("top1", "top5", "sparsity", "target_sparsity", "nonzero_weights")}
    for kind, name in (("config", CONFIG_FILE), ("model", MODEL_FILE), ("layers", LAYERS_FILE)):
        path = run_dir / name
        if path.exists() and (model or kind != "model"):
            artifact = wandb.Artifact(f"{run.id}-{kind}", type=kind, metadata=shown)
            artifact.add_file(str(path), policy="immutable", skip_cache=True)
            run.log_artifact(artifact)

"""The files through which the driver and the workers of a run talk, in the run directory that all of them see.

    RUN_DIR/cluster/LAUNCH/stop      why the run should stop; the driver writes it, the workers poll it
    RUN_DIR/cluster/LAUNCH/fatal     an error that a restart would only repeat; a worker writes it
    RUN_DIR/cluster/LAUNCH/failures  one line per failed worker group, written where Ray Train's controller runs

LAUNCH identifies the driver's launch. The folder is removed at the end; a killed driver's one by the next launch.
"""

from __future__ import annotations

import json
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asp_dist.checkpoint.folder_lock import hold_folder
from asp_dist.errors import UserError
from asp_dist.files import write_text

END_WAIT_S = 15.0  # a cluster takes some seconds to end a lost driver's workers


@dataclass(frozen=True)
class LaunchFiles:
    """The launch files of one launch.

    Args:
        run_dir: the run directory, absolute.
        launch: identifier of the driver's launch.
    """

    run_dir: Path
    launch: str

    @property
    def folder(self) -> Path:
        """The launch's own folder."""
        return self.run_dir / "cluster" / self.launch

    @classmethod
    def begin(cls, run_dir: Path) -> LaunchFiles:
        """Begin a launch in `run_dir`.

        Raises:
            UserError: the folder cannot be written.
        """
        files = cls(run_dir, uuid.uuid4().hex[:12])
        files._sweep()
        try:
            files.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot write to the run's folder {run_dir}: {error}") from error
        return files

    def end(self) -> None:
        """Remove the launch files, once the workers are gone."""
        self._sweep(END_WAIT_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sweep(self, wait_s: float = 0.0) -> None:
        """Remove all launch files, those that killed drivers left too, unless some run is at work here."""
        with suppress(OSError, UserError), hold_folder(self.run_dir, wait_s):
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def visible(self) -> bool:
        """Whether this process sees the folder that the driver made."""
        return self.folder.is_dir()

    def request_stop(self, reason: str) -> None:
        """Ask all workers to finish their step, save a checkpoint and end."""
        write_text(self.folder / "stop", reason, durable=False)

    def stop_reason(self) -> str | None:
        """What `request_stop` was given, or None."""
        try:
            return (self.folder / "stop").read_text() or None
        except OSError:
            return None

    def write_fatal(self, record: dict[str, Any]) -> None:
        """Record an error that ends the run; the first one stays."""
        if self.fatal() is None:
            write_text(self.folder / "fatal", json.dumps(record), durable=False)

    def fatal(self) -> dict[str, Any] | None:
        """The recorded error that ends the run, or None."""
        try:
            record: dict[str, Any] = json.loads((self.folder / "fatal").read_text())
        except OSError:
            return None
        return record

"""The files through which the driver and the workers of a run talk, in the run directory that all of them see.

    RUN_DIR/cluster/LAUNCH/stop      why the run should stop; the driver writes it, rank 0 polls it
    RUN_DIR/cluster/LAUNCH/fatal     an error that a restart would only repeat; a worker writes it
    RUN_DIR/cluster/LAUNCH/progress  the step of the last checkpoint; rank 0 writes it, Ray Train's controller reads it
    RUN_DIR/cluster/LAUNCH/failures  one line per failed worker group, written where Ray Train's controller runs

A network file system may show a file a minute late: the first three travel through the memory of Ray's head as well. LAUNCH
identifies the driver's launch. The folder is removed at the end; a killed driver's one by the next launch.
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
from asp_dist.cluster.ray_private import forget_word, get_word, put_word
from asp_dist.errors import UserError
from asp_dist.files import write_text
from asp_dist.training.hooks import RESIZE

WORDS = ("stop", "fatal", "progress")
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
        """Remove the launch files, once the workers are gone. Their words in Ray's memory: see `forget`."""
        self._sweep(END_WAIT_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sweep(self, wait_s: float = 0.0) -> None:
        """Remove all launch files, those that killed drivers left too, unless some run is at work here."""
        with suppress(OSError, UserError), hold_folder(self.run_dir, wait_s):
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def visible(self) -> bool:
        """Whether this process sees the folder that the driver made."""
        return self.folder.is_dir()

    def forget(self) -> None:
        """Remove what Ray's memory holds of this launch; call it while connected to Ray."""
        for name in WORDS:
            forget_word(self._word(name))

    def request_stop(self, reason: str) -> None:
        """Ask all workers to finish their step, save a checkpoint and end."""
        self._tell("stop", reason)

    def stop_reason(self) -> str | None:
        """What `request_stop` was given, or None."""
        return self._told("stop")

    def request_resize(self) -> None:
        """Ask all workers to save a checkpoint and end, so that another number of them can go on; a stop comes first."""
        if self.stop_reason() is None:
            self.request_stop(RESIZE)

    def withdraw_resize(self) -> None:
        """Take `request_resize` back."""
        if self.stop_reason() == RESIZE:
            forget_word(self._word("stop"))
            with suppress(OSError):
                (self.folder / "stop").unlink(missing_ok=True)

    def write_fatal(self, record: dict[str, Any]) -> None:
        """Record an error that ends the run; the first one stays."""
        if self.fatal() is None:
            self._tell("fatal", json.dumps(record))

    def fatal(self) -> dict[str, Any] | None:
        """The recorded error that ends the run, or None."""
        text = self._told("fatal")
        record: dict[str, Any] | None = None if text is None else json.loads(text)
        return record

    def write_progress(self, step: int) -> None:
        """Record the step of a checkpoint."""
        self._tell("progress", str(step))

    def progress(self) -> int:
        """The step that `write_progress` was given last, or 0."""
        return int(self._told("progress") or 0)

    def _word(self, name: str) -> str:
        return f"asp_dist/{self.launch}/{name}"

    def _tell(self, name: str, text: str) -> None:
        told = put_word(self._word(name), text)
        try:
            write_text(self.folder / name, text, durable=False)
        except OSError:
            if not told:
                raise

    def _told(self, name: str) -> str | None:
        text = get_word(self._word(name))
        if text is None:
            try:
                text = (self.folder / name).read_text() or None
            except OSError:
                return None
        return text

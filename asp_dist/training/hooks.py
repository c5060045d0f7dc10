"""What surrounds the trainer: where it reports to, and what may ask it to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from asp_dist.checkpoint.folder_lock import START_WAIT_S

if TYPE_CHECKING:
    from asp_dist.training.run import Run


# Reasons of a stop after which others go on: Ray announced that a machine goes away; the group gets another size.
PREEMPTION, RESIZE = "preemption", "resize"
# That of ``training.max_minutes``.
TIME_LIMIT = "its time limit"


class Stopped(RuntimeError):  # noqa: N818
    """The run stopped on request, with a checkpoint saved; the same command resumes from it.

    Args:
        reason: what asked for it.
        step: optimizer steps done.
        problem: why saving failed, if it did; the same command then resumes from the previous checkpoint.
    """

    def __init__(self, reason: str, step: int, problem: str = "") -> None:
        note = f" ({problem})" if problem else ""
        super().__init__(f"stopped by {reason} after step {step}{note}; start the same command again to resume")
        self.reason = reason
        self.step = step


class Hooks:
    """The trainer's seams to its surroundings; the defaults do nothing.

    Attributes:
        folder_wait_s: how long to wait for another process that still writes to the run's folder.
    """

    folder_wait_s: float = START_WAIT_S

    def report(self, metrics: dict[str, Any]) -> None:
        """Take the metrics of an epoch. Called equally often on every rank."""

    def stop_requested(self) -> str | None:
        """Why the run should stop (``SIGTERM``, ``preemption``, ...), or None. Polled at every optimizer step.

        One rank's request stops all of them after the same step.
        """
        return None

    def after_step(self, run: Run) -> None:
        """Called on every rank after each optimizer step."""

    def saved(self, step: int) -> None:
        """Called on rank 0, in the background, once a checkpoint is written."""

    def finished(self, run_dir: Path) -> None:
        """Called on rank 0 once a finished run's files are in `run_dir`, before they go to the storage."""


class SignalHooks(Hooks):
    """Stops the run at SIGTERM or SIGINT; a second SIGINT interrupts at once. Use as a context manager.

    Must be entered in the main thread, where Python allows signal handlers.

    Args:
        on_finish: called with the folder of a finished run; see `Hooks.finished`.
    """

    def __init__(self, on_finish: Callable[[Path], None] | None = None) -> None:
        self._on_finish = on_finish
        self._reason: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def stop_requested(self) -> str | None:
        """The signal's name, once one arrived."""
        return self._reason

    def finished(self, run_dir: Path) -> None:
        """Call `on_finish`, if there is one."""
        if self._on_finish is not None:
            self._on_finish(run_dir)

    def __enter__(self) -> SignalHooks:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self._reason == "SIGINT":
            raise KeyboardInterrupt
        self._reason = name

"""What a signal to the driver does."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Protocol


class Stoppable(Protocol):
    """What can be asked to stop, such as a run's launch files."""

    def request_stop(self, reason: str) -> None:
        """Let the workers save a checkpoint and end."""


class Signals:
    """SIGTERM and SIGINT ask the workers to stop after saving a checkpoint; a second SIGINT ends the driver at once."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._files: Stoppable | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.getsignal(number)
            self.install()
        return self

    def install(self) -> None:
        """Set the handlers, if this is the main thread."""
        for number in self._before:
            signal.signal(number, self._handle)

    def connect(self, files: Stoppable) -> None:
        """Send requests to the workers from now on, the ones that came already included."""
        self._files = files
        if self._reason is not None:
            files.request_stop(self._reason)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self._reason == "SIGINT":
            raise KeyboardInterrupt
        self._reason = name
        if self._files is not None:  # not here: a storage that hangs would hold the signal back
            threading.Thread(target=self._files.request_stop, args=(name,), name="stop", daemon=True).start()
        print(f"{name}: saving a checkpoint, then stopping; a second SIGINT stops at once", file=sys.stderr, flush=True)

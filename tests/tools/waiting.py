"""Waiting for a condition, on however busy a machine."""

from __future__ import annotations

import time
from collections.abc import Callable

# What has not happened by then hangs. No result depends on it: a test waits for what it needs, however long that takes.
HANG_S = 1800.0


def wait_until(condition: Callable[[], object], what: str, poll_s: float = 0.2) -> None:
    """Return once `condition` is true.

    Raises:
        TimeoutError: it did not become so; `what` says what was awaited.
    """
    deadline = time.monotonic() + HANG_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {HANG_S:.0f} s in vain for {what}")
        time.sleep(poll_s)

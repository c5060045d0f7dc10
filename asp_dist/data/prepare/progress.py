"""One progress bar, for the commands that go through many files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, total: int, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields ``advance(n)``, which any thread may call.

    Args:
        title: what is being done.
        total: number of things to do.
        enabled: False shows nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as progress:
        task = progress.add_task(title, total=total)
        lock = threading.Lock()

        def advance(count: int) -> None:
            with lock:
                progress.advance(task, count)

        yield advance

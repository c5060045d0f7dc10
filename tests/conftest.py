"""What all tests share."""

from __future__ import annotations

import os

import pytest


def pytest_configure() -> None:
    """One Ray token for this process and all that it starts, set before ray is imported: it reads it once."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=f"{os.getpid():064x}", RAY_worker_niceness="0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the unit tests first: they tell most, soonest. Side by side, the files with slow tests, so that both end together."""

    def is_slow(item: pytest.Item) -> bool:
        return item.get_closest_marker("slow") is not None

    if hasattr(config, "workerinput"):  # one of pytest-xdist's processes
        slow_files = {item.path for item in items if is_slow(item)}
        items.sort(key=lambda item: (item.path not in slow_files, item.path, is_slow(item)))
    else:
        items.sort(key=is_slow)

"""What all tests share."""

from __future__ import annotations

import os

import pytest


def pytest_configure() -> None:
    """One Ray token for this process and all that it starts, set before ray is imported: it reads it once."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=f"{os.getpid():064x}", RAY_worker_niceness="0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the unit tests first: they tell most, soonest."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)

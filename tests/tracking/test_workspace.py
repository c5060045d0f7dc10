"""The wandb dashboard, built and serialized without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import wandb

from asp_dist.errors import UserError
from asp_dist.tracking.wandb.workspace import LAYER_PANELS, SECTIONS, build_workspace, create_dashboard, serialized

pytest.importorskip("wandb_workspaces")
# wandb-workspaces itself still uses pydantic's first interface.
pytestmark = pytest.mark.filterwarnings(r"ignore:(Pydantic V1|Support for class-based|`json_encoders`).*:DeprecationWarning")


@pytest.fixture(autouse=True)
def _no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # its settings are read once in a process, and may be those of another file's tests


def panels(tree: Any) -> list[dict[str, Any]]:
    """All panels anywhere in a serialized view."""
    if isinstance(tree, list):
        return [panel for item in tree for panel in panels(item)]
    if not isinstance(tree, dict):
        return []
    found = [tree] if "viewType" in tree and "config" in tree else []
    return found + [panel for value in tree.values() for panel in panels(value)]


def test_workspace_and_report_are_written_without_a_server(tmp_path: Path) -> None:
    out = tmp_path / "dashboard.json"
    assert create_dashboard("pruning", "team", out=out) == [str(out)]
    things = json.loads(out.read_text(encoding="utf-8"))
    keys = {key for charts in SECTIONS.values() for chart in charts for key in chart.keys}
    for name in ("workspace", "report"):
        found = panels(things[name])
        lines = [panel for panel in found if panel["viewType"] == "Run History Line Plot"]
        assert {panel["config"]["xAxis"] for panel in lines} == {"global_step"}
        assert {key for panel in lines for key in panel["config"]["metrics"]} == keys
        assert [panel["config"]["mediaKeys"] for panel in found if panel["viewType"] == "Media Browser"] == [[*LAYER_PANELS]]
        assert len([panel for panel in found if panel["viewType"] == "Scatter Plot"]) == 1
    assert (things["workspace"]["entity"], things["workspace"]["project"]) == ("team", "pruning")


def test_workspace_survives_the_way_through_its_serialized_form() -> None:
    workspace = build_workspace("pruning", "team")
    again = type(workspace)._from_model(workspace._to_model())
    assert [section.name for section in again.sections] == [*SECTIONS, "Layers", "All runs"]
    assert panels(serialized(again)) != []
    assert [panel.title for panel in again.sections[0].panels] == [chart.title for chart in next(iter(SECTIONS.values()))]


def test_without_a_login_it_says_so() -> None:
    with pytest.raises(UserError, match=r"no API key.*--output FILE"):
        create_dashboard("pruning", "team")

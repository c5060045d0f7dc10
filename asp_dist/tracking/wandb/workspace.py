"""`create_dashboard`: a wandb workspace and report about all runs of a project, made with ``wandb-workspaces``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asp_dist.errors import UserError
from asp_dist.tracking.layer_rows import write_json
from asp_dist.tracking.schema import (
    BYTES,
    DATA_TIME,
    FORWARD_BACKWARD_TIME,
    GRAD_NORM,
    IMAGES_PER_SECOND,
    LAYERS_HEAT_MAP,
    LR,
    MACS_DENSITY,
    MEASURED_SPARSITY,
    PREDICTED_SPARSITY,
    SPARSITY_LOSS,
    STEP_TIME,
    TARGET_SPARSITY,
    THRESHOLD_LR,
    TRAIN_LOSS,
    VAL_EMA_TOP1,
    VAL_LOSS,
    VAL_TOP1,
)

NAME = "Sparsity at a glance"


@dataclass(frozen=True)
class Chart:
    """A line chart over optimizer steps, one line per run and key."""

    title: str
    keys: tuple[str, ...]
    log: bool = False


# What a user looks at first comes first. The keys are those of the rows that the trainer logs.
SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Is the budget met, and what does it cost?": (
        Chart("Top-1", (VAL_TOP1, VAL_EMA_TOP1)),
        Chart("Sparsity", (MEASURED_SPARSITY, PREDICTED_SPARSITY, TARGET_SPARSITY)),
        Chart("Loss", (TRAIN_LOSS, VAL_LOSS)),
        Chart("Multiply-adds left", (MACS_DENSITY,)),
    ),
    "Speed": (
        Chart("Images per second", (IMAGES_PER_SECOND,)),
        Chart("Seconds per step", (STEP_TIME, FORWARD_BACKWARD_TIME, DATA_TIME)),
    ),
    "Optimisation": (
        Chart("Learning rates", (LR, THRESHOLD_LR), log=True),
        Chart("Gradient norm", (GRAD_NORM,), log=True),
        Chart("Sparsity loss", (SPARSITY_LOSS,), log=True),
        Chart("Bytes of the sparse file", (BYTES,)),
    ),
}
LAYER_PANELS = (LAYERS_HEAT_MAP,)


def _packages() -> tuple[Any, Any]:
    """wandb_workspaces' modules for workspaces and reports."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError("the dashboard needs wandb-workspaces: pip install 'asp-dist[dashboard]'") from error
    return workspaces, reports


def _lines(reports: Any, charts: tuple[Chart, ...]) -> list[Any]:
    """The charts of a section, two side by side."""
    panels = []
    for index, chart in enumerate(charts):
        place = reports.Layout(x=12 * (index % 2), y=8 * (index // 2), w=12, h=8)
        log = {"log_y": True} if chart.log else {}
        panels.append(reports.LinePlot(title=chart.title, x="global_step", y=list(chart.keys), layout=place, **log))
    return panels


def _layer_panels(reports: Any) -> list[Any]:
    place = reports.Layout(x=0, y=0, w=24, h=14)
    return [reports.MediaBrowser(title="Sparsity of the layers over time", media_keys=list(LAYER_PANELS), layout=place)]


def _front(reports: Any) -> Any:
    """Accuracy against sparsity, one point per run."""
    place = reports.Layout(x=0, y=0, w=24, h=10)
    x, y = reports.SummaryMetric("sparsity"), reports.SummaryMetric("top1")
    return reports.ScatterPlot(title="Accuracy against sparsity", x=x, y=y, layout=place)


def build_workspace(project: str, entity: str) -> Any:
    """The workspace, not saved; nothing is asked of a server.

    Raises:
        UserError: ``wandb-workspaces`` is not installed.
    """
    workspaces, reports = _packages()
    sections = [
        workspaces.Section(name=name, panels=_lines(reports, charts), is_open=index == 0)
        for index, (name, charts) in enumerate(SECTIONS.items())
    ]
    sections.append(workspaces.Section(name="Layers", panels=_layer_panels(reports), is_open=True))
    sections.append(workspaces.Section(name="All runs", panels=[_front(reports)], is_open=False))
    columns = ["run:displayName", "summary:top1", "summary:sparsity", "summary:images_per_second", "config:model.name"]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis="global_step", max_runs=20),
        runset_settings=workspaces.RunsetSettings(pinned_columns=columns),
    )


def build_report(project: str, entity: str) -> Any:
    """The report, not saved; nothing is asked of a server.

    Raises:
        UserError: ``wandb-workspaces`` is not installed.
    """
    _, reports = _packages()

    def grid(panels: list[Any]) -> Any:
        # Without a project of its own it shows the report's, and needs no server to be serialized.
        return reports.PanelGrid(runsets=[reports.Runset(name="runs")], panels=panels)

    blocks = [reports.TableOfContents()]
    for name, charts in SECTIONS.items():
        blocks += [reports.H2(name), grid(_lines(reports, charts))]
    blocks += [reports.H2("Layers"), grid(_layer_panels(reports))]
    blocks += [reports.H2("Accuracy against sparsity"), grid([_front(reports)])]
    text = "Pruning runs of asp-dist: accuracy, sparsity against the budget, layers, speed."
    return reports.Report(entity=entity, project=project, title=NAME, description=text, blocks=blocks, width="fluid")


def serialized(thing: Any) -> dict[str, Any]:
    """A workspace or a report as wandb stores it: plain JSON types."""
    model: dict[str, Any] = json.loads(thing._to_model().model_dump_json(by_alias=True, exclude_none=True))
    return model


def create_dashboard(project: str, entity: str | None = None, *, out: Path | str | None = None) -> list[str]:
    """Create the workspace and the report of a project.

    Args:
        project: wandb project.
        entity: wandb user or team; None: the logged-in user's default.
        out: write the definitions to this JSON file and ask no server; None: create them there.

    Returns:
        The addresses of workspace and report, or the file's path.

    Raises:
        UserError: ``wandb-workspaces`` is missing, there is no login, or the server refuses.
    """
    if out is not None:
        name = entity or "entity"
        things = {
            "workspace": serialized(build_workspace(project, name)),
            "report": serialized(build_report(project, name)),
        }
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, things)
        return [str(path)]
    import wandb

    from asp_dist.tracking.wandb.login import usable

    base_url = wandb.setup().settings.base_url.rstrip("/")
    problem = usable(base_url, 10.0)
    if problem:
        raise UserError(f"the dashboard cannot be created: {problem}; --output FILE writes its definition instead")
    try:
        entity = entity or wandb.Api().default_entity
        if not entity:
            raise UserError("the login has no default entity: give --entity")
        made = [build_workspace(project, entity), build_report(project, entity)]
        for thing in made:
            thing.save()
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise UserError(f"the dashboard of {entity}/{project} cannot be created: {error}") from error
    return [str(thing.url) for thing in made]

"""``asp-dist dashboard``: a wandb workspace and report for a project's runs."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``dashboard``."""
    parser.add_argument("--project", type=str, default="asp-dist", help="wandb project.")
    parser.add_argument("--entity", type=str | None, default=None, help="wandb user or team.")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="write the definitions to this file without contacting the server.",
    )


def run(*, project: str, entity: str | None = None, output: str | None = None) -> int:
    """Create the wandb workspace and report of a project."""
    from asp_dist.tracking.wandb.workspace import create_dashboard

    for address in create_dashboard(project, entity, out=output):
        print(address)
    return 0

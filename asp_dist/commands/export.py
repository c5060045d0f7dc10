"""``asp-dist export``: a run's model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``export``."""
    parser.add_argument("run_dir", type=str, help="folder of a finished run, such as runs/quickstart.")
    parser.add_argument("--format", type=Literal["sparse", "onnx"], default="sparse", help="format of the file.")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: in the run's folder.")


def run(run_dir: str, *, format: Any = "sparse", output: str | None = None) -> int:
    """Write a run's model in another format."""
    from asp_dist.export.export_run import export_run

    path = export_run(Path(run_dir), format, Path(output) if output else None)
    print(f"{path}  ({path.stat().st_size:,} bytes)")
    return 0

"""``asp-dist recipes``: the configurations that come with the package's source."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

import asp_dist
from asp_dist.errors import check


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``recipes``."""
    parser.add_argument("--folder", type=str | None, default=None, help="where they lie; default: configs/ of the source.")


def run(*, folder: str | None = None) -> int:
    """List the recipes, each with its first line."""
    place = Path(folder) if folder is not None else Path(asp_dist.__file__).parents[1] / "configs"
    files = sorted(place.glob("*.yaml"))
    check(bool(files), f"there are no recipes (*.yaml) in {place}: give --folder DIR, configs/ in a clone of the repository")
    width = max(len(file.stem) for file in files)
    for file in files:
        print(f"{file.stem:<{width}}  {file.read_text(encoding='utf-8').partition(chr(10))[0].lstrip('# ')}")
    shown = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
    print(f"\nasp-dist train {shown}/NAME.yaml; the first lines of a file say what it needs and where it is from")
    return 0

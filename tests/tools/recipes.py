"""The recipes under configs/, as ``asp-dist train`` reads them."""

from __future__ import annotations

import functools
from pathlib import Path

from asp_dist import cli
from asp_dist.config import Config

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))

parser = functools.cache(cli.build_parser)


def load(recipe: str, *overrides: str) -> Config:
    """The configuration that ``asp-dist train configs/RECIPE.yaml OVERRIDES`` runs."""
    arguments = cli._with_config_option(["train", str(CONFIGS / f"{recipe}.yaml"), *overrides])
    cli.check_fields(arguments)
    return cli.to_config(parser().parse_args(arguments))

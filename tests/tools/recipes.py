"""The recipes under configs/, as ``asp-dist train`` reads them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

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


def quick_precision(recipe: str) -> dict[str, str]:
    """float32 in place of bfloat16 where the processor emulates it and takes four times as long; one recipe keeps it."""
    emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return {"training.precision": "float32"} if emulated and recipe != "imagenet_resnet50" else {}

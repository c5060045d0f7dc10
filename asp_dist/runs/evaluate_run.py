"""``asp-dist evaluate``: a finished run measured again, from its model file alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from asp_dist.checkpoint.record import load_config
from asp_dist.config import Config
from asp_dist.data import build_loaders, inspect_data
from asp_dist.errors import UserError
from asp_dist.models import check_model_name
from asp_dist.tracking.schema import LAYERS_FILE, MODEL_FILE, VAL_LOSS, VAL_SAMPLES, VAL_TOP1, VAL_TOP5
from asp_dist.training.build import place_model
from asp_dist.training.evaluation import evaluate_model
from asp_dist.training.validation import count_zeros
from asp_dist.training.world import World, init_world


def evaluate(run_dir: Path) -> dict[str, Any]:
    """Accuracy and sparsity of ``model.safetensors`` in `run_dir`, as plain timm loads it.

    Returns:
        ``top1``, ``top5`` (fractions), ``loss``, ``samples``, ``sparsity`` over the prunable weights, and the counts
        ``nonzero_weights`` and ``prunable_weights``.

    Raises:
        UserError: no finished run there, or its data are gone.
    """
    config = load_config(run_dir)
    file = model_file(run_dir)
    world = World(device=init_world(config.training.device).device)
    model = load_model(config, file, len(inspect_data(config.data).classes))
    model_data = resolve_model_data_config(model)
    model = place_model(dataclasses.replace(config.training, parallel="ddp"), model, world)
    data = dataclasses.replace(config.data, eval_batch_size=config.data.eval_batch_size or min(64, config.data.batch_size))
    loaders = build_loaders(data, model_data=model_data, seed=config.training.seed, rank=0, world_size=1, device=world.device)
    try:
        results = evaluate_model(model, loaders.val, config.training, world)
    finally:
        loaders.close()
    nonzero, prunable = count_zeros(prunable_weights(run_dir, load_file(file)))
    return {
        "top1": results[VAL_TOP1],
        "top5": results[VAL_TOP5],
        "loss": results[VAL_LOSS],
        "samples": results[VAL_SAMPLES],
        "sparsity": 1.0 - nonzero / prunable if prunable else 0.0,
        "nonzero_weights": nonzero,
        "prunable_weights": prunable,
    }


def model_file(run_dir: Path) -> Path:
    """The file of a finished run's model.

    Raises:
        UserError: the run is not finished.
    """
    file = run_dir / MODEL_FILE
    if not file.is_file():
        raise UserError(f"{file} is missing: the run is not finished; start `asp-dist train` again to resume")
    return file


def load_model(config: Config, file: Path, num_classes: int) -> torch.nn.Module:
    """The run's network with the weights of `file`, through timm's own loading."""
    check_model_name(config.model.name)
    kwargs = dict(config.model.kwargs)
    default = timm.get_pretrained_cfg(config.model.name, allow_unregistered=True)
    if config.data.input_size is not None and default is not None and default.fixed_input_size:
        kwargs.setdefault("img_size", config.data.input_size)
    try:
        return timm.create_model(
            config.model.name,
            num_classes=num_classes,
            pretrained=True,
            # Without its number of classes timm assumes an ImageNet file and drops the classifier.
            pretrained_cfg_overlay={"file": str(file), "num_classes": num_classes},
            **kwargs,
        )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{file} does not load into {config.model.name}: {str(error).splitlines()[0]}") from error


def prunable_weights(run_dir: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the layers that ``layers.json`` says were pruned; all matrices without that file."""
    try:
        rows = json.loads((run_dir / LAYERS_FILE).read_text())
    except (OSError, ValueError):
        return {name: weight for name, weight in weights.items() if weight.dim() > 1}
    rows = rows["layers"] if isinstance(rows, dict) else rows
    pruned = {row["name"] for row in rows if row["pruned"]}
    return {n: w for n, w in weights.items() if n in pruned or n.removesuffix(".weight") in pruned}

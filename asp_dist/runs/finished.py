"""The model file of a finished run: where it is, how it is loaded, which of its weights may be zero."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open

from asp_dist.config import Config
from asp_dist.errors import UserError
from asp_dist.models import check_model_name
from asp_dist.tracking.schema import LAYERS_FILE, MODEL_FILE, SUMMARY_FILE


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
    return weights_of(weights, {row["name"] for row in rows if row["pruned"]})


def weights_of(weights: dict[str, torch.Tensor], layers: set[str]) -> dict[str, torch.Tensor]:
    """Those of `weights` that belong to the `layers` of these names."""
    return {name: weight for name, weight in weights.items() if name in layers or name.removesuffix(".weight") in layers}


def metadata_of(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; none of another file's."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def count_classes(run_dir: Path, file: Path) -> int:
    """The number of classes of a finished run, from ``summary.json`` or else from the metadata of its model `file`.

    Raises:
        UserError: neither says.
    """
    try:
        return int(json.loads((run_dir / SUMMARY_FILE).read_text())["num_classes"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a run from before the summary had it
    try:
        with safe_open(file, framework="pt") as model:
            metadata = model.metadata() or {}
        return len(json.loads(metadata["classes"]))
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({error}): the file is damaged") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"neither {run_dir / SUMMARY_FILE} nor the metadata of {file} has the number of classes: add "
            '"num_classes": N to the former'
        ) from error

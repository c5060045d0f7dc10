"""``asp-dist export``: a finished run's model in the form that another program wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from asp_dist.checkpoint.record import load_config
from asp_dist.errors import UserError
from asp_dist.export.onnx_file import export_onnx
from asp_dist.runs.evaluate_run import load_model, model_file, prunable_weights
from asp_dist.tracking.schema import SUMMARY_FILE
from asp_dist.weight_files import save_sparse

Format = Literal["sparse", "onnx"]
FILES: dict[Format, str] = {"sparse": "model.sparse.safetensors", "onnx": "model.onnx"}


def export_run(run_dir: Path, form: Format, output: Path | None = None) -> Path:
    """Write the model of `run_dir` as ``sparse`` (bitmap and values) or ``onnx``; return the file.

    The run's folder is all that it needs: the data set may be gone.

    Raises:
        UserError: the run has no finished model, or nothing says how many classes it has.
    """
    file = model_file(run_dir)
    target = output or run_dir / FILES[form]
    if form == "sparse":
        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} cannot be read ({error}): the file is damaged") from error
        save_sparse(tensors, prunable_weights(run_dir, tensors), target)
        return target
    config = load_config(run_dir)
    model = load_model(config, file, count_classes(run_dir, file))
    channels, height, width = resolve_model_data_config(model)["input_size"]
    side = config.data.input_size
    export_onnx(model, (channels, side or height, side or width), target)
    return target


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

"""``asp-dist export``: a finished run's model in the form that another program wants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file
from timm.data import resolve_model_data_config

from asp_dist.config import UserError
from asp_dist.export.onnx_file import export_onnx
from asp_dist.export.sparse_file import save_sparse

Format = Literal["sparse", "onnx"]
FILES: dict[Format, str] = {"sparse": "model.sparse.safetensors", "onnx": "model.onnx"}


def export_run(run_dir: Path, form: Format, output: Path | None = None) -> Path:
    """Write the model of `run_dir` as ``sparse`` (bitmap and values) or ``onnx``; return the file.

    Raises:
        UserError: the run has no finished model.
    """
    from asp_dist.data import inspect_data
    from asp_dist.training.evaluate import load_model, prunable_weights
    from asp_dist.training.rundir import MODEL, load_config

    file = run_dir / MODEL
    if not file.is_file():
        raise UserError(f"{file} is missing: the run is not finished; start `asp-dist train` again to go on")
    target = output or run_dir / FILES[form]
    if form == "sparse":
        tensors = load_file(file)
        save_sparse(tensors, prunable_weights(run_dir, tensors), target)
        return target
    config = load_config(run_dir)
    summary = run_dir / "summary.json"
    classes = json.loads(summary.read_text()).get("num_classes") if summary.is_file() else None
    model = load_model(config, file, classes or len(inspect_data(config.data).classes))
    channels, height, width = resolve_model_data_config(model)["input_size"]
    side = config.data.input_size
    export_onnx(model, (channels, side or height, side or width), target)
    return target

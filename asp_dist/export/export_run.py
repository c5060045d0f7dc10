"""``asp-dist export``: a finished run's model in the form that another program wants."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from torch import nn

from asp_dist.checkpoint.record import load_config
from asp_dist.config import Config
from asp_dist.errors import UserError, check
from asp_dist.export.agreement import Agreement, compare_with_torch
from asp_dist.export.mnn_file import Weights, convert_to_mnn
from asp_dist.export.onnx_file import export_onnx, make_sparse
from asp_dist.export.runtimes import MNN_RUNTIME, ONNX_RUNTIME, Runtime
from asp_dist.runs.finished import count_classes, load_model, metadata_of, model_file, prunable_weights
from asp_dist.weight_files import save_sparse

Format = Literal["sparse", "onnx", "onnx-sparse", "mnn"]
FILES: dict[Format, str] = {
    "sparse": "model.sparse.safetensors",
    "onnx": "model.onnx",
    "onnx-sparse": "model.sparse.onnx",
    "mnn": "model.mnn",
}
RUN_BY: dict[Format, Runtime] = {"onnx": ONNX_RUNTIME, "onnx-sparse": ONNX_RUNTIME, "mnn": MNN_RUNTIME}
TYPES: dict[Format, tuple[Weights, ...]] = {"sparse": ("float32", "float16"), "mnn": ("float32", "float16", "int8")}
STORED = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Args:
        file: where it lies.
        size: its bytes, those beside it included.
        dense_size: bytes of the dense network in the same format.
        agreement: how it compares with torch where it will run; None: nothing runs it, or that is not installed.
        note: why it was not compared.
    """

    file: Path
    size: int
    dense_size: int
    agreement: Agreement | None = None
    note: str | None = None


def export_run(
    run_dir: Path, form: Format, output: Path | None = None, *, weights: Weights = "float32", images: int = 1000
) -> Exported:
    """Write the model of `run_dir` in another format, and compare what it computes there with torch.

    The run's folder is all that it needs: without the data set it is compared on random images.

    Args:
        run_dir: a finished run.
        form: ``sparse`` (bitmap and values), ``onnx``, ``onnx-sparse`` (the standard's sparse initializers) or ``mnn``.
        output: the file to write; default: in the run's folder.
        weights: type of the weights in the file.
        images: validation images at most to compare on; 0: none.

    Raises:
        UserError: the run has no finished model, nothing says how many classes it has, or the format cannot hold it.
    """
    check(
        weights in TYPES.get(form, ("float32",)),
        f"--weights {weights} is not possible with --format {form}: choose {' or '.join(TYPES.get(form, ('float32',)))}",
    )
    file = model_file(run_dir)
    target = output or run_dir / FILES[form]
    if form == "sparse":
        return _export_sparse(run_dir, file, target, STORED[weights])
    config = load_config(run_dir)
    model = load_model(config, file, count_classes(run_dir, file))
    shape = input_shape(config, model)
    with tempfile.TemporaryDirectory(prefix="asp_dist_export") as folder:
        graph = target if form == "onnx" else Path(folder) / "model.onnx"
        export_onnx(model, shape, graph)
        dense_size = _size(graph)
        if form == "onnx-sparse":
            make_sparse(graph, target)
        elif form == "mnn":
            convert_to_mnn(graph, target, weights, block=config.pruning.pattern.block)
            convert_to_mnn(graph, Path(folder) / "dense.mnn", sparse=False)
            dense_size = _size(Path(folder) / "dense.mnn")
    exported = Exported(target, _size(target), dense_size)
    runtime = RUN_BY[form]
    if images == 0:
        return exported
    if runtime.version is None:
        note = f"not compared with torch: {runtime.name} is not installed (pip install {runtime.package})"
        return dataclasses.replace(exported, note=note)
    threads = torch.get_num_threads()
    return dataclasses.replace(exported, agreement=compare_with_torch(target, runtime, model, config, shape, images, threads))


def _export_sparse(run_dir: Path, file: Path, target: Path, stored: torch.dtype) -> Exported:
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({error}): the file is damaged") from error
    dense_size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    pruned = prunable_weights(run_dir, tensors)
    values = {name: weight.to(stored) for name, weight in pruned.items()}
    for name, weight in values.items():
        check(bool(weight.isfinite().all()), f"{name} has weights too large for {str(stored).removeprefix('torch.')}")
    save_sparse({**tensors, **values}, pruned, target, metadata_of(file))
    return Exported(target, _size(target), dense_size)


def _size(file: Path) -> int:
    """Bytes of `file`, and of the weights that lie beside it."""
    beside = file.with_name(f"{file.name}.data")
    return file.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def input_shape(config: Config, model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images that the run's network takes."""
    channels, height, width = resolve_model_data_config(model)["input_size"]
    side = config.data.input_size
    return channels, side or height, side or width

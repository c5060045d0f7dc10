"""MNN's files, by MNN's own converter: its sparse kernels gain from unstructured zeros, and its files are small."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Literal

from asp_dist.errors import UserError

Weights = Literal["float32", "float16", "int8"]
OPTIONS: dict[Weights, list[str]] = {"float32": [], "float16": ["--fp16"], "int8": ["--weightQuantBits", "8"]}
# The command `mnnconvert` reports each use to its maker's server, and installs a package for it. Its library does not.
CALL = "import sys, MNN, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"


def convert_to_mnn(onnx_file: Path, target: Path, weights: Weights = "float32", *, sparse: bool = True) -> None:
    """Write the ONNX model in `onnx_file` as MNN's file.

    Args:
        onnx_file: with dense initializers.
        target: the file to write.
        weights: type of the weights in the file; MNN computes in float32 all the same.
        sparse: let MNN choose its sparse kernels for layers with enough zeros.

    Raises:
        UserError: MNN is missing, or cannot convert the model; the reason is MNN's own.
    """
    if importlib.util.find_spec("MNN") is None:
        raise UserError("MNN export needs MNN: pip install 'asp-dist[mnn]'")
    files = ["--modelFile", str(onnx_file), "--MNNModel", str(target)]
    options = [*OPTIONS[weights], *(["--detectSparseSpeedUp"] if sparse else [])]
    command = [sys.executable, "-c", CALL, "-f", "ONNX", *files, "--bizCode", "asp_dist", *options]
    target.unlink(missing_ok=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not target.is_file():
        said = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        raise UserError(f"MNN cannot convert {onnx_file}: {' / '.join(said[-3:]) or f'exit code {result.returncode}'}")

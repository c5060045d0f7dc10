"""MNN's files, by MNN's own converter: its sparse kernels gain from unstructured zeros, and its files are small."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from asp_dist.errors import UserError

Weights = Literal["float32", "float16", "int8"]
OPTIONS: dict[Weights, list[str]] = {"float32": [], "float16": ["--fp16"], "int8": ["--weightQuantBits", "8"]}
# The command `mnnconvert` reports each use to its maker's server, and installs a package for it. Its library does not.
CALL = "import sys, MNN, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"


SIMD = 4  # output channels that MNN's kernels for blocks work on together


def block_parameters(channels: int) -> bytes:
    """MNN's message that says how many output channels share a mask: ``Pipeline`` of its MNN_compression.proto, serialized."""

    def message(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    def integer(number: int, value: int) -> bytes:
        return bytes([number << 3, value])

    # version; an algorithm of type PRUNE, with parameters of type SIMD_OC, which have oc_blocks.
    parameters = integer(1, 1) + message(3, integer(4, channels))
    return message(1, b"0.0.0") + message(2, integer(1, 1) + message(3, parameters))


def convert_to_mnn(onnx_file: Path, target: Path, weights: Weights = "float32", *, sparse: bool = True, block: int = 1) -> None:
    """Write the ONNX model in `onnx_file` as MNN's file.

    Args:
        onnx_file: with dense initializers.
        target: the file to write.
        weights: type of the weights in the file; MNN computes in float32 all the same.
        sparse: let MNN choose its sparse kernels for layers with enough zeros.
        block: output channels that share a mask; multiples of 4 have kernels of their own.

    Raises:
        UserError: MNN is missing, or cannot convert the model; the reason is MNN's own.
    """
    if importlib.util.find_spec("MNN") is None:
        raise UserError("MNN export needs MNN: pip install 'asp-dist[mnn]'")
    files = ["--modelFile", str(onnx_file), "--MNNModel", str(target)]
    options = [*OPTIONS[weights], *(["--detectSparseSpeedUp"] if sparse else [])]
    target.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(prefix="asp_dist_mnn") as parameters:
        if sparse and block % SIMD == 0:
            parameters.write(block_parameters(SIMD))
            parameters.flush()
            options += ["--compressionParamsFile", parameters.name]
        command = [sys.executable, "-c", CALL, "-f", "ONNX", *files, "--bizCode", "asp_dist", *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not target.is_file():
        said = [line for line in (result.stdout + result.stderr).splitlines() if line.strip()]
        raise UserError(f"MNN cannot convert {onnx_file}: {' / '.join(said[-3:]) or f'exit code {result.returncode}'}")

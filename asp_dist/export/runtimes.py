"""Programs that run an exported file: ONNX Runtime, OpenVINO, MNN; each as a function from images to logits."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Logits = Callable[[Array], Array]


@dataclass(frozen=True)
class Runtime:
    """A program that runs model files on the CPU.

    Args:
        name: as it is shown.
        module: the Python module that has it.
        package: its name on PyPI.
        open: from a file and a number of threads to the function from images [N, C, H, W] to logits [N, classes].
        reads: the suffix of the files that it reads.
    """

    name: str
    module: str
    package: str
    open: Callable[[Path, int], Logits]
    reads: str

    @property
    def version(self) -> str | None:
        """Its version, or None where it is not installed."""
        if importlib.util.find_spec(self.module) is None:
            return None
        return importlib.metadata.version(self.package)


def _onnxruntime(file: Path, threads: int) -> Logits:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: np.asarray(session.run(None, {name: images})[0])


def _openvino(file: Path, threads: int) -> Logits:
    import openvino

    core = openvino.Core()
    # Without the hint OpenVINO computes in bfloat16 where the processor can.
    wanted: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(str(file)), "CPU", wanted)
    request = compiled.create_infer_request()

    def logits(images: Array) -> Array:
        return np.asarray(next(iter(request.infer([images]).values()))).copy()

    return logits


def _mnn(file: Path, threads: int) -> Logits:
    with silent_output():
        import MNN

        manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": threads, "precision": "high"},))
        network = MNN.nn.load_module_from_file(str(file), ["images"], ["logits"], runtime_manager=manager)

    def logits(images: Array) -> Array:
        given = MNN.expr.const(np.ascontiguousarray(images), list(images.shape), MNN.expr.NCHW, MNN.expr.float)
        return np.array(MNN.expr.convert(network.forward(given), MNN.expr.NCHW).read(), dtype=np.float32)

    return logits


@contextmanager
def silent_output() -> Iterator[None]:
    """Sends what libraries print from C++ to nowhere."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


ONNX_RUNTIME = Runtime("ONNX Runtime", "onnxruntime", "onnxruntime", _onnxruntime, ".onnx")
OPENVINO = Runtime("OpenVINO", "openvino", "openvino", _openvino, ".onnx")
MNN_RUNTIME = Runtime("MNN", "MNN", "MNN", _mnn, ".mnn")
RUNTIMES = (ONNX_RUNTIME, OPENVINO, MNN_RUNTIME)

"""ONNX: the pruned network for other runtimes, with its zeros as they are or left out."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from asp_dist.errors import UserError

LARGE = 1 << 30  # bytes of weights from which they go into a file beside the graph: a protobuf holds 2 GB at most
SPARSE_FROM = 2 / 3  # share of zeros from which a value and its index of 8 bytes, in float32, are smaller than the values


def export_onnx(model: nn.Module, input_shape: tuple[int, int, int], path: Path) -> None:
    """Write `model` to `path` as ONNX, for batches of any size of float32 images [N, C, H, W].

    Weights of more than 1 GiB lie beside it, in ``{path}.data``.

    Args:
        model: the network, on the CPU.
        input_shape: (C, H, W) of one image.
        path: the file to write.

    Raises:
        UserError: the packages of the ``export`` extra are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX export needs more packages: pip install 'asp-dist[export]'") from error
    images = torch.zeros((2, *input_shape))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # The exporter warns of its own internals.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model.eval(),
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    program.save(str(path), external_data=size > LARGE)


def make_sparse(path: Path, target: Path) -> None:
    """Write the ONNX model in `path` to `target`, weights as the standard's ``sparse_initializer`` where that is smaller.

    A weight's values lie beside their places in the flattened tensor, int64. ONNX Runtime loads such files, and makes
    the weights dense again; OpenVINO does not load them.

    Raises:
        UserError: the weights are too large for one file.
    """
    import onnx
    from onnx import helper, numpy_helper

    if path.with_name(f"{path.name}.data").exists():
        raise UserError(f"{path}: weights of more than {LARGE:,} bytes do not fit into one file: choose --format onnx")
    model = onnx.load(str(path))
    dense = []
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or array.ndim < 2 or np.count_nonzero(array) >= (1 - SPARSE_FROM) * array.size:
            dense.append(tensor)
            continue
        places = np.flatnonzero(array).astype(np.int64)
        values = numpy_helper.from_array(array.reshape(-1)[places], tensor.name)
        indices = numpy_helper.from_array(places, f"{tensor.name}_places")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(array.shape)))
    del model.graph.initializer[:]
    model.graph.initializer.extend(dense)
    onnx.save(model, str(target))

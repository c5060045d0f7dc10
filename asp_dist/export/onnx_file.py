"""ONNX: the pruned network for other runtimes, with its zeros as they are."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from asp_dist.errors import UserError


def export_onnx(model: nn.Module, input_shape: tuple[int, int, int], path: Path) -> None:
    """Write `model` to `path` as ONNX, for batches of any size of float32 images [N, C, H, W].

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
    program.save(str(path), external_data=False)

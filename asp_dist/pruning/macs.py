"""Multiply-adds per weight, from one traced forward pass on the meta device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from asp_dist.pruning.layers import WeightInfo


def _uses(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> float:
    """How often one sample's forward pass multiplies by each weight of `module`; the batch holds one sample.

    For a convolution that is the number of output positions (of input positions for a transposed one), whatever its
    groups; for a linear layer, the number of vectors it maps.
    """
    first: Tensor = inputs[0]
    result: Tensor = output[0] if isinstance(output, tuple) else output
    if isinstance(module, _ConvTransposeNd):
        return math.prod(first.shape[2:])
    if isinstance(module, _ConvNd):
        return math.prod(result.shape[2:])
    if isinstance(module, nn.Linear):
        return first.numel() / first.shape[-1]
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return first.numel() / first.shape[-1]
    if result.ndim == 4:  # CondConv2d: each expert's weights enter the mixed kernel, which is used at every position.
        experts = getattr(module, "num_experts", 1)
        return 1 + math.prod(result.shape[2:]) / experts
    return 1.0


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def macs_per_weight(model: nn.Module, weights: Sequence[WeightInfo], input_shape: Sequence[int]) -> list[float]:
    """Multiply-adds that one sample costs per weight of each of `weights`.

    Nothing is computed and the model is left as it was: parameters and buffers are replaced by meta tensors for the call.

    Args:
        model: the network.
        weights: its weights, from `find_weights`.
        input_shape: shape of one input sample, such as (3, 224, 224).

    Returns:
        One number per entry; 0 for a weight that the forward pass does not use.

    Raises:
        ValueError: the model does not run on an input of that shape.
    """
    uses: dict[str, float] = {}
    modules = dict(model.named_modules())
    wanted = {info.module_name for info in weights}

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            uses[name] = uses.get(name, 0.0) + _uses(module, inputs, output)
            if isinstance(module, nn.MultiheadAttention):  # It calls its output projection without calling the module.
                inner = f"{name}.out_proj" if name else "out_proj"
                uses[inner] = uses[name]

        return hook

    handles = [modules[name].register_forward_hook(count(name)) for name in wanted]
    # A weight inside an attention module is counted by the attention module's own call.
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and name not in wanted:
            handles.append(module.register_forward_hook(count(name)))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    dtype = next((t.dtype for t in meta.values() if t.is_floating_point()), torch.float32)
    sample = torch.empty((1, *input_shape), dtype=dtype, device="meta")
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), _evaluating(model):
            torch.func.functional_call(model, meta, (sample,), tie_weights=True)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"multiply-adds: the model does not run on an input of shape {tuple(input_shape)}: {error}"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()
    return [uses.get(info.module_name, 0.0) for info in weights]

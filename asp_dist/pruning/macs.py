"""Multiply-adds per weight, from one traced forward pass on the meta device."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from asp_dist.pruning.layers import WeightInfo

aten = torch.ops.aten
# Positions of the two factors among the arguments of the operators that multiply by weights.
_FACTORS: dict[Any, tuple[int, int]] = {
    aten.mm: (0, 1),
    aten.mv: (0, 1),
    aten.bmm: (0, 1),
    aten.addmm: (1, 2),
    aten.addmv: (1, 2),
    aten.baddbmm: (1, 2),
    aten.convolution: (0, 1),
}


def _multiply_adds(operator: Any, arguments: Sequence[Any], result: Tensor) -> float:
    """Multiply-adds of one call of an operator of `_FACTORS`."""
    first, second = (arguments[i] for i in _FACTORS[operator])
    if operator is not aten.convolution:
        return result.numel() * first.shape[-1]
    # A kernel's every weight meets each output position; in a transposed convolution, each input position. So per sample,
    # for any number of groups.
    positions = (first if arguments[6] else result).shape[2:]
    return first.shape[0] * second.numel() * math.prod(positions)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Uses(TorchDispatchMode):
    """Adds up the multiply-adds of each given tensor, known again in its views by the storage that they share."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {_storage(tensor): name for name, tensor in tensors.items()}
        self.total = dict.fromkeys(tensors, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _FACTORS:
            for index in _FACTORS[func.overloadpacket]:
                name = self.names.get(_storage(args[index]))
                if name is not None:
                    self.total[name] += _multiply_adds(func.overloadpacket, args, result)
        return result


@contextmanager
def _bare(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, its own forward functions without hooks (FSDP2's among them) or compilation."""
    names = ("training", "_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl")
    kept = [(module, {name: getattr(module, name) for name in names}) for module in model.modules()]
    try:
        model.eval()
        for module, _ in kept:
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
            module._compiled_call_impl = None
        yield
    finally:
        for module, values in kept:
            for name, value in values.items():
                setattr(module, name, value)


def macs_per_weight(model: nn.Module, weights: Sequence[WeightInfo], input_shape: Sequence[int]) -> list[float]:
    """Multiply-adds that one sample costs per weight of each of `weights`: averaged over a matrix used in parts.

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
    parameters = {id(p): name for name, p in model.named_parameters()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    dtype = next((t.dtype for t in meta.values() if t.is_floating_point()), torch.float32)
    sample = torch.empty((1, *input_shape), dtype=dtype, device="meta")
    names = [parameters[id(info.parameter)] for info in weights]
    uses = _Uses({name: meta[name] for name in names})
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _bare(model), torch.no_grad():
            mixed = _count_mixed_kernels(model, weights, uses, names)
            with uses:
                torch.func.functional_call(model, meta, (sample,), tie_weights=True)
            for handle in mixed:
                handle.remove()
    except (RuntimeError, AssertionError, NotImplementedError, IndexError) as error:
        raise ValueError(f"multiply-adds: the model does not run on an input of shape {tuple(input_shape)}: {error}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return [uses.total[name] / info.numel for name, info in zip(names, weights)]


def _count_mixed_kernels(
    model: nn.Module, weights: Sequence[WeightInfo], uses: _Uses, names: Sequence[str]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks for layers whose experts' weights are mixed into the kernel that is applied (CondConv2d).

    The mixing is a matrix product, which `uses` sees; the kernel's own multiply-adds are shared among the experts.
    """
    handles = []
    for info, name in zip(weights, names):
        module = model.get_submodule(info.module_name)
        experts = getattr(module, "num_experts", None)
        if isinstance(experts, int) and info.parameter.ndim == 2 and info.parameter.shape[0] == experts:

            def hook(
                module: nn.Module,
                inputs: Any,
                output: Tensor,
                name: str = name,
                info: WeightInfo = info,
                n: int = experts,
            ) -> None:
                uses.total[name] += info.numel / n * math.prod(output.shape[2:])

            handles.append(module.register_forward_hook(hook))
    return handles

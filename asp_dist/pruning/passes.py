"""The passes over one layer's flat weights that a step takes.

On the CPU the memory-bound ones are single vectorized kernels of torch's own; nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from asp_dist.pruning.options import Operator

# A layer's weights go through several operations in pieces: on the CPU a piece stays in the cache between them, and anywhere
# the temporary tensors are small beside a network. At 1 MiB and more, malloc would take each of those from the system anew.
_CPU_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 20


def _block(tensor: Tensor) -> int:
    return _CPU_BLOCK if tensor.device.type == "cpu" else _GPU_BLOCK


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors of one length in pieces, side by side; at least one piece, even if it is empty."""
    return zip(*(tensor.split(_block(tensor)) for tensor in tensors))


def write_pruned(operator: Operator, dense: Tensor, mean: float, threshold: float, out: Tensor) -> None:
    """Subtract `mean` from the dense weights in place, and write the pruned ones into `out`; both flat."""
    for chunk, target in blocks(dense, out):
        operator.prune(chunk if mean == 0.0 else chunk.sub_(mean), threshold, target)


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.double() for part in parts]).sum()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a·b of flat tensors; half precision is summed as float32, which keeps the digits of sums over millions of weights."""
    if not (_is_half(a) or _is_half(b)):
        return torch.dot(a, b)
    return _sum([torch.dot(x.float(), y.float()) for x, y in blocks(a, b)])


def pruned_dot(gradient: Tensor, dense: Tensor, pruned: Tensor, threshold: float, operator: Operator) -> Tensor:
    """Σ over pruned weights of gradient·dense, as a scalar tensor.

    Where kept weights keep their values, the pruned copy is the dense one or zero, so the sum is the difference of two dot
    products, each one pass at memory bandwidth. Other operators change the kept weights, so the removed part is written out.
    """
    if operator.keeps_values:
        return _dot(gradient, dense) - _dot(gradient, pruned)
    return _sum([_dot(chunk, w - torch.hardshrink(w, threshold)) for chunk, w in blocks(gradient, dense)])


def scale_pruned_gradient_(gradient: Tensor | None, pruned: Tensor, scale: float) -> None:
    """Multiply, in place, the gradient of the pruned weights (those that are zero in `pruned`) by `scale`; any strides."""
    if gradient is None or scale == 1.0:
        return
    rows = max(_block(pruned) * pruned.shape[0] // max(pruned.numel(), 1), 1)
    for chunk, weights in zip(gradient.split(rows), pruned.split(rows)):
        if scale == 0.0:
            chunk.masked_fill_(weights == 0, 0.0)
        else:
            chunk.copy_(torch.where(weights == 0, chunk * scale, chunk))


def count_above(weights: Tensor, threshold: float) -> Tensor:
    """Number of weights with |w| > threshold of a flat tensor, as a scalar integer tensor."""
    return torch.stack([torch.count_nonzero(chunk.abs() > threshold) for (chunk,) in blocks(weights)]).sum()


def largest(weights: Tensor) -> Tensor:
    """The largest |w| of a flat tensor, as a scalar; 0 if it is empty."""
    if not weights.numel():
        return weights.new_zeros(())
    low, high = torch.aminmax(weights)
    return torch.maximum(high, -low)


def moments(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(Σw, Σw²) of a flat tensor, as scalars; each one pass at memory bandwidth."""
    if _is_half(weights):
        return _sum([chunk.float().sum() for (chunk,) in blocks(weights)]), _dot(weights, weights)
    return weights.sum(), torch.dot(weights, weights)


def checksum(weights: Tensor) -> Tensor:
    """The sum of the bits of a flat tensor's numbers, taken as integers, below 2^52."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    return torch.stack([chunk.sum() for (chunk,) in blocks(weights.view(integers))]).sum() % (1 << 52)

"""How a threshold turns dense weights into pruned ones, and the passes over the weights that a step takes.

All functions work on one layer's flat tensors. On the CPU the memory-bound passes below are single vectorised kernels of
torch's own; nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Operator = Literal["hard", "soft", "power"]
Prune = Callable[[Tensor, float, Tensor], None]


def _hard(dense: Tensor, threshold: float, out: Tensor) -> None:
    torch.ops.aten.hardshrink.out(dense, threshold, out=out)


def _soft(dense: Tensor, threshold: float, out: Tensor) -> None:
    torch.ops.aten.softshrink.out(dense, threshold, out=out)


def _power(dense: Tensor, threshold: float, out: Tensor, p: float) -> None:
    # In units of b: sign(w)·b·(|w/b|^p − 1)^(1/p). The powers of a weight in its own units underflow in float32.
    torch.abs(dense, out=out)
    out.div_(threshold).pow_(p).sub_(1.0).clamp_(min=0.0).pow_(1.0 / p).mul_(threshold).copysign_(dense)


# A layer's weights go through several operations in pieces: on the CPU a piece stays in the cache between them, and anywhere
# the temporary tensors are small beside a network. At 1 MiB and more, malloc would take each of those from the system anew.
_CPU_BLOCK = 1 << 17
_GPU_BLOCK = 1 << 20


def _block(tensor: Tensor) -> int:
    return _CPU_BLOCK if tensor.device.type == "cpu" else _GPU_BLOCK


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat tensors of one length in pieces, side by side; at least one piece, be it empty."""
    return zip(*(tensor.split(_block(tensor)) for tensor in tensors))


def write_pruned(prune: Prune, dense: Tensor, mean: float, threshold: float, out: Tensor) -> None:
    """Subtract `mean` from the dense weights in place, and write the pruned ones into `out`; both flat."""
    for some, target in blocks(dense, out):
        prune(some if mean == 0.0 else some.sub_(mean), threshold, target)


def build_operator(name: Operator, power: float = 3.0) -> Prune:
    """A function (dense, threshold, out) that writes the pruned weights of one layer into `out`.

    With b the threshold in weight units, in every case zero where |w| <= b:
    ``hard``: w (arXiv 2006.02768); ``soft``: sign(w)(|w| − b); ``power``: sign(w)(|w|^p − b^p)^(1/p) (arXiv 2310.02448).
    """
    if name == "hard":
        return _hard
    if name == "soft":
        return _soft
    if name == "power":
        if power < 1:
            raise ValueError(f"operator 'power': p = {power} must be at least 1")
        return partial(_power, p=power)
    raise ValueError(f"operator {name!r} is none of 'hard', 'soft', 'power'")


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

    With the hard operator the pruned copy is the dense one or zero, so the sum is the difference of two dot products, each
    one pass at memory bandwidth; the other operators change the kept weights, so the removed part is written out first.
    """
    if operator == "hard":
        return _dot(gradient, dense) - _dot(gradient, pruned)
    return _sum([_dot(some, w - torch.hardshrink(w, threshold)) for some, w in blocks(gradient, dense)])


def scale_pruned_gradient_(gradient: Tensor | None, pruned: Tensor, scale: float) -> None:
    """Multiply, in place, the gradient of the pruned weights (those that are zero in `pruned`) by `scale`; any strides."""
    if gradient is None or scale == 1.0:
        return
    rows = max(_block(pruned) * pruned.shape[0] // max(pruned.numel(), 1), 1)
    for some, zeros in zip(gradient.split(rows), pruned.split(rows)):
        if scale == 0.0:
            some.masked_fill_(zeros == 0, 0.0)
        else:
            some.copy_(torch.where(zeros == 0, some * scale, some))


def count_above(weights: Tensor, threshold: float) -> Tensor:
    """Number of weights with |w| > threshold of a flat tensor, as a scalar integer tensor."""
    return torch.stack([torch.count_nonzero(some.abs() > threshold) for (some,) in blocks(weights)]).sum()


def largest(weights: Tensor) -> Tensor:
    """The largest |w| of a flat tensor, as a scalar; 0 if it has none."""
    if not weights.numel():
        return weights.new_zeros(())
    low, high = torch.aminmax(weights)
    return torch.maximum(high, -low)


def moments(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(Σw, Σw²) of a flat tensor, as scalars; each one pass at memory bandwidth."""
    if _is_half(weights):
        return _sum([some.float().sum() for (some,) in blocks(weights)]), _dot(weights, weights)
    return weights.sum(), torch.dot(weights, weights)

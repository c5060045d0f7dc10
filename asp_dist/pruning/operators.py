"""How a threshold turns dense weights into pruned ones, and the passes over the weights that a step takes.

All functions work on one layer's flat tensors. On the CPU the memory-bound passes below are single vectorised kernels of
torch's own; nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
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


# Weights that go through two operations in turn, so that the second finds them in the cache.
_BLOCK = 1 << 18


def write_pruned(prune: Prune, dense: Tensor, mean: float, threshold: float, out: Tensor) -> None:
    """Subtract `mean` from the dense weights in place, and write the pruned ones into `out`; both flat."""
    if mean == 0.0:
        prune(dense, threshold, out)
        return
    size = _BLOCK if dense.device.type == "cpu" else max(dense.numel(), 1)
    for some, target in zip(dense.split(size), out.split(size)):
        prune(some.sub_(mean), threshold, target)


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


def _wide(tensor: Tensor) -> Tensor:
    """Half-precision tensors as float32, so that sums over millions of weights keep their digits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def pruned_dot(gradient: Tensor, dense: Tensor, pruned: Tensor, threshold: float, operator: Operator) -> Tensor:
    """Σ over pruned weights of gradient·dense, as a scalar tensor.

    With the hard operator the pruned copy is the dense one or zero, so the sum is the difference of two dot products, each
    one pass at memory bandwidth; the other operators change the kept weights, so the kept dense ones are written out first.
    """
    kept = pruned if operator == "hard" else torch.hardshrink(dense, threshold)
    gradient = _wide(gradient)
    return torch.dot(gradient, _wide(dense)) - torch.dot(gradient, _wide(kept))


def scale_pruned_gradient_(gradient: Tensor | None, pruned: Tensor, scale: float) -> None:
    """Multiply, in place, the gradient of the pruned weights (those that are zero in `pruned`) by `scale`; any strides."""
    if gradient is None or scale == 1.0:
        return
    if scale == 0.0:
        gradient.masked_fill_(pruned == 0, 0.0)
    else:
        gradient.copy_(torch.where(pruned == 0, gradient * scale, gradient))


def moments(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(Σw, Σw²) of a flat tensor, as scalars; each one pass at memory bandwidth."""
    weights = _wide(weights)
    return weights.sum(), torch.dot(weights, weights)

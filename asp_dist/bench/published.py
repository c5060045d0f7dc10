"""The published form of the method, for comparison: a parametrization that prunes in every forward pass, with autograd."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from asp_dist.pruning import find_weights


class _Shrink(torch.autograd.Function):
    """w where |w| > r·σ + 1e-6, else 0; straight-through for w, and −(σ/b)·Σ_{|w| <= b} g·w for r (arXiv 2006.02768)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor) -> Tensor:
        sigma = weight.std()
        bound = threshold.clamp(0.0, 5.0) * sigma + 1e-6
        kept = weight.abs() > bound
        ctx.save_for_backward(weight, kept, sigma / bound)
        return weight * kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        weight, kept, scale = ctx.saved_tensors
        return gradient, -scale * (gradient * weight * ~kept).sum()


class ShrunkWeight(nn.Module):
    """A layer's pruning as a parametrization of its weight, with the threshold as a parameter."""

    def __init__(self, initial_threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(initial_threshold))

    def forward(self, weight: Tensor) -> Tensor:
        """The pruned weight; the dense one is centered in place, as published."""
        with torch.no_grad():
            weight -= weight.mean()
        shrunk: Tensor = _Shrink.apply(weight, self.threshold)
        return shrunk


class PublishedLoss:
    """Wraps the layers of `model` that the engine would prune; calling it gives the sparsity loss."""

    def __init__(self, model: nn.Module, density: float, sparsity_weight: float, initial_threshold: float) -> None:
        self.density, self.sparsity_weight = density, sparsity_weight
        self.wrappers: list[ShrunkWeight] = []
        self.sizes: list[int] = []
        for info in [info for info in find_weights(model) if not info.reason]:
            module = model.get_submodule(info.module_name)
            name = next(name for name, p in module.named_parameters(recurse=False) if p is info.parameter)
            wrapper = ShrunkWeight(initial_threshold).to(info.parameter.device)
            parametrize.register_parametrization(module, name, wrapper, unsafe=True)
            self.wrappers.append(wrapper)
            self.sizes.append(info.numel)

    def parameter_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The model's parameters, and the thresholds at a hundredth of the learning rate without weight decay."""
        thresholds = [wrapper.threshold for wrapper in self.wrappers]
        own = {id(threshold) for threshold in thresholds}
        others = [parameter for parameter in model.parameters() if id(parameter) not in own]
        return [{"params": others}, {"params": thresholds, "lr": 0.01 * lr, "weight_decay": 0.0}]

    def __call__(self) -> Tensor:
        """λ·(predicted density − target)²."""
        thresholds = torch.stack([wrapper.threshold for wrapper in self.wrappers])
        sizes = torch.tensor(self.sizes, dtype=thresholds.dtype, device=thresholds.device)
        density = (torch.erfc(thresholds / math.sqrt(2.0)) * sizes).sum() / sizes.sum()
        return self.sparsity_weight * (density - self.density).square()

"""How long a step would take on a GPU that is not here: a roofline over every kernel of the network's own training step.

A kernel takes the longer of its arithmetic at a share of the GPU's peak, and its reading and writing at a share of its memory's
bandwidth (Williams et al., Communications of the ACM 52 (4), 2009). The kernels are those that PyTorch starts where nothing is
compiled, counted on its meta device, which computes nothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from asp_dist.planning.gpus import Gpu, Shares
from asp_dist.planning.step_time import StepTime, counting_saved

LAUNCH_S = 8e-6  # of the host, for each kernel, forward or backward
COUNTED = (2, 4)  # images; what a kernel does grows with them from a part that does not, its weights
# Kernels that read what they are given twice: for the statistics, and for the result.
TWICE = ("native_batch_norm", "cudnn_batch_norm", "native_layer_norm", "native_group_norm")


@dataclass
class Kernel:
    """What a kernel does.

    Attributes:
        name: of PyTorch's operator.
        kind: ``convolution``, ``grouped``, ``product`` or ``other``.
        flops: of matrix products and convolutions; in a step's count, of one image.
        bytes: read and written; in a step's count, for one image.
        fixed: bytes read and written whatever the number of images.
    """

    name: str
    kind: str
    flops: float
    bytes: float
    fixed: float = 0.0


class _Counting(TorchDispatchMode):
    """Records the kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            self.kernels.append(self._kernel(func, args, kwargs or {}, out))
        return out

    def _kernel(self, func: Any, args: Any, kwargs: Any, out: Any) -> Kernel:
        name = func._schema.name.removeprefix("aten::")
        count = flop_registry.get(func._overloadpacket)
        flops = float(count(*args, **kwargs, out_val=out)) if count is not None else 0.0
        read = sum(map(_size, _tensors((args, kwargs))))
        kind = "other"
        if name.startswith("convolution"):
            kind = "grouped" if _groups(args) > 1 else "convolution"
        elif flops:
            kind = "product"
        size = read * (2 if name.startswith(TWICE) else 1) + sum(map(_size, _tensors(out)))
        return Kernel(name, kind, flops, float(size))


def _groups(args: Any) -> int:
    integers = [value for value in args if isinstance(value, int) and not isinstance(value, bool)]
    return integers[-1] if integers else 1


def _tensors(tree: Any) -> list[Tensor]:
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor)]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Attention(torch.autograd.Function):
    """Attention as one kernel, as on a GPU: no matrix of all pairs is written."""

    @staticmethod
    def forward(context: Any, q: Tensor, k: Tensor, v: Tensor, kernels: list[Kernel]) -> Tensor:
        context.save_for_backward(q, k, v)
        context.kernels = kernels
        flops = 4.0 * q.numel() * k.shape[-2]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        kernels.append(Kernel("attention", "product", flops, float(sum(map(_size, (q, k, v, out))))))
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        q, k, v = context.saved_tensors
        flops = 2.5 * 4.0 * q.numel() * k.shape[-2]  # five products instead of two
        context.kernels.append(Kernel("attention_backward", "product", flops, 2.0 * sum(map(_size, (q, k, v, q)))))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


class _FusedAttention(TorchFunctionMode):
    def __init__(self, kernels: list[Kernel]) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], self._kernels)
        return func(*args, **(kwargs or {}))


@dataclass
class Counted:
    """A training step's kernels.

    Attributes:
        kernels: of forward and backward.
        saved: bytes kept for backward, per image.
        update: bytes that the optimizer, the average of the weights and the pruner read and write, per step.
        updates: their launches.
    """

    kernels: list[Kernel] = field(default_factory=list)
    saved: float = 0.0
    update: float = 0.0
    updates: int = 0

    def seconds(self, gpu: Gpu, images: int, shares: Shares, precision: str) -> float:
        """A step's time with so many images on one GPU."""
        parts = [self._kernel_seconds(kernel, gpu, images, shares, precision) for kernel in self.kernels]
        update = self.update / (shares.memory * gpu.bandwidth)
        return max(sum(parts) + update, LAUNCH_S * (len(parts) + self.updates))

    def _kernel_seconds(self, kernel: Kernel, gpu: Gpu, images: int, shares: Shares, precision: str) -> float:
        peak = gpu.half
        if precision == "float32":
            peak = gpu.tf32 if gpu.tf32 is not None and kernel.kind == "convolution" else gpu.float32
        memory = shares.grouped if kernel.kind == "grouped" else shares.memory
        arithmetic = 0.0 if kernel.kind == "grouped" else images * kernel.flops / (shares.arithmetic * peak)
        return max(arithmetic, (kernel.fixed + images * kernel.bytes) / (memory * gpu.bandwidth))


def count_step(
    model: nn.Module, size: tuple[int, int], precision: str, *, state: float, average: bool, pruned: float
) -> Counted:
    """Count a training step's kernels.

    Args:
        model: the network, anywhere; it stays as it is.
        size: height and width of the images.
        precision: of forward and backward.
        state: numbers that the optimizer keeps for each weight.
        average: whether an average of the weights is kept.
        pruned: prunable weights; 0: none.
    """
    twin = copy.deepcopy(model).to("meta", torch.float32 if precision == "float32" else torch.bfloat16).train()
    weights = sum(p.numel() for p in twin.parameters())
    (few, _), (many, saved) = (_kernels(twin, images, size) for images in COUNTED)
    counted = Counted(saved=saved / COUNTED[1])
    for one, other in zip(few, many):
        flops, growth = other.flops / COUNTED[1], (other.bytes - one.bytes) / (COUNTED[1] - COUNTED[0])
        counted.kernels.append(Kernel(other.name, other.kind, flops, growth, max(0.0, one.bytes - COUNTED[0] * growth)))
    # Reads the weight, its gradient and the state, writes the weight and the state; the average is read and written; the pruner
    # reads the dense weight and its gradient, and writes the dense and the pruned one, about twice.
    counted.update = 4.0 * (weights * (3 + 2 * state + (3 if average else 0)) + 6 * pruned)
    counted.updates = 20
    return counted


def _kernels(model: nn.Module, images: int, size: tuple[int, int]) -> tuple[list[Kernel], float]:
    """The kernels of a step with so many images, and the bytes that are kept for backward."""
    model.zero_grad(set_to_none=True)
    batch = torch.empty(images, 3, *size, device="meta", dtype=next(model.parameters()).dtype)
    targets = torch.zeros(images, dtype=torch.long, device="meta")
    with counting_saved(model) as saved, _Counting() as counting, _FusedAttention(counting.kernels):
        nn.functional.cross_entropy(model(batch).float(), targets).backward()
    return counting.kernels, saved[0]


def step_on(gpu: Gpu, counted: Counted, images: int, shares: Shares, precision: str) -> StepTime:
    """The step of `counted` on `gpu` around so many images, in the form of a measured one."""
    small, large = max(1, images // 2), max(2, images)
    times = [counted.seconds(gpu, n, shares, precision) for n in (small, large)]
    per_image = (times[1] - times[0]) / (large - small)
    return StepTime(gpu.name, max(0.0, times[0] - small * per_image), per_image, counted.saved, (small, large))

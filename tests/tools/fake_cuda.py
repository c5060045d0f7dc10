"""Turn what was built on the CPU into fake tensors of a CUDA device, where every read by the host raises an error."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
# Operations that launch nothing.
VIEWS = {
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "squeeze", "split", "t", "transpose", "unbind",
    "unsqueeze", "view", "reshape", "_unsafe_view", "set_", "empty", "empty_strided", "empty_like", "new_empty", "resize_",
    "is_same_size", "size", "stride", "is_pinned", "storage_offset", "prim_layout", "sym_size", "device",
}  # fmt: skip


def as_fake_cuda(*things: Any) -> FakeTensorMode:
    """Replace, in place, every tensor that is reachable from `things`."""
    mode = FakeTensorMode()
    seen: dict[int, Any] = {}

    def visit(thing: Any) -> None:
        if id(thing) in seen or thing is None or isinstance(thing, str | int | float | bool | type):
            return
        seen[id(thing)] = thing
        if isinstance(thing, torch.device):
            return
        if isinstance(thing, Tensor):
            gradient = thing.grad if thing.is_leaf else None
            with mode:
                fake: Tensor = torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device=DEVICE)
                if gradient is not None:
                    thing.grad = None
                if isinstance(thing, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=thing.requires_grad)
                if gradient is not None:
                    fake.grad = torch.empty_strided(gradient.shape, gradient.stride(), dtype=gradient.dtype, device=DEVICE)
            with patch("weakref.getweakrefs", lambda tensor: []):  # the mode's own, which may stay
                torch.utils.swap_tensors(thing, fake)
            seen[id(fake)] = fake
        elif isinstance(thing, dict):
            for value in [*thing.keys(), *thing.values()]:
                visit(value)
        elif isinstance(thing, list | tuple):
            for value in thing:
                visit(value)
        elif isinstance(thing, nn.Module | Optimizer) or type(thing).__module__.startswith("asp_dist"):
            for name, value in list(vars(thing).items()):
                if isinstance(value, torch.device):
                    object.__setattr__(thing, name, DEVICE)
                elif not name.startswith("_backward") and not callable(value):
                    visit(value)

    for thing in things:
        visit(thing)
    return mode


class Launches(TorchDispatchMode):
    """Names of the operations on tensors of a CUDA device that are not views, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(one, Tensor)]
        name = func.overloadpacket.__name__
        if name not in VIEWS and any(one.device.type == "cuda" for one in tensors):
            self.names.append(name)
        return result

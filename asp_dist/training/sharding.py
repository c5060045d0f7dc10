"""Full state of a replicated or sharded model, and the buffers that a bad step must not change."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded `model`'s parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of model and optimizer with whole tensors, independent of the sharding.

    A collective under FSDP2, where only rank 0 receives it.
    """
    if not is_sharded(model):
        return model.state_dict(), optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    whole, of_optimizer = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return dict(whole), dict(of_optimizer)


def load_full_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, of_model: dict[str, Any], of_optimizer: dict[str, Any]
) -> None:
    """Load what `full_state` gave, on every rank the same."""
    if not is_sharded(model):
        model.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=of_model,
        optim_state_dict=of_optimizer,
        options=StateDictOptions(full_state_dict=True),
    )


class BufferGuard:
    """A copy of a model's buffers from before the step: a batch with bad numbers must not stay in batch norm."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [buffer for buffer in model.buffers() if not isinstance(buffer, DTensor)]
        self._copies = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the buffers as they are."""
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._copies)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The buffers themselves."""
        return self._buffers

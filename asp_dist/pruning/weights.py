"""The prunable weights as one rank has them, and the all-reduce that makes every rank see the same numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from asp_dist.pruning.layers import WeightInfo


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat(tensor: Tensor) -> Tensor:
    """A one-dimensional view of a dense tensor in the order of its storage, whatever its memory format.

    Raises:
        ValueError: the tensor has gaps or overlaps in memory.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise ValueError(f"a weight of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps in memory")
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class LayerWeights:
    """One prunable parameter on this rank: the model's own tensor, which is pruned, and its dense weights.

    A replicated parameter (one process, DDP) exchanges storages around the optimizer's step, which copies nothing. FSDP2 keeps
    references of its own to its shards, so their values are copied in place.

    Args:
        info: the weight in the model.
        world_size: number of ranks.

    Raises:
        ValueError: the parameter is sharded along another dimension than the first.

    Attributes:
        info: the weight in the model.
        dense: the dense weights, in the parameter's local shape and memory format.
        pruned: the tensor that the forward pass uses.
        replication: how many ranks have each weight of this layer.
        shards: into how many shards the layer is cut; 1 if it is replicated.
        shard: which of them this rank has.
    """

    def __init__(self, info: WeightInfo, world_size: int) -> None:
        self.info = info
        parameter = info.parameter
        self.sharded = isinstance(parameter, DTensor)
        self.pruned = local(parameter.data)
        self.dense = self.pruned.clone()
        self.shard_group: dist.ProcessGroup | None = None
        shards = 1
        if isinstance(parameter, DTensor):
            for mesh_dim, placement in enumerate(parameter.placements):
                if isinstance(placement, Shard):
                    if placement.dim != 0 or self.shard_group is not None:
                        raise ValueError(f"layer {info.name!r}: only sharding along dimension 0 is supported")
                    self.shard_group = parameter.device_mesh.get_group(mesh_dim)
                    shards = parameter.device_mesh.size(mesh_dim)
        self.replication = world_size / shards
        self.shards = shards
        self.shard = 0 if self.shard_group is None else dist.get_rank(self.shard_group)

    @property
    def parameter(self) -> nn.Parameter:
        """The model's parameter."""
        return self.info.parameter

    def flat_dense(self) -> Tensor:
        """The dense weights of this rank, one-dimensional, sharing memory."""
        return flat(self.dense)

    def flat_pruned(self) -> Tensor:
        """The pruned weights of this rank, one-dimensional, sharing memory."""
        return flat(self.pruned)

    def gradient(self) -> Tensor | None:
        """This rank's part of the parameter's gradient; None where there is none."""
        gradient = self.parameter.grad
        return None if gradient is None else local(gradient)

    def flat_gradient(self) -> Tensor | None:
        """The gradient in the memory order of `flat_dense`, a copy if its own order differs; None where there is none.

        Raises:
            ValueError: the gradient is sparse.
        """
        gradient = self.gradient()
        if gradient is None:
            return None
        if gradient.layout is not torch.strided:
            raise ValueError(f"layer {self.info.name!r}: sparse gradients cannot be pruned; exclude the layer")
        if gradient.stride() != self.dense.stride():
            aligned = torch.empty_like(self.dense)
            aligned.copy_(gradient)
            gradient = aligned
        return flat(gradient)

    def check_storage(self) -> None:
        """Raise `RuntimeError` if the parameter's storage was replaced by something else (such as ``model.to``)."""
        if not self.sharded and self.parameter.data_ptr() != self.pruned.data_ptr():
            raise RuntimeError(
                f"layer {self.info.name!r}: its parameter was moved or converted after the Pruner was built; "
                "move the model to its device and type first"
            )

    def swap_in_dense(self) -> None:
        """Put the dense weights into the parameter, as the optimizer expects them."""
        if self.sharded:
            self.pruned.copy_(self.dense)
        else:
            self.parameter.data = self.dense

    def swap_out_dense(self) -> None:
        """Take the dense weights back from the parameter, and put the pruned ones in again."""
        if self.sharded:
            self.dense.copy_(self.pruned)
        else:
            self.parameter.data = self.pruned

    def gather(self, tensor: Tensor) -> Tensor:
        """The whole parameter's tensor out of the ranks' local ones, on every rank; a collective where it is sharded."""
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return tensor
        whole = DTensor.from_local(
            tensor, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
        return whole.full_tensor()

    def scatter_(self, whole: Tensor, into: Tensor) -> None:
        """Write this rank's part of a tensor of the whole parameter's shape into `into`."""
        if whole.shape != self.parameter.shape:
            raise ValueError(
                f"layer {self.info.name!r}: a tensor of shape {tuple(whole.shape)} does not fit "
                f"its weights of shape {tuple(self.parameter.shape)}"
            )
        if not isinstance(self.parameter, DTensor):
            into.copy_(whole)
            return
        group = self.shard_group
        assert group is not None
        rows = -(-whole.shape[0] // dist.get_world_size(group))
        start = min(dist.get_rank(group) * rows, whole.shape[0])
        into.copy_(whole[start : start + into.shape[0]])


class RankReducer:
    """Makes per-layer numbers the same on every rank, by one all-reduce of one packed float64 vector.

    Each rank adds its numbers, divided by the number of ranks that have the same weights: replicated values are thereby
    averaged and sharded ones summed. In a single process nothing is communicated.

    Args:
        layers: the layers as this rank has them.
        group: the ranks; None: the default group, or one process.
        device: where the collectives' tensors are.
    """

    def __init__(self, layers: Sequence[LayerWeights], group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.share = torch.tensor([1.0 / layer.replication for layer in layers], dtype=torch.float64, device=device)
        self.calls = 0

    def reduce(self, *columns: Tensor) -> list[Tensor]:
        """Reduce float64 vectors of one number per layer, together; integers stay exact below 2^53 after rounding."""
        if self.world_size == 1:
            return list(columns)
        packed = torch.stack([column * self.share for column in columns])
        dist.all_reduce(packed, group=self.group)
        self.calls += 1
        return list(packed.unbind())

    def max_minus_min(self, values: Tensor) -> Tensor:
        """max − min over ranks of each number, to prove that ranks agree: zeros when they do."""
        if self.world_size == 1:
            return torch.zeros_like(values)
        packed = torch.stack([values, -values])
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self.group)
        return packed[0] + packed[1]

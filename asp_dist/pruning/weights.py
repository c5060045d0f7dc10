"""The prunable weights as one rank has them, and the all-reduce that makes every rank see the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from asp_dist.pruning.layers import WeightInfo
from asp_dist.pruning.options import Operator
from asp_dist.pruning.patterns import grouped, norms

# A layer's weights go through several operations in pieces: on the CPU a piece stays in the cache between them, and anywhere
# the temporary tensors are small compared to a network. From 1 MiB, malloc would request each from the system anew.
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
        if not _is_half(chunk):
            operator.prune(chunk if mean == 0.0 else chunk.sub_(mean), threshold, target)
            continue
        # torch would round the mean, the threshold and each of an operator's results to half precision.
        if mean != 0.0:
            chunk.copy_(chunk.float().sub_(mean))
        whole = chunk.float()
        pruned = torch.empty_like(whole)
        operator.prune(whole, threshold, pruned)
        target.copy_(pruned)


def write_pruned_blocks(operator: Operator, layer: LayerWeights, mean: float, threshold: float) -> None:
    """As `write_pruned`, of a layer whose blocks share a mask: each block is scaled as the operator changes its norm."""
    if mean != 0.0:
        layer.dense.copy_(layer.dense.float().sub_(mean) if _is_half(layer.dense) else layer.dense.sub(mean))
    sizes = layer.magnitudes()
    shrunk = torch.empty_like(sizes)
    operator.prune(sizes, threshold, shrunk)
    scale = layer.spread(torch.where(sizes > threshold, shrunk / sizes, 0.0))
    layer.flat_pruned().copy_(layer.flat_dense() * scale)


def pruned_dot_of_blocks(gradient: Tensor, layer: LayerWeights, threshold: float) -> Tensor:
    """Σ over the weights of pruned blocks of gradient·dense, as a scalar tensor."""
    removed = layer.spread(layer.magnitudes() <= threshold)
    return _dot(gradient, layer.flat_dense() * removed)


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
    return _sum([_dot(chunk, _removed(w, threshold)) for chunk, w in blocks(gradient, dense)])


def _removed(weights: Tensor, threshold: float) -> Tensor:
    """The weights that are pruned, zero elsewhere; half precision as float32, or the threshold would be rounded."""
    whole = weights.float() if _is_half(weights) else weights
    return whole - torch.hardshrink(whole, threshold)


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
    """Number of weights with |w| > threshold of a flat tensor, as a float64 scalar."""
    half = _is_half(weights)  # in which the threshold would be rounded
    return _sum([_ones(chunk.float() if half else chunk, threshold) for (chunk,) in blocks(weights)])


def _ones(weights: Tensor, threshold: float) -> Tensor:
    """How many of a block's weights are above `threshold`: as a sum of ones, which on the CPU takes a third of the time of
    torch's counting, and is exact up to 2^24 of them."""
    return weights.hardshrink(threshold).sign_().abs_().sum()


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


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat(tensor: Tensor) -> Tensor:
    """A one-dimensional view of a dense tensor in the order of its storage, for any memory format.

    Raises:
        ValueError: the tensor has gaps or overlaps in memory.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
        raise ValueError(f"a weight of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps in memory")
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; strides of dimensions of size 1 say nothing."""
    return all(s == t for s, t, size in zip(a.stride(), b.stride(), a.shape) if size > 1)


class LayerWeights:
    """One prunable parameter on this rank: the model's own tensor, which is pruned, and its dense weights.

    A replicated parameter (one process, DDP) exchanges storages around the optimizer's step, which copies nothing. FSDP2 keeps
    references of its own to its shards, so their values are copied in place.

    Args:
        info: the weight in the model.
        world_size: number of ranks.
        place: the module's dictionary that has the parameter, and its name there; None: it is not watched.
        block: output channels that share a mask; 1: every weight has its own.

    Raises:
        ValueError: the parameter is sharded along another dimension than the first, or blocks are cut by the shards.

    Attributes:
        info: the weight in the model.
        dense: the dense weights, in the parameter's local shape and memory format.
        pruned: the tensor that the forward pass uses.
        replication: how many ranks have each weight of this layer.
        shards: into how many shards the layer is cut; 1 if it is replicated.
        shard: which of them this rank has.
    """

    def __init__(
        self,
        info: WeightInfo,
        world_size: int,
        place: tuple[dict[str, nn.Parameter | None], str] | None = None,
        block: int = 1,
    ) -> None:
        self.info, self.place, self.block = info, place, block
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
        rows = -(-info.parameter.shape[0] // shards)
        if shards > 1 and rows % block:
            raise ValueError(
                f"layer {info.name!r}: {shards} shards of {rows} output channels cut blocks of {block}: choose another block, "
                "or exclude the layer in pattern.exclude"
            )
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

    def magnitudes(self) -> Tensor:
        """What is compared with the threshold, flat: |w| of every weight, or the norm of every block; float32 at least."""
        if self.block == 1:
            weights = self.flat_dense()
            return weights.abs().to(torch.float64 if weights.dtype == torch.float64 else torch.float32)
        return norms(self.dense, self.block).flatten()

    def spread(self, of_blocks: Tensor) -> Tensor:
        """A flat tensor of one number per block as one per weight, in the order of `flat_dense`."""
        if self.block == 1:
            return of_blocks
        whole = torch.empty_like(self.dense, dtype=of_blocks.dtype)
        view = grouped(whole, self.block)
        view.copy_(of_blocks.view(view.shape[0], 1, *view.shape[2:]).expand_as(view))
        return flat(whole)

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
        if not _same_order(gradient, self.dense):
            aligned = torch.empty_like(self.dense)
            aligned.copy_(gradient)
            gradient = aligned
        return flat(gradient)

    def check_storage(self) -> None:
        """Raise `RuntimeError` if the model has left the parameter or its storage, as ``load_state_dict(assign=True)`` does."""
        now = self.parameter if self.place is None else self.place[0].get(self.place[1])
        # Between a forward and the backward pass FSDP2 has the whole parameter in its place.
        if now is not self.parameter and isinstance(now, DTensor) == self.sharded:
            raise RuntimeError(
                f"layer {self.info.name!r}: its parameter was replaced after the Pruner was built; load weights without "
                "assign=True, or build optimizer and Pruner after that"
            )
        if local(self.parameter.data).data_ptr() != self.pruned.data_ptr():
            raise RuntimeError(
                f"layer {self.info.name!r}: its parameter was moved or converted after the Pruner was built; "
                "move the model to its device and type first"
            )

    def is_removed(self) -> Tensor:
        """Where a frozen mask has removed weights: boolean, in the parameter's local shape; see `projection.freeze_`."""
        return self.dense != 0

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


def swap_in_dense(layers: Sequence[LayerWeights]) -> None:
    """Put the dense weights into the parameters, as the optimizer expects them."""
    for layer in layers:
        if not layer.sharded:
            layer.parameter.data = layer.dense
    _copy_shards([(layer.pruned, layer.dense) for layer in layers if layer.sharded])


def swap_out_dense(layers: Sequence[LayerWeights]) -> None:
    """Store the parameters' values as the dense weights, and put the pruned ones in again."""
    for layer in layers:
        if not layer.sharded:
            layer.parameter.data = layer.pruned
    _copy_shards([(layer.dense, layer.pruned) for layer in layers if layer.sharded])


def _copy_shards(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first, in one launch."""
    if pairs:
        torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


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
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.share = torch.tensor([1.0 / layer.replication for layer in layers], dtype=torch.float64, device=device)
        self.calls = 0

    def reduce(self, *columns: Tensor, of_first: Tensor | None = None) -> list[Tensor]:
        """Reduce float64 vectors of one number per layer, together; integers stay exact below 2^53 after rounding.

        The first rank's `of_first` reaches every rank to the last bit, as one more vector.
        """
        if self.world_size == 1:
            return [*columns, *([] if of_first is None else [of_first])]
        rows = [column * self.share for column in columns]
        if of_first is not None:
            rows.append(of_first if self.rank == 0 else torch.zeros_like(of_first))
        return list(self.sum_(torch.stack(rows)).unbind())

    def sum_(self, packed: Tensor) -> Tensor:
        """Sum `packed` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(packed, group=self.group)
            self.calls += 1
        return packed

    def broadcast_(self, tensor: Tensor) -> None:
        """Overwrite `tensor` by the first rank's."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0 if self.group is None else dist.get_global_rank(self.group, 0), group=self.group)

    def all_agree(self, answer: bool) -> bool:
        """Whether every rank's answer is yes; a collective."""
        if self.world_size == 1:
            return answer
        flag = torch.tensor(float(answer), device=self.share.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return bool(flag > 0)

    def max_minus_min(self, values: Tensor) -> Tensor:
        """max − min over ranks of each number, to prove that ranks agree: zeros when they do."""
        if self.world_size == 1:
            return torch.zeros_like(values)
        packed = torch.stack([values, -values])
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self.group)
        return packed[0] + packed[1]

"""This process's place among the ranks of a run, and the few collectives that the trainer needs.

The same trainer runs in one process, under torchrun and under Ray Train. `World` hides which: alone it skips
communication, otherwise it uses the process group that torchrun's environment describes, or an existing one.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from asp_dist.checkpoint.format import split_state, unflatten_state
from asp_dist.config import Config
from asp_dist.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One rank among `world_size`, with the device that it computes on.

    Args:
        rank: this process's number, 0 to `world_size` - 1.
        local_rank: its number on this machine.
        world_size: number of processes.
        device: the device of model and batches.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's files."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum of `tensor` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def share(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def on_main(self, work: Callable[[], T] | None) -> T:
        """What `work` returns on rank 0, on every rank; what it raises there, every rank raises. Others may give None."""
        result: T | None = None
        error: Exception | None = None
        if self.is_main:
            assert work is not None
            try:
                result = work()
            except Exception as caught:
                error = caught
        result, error = self.share((result, error))
        if error is not None:
            error.on_every_rank = True  # type: ignore[attr-defined]
            raise error
        return result  # type: ignore[return-value]

    def share_state(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """Rank 0's `state`, a dictionary of parts with tensors on the CPU, on every rank: tensor by tensor, as bytes.

        Pickled in one piece it would take up its own size again, on the device.
        """
        if self.world_size == 1 or self.is_main:
            assert state is not None
            plain, parts = split_state(state)
            self.share((plain, {part: _shapes(tensors) for part, tensors in parts.items()}))
        else:
            shapes: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
            plain, shapes = self.share(({}, shapes))
            parts = {part: {n: torch.empty(s, dtype=d) for n, (s, d) in those.items()} for part, those in shapes.items()}
        for tensors in parts.values():
            for tensor in tensors.values():
                self._share_bytes(tensor)
        if state is not None:
            return state
        return {part: unflatten_state(tree, parts.get(part, {})) for part, tree in plain.items()}

    def _share_bytes(self, tensor: torch.Tensor) -> None:
        """Overwrite a CPU tensor by rank 0's."""
        if self.world_size == 1 or tensor.numel() == 0:
            return
        data = tensor.contiguous().reshape(-1).view(torch.uint8).to(self.device)
        dist.broadcast(data, src=0)
        if not self.is_main:
            tensor.copy_(data.cpu().view(tensor.dtype).reshape(tensor.shape))

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite `tensors` by rank 0's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def started_by_torchrun() -> bool:
    """Whether torchrun started this process, as one rank."""
    return "TORCHELASTIC_RUN_ID" in os.environ and has_rank()


def has_rank() -> bool:
    """Whether the environment gives this process a rank. Platforms do so too, for whatever they start."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_one_rank(config: Config) -> bool:
    """Whether this process is one rank of the run by its environment: from torchrun, or asked for by ``cluster.mode``."""
    return has_rank() and (started_by_torchrun() or config.cluster.mode == "local")


def init_world(device: str = "auto", timeout_s: float = 600.0) -> World:
    """The world of this process: an existing process group, torchrun's environment, or alone.

    Args:
        device: ``auto`` (CUDA where there is some, else the CPU), ``cpu`` or ``cuda``.
        timeout_s: seconds after which a collective that does not finish raises.

    Raises:
        UserError: CUDA is asked for and there is none, or there are more ranks here than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _choose_device(device, local_rank)
    if not dist.is_initialized():
        if not has_rank() or os.environ["WORLD_SIZE"] == "1":
            return World(device=chosen)
        on_cuda = chosen.type == "cuda"
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
            device_id=chosen if on_cuda else None,
        )
    return World(dist.get_rank(), local_rank, dist.get_world_size(), chosen)


def _choose_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise UserError(
            f"training.device = {name} with local rank {local_rank}, but this machine has {count} usable GPUs: "
            "start fewer processes here, or set training.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def share_problem(config: Config, world_size: int) -> str:
    """Why `world_size` workers cannot share the batch of a step, with the remedy; empty if they can."""
    batch, accumulate, augment = config.data.batch_size, config.training.accumulate, config.data.augment
    parts = world_size * accumulate
    if batch % parts:
        return (
            f"data.batch_size = {batch} does not divide among {world_size} workers × training.accumulate = {accumulate}: "
            f"{batch} / {parts} = {batch / parts:.2f}; use a multiple of {parts}"
        )
    if (batch // parts) % 2 and (augment.mixup > 0 or augment.cutmix > 0):
        return (
            f"data.augment.mixup and cutmix pair images: data.batch_size = {batch} over {parts} parts leaves "
            f"{batch // parts} per part, which is odd; use a multiple of {2 * parts}"
        )
    return ""


def group_sizes(config: Config) -> list[int]:
    """The sizes that a group of workers on a cluster may have, rising: one unless ``cluster.min_workers`` is set.

    Of an elastic group's sizes, those among which the batch cannot be shared are left out.
    """
    cluster = config.cluster
    if cluster.min_workers is None:
        return [cluster.num_workers]
    sizes = range(cluster.min_workers, cluster.num_workers + 1)
    return [size for size in sizes if not share_problem(config, size)]

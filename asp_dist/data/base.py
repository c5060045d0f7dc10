"""What the training loaders of all backends share: the options, the place in the epoch, and going on from it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asp_dist.config import AugmentConfig, DaliConfig
from asp_dist.data.images import ImageSpec, progressive_size
from asp_dist.data.order import EpochPlan, eval_part, eval_steps
from asp_dist.data.remote import Cache
from asp_dist.data.samples import IndexArray, Samples

log = logging.getLogger(__name__)
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader needs besides its samples.

    Args:
        spec: the tensor that the model wants.
        augment: augmentation of the training images.
        device: where the batches land; with DALI, a CUDA device decodes there too.
        rank: this rank.
        world_size: number of ranks.
        seed: seed of the order and of the augmentation.
        threads: CPU threads, or worker processes of the torch backend.
        prefetch: batches worked ahead.
        sizes: progressive image sides over `epochs`; empty: `spec.size` throughout.
        epochs: length of the training.
        channels_last: memory order of the images; nothing else changes.
        dali: how DALI uses a GPU.
        cache: folder for copies of an object store's images; None: none are kept.
        cache_bytes: what it may take up; None: no limit.
        node_ranks: ranks of this node, which share it.
    """

    spec: ImageSpec
    augment: AugmentConfig
    device: torch.device
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    threads: int = 1
    prefetch: int = 2
    sizes: tuple[int, ...] = ()
    epochs: int = 1
    channels_last: bool = False
    dali: DaliConfig = DaliConfig()
    cache: Path | None = None
    cache_bytes: float | None = None
    node_ranks: int = 1

    def cache_of(self, samples: Samples | None) -> Cache | None:
        """The cache of a split, for this rank; None: there is none."""
        if self.cache is None or samples is None:
            return None
        return Cache(self.cache, samples, self.cache_bytes, writer=f"{self.rank}", writers=self.node_ranks)

    def spec_in(self, epoch: int) -> ImageSpec:
        """The training images' spec in `epoch`."""
        side = progressive_size(self.sizes, epoch, self.epochs)
        return self.spec if side is None else dataclasses.replace(self.spec, size=(side, side))


class TrainLoader(ABC):
    """Training batches of one rank.

    Args:
        samples: the training split; None for the synthetic source.
        plan: how an epoch is dealt to steps and ranks.
        options: everything else.

    Attributes:
        cache: the node's copy of an object store's images, if it keeps one.
    """

    backend: str

    def __init__(self, samples: Samples | None, plan: EpochPlan, options: LoaderOptions) -> None:
        self.samples, self.plan, self.options = samples, plan, options
        self.cache = options.cache_of(samples)
        self.steps_per_epoch = plan.steps
        self.samples_per_epoch = plan.steps * plan.batch_size
        self._epoch = self._taken = self._first_step = 0
        self._restored: dict[str, Any] | None = None

    def start(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        """Micro-batches from optimizer step `step` of `epoch`: images float32 [micro, 3, H, W], targets int64 [micro].

        Raises:
            DataError: a file that does not decode, with its name.
            DataReadError: a file that cannot be read now.
        """
        if self.cache is not None:
            self.cache.refresh()
        restored, self._restored = self._restored, None
        self._epoch, self._first_step, self._taken = epoch, step, step * self.plan.accumulate
        pipeline = None
        if restored is not None and restored["epoch"] == epoch and restored["pipeline"] is not None:
            if restored["step"] == step:
                self._first_step, pipeline = restored["first_step"], restored["pipeline"]
            else:
                log.warning(
                    "rank %d: the loader's state is of step %d of epoch %d, but step %d is asked for: "
                    "the same order continues from there, with new augmentation draws",
                    self.options.rank, restored["step"], epoch, step,
                )  # fmt: skip
        for batch in self._batches(epoch, step, pipeline):
            self._taken += 1
            yield batch

    @abstractmethod
    def _batches(self, epoch: int, step: int, pipeline: str | None) -> Iterator[Batch]:
        """The micro-batches of `start`; with `pipeline`, that state of a pipeline begun at ``self._first_step``."""

    def _pipeline_state(self) -> str | None:
        """State of the running pipeline after the last batch taken, if the backend has any."""
        return None

    def _part(self, epoch: int, first_step: int) -> IndexArray:
        """This rank's samples of `epoch` from `first_step` on."""
        assert self.samples is not None
        order = self.plan.order(self.options.seed, epoch, self.samples.shard)
        return self.plan.part(order, self.options.rank, first_step)

    def topology(self) -> dict[str, Any]:
        """What a state must have in common with this loader to restore the exact next batch."""
        plan, options = self.plan, self.options
        looks = repr((options.spec, options.augment, options.sizes, options.epochs))
        return {
            "backend": self.backend,
            "data set": None if self.samples is None else self.samples.fingerprint,
            "samples": plan.num_samples,
            "batch size": plan.batch_size,
            "micro-batches": plan.accumulate,
            "world size": plan.world_size,
            "rank": options.rank,
            "seed": options.seed,
            "device": options.device.type,
            "images": hashlib.sha256(looks.encode()).hexdigest()[:16],
        }

    def state_dict(self) -> dict[str, Any]:
        """This rank's place in the epoch, after the last batch taken: plain types. Every rank has its own."""
        whole_steps = self._taken % self.plan.accumulate == 0
        return {
            "topology": self.topology(),
            "epoch": self._epoch,
            "step": self._taken // self.plan.accumulate,
            "first_step": self._first_step,
            "pipeline": self._pipeline_state() if whole_steps else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit at the next `start` of the state's epoch and step, if the state fits this loader.

        Otherwise `start` continues the same epoch's order from the same step, with new augmentation draws, and a
        log line says what differs.
        """
        mine, theirs = self.topology(), state.get("topology", {})
        changes = [f"{k} {theirs.get(k)!r} -> {mine[k]!r}" for k in mine if mine[k] != theirs.get(k)]
        self._restored = None if changes else state
        if changes:
            log.warning(
                "rank %d: the loader's state does not fit (%s): epoch %s continues from step %s by its order, "
                "with new augmentation draws",
                self.options.rank, ", ".join(changes), state.get("epoch"), state.get("step"),
            )  # fmt: skip

    def close(self) -> None:  # noqa: B027
        """Let go of threads, processes and files."""


class ValLoader(ABC):
    """Validation batches of one rank: every sample on exactly one rank, equal steps on every rank.

    Args:
        samples: the validation split; None for the synthetic source.
        num_samples: validation samples over all ranks.
        batch_size: samples per batch on one rank.
        options: everything else.

    Attributes:
        cache: the node's copy of an object store's images, if it keeps one.
    """

    def __init__(self, samples: Samples | None, num_samples: int, batch_size: int, options: LoaderOptions) -> None:
        self.samples, self.num_samples, self.batch_size, self.options = samples, num_samples, batch_size, options
        self.cache = options.cache_of(samples)
        self.part = eval_part(num_samples, options.rank, options.world_size)
        self.steps = eval_steps(num_samples, batch_size, options.world_size)

    def __len__(self) -> int:
        """Batches on each rank."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """Images float32 [B, 3, H, W] and targets int64 [B]; real samples only, so B may be 0 in the last batch."""
        yielded = 0
        for batch in self._batches():
            yielded += 1
            yield batch
        height, width = self.options.spec.size
        for _ in range(self.steps - yielded):
            yield (
                torch.empty(0, 3, height, width, device=self.options.device),
                torch.empty(0, dtype=torch.int64, device=self.options.device),
            )

    @abstractmethod
    def _batches(self) -> Iterator[Batch]:
        """The batches that contain samples."""

    def close(self) -> None:  # noqa: B027
        """Let go of threads, processes and files."""

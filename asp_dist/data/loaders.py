"""Building the loaders of one rank."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asp_dist.config import DataConfig
from asp_dist.data.base import LoaderOptions, TrainLoader, ValLoader
from asp_dist.data.images import build_spec, default_threads
from asp_dist.data.info import DataInfo, DataSet, inspect_data, open_data_set
from asp_dist.data.order import EpochPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaders:
    """One rank's loaders, and the contents of their data set; `select` is of the images held out to choose on, if any are."""

    train: TrainLoader
    val: ValLoader
    info: DataInfo
    select: ValLoader | None = None

    @property
    def judge(self) -> ValLoader:
        """Of the images that the epochs' validations look at."""
        return self.val if self.select is None else self.select

    def close(self) -> None:
        """Let go of threads, processes and files."""
        for loader in (self.train, self.val, self.select):
            if loader is not None:
                loader.close()

    def remove_caches(self) -> None:
        """Delete the node's copies of an object store's images."""
        for loader in (self.train, self.val, self.select):
            if loader is not None and loader.cache is not None:
                loader.cache.remove()


def build_loaders(
    data: DataConfig,
    *,
    model_data: dict[str, Any],
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device,
    accumulate: int = 1,
    epochs: int = 1,
    channels_last: bool = False,
    data_set: DataSet | None = None,
) -> Loaders:
    """The training and validation loaders of one rank.

    Args:
        data: the data set and how it is loaded.
        model_data: timm's ``resolve_model_data_config`` of the model; ``data.input_size`` overrides it.
        seed: seed of the order and of the augmentation.
        rank: this rank.
        world_size: number of ranks.
        device: where the batches land; a CUDA device decodes there too.
        accumulate: micro-batches per optimizer step.
        epochs: length of the training, over which ``data.progressive_sizes`` are spread.
        channels_last: memory order of the batches, where the loader can choose it for nothing.
        data_set: the data set at ``data.root``, if it has been opened already.

    Raises:
        UserError: a data set that is missing or unfit, a batch size that does not divide.
    """
    options = LoaderOptions(
        spec=build_spec(data, model_data),
        augment=data.augment,
        device=device,
        rank=rank,
        world_size=world_size,
        seed=seed,
        threads=data.threads or default_threads(),
        prefetch=data.prefetch,
        sizes=tuple(data.progressive_sizes),
        epochs=epochs,
        channels_last=channels_last,
        dali=data.dali,
        cache=None if data.cache is None else Path(data.cache).expanduser(),
        cache_bytes=None if data.cache_gb is None else 1e9 * data.cache_gb,
        node_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    if data.backend == "synthetic":
        return _synthetic(data, options, accumulate)
    data_set = data_set or open_data_set(data)
    plan = EpochPlan(len(data_set.train), data.batch_size, world_size, accumulate, data.augment.repeats)
    eval_batch = data.eval_batch_size or plan.micro
    if rank == 0 and plan.num_samples % plan.batch_size:
        log.info(
            "each epoch takes %d of the %d training images: %d steps of %d",
            plan.steps * plan.batch_size, plan.num_samples, plan.steps, plan.batch_size,
        )  # fmt: skip
    if data.backend == "torch":
        from asp_dist.data.torch_loader import TorchTrain, TorchVal

        train: TrainLoader = TorchTrain(data_set.train, plan, options)
        kind: type[ValLoader] = TorchVal
    else:
        from asp_dist.data.dali.dali_loader import DaliTrain, DaliVal

        train = DaliTrain(data_set.train, plan, options)
        kind = DaliVal
    val, held = data_set.val, data_set.select
    select = None if held is None else kind(held, len(held), eval_batch, options)
    return Loaders(train, kind(val, len(val), eval_batch, options), data_set.info, select)


def _synthetic(data: DataConfig, options: LoaderOptions, accumulate: int) -> Loaders:
    from asp_dist.data.synthetic import SyntheticTrain, SyntheticVal

    info = inspect_data(data)
    plan = EpochPlan(info.num_train, data.batch_size, options.world_size, accumulate)
    classes = data.synthetic_classes
    val = SyntheticVal(info.num_val, data.eval_batch_size or plan.micro, options, classes)
    return Loaders(SyntheticTrain(plan, options, classes), val, info)

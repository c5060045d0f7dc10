"""The torch backend: timm's transforms in torch's DataLoader, over the same order as DALI's."""

from __future__ import annotations

import gc
import io
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, InterpolationMode, RandomCrop, Resize

from asp_dist.config import AugmentConfig
from asp_dist.data.bad_files import DataError, DataReadError, diagnose, pipeline_error, without_traceback
from asp_dist.data.base import Batch, LoaderOptions, TrainLoader, ValLoader
from asp_dist.data.images import ImageSpec, erases_batches
from asp_dist.data.samples import IndexArray, Samples

STRICT = partial(diagnose, strict=True)  # PIL itself decodes here


def build_transform(spec: ImageSpec, augment: AugmentConfig | None) -> Callable[[Any], Any]:
    """timm's training transform, or its evaluation transform without `augment`: PIL image to float32 [3, H, W].

    timm leaves color jitter out where there is a policy; DALI's pipelines do both.
    """
    from timm.data import auto_augment, create_transform

    shared: dict[str, Any] = {
        "input_size": (3, *spec.size),
        "interpolation": spec.interpolation,
        "mean": spec.mean,
        "std": spec.std,
        "crop_pct": spec.crop_pct,
        "crop_mode": spec.crop_mode,
    }
    if augment is None:
        return create_transform(**shared)
    spread = f"-mstd{augment.policy_std:g}" if augment.policy_std else ""
    how = f"-n{augment.policy_ops}-p{augment.policy_prob:f}-inc{int(augment.policy_increasing)}{spread}"
    policies = {
        "none": None,
        # timm's magnitudes are whole numbers up to 10, where DALI's go up to 30.
        "randaugment": f"rand-m{round(augment.policy_magnitude / 3)}{how}",
        "augmix": f"augmix-m{round(augment.policy_magnitude / 3)}{spread}",
        "trivialaugment": "rand-n1-m15-mstd101",  # one operation, magnitude uniform: timm's form of TrivialAugment
        "autoaugment": "original",
    }
    whole = create_transform(
        **shared,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=policies[augment.policy],
        re_prob=0.0 if erases_batches(augment) else augment.erase,
        re_mode="const",
    )
    for step in whole.transforms:
        for one in getattr(step, "ops", ()):
            if one.aug_fn is auto_augment.posterize:
                one.aug_fn = partial(_posterize, auto_augment.posterize)
    if augment.pad:  # in place of timm's random resized crop, which comes first
        height, width = spec.size
        whole.transforms[0] = Compose([Resize((height, width), _pil(spec.interpolation)), RandomCrop(spec.size, augment.pad)])
    return whole


def _posterize(posterize: Callable[..., Any], image: Any, bits: int, **more: Any) -> Any:
    """timm's operation with one bit at least: newer versions of PIL refuse none, which small magnitudes ask for."""
    return posterize(image, max(1, bits), **more)


def _pil(interpolation: str) -> InterpolationMode:
    return InterpolationMode(interpolation)


class DecodedDataset(Dataset[tuple[torch.Tensor, int]]):
    """The samples of one part, decoded by PIL; its randomness is a function of (seed, epoch, position) alone.

    Args:
        samples: the split.
        part: int64 [M], the samples to serve.
        transform: PIL image to tensor.
        key: whole numbers that the draws depend on; None for no randomness.
        where: rank and epoch, for messages, up to the word that the step's number follows.
        step: samples of this rank per step.
    """

    def __init__(
        self,
        samples: Samples,
        part: IndexArray,
        transform: Callable[[Any], Any],
        key: tuple[int, ...] | None,
        where: str,
        step: int,
    ) -> None:
        self.samples, self.part, self.transform, self.key = samples, part, transform, key
        self.where, self.step = where, step

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        index = int(self.part[position])
        if self.key is not None:
            seed = int(np.random.SeedSequence([*self.key, position]).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)  # timm's transforms draw from all three
            torch.manual_seed(seed)
        try:
            with Image.open(io.BytesIO(self.samples.read(index))) as encoded:
                image = encoded.convert("RGB")
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for broken files
            where = f"{self.where} {position // self.step}"
            raise pipeline_error(error, self.samples, [index], where=where, looks=[STRICT]) from error
        return self.transform(image), int(self.samples.labels[index])


def serve(dataset: DecodedDataset, batch: int, first: int, options: LoaderOptions) -> Iterator[Batch]:
    """Batches of `dataset` from position `first` on; the last may be smaller.

    Raises:
        DataError: a file that does not decode, with its name.
        DataReadError: a file that cannot be read now.
    """
    order = [list(range(i, min(i + batch, len(dataset)))) for i in range(first, len(dataset), batch)]
    cuda = options.device.type == "cuda"
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=options.threads if len(order) > 1 else 0,
        prefetch_factor=options.prefetch if len(order) > 1 else None,
        pin_memory=cuda,
        worker_init_fn=keep_the_parents,
    )
    gc.collect()  # what is let go of here must not be let go of in the workers
    for images, targets in _unwrapped(loader):
        yield images.to(options.device, non_blocking=cuda), targets.to(options.device, non_blocking=cuda)


def keep_the_parents(worker: int) -> None:
    """In a worker: never let go of what came with the fork. A DALI pipeline would wait there for threads that it lacks."""
    gc.freeze()


def _unwrapped(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches; its errors in one line."""
    try:
        yield from loader
    except (DataError, DataReadError) as error:
        raise without_traceback(error) from error


class TorchTrain(TrainLoader):
    """Training batches of one rank through torch's DataLoader; see `TrainLoader`."""

    backend = "torch"

    def _batches(self, epoch: int, step: int, pipeline: str | None) -> Iterator[Batch]:
        assert self.samples is not None
        options = self.options
        dataset = DecodedDataset(
            self.samples,
            self._part(epoch, 0),
            build_transform(options.spec_in(epoch), options.augment),
            (options.seed % 2**64, epoch, options.rank),
            f"rank {options.rank}, epoch {epoch}, step",
            self.plan.micro * self.plan.accumulate,
        )
        yield from serve(dataset, self.plan.micro, step * self.plan.accumulate * self.plan.micro, options)


class TorchVal(ValLoader):
    """Validation batches of one rank through torch's DataLoader; see `ValLoader`."""

    def _batches(self) -> Iterator[Batch]:
        assert self.samples is not None
        transform = build_transform(self.options.spec, None)
        where = f"rank {self.options.rank}, validation batch"
        dataset = DecodedDataset(self.samples, self.part, transform, None, where, self.batch_size)
        yield from serve(dataset, self.batch_size, 0, self.options)

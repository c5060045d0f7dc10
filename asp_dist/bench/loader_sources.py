"""What `asp-dist bench data` compares: each source is a function that yields batches."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asp_dist.data.base import LoaderOptions
from asp_dist.data.dali.dali_loader import DaliTrain, DaliVal, PipelineRun, pipeline_options, placement
from asp_dist.data.order import EpochPlan
from asp_dist.data.samples import IndexArray, Samples
from asp_dist.data.torch_loader import TorchTrain, TorchVal

Source = Callable[[], Iterator[int]]  # yields the number of images of each batch


class _TorchvisionDataset(Dataset[tuple[Tensor, int]]):
    """The samples through PIL and torchvision's transforms."""

    def __init__(self, samples: Samples, transform: Callable[[Any], Tensor]) -> None:
        self.samples, self.transform = samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(io.BytesIO(self.samples.read(index))) as image:
            return self.transform(image.convert("RGB")), int(self.samples.labels[index])


def torchvision_transform(options: LoaderOptions, *, train: bool) -> Callable[[Any], Tensor]:
    """torchvision's transforms that do what the DALI pipelines do: crop, flip and normalization."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    spec, mode = options.spec, InterpolationMode(options.spec.interpolation)
    if train:
        augment = options.augment
        crop = transforms.RandomResizedCrop(spec.size, augment.scale, augment.ratio, mode, antialias=True)
        first = [crop, transforms.RandomHorizontalFlip(augment.hflip)]
    else:
        first = [transforms.Resize(spec.resize[0], mode, antialias=True), transforms.CenterCrop(spec.size)]
    transform: Callable[[Any], Tensor] = transforms.Compose(
        [*first, transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    )
    return transform


def torchvision_source(samples: Samples, batch: int, options: LoaderOptions, *, train: bool) -> Source:
    """torchvision's transforms in torch's DataLoader, with as many workers as DALI has threads."""

    def run() -> Iterator[int]:
        loader = DataLoader(
            _TorchvisionDataset(samples, torchvision_transform(options, train=train)),
            batch_size=batch,
            shuffle=train,
            num_workers=options.threads,
            prefetch_factor=options.prefetch,
            drop_last=True,
        )
        for images, _ in loader:
            yield len(images.to(options.device))

    return run


def loader_sources(samples: Samples, batch: int, options: LoaderOptions) -> dict[str, Source]:
    """The package's own loaders: DALI's and timm's, for training and validation."""
    plan, count = EpochPlan(len(samples), batch), len(samples)

    def serve(batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[int]:
        for images, _ in batches:
            yield len(images)

    return {
        "DALI, training": lambda: serve(DaliTrain(samples, plan, options).start(0)),
        "timm, training": lambda: serve(TorchTrain(samples, plan, options).start(0)),
        "DALI, validation": lambda: serve(iter(DaliVal(samples, count, batch, options))),
        "timm, validation": lambda: serve(iter(TorchVal(samples, count, batch, options))),
    }


def bare_sources(samples: Samples, batch: int, options: LoaderOptions) -> dict[str, Source]:
    """DALI's read alone, and its decoders alone: the limits that no pipeline exceeds."""
    from nvidia.dali import fn, pipeline_def, types

    from asp_dist.data.dali.readers import Reader, reader_of

    augment, decoder = options.augment, placement(options).decoder

    @pipeline_def  # type: ignore[untyped-decorator]
    def read(reader: Reader) -> Any:
        return reader()

    @pipeline_def  # type: ignore[untyped-decorator]
    def decode(reader: Reader) -> Any:
        encoded, position = reader()
        return fn.decoders.image(encoded, **decoder, output_type=types.RGB), position

    @pipeline_def  # type: ignore[untyped-decorator]
    def crop(reader: Reader) -> Any:
        encoded, position = reader()
        random: dict[str, Any] = {"random_area": list(augment.scale), "random_aspect_ratio": list(augment.ratio)}
        return fn.decoders.image_random_crop(encoded, **decoder, output_type=types.RGB, **random), position

    def source(build: Callable[..., Any]) -> Source:
        def run() -> Iterator[int]:
            part: IndexArray = np.arange(len(samples) // batch * batch)
            arguments = pipeline_options(options, batch, len(part) // batch)
            with reader_of(samples, part, batch) as reader:
                pipeline = build(reader, seed=1, **arguments)
                pipeline.build()
            bare = PipelineRun(pipeline, len(part) // batch, arguments["prefetch_queue_depth"], reader.tar, channels_last=False)
            for _ in range(bare.batches):
                bare.advance()
                yield batch
            if options.device.type == "cuda":
                torch.cuda.synchronize(options.device)

        return run

    return {"read": source(read), "decode": source(decode), "random-crop decode": source(crop)}

"""Resizing images on the CPU by torch's kernel, inside DALI's pipeline.

DALI's own CPU operator takes as long as decoding a training crop does (bilinear), or half as long again (bicubic): nine
tenths of it go into resampling rows pixel by pixel. torch's kernel for uint8 takes a third of that, and is Pillow's but
for rounding (two levels of 255 at most), so that the images are also those of the torch backend.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from torch import Tensor
from torch.nn.functional import interpolate

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Size = np.ndarray[Any, np.dtype[np.int32]]
MODES = ("bilinear", "bicubic")


class TorchResize:
    """A batch operator: uint8 images [H, W, 3] of any sizes to given sizes, antialiased.

    Args:
        mode: one of `MODES`.
        threads: images resized at once.
        crop: height and width of the middle to keep of each resized image, in pixels; None: all of it.
    """

    def __init__(self, mode: str, threads: int, crop: tuple[int, int] | None = None) -> None:
        self.mode, self.threads, self.crop = mode, threads, crop
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")

    def __call__(self, images: list[Pixels], sizes: list[Size]) -> list[Pixels]:
        """The resized images, each to its height and width in `sizes`. torch lets go of the interpreter meanwhile."""
        firsts = range(self.threads)  # a task per image costs more
        parts = self.pool.map(self._each, *([some[first :: self.threads] for first in firsts] for some in (images, sizes)))
        resized: list[Pixels] = list(images)
        for first, part in enumerate(parts):
            resized[first :: self.threads] = part
        return resized

    def _each(self, images: list[Pixels], sizes: list[Size]) -> list[Pixels]:
        """Each image viewed as a channels_last batch of one, the layout that torch's fast kernel takes."""
        batches = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in images)
        resized = (interpolate(batch, size.tolist(), mode=self.mode, antialias=True)[0] for batch, size in zip(batches, sizes))
        return [self._middle(image.permute(1, 2, 0)).contiguous().numpy() for image in resized]

    def _middle(self, image: Tensor) -> Tensor:
        """Torchvision's center crop: half a pixel goes to the even one."""
        if self.crop is None:
            return image
        top, left = (round((side - crop) / 2) for side, crop in zip(image.shape, self.crop))
        return image[top : top + self.crop[0], left : left + self.crop[1]]


def torch_resize(images: Any, size: Any, mode: str, crop: tuple[int, int] | None = None) -> Any:
    """In a CPU graph: uint8 `images` [H, W, 3] resized to `size`, by as many threads as the pipeline has.

    Args:
        images: the graph's images.
        size: height and width in pixels, whole numbers: a pair, or int [2] of the graph, one per image.
        mode: one of `MODES`.
        crop: height and width of the middle to keep; None: all of it. The rest would be copied for nothing.
    """
    operator = TorchResize(mode, Pipeline.current().num_threads, crop)
    if isinstance(size, tuple):
        size = types.Constant(list(size), device="cpu")
    return fn.python_function(images, size, function=operator, batch_processing=True, output_layouts="HWC")

"""Resizing training crops on the CPU by torch's kernel, inside DALI's pipeline.

DALI's own CPU operator takes as long as decoding the crop does (bilinear), or half as long again (bicubic): nine tenths
of it go into resampling rows pixel by pixel. torch's kernel for uint8 takes a third of that, and is Pillow's but for
rounding (two levels of 255 at most), so that the crops are also those of the torch backend.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from torch.nn.functional import interpolate

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
MODES = ("bilinear", "bicubic")


class TorchResize:
    """A batch operator: uint8 images [H, W, 3] of any sizes to `size`, antialiased.

    Args:
        size: height and width in pixels.
        mode: one of `MODES`.
        threads: images resized at once.
    """

    def __init__(self, size: tuple[int, int], mode: str, threads: int) -> None:
        self.size, self.mode, self.threads = size, mode, threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")

    def __call__(self, images: list[Pixels]) -> list[Pixels]:
        """The resized images. torch lets go of the interpreter meanwhile."""
        parts = [images[first :: self.threads] for first in range(self.threads)]  # a task per image costs more
        resized: list[Pixels] = list(images)
        for first, part in enumerate(self.pool.map(self._each, parts)):
            resized[first :: self.threads] = part
        return resized

    def _each(self, images: list[Pixels]) -> list[Pixels]:
        """Each image viewed as a channels_last batch of one, the layout that torch's fast kernel takes."""
        batches = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in images)
        resized = (interpolate(batch, self.size, mode=self.mode, antialias=True)[0] for batch in batches)
        return [image.permute(1, 2, 0).numpy() for image in resized]


def torch_resize(images: Any, size: tuple[int, int], mode: str) -> Any:
    """In a CPU graph: uint8 `images` [H, W, 3] resized to `size`, by as many threads as the pipeline has."""
    operator = TorchResize(size, mode, Pipeline.current().num_threads)
    return fn.python_function(images, function=operator, batch_processing=True, output_layouts="HWC")

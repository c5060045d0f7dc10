"""How an image becomes a tensor: sizes, interpolation and normalization, from the model's timm data config."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asp_dist.config import AugmentConfig, DataConfig
from asp_dist.errors import check

CROP_MODES = ("center", "squash")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class ImageSpec:
    """The tensor that the model wants.

    Args:
        size: height and width in pixels.
        crop_pct: validation: share of the resized image's side that the crop keeps.
        crop_mode: ``center`` (resize the shorter side, crop the middle) or ``squash`` (resize both sides, crop).
        interpolation: ``bilinear``, ``bicubic``, ``nearest`` or ``lanczos``; always antialiased.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].
    """

    size: tuple[int, int] = (224, 224)
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def resize(self) -> tuple[int, int]:
        """Validation: height and width before the crop, rounded down as timm does."""
        return int(self.size[0] / self.crop_pct), int(self.size[1] / self.crop_pct)


def build_spec(data: DataConfig, model_data: dict[str, Any]) -> ImageSpec:
    """The image spec of timm's `model_data` (``resolve_model_data_config``) with `data.input_size` on top.

    Raises:
        UserError: an interpolation or crop mode that the loaders do not offer.
    """
    _, height, width = model_data.get("input_size", (3, 224, 224))
    if data.input_size is not None:
        height = width = data.input_size
    spec = ImageSpec(
        size=(height, width),
        crop_pct=float(model_data.get("crop_pct", 0.875)),
        crop_mode=model_data.get("crop_mode") or "center",
        interpolation=model_data.get("interpolation", "bicubic"),
        mean=tuple(model_data.get("mean", ImageSpec.mean)),
        std=tuple(model_data.get("std", ImageSpec.std)),
    )
    check(
        spec.interpolation in INTERPOLATIONS,
        f"the model's data config has interpolation = {spec.interpolation!r}; the loaders offer {INTERPOLATIONS}",
    )
    check(
        spec.crop_mode in CROP_MODES,
        f"the model's data config has crop_mode = {spec.crop_mode!r}; the loaders offer {CROP_MODES}",
    )
    return spec


def erases_batches(augment: AugmentConfig) -> bool:
    """Whether timm erases rectangles of the batches, and no loader does of the images."""
    return augment.erase_mode != "const" or augment.erase_count > 1


def progressive_size(sizes: tuple[int, ...], epoch: int, epochs: int) -> int | None:
    """The training images' side in `epoch` of `epochs`, the `sizes` spread evenly; None without sizes."""
    if not sizes:
        return None
    return sizes[min(len(sizes) - 1, epoch * len(sizes) // max(1, epochs))]


def default_threads() -> int:
    """Decoding threads of one worker: this process's CPUs shared among the node's ranks, 16 at most.

    Counts the CPU affinity and the cgroup's quota, and reads ``LOCAL_WORLD_SIZE``, which torchrun and Ray Train set.
    """
    cpus = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, int(quota) / int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        pass
    return max(1, min(16, int(cpus) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

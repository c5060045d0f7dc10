"""Data sets and loaders small enough for tests, and images that are bad in every way."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from asp_dist.config import DataConfig
from asp_dist.data import Loaders, build_loaders

MODEL_DATA = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}
CPU = torch.device("cpu")


def config(root: Path, **changes: Any) -> DataConfig:
    return dataclasses.replace(DataConfig(root=str(root), threads=1, batch_size=120, input_size=16), **changes)


def loaders(data: DataConfig, rank: int = 0, world_size: int = 1, seed: int = 0, **more: Any) -> Loaders:
    return build_loaders(data, model_data=MODEL_DATA, seed=seed, rank=rank, world_size=world_size, device=CPU, **more)


def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def jpeg(seed: int, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {
    "truncated": jpeg(1)[:700],
    "empty": b"",
    "not an image": b"<html>404</html>",
    "cmyk": jpeg(2, "CMYK"),
    "unreadable": None,
}

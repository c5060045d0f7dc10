"""scikit-learn's handwritten digits as an image folder: 1,797 real images that need no download."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asp_dist.data.formats.manifest import CLASSES, write_classes
from asp_dist.errors import UserError

SIDE, BORDER = 32, 4
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def prepare_digits(target: str | Path) -> Path:
    """Write the digits as ``train/DIGIT/NNNN.png`` and ``val/DIGIT/NNNN.png`` of 32 x 32 pixels; return `target`.

    The split is fixed and stratified: of each class, a fifth is for validation (1,438 and 359 images). An 8 x 8 image
    becomes 24 x 24, bicubic, within a black border, so that a center crop loses no stroke. Nothing is done where
    the data set exists already. It appears complete or not at all.

    Raises:
        UserError: `target` contains something else.
    """
    target = Path(target)
    if (target / CLASSES).is_file():
        return target
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target} contains something other than the digits: choose another folder or remove it")
    from sklearn.datasets import load_digits

    digits = load_digits()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for digit in range(10):
            members = np.flatnonzero(digits.target == digit)
            shuffled = np.random.RandomState(digit).permutation(members)
            num_val = round(len(members) / 5)
            _write(digits.images, shuffled[:num_val], temporary / "val" / str(digit))
            _write(digits.images, shuffled[num_val:], temporary / "train" / str(digit))
        write_classes(temporary, tuple(map(str, range(10))), NAMES)
        temporary.chmod(0o755)
        if target.is_dir():
            target.rmdir()
        try:
            os.rename(temporary, target)
        except OSError:
            if not (target / CLASSES).is_file():  # else another process was faster with the same files
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write(images: NDArray[np.float64], indices: NDArray[np.int64], folder: Path) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    inner = SIDE - 2 * BORDER
    for index in indices:
        small = Image.fromarray(np.round(images[index] * (255 / 16)).astype(np.uint8))
        canvas = Image.new("L", (SIDE, SIDE))
        canvas.paste(small.resize((inner, inner), Image.Resampling.BICUBIC), (BORDER, BORDER))
        canvas.save(folder / f"{index:04d}.png")

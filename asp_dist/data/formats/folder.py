"""Image folders: ``SPLIT/CLASS/*``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from asp_dist.data.remote import RemotePath
from asp_dist.data.samples import Names, Samples
from asp_dist.errors import UserError, check

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"})


def class_folders(split: Path) -> tuple[str, ...]:
    """The class folders of `split`, sorted.

    Raises:
        UserError: there is no such folder.
    """
    if not split.is_dir():
        raise UserError(f"data: there is no folder {split}: give data.root a folder with train/CLASS/* and val/CLASS/*")
    return tuple(sorted(e.name for e in os.scandir(split) if e.is_dir() and not e.name.startswith(".")))


def image_names(folder: Path) -> list[str]:
    """The names of the images in `folder`, sorted; hidden files, such as macOS's ``._1.jpg``, are none."""
    names = (entry.name for entry in os.scandir(folder))
    return sorted(n for n in names if os.path.splitext(n)[1].lower() in EXTENSIONS and not n.startswith("."))


def scan_store(root: RemotePath, name: str, classes: tuple[str, ...]) -> Samples:
    """All images of the class folders under ``root/name`` in an object store, by class, then by name; see `scan_folder`."""
    found: dict[str, list[str]] = {}
    for path in (root / name).names(deep=True):
        folder, _, file = path.rpartition("/")
        if folder and "/" not in folder and os.path.splitext(file)[1].lower() in EXTENSIONS and not file.startswith("."):
            found.setdefault(folder, []).append(f"{name}/{path}")
    unknown = sorted(set(found) - set(classes)) if classes else []
    check(not unknown, f"data: {root / name} has class folders that the training split lacks: {', '.join(unknown[:5])}")
    check(bool(found), f"data: no image under {root / name}: expected CLASS/*.jpg or another of {sorted(EXTENSIONS)}")
    index = {label: i for i, label in enumerate(classes or sorted(found))}
    labels = [index[folder] for folder in sorted(found) for _ in found[folder]]
    names = [path for folder in sorted(found) for path in sorted(found[folder])]
    return Samples(root, Names.of(names), np.asarray(labels, dtype=np.int64))


def scan_folder(root: Path, name: str, classes: tuple[str, ...]) -> Samples:
    """All images of the class folders under ``root/name``, by class, then by name.

    Args:
        root: the data set; the names of the samples are relative to it.
        name: the split.
        classes: the classes, in the order of their indices.

    Raises:
        UserError: a class folder that is not among `classes`, or no image at all.
    """
    split = root / name
    index = {label: i for i, label in enumerate(classes)}
    unknown = [folder for folder in class_folders(split) if folder not in index]
    check(not unknown, f"data: {split} has class folders that the training split lacks: {', '.join(unknown[:5])}")
    names: list[str] = []
    labels: list[int] = []
    for folder in class_folders(split):
        files = image_names(split / folder)
        names += [f"{name}/{folder}/{file}" for file in files]
        labels += [index[folder]] * len(files)
    check(bool(names), f"data: no image under {split}: expected CLASS/*.jpg or another of {sorted(EXTENSIONS)}")
    for file in names:
        check("\n" not in file, f"data: the file name {file!r} under {root} contains a line break: rename it")
    return Samples(root, Names.of(names), np.asarray(labels, dtype=np.int64))

"""Opening a data set: its contents, its layout, and the names of its classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asp_dist.config import DataConfig
from asp_dist.data.formats.folder import class_folders, scan_folder
from asp_dist.data.formats.manifest import CLASSES, manifest_path, read_classes, read_manifest
from asp_dist.data.formats.shards import read_shards, shard_files
from asp_dist.data.order import permutation
from asp_dist.data.remote import Place, RemotePath, place_of_data
from asp_dist.data.samples import Samples
from asp_dist.errors import UserError, check, missing_data

# In the folder of a data set that `asp-dist prepare` writes: what, from what.
PREPARED = ".prepare.json"
HOLD_OUT_SEED = 0x5E1EC7


@dataclass(frozen=True)
class DataInfo:
    """The contents of a data set.

    Args:
        num_train: training samples.
        num_val: validation samples.
        classes: folder names or synset ids, in the order of the class indices.
        names: the classes for people; the same as `classes` where nothing better is known.
        format: ``folder``, ``manifest``, ``shards`` or ``synthetic``.
    """

    num_train: int
    num_val: int
    classes: tuple[str, ...]
    names: tuple[str, ...]
    format: str


@dataclass(frozen=True)
class DataSet:
    """An opened data set: `info`, its two splits, and the training images that are held out to choose on, if any."""

    info: DataInfo
    train: Samples
    val: Samples
    select: Samples | None = None


def class_names(root: Place, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes for people: from ``classes.tsv`` under `root`, else timm's names of synsets, else the ids."""
    table = read_classes(root)
    known: dict[str, str] = {}
    if table is not None:
        known = dict(zip(*table))
    elif all(len(c) == 9 and c[0] == "n" and c[1:].isdigit() for c in classes):
        from timm.data.imagenet_info import ImageNetInfo

        synsets = ImageNetInfo("imagenet-22k")
        listed = set(synsets.label_names())
        known = {c: synsets.label_name_to_description(c) for c in classes if c in listed}
    return tuple(known.get(c, c) for c in classes)


def detect_format(root: Place, split: str) -> str:
    """How `split` is laid out under `root`: a manifest goes before shards, and shards before class folders."""
    if manifest_path(root, split) is not None:
        return "manifest"
    return "shards" if shard_files(root, split) else "folder"


def open_data_set(data: DataConfig) -> DataSet:
    """Open the data set at ``data.root``.

    Raises:
        UserError: it is missing, empty, has one class, its splits do not fit together, or `asp-dist prepare` has not ended.
    """
    root = place_of_data(data.root)
    if not root.is_dir():
        raise missing_data(data.root)
    check(
        data.backend != "torch" or isinstance(root, Path),
        f"data.backend = torch reads folders of this machine alone: use data.backend = dali for {data.root}",
    )
    check(
        not (root / PREPARED).is_file() or (root / CLASSES).is_file(),
        f"data.root = {data.root} is incomplete: `asp-dist prepare` began to write it and has not ended; start it again",
    )
    kind = detect_format(root, data.train) if data.format == "auto" else data.format
    if isinstance(root, RemotePath):
        check(
            kind != "folder",
            f"data.root = {data.root} has no manifest and no shards, and folders in a store are not walked at every start: "
            f"`asp-dist prepare manifest --source {data.root}` writes the manifests, next to the images",
        )
    elif kind == "folder":
        classes = class_folders(root / data.train)
        check(bool(classes), f"data: {root / data.train} is empty: expected one folder per class")
        _check_classes(root / data.train, classes)
        names = class_names(root, classes)
        train, val = scan_folder(root, data.train, classes), scan_folder(root, data.val, classes)
    if kind != "folder":
        table = read_classes(root)
        limit = None if table is None else len(table[0])
        train, val = (_open_split(kind, root, split, limit) for split in (data.train, data.val))
        count = max(int(train.labels.max()), int(val.labels.max())) + 1
        classes = tuple(str(i) for i in range(count)) if table is None else table[0]
        names = classes if table is None else table[1]
    _check_classes(root / data.train, classes)
    train, select = hold_out(train, data.select_fraction)
    return DataSet(DataInfo(len(train), len(val), classes, names, kind), train, val, select)


def hold_out(train: Samples, fraction: float) -> tuple[Samples, Samples | None]:
    """The images to train on, and a `fraction` that is held out, drawn once and for all; None for 0.

    Raises:
        UserError: one of the two would be empty.
    """
    if fraction == 0:
        return train, None
    count = round(fraction * len(train))
    check(0 < count < len(train), f"data.select_fraction = {fraction} holds out {count} of {len(train)} training images")
    drawn = permutation(len(train), HOLD_OUT_SEED)
    return train.subset(np.sort(drawn[count:])), train.subset(np.sort(drawn[:count]))


def _check_classes(split: Place, classes: tuple[str, ...]) -> None:
    check(len(classes) > 1, f"data: {split} has one class ({classes[0]}): classification needs at least two classes")


def _open_split(kind: str, root: Place, split: str, num_classes: int | None) -> Samples:
    if kind == "shards":
        return read_shards(root, split, num_classes)
    path = manifest_path(root, split)
    if path is None:
        raise UserError(f"data: there is no manifest {split}.tsv under {root}: `asp-dist prepare manifest` writes it")
    return read_manifest(path, num_classes)


def inspect_data(data: DataConfig) -> DataInfo:
    """The contents of the data set at ``data.root``.

    Raises:
        UserError: as `open_data_set`.
    """
    if data.backend == "synthetic":
        names = tuple(str(i) for i in range(data.synthetic_classes))
        return DataInfo(*data.synthetic_samples, names, names, "synthetic")
    return open_data_set(data).info

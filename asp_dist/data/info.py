"""Opening a data set: what it holds, how it is laid out, what its classes are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from asp_dist.config import DataConfig, UserError, check
from asp_dist.data.folder import class_folders, scan_folder
from asp_dist.data.samples import Samples


@dataclass(frozen=True)
class DataInfo:
    """What a data set holds.

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
    """An opened data set: `info` and its two splits."""

    info: DataInfo
    train: Samples
    val: Samples


def class_names(root: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes for people: from ``classes.tsv`` under `root` (lines ``id<TAB>name``), else timm's synset names."""
    table = root / "classes.tsv"
    known: dict[str, str] = {}
    if table.is_file():
        lines = table.read_text(encoding="utf-8").splitlines()
        known = dict(line.split("\t", 1) for line in lines if "\t" in line)
    elif all(len(c) == 9 and c[0] == "n" and c[1:].isdigit() for c in classes):
        from timm.data.imagenet_info import ImageNetInfo

        info = ImageNetInfo("imagenet-22k")
        known = {c: info.label_name_to_description(c) for c in classes if c in set(info.label_names())}
    return tuple(known.get(c, c) for c in classes)


def open_data_set(data: DataConfig) -> DataSet:
    """Open the data set at ``data.root``.

    Raises:
        UserError: it is missing, empty, has one class, or its splits do not fit together.
    """
    root = Path(data.root)
    if not root.is_dir():
        raise UserError(
            f"data.root = {data.root}: there is no such folder. `asp-dist prepare digits` writes a small data set"
        )
    classes = class_folders(root / data.train)
    check(bool(classes), f"data: {root / data.train} is empty: expected one folder per class")
    check(
        len(classes) > 1,
        f"data: {root / data.train} has one class folder ({classes[0]}): classification needs at least two classes",
    )
    train, val = scan_folder(root / data.train, classes), scan_folder(root / data.val, classes)
    info = DataInfo(len(train), len(val), classes, class_names(root, classes), "folder")
    return DataSet(info, train, val)


def inspect_data(data: DataConfig) -> DataInfo:
    """What the data set at ``data.root`` holds.

    Raises:
        UserError: as `open_data_set`.
    """
    if data.backend == "synthetic":
        names = tuple(str(i) for i in range(data.synthetic_classes))
        return DataInfo(*data.synthetic_samples, names, names, "synthetic")
    return open_data_set(data).info

"""ImageNet (ILSVRC 2012) from the three official archives, read where they lie: nothing is unpacked on the way."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asp_dist.data.samples import Names, Samples, plain_name
from asp_dist.errors import UserError, check

# Images of the official archives, and the archives' MD5 sums, as torchvision has them.
COUNTS = {"train": 1_281_167, "val": 50_000}
NUM_CLASSES = 1000
TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
META = "ILSVRC2012_devkit_t12/data/meta.mat"
TRUTH = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
SUMS = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}


@dataclass(frozen=True)
class Archives:
    """The images inside the archives: synset ids in sorted order, their names, and both splits."""

    synsets: tuple[str, ...]
    names: tuple[str, ...]
    train: Samples
    val: Samples


def read_devkit(path: Path) -> tuple[dict[int, str], dict[str, str], list[int]]:
    """(ILSVRC id -> synset, synset -> name, ILSVRC id of each validation image in order) from the development kit."""
    from scipy.io import loadmat

    with tarfile.open(path) as tar:
        meta, truth = tar.extractfile(META), tar.extractfile(TRUTH)
        assert meta is not None and truth is not None
        rows = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        labels = [int(line) for line in truth.read().split()]
    leaves = [row for row in rows if int(row["num_children"]) == 0]
    synset_of = {int(row["ILSVRC2012_ID"]): plain_name(str(row["WNID"]), DEVKIT) for row in leaves}
    names = {plain_name(str(row["WNID"]), DEVKIT): str(row["words"]) for row in leaves}
    return synset_of, names, labels


def _members(path: Path) -> list[tuple[str, int, int]]:
    """(name, offset, size) of the files of a tar archive; only headers are read."""
    with tarfile.open(path, "r:") as tar:
        return [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


def _nested_members(path: Path) -> list[tuple[str, int, int]]:
    """The same for a tar archive of tar archives; the inner archive's name, without ``.tar``, is put before."""
    members = []
    with path.open("rb") as file:
        for outer, start, size in _members(path):
            folder = Path(plain_name(outer, TRAIN)).stem
            inner = tarfile.open(fileobj=_Window(file, start, size), mode="r:")  # noqa: SIM115
            inside = [m for m in inner if m.isfile()]
            members += [(f"{folder}/{plain_name(m.name, outer)}", start + m.offset_data, m.size) for m in inside]
    return members


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        self.file.seek(self.start + self.at)
        content = self.file.read(left if size < 0 else min(size, left))
        self.at += len(content)
        return content


def check_sums(source: Path) -> None:
    """Compare the archives in `source` with their published MD5 sums; reads 156 GB.

    Raises:
        UserError: one of them differs; names it.
    """
    for name, wanted in SUMS.items():
        with (source / name).open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        check(found == wanted, f"--source {source}: {name} has the MD5 sum {found} instead of {wanted}: fetch it again")


def open_archives(source: Path, *, allow_incomplete: bool = False) -> Archives:
    """Index the official archives in `source`.

    Args:
        source: their folder.
        allow_incomplete: accept fewer images or classes than ImageNet has.

    Raises:
        UserError: one of them is missing, broken or incomplete, or they do not fit together.
    """
    missing = [name for name in (TRAIN, VAL, DEVKIT) if not (source / name).is_file()]
    check(not missing, f"--source {source}: lacks {', '.join(missing)}; https://image-net.org/download has them")
    try:
        synset_of, named, truth = read_devkit(source / DEVKIT)
        train = _nested_members(source / TRAIN)
        val = sorted((plain_name(name, VAL), start, size) for name, start, size in _members(source / VAL))
    except UserError:
        raise
    except (tarfile.TarError, KeyError, ValueError, OSError) as error:
        raise UserError(f"--source {source}: an archive is broken ({error}): fetch it again") from error
    synsets = tuple(sorted(named))
    index = {synset: i for i, synset in enumerate(synsets)}
    unknown = sorted({name.split("/")[0] for name, _, _ in train} - set(synsets))
    check(not unknown, f"--source {source}: {TRAIN} contains {unknown[:3]}, which {DEVKIT} does not list")
    check(len(val) == len(truth), f"--source {source}: {VAL} contains {len(val)} images, {DEVKIT} labels {len(truth)}")
    if not allow_incomplete:
        check_complete(source, synsets, [name.split("/")[0] for name, _, _ in train], len(val))
    val_labels = [index[synset_of[label]] for label in truth]
    val_names = [f"{synsets[label]}/{name}" for (name, _, _), label in zip(val, val_labels)]
    return Archives(
        synsets,
        tuple(named[s] for s in synsets),
        _samples(source, TRAIN, train, [name for name, _, _ in train], [index[n.split("/")[0]] for n, _, _ in train]),
        _samples(source, VAL, val, val_names, val_labels),
    )


def check_complete(source: Path, synsets: tuple[str, ...], train: Sequence[str], val: int) -> None:
    """Raise `UserError` unless there are as many classes and images as ImageNet has.

    A hole of zeros, which an interrupted download may leave, ends an archive without an error.

    Args:
        source: the archives' folder.
        synsets: the classes.
        train: the class of each training image.
        val: number of validation images.
    """
    lacking = sorted(set(synsets) - set(train))
    found = f"{len(train):,} training images of {len(set(train)):,} classes and {val:,} validation images"
    complete = len(train) == COUNTS["train"] and val == COUNTS["val"] and len(synsets) == NUM_CLASSES and not lacking
    check(
        complete,
        f"--source {source}: the archives contain {found}, ImageNet has {COUNTS['train']:,} of {NUM_CLASSES:,} and "
        f"{COUNTS['val']:,}"
        + (f"; no image of {', '.join(lacking[:3])}" if lacking else "")
        + ". Fetch them again (--checksums "
        "says which one is bad), or take them as they are (--allow-incomplete)",
    )


def _samples(root: Path, archive: str, members: list[tuple[str, int, int]], names: list[str], labels: list[int]) -> Samples:
    return Samples(
        root,
        Names.of(names),
        np.asarray(labels, dtype=np.int64),
        (archive,),
        np.zeros(len(members), dtype=np.int64),
        np.array([m[1] for m in members], dtype=np.int64),
        np.array([m[2] for m in members], dtype=np.int64),
    )

"""Manifests: one line ``PATH<TAB>LABEL`` per image, so that starting a run does not walk the folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from asp_dist.data.remote import Place, RemotePath
from asp_dist.data.samples import IndexArray, Names, Samples
from asp_dist.errors import UserError, check
from asp_dist.files import write_bytes

SUFFIX = ".tsv"
CLASSES = "classes.tsv"
NEWLINE, TAB, SPACE, ZERO = 10, 9, 32, 48


def manifest_path(root: Place, split: str) -> Place | None:
    """The manifest of `split` under `root`: the file of that name, or with ``.tsv``; None if there is none."""
    return next((p for p in (root / split, root / f"{split}{SUFFIX}") if p.is_file()), None)


def read_manifest(path: Place, num_classes: int | None = None) -> Samples:
    """The samples of a manifest; 1.28 million lines take a fraction of a second.

    The label is what follows the last tab or space of a line, paths are relative to the manifest's folder.

    Args:
        path: the manifest.
        num_classes: labels must lie below; None: any.

    Raises:
        UserError: a line that does not end in a class index, with its number.
    """
    blob = path.read_bytes()
    if b"\r" in blob:
        blob = blob.replace(b"\r\n", b"\n")
    if blob and not blob.endswith(b"\n"):
        blob += b"\n"
    data = np.frombuffer(blob, dtype=np.uint8)
    ends = np.flatnonzero(data == NEWLINE)
    check(len(ends) > 0, f"data: the manifest {path} is empty")
    begins = np.concatenate([[0], ends[:-1] + 1])
    separators = np.flatnonzero((data == TAB) | (data == SPACE))
    before = np.searchsorted(separators, ends) - 1
    cut = np.where(before >= 0, separators[before] if len(separators) else -1, -1)
    labels = _digits(data, cut, ends)
    limit = np.iinfo(np.int64).max if num_classes is None else num_classes
    bad = np.flatnonzero((cut <= begins) | (labels < 0) | (labels >= limit))
    if len(bad):
        line = blob[begins[bad[0]] : ends[bad[0]]].decode(errors="replace")
        raise UserError(
            f"data: line {bad[0] + 1} of {path} is {line!r}: expected a path, a tab and a class index"
            + ("" if num_classes is None else f" below {num_classes}, the number of classes")
        )
    return Samples(path.parent, Names(blob, begins, cut), labels)


def _digits(data: np.ndarray, cut: IndexArray, ends: IndexArray) -> IndexArray:
    """The decimal numbers in ``data[cut + 1:ends]``, int64; -1 where there is none."""
    values = np.zeros(len(ends), dtype=np.int64)
    widths = ends - cut - 1
    bad = (widths < 1) | (widths > 9)
    for place in range(int(np.clip(widths.max(), 0, 9))):
        inside = ~bad & (place < widths)
        digit = data[ends[inside] - 1 - place].astype(np.int64) - ZERO
        values[inside] += digit * 10**place
        bad[inside] |= (digit < 0) | (digit > 9)
    return np.where(bad, -1, values)


def write_manifest(samples: Samples, path: Place, *, keep: IndexArray | None = None) -> None:
    """Write the manifest of single files, aside and then in place; paths become relative to its folder.

    Args:
        samples: the samples.
        path: the manifest.
        keep: int64 [M], the samples to write; None: all.

    Raises:
        UserError: the samples lie in shards, or a path cannot be written on a line.
    """
    check(samples.shard is None, "data: shards have their own index and need no manifest")
    indices = np.arange(len(samples)) if keep is None else keep
    prefix = os.fsencode(_way(path.parent, samples.root))
    prefix = b"" if prefix == b"." else prefix + b"/"
    names = samples.names.take(indices)
    for name in names:
        check(b"\n" not in name, f"data: the file name {os.fsdecode(name)!r} contains a line break: rename it")
    lines = [b"%b%b\t%d\n" % (prefix, name, label) for name, label in zip(names, samples.labels[indices].tolist())]
    _write(path, b"".join(lines))


def _way(begin: Place, end: Place) -> str:
    """The relative path from one folder to another.

    Raises:
        UserError: one is in an object store and the other is not.
    """
    if isinstance(begin, Path) and isinstance(end, Path):  # where a folder is a link, the way up starts where it points to
        return os.path.relpath(os.path.realpath(end), os.path.realpath(begin))
    check(
        isinstance(begin, RemotePath) and isinstance(end, RemotePath),
        f"a manifest in {begin} cannot name images in {end}: write it to the same store, such as {end}",
    )
    return os.path.relpath(str(end).partition("://")[2], str(begin).partition("://")[2])


def _write(path: Place, data: bytes) -> None:
    if isinstance(path, RemotePath):
        path.write_bytes(data)
    else:
        write_bytes(path, data, durable=False)


def read_classes(root: Place) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Class ids and names from ``classes.tsv`` (lines ``ID<TAB>NAME`` in the order of the indices), or None."""
    path = root / CLASSES
    if not path.is_file():
        return None
    pairs = [line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    return tuple(p[0] for p in pairs), tuple(p[2] or p[0] for p in pairs)


def write_classes(root: Place, classes: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Write ``classes.tsv``; it is the last file of a data set, and marks it as complete."""
    _write(root / CLASSES, "".join(f"{c}\t{n}\n" for c, n in zip(classes, names, strict=True)).encode())

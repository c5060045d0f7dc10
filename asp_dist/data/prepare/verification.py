"""Looking at every file of a data set: which are broken, in an odd format, or there twice."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from asp_dist.config import DataConfig
from asp_dist.data.formats.folder import EXTENSIONS, class_folders
from asp_dist.data.formats.manifest import write_classes, write_manifest
from asp_dist.data.images import default_threads
from asp_dist.data.info import DataSet, open_data_set
from asp_dist.data.prepare.progress import progress_bar
from asp_dist.data.remote import Place, place_of_data
from asp_dist.data.samples import Samples
from asp_dist.errors import check

Kind = Literal["unreadable", "empty", "not an image", "truncated", "cmyk", "huge", "duplicate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What a network can be trained on all the same: the official ImageNet has the first and the last.
HARMLESS: tuple[Kind, ...] = ("cmyk", "huge", "duplicate")
# Decoded, such an image takes 270 MB, and several are decoded at once.
HUGE_PIXELS = 89_478_485
DECODABLE = frozenset({"JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000"})


@dataclass(frozen=True)
class Finding:
    """A file that something is wrong with.

    Args:
        split: name of the split.
        index: its sample.
        place: where it lies.
        kind: what is wrong.
        detail: the decoder's words, or the file that it repeats.
    """

    split: str
    index: int
    place: str
    kind: Kind
    detail: str


@dataclass(frozen=True)
class Report:
    """What `verify` found: `findings` in the order of the splits and samples, the number of files looked at, and `notes`.

    The notes are of folders and files that no training takes.
    """

    findings: tuple[Finding, ...]
    files: int
    notes: tuple[str, ...] = ()

    @property
    def undecodable(self) -> int:
        """How many files no decoder takes."""
        return sum(finding.kind not in HARMLESS for finding in self.findings)

    def counts(self) -> dict[str, int]:
        """Findings of each kind."""
        return {kind: sum(f.kind == kind for f in self.findings) for kind in KINDS}


def classify(encoded: bytes) -> tuple[Kind, str] | None:
    """What is wrong with an encoded image, decoding it whole: (kind, detail), or None."""
    from PIL import Image, UnidentifiedImageError

    if not encoded:
        return "empty", "0 bytes"
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
            if image.format not in DECODABLE:
                return "not an image", f"{image.format}, which DALI does not decode"
            mode, pixels = image.mode, image.width * image.height
            if pixels > HUGE_PIXELS:
                return "huge", f"{image.width} × {image.height} pixels"
            image.load()
    except Image.DecompressionBombError as error:
        return "huge", str(error)
    except UnidentifiedImageError:
        return "not an image", "unrecognized image format"
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for broken files
        kind: Kind = "truncated" if "truncated" in str(error).lower() else "not an image"
        return kind, str(error)
    return ("cmyk", "four color channels") if mode in ("CMYK", "YCCK") else None


def _look(samples: Samples, index: int) -> tuple[Kind, str] | bytes:
    """What is wrong with sample `index`, or the digest of a sound one (16 bytes)."""
    try:
        encoded = samples.read(index)
    except OSError as error:
        return "unreadable", error.strerror or str(error)
    return classify(encoded) or hashlib.blake2b(encoded, digest_size=16).digest()


def _place(sample: tuple[Samples, int]) -> str:
    return sample[0].place(sample[1])


def _findings(data_set: DataSet, threads: int, advance: Callable[[int], None]) -> Iterator[Finding]:
    first_seen: dict[bytes, tuple[Samples, int]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for split, samples in (("train", data_set.train), ("val", data_set.val)):
            for start in range(0, len(samples), 1024):
                chunk = range(start, min(start + 1024, len(samples)))
                for index, seen in zip(chunk, pool.map(lambda i, s=samples: _look(s, i), chunk)):
                    advance(1)
                    if not isinstance(seen, bytes):
                        yield Finding(split, index, samples.place(index), *seen)
                    elif seen in first_seen:
                        yield Finding(split, index, samples.place(index), "duplicate", f"of {_place(first_seen[seen])}")
                    else:
                        first_seen[seen] = (samples, index)


def verify(
    root: str | Path,
    *,
    train: str = "train",
    val: str = "val",
    manifest: str | Path | None = None,
    drop: tuple[Kind, ...] = (),
    threads: int | None = None,
    progress: bool = True,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """Decode every file of the data set at `root` and list what is wrong; write manifests of the rest if asked to.

    Files with four color channels and files that are there twice stay in the manifests unless they are to be dropped: a
    benchmark without them would be another one.

    A JPEG whose compressed data was overwritten decodes to noise without an error, here as in any decoder, and is not
    found.

    Args:
        root: the data set: folder, manifest or shards.
        train: name of the training split.
        val: name of the validation split.
        manifest: folder for the manifests of the files that decode (``train.tsv``, ``val.tsv``, ``classes.tsv``).
        drop: kinds of findings that the manifests leave out as well: ``cmyk``, ``duplicate``.
        threads: decoding threads; None: from the machine.
        progress: show a progress bar.
        on_finding: called with each finding at once.

    Raises:
        UserError: no data set at `root`; a manifest of shards.
    """
    unknown = sorted(set(drop) - set(KINDS))
    check(not unknown, f"drop = {unknown} names no kind of finding; there are {', '.join(KINDS)}")
    data_set = open_data_set(DataConfig(root=str(root), train=train, val=val))
    check(
        manifest is None or data_set.info.format != "shards",
        "manifests are not supported for shards: write new shards without the bad files",
    )
    total = data_set.info.num_train + data_set.info.num_val
    with progress_bar("Verifying", total, progress) as advance:
        found: list[Finding] = []
        for finding in _findings(data_set, threads or default_threads(), advance):
            found.append(finding)
            on_finding(finding)
        findings = tuple(found)
    if manifest is not None:
        folder = place_of_data(manifest)
        if isinstance(folder, Path):
            folder.mkdir(parents=True, exist_ok=True)
        for split, samples in (("train", data_set.train), ("val", data_set.val)):
            dropped = [f.index for f in findings if f.split == split and (f.kind not in HARMLESS or f.kind in drop)]
            write_manifest(samples, folder / f"{split}.tsv", keep=np.delete(np.arange(len(samples)), dropped))
        write_classes(folder, data_set.info.classes, data_set.info.names)
    return Report(findings, total, tuple(_notes(place_of_data(root), data_set, train, val)))


def _notes(root: Place, data_set: DataSet, train: str, val: str) -> Iterator[str]:
    """Classes without an image, and what lies in class folders and is none."""
    for split, samples in ((train, data_set.train), (val, data_set.val)):
        counts = np.bincount(samples.labels, minlength=len(data_set.info.classes))
        bare = [data_set.info.classes[index] for index in np.flatnonzero(counts == 0)]
        if bare:
            yield f"{len(bare)} classes have no image in {split}: {', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''}"
        if data_set.info.format != "folder" or not isinstance(root, Path):
            continue
        for folder in class_folders(root / split):
            for entry in sorted(os.scandir(root / split / folder), key=lambda entry: entry.name):
                if entry.is_dir():
                    yield f"{entry.path} is a folder inside of a class: its files are not taken"
                elif entry.name.startswith(".") or os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
                    yield f"{entry.path} is no image by its name: it is not taken"

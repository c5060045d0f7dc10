"""WebDataset shards: tar files of ``KEY.jpg`` and ``KEY.cls`` pairs, with an index next to each (DALI's format v1.2).

A shard's samples are read together, so a batch mixes the images of few shards: `write_shards` shuffles the data set first.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from asp_dist.data.formats.folder import EXTENSIONS
from asp_dist.data.order import permutation
from asp_dist.data.remote import Place, RemotePath
from asp_dist.data.samples import IndexArray, Names, Samples
from asp_dist.errors import UserError, check
from asp_dist.files import replacing, write_bytes

Member = tuple[str, int, int, int]  # name, offset, size, label
SHUFFLE_SEED = 0x5EED


def shard_files(root: Place, split: str) -> tuple[str, ...]:
    """The shards of `split` under `root`, such as ``train-000000.tar``, relative to it, sorted."""
    pattern = re.compile(re.escape(split) + r"[-_.]?\d*\.tar")
    if isinstance(root, RemotePath):
        names = root.names()
    else:
        names = [entry.name for entry in os.scandir(root)] if root.is_dir() else []
    return tuple(sorted(filter(pattern.fullmatch, names)))


def read_shards(root: Place, split: str, num_classes: int | None = None) -> Samples:
    """The samples of the shards of `split`; their table is kept in ``SPLIT.index.npz``, so the tars are walked once.

    Raises:
        UserError: no shard, or a shard without samples or labels.
    """
    shards = shard_files(root, split)
    check(bool(shards), f"data: there are no shards {split}-*.tar under {root}")
    table = root / f"{split}.index.npz"
    samples = _read_table(table, root, shards)
    if samples is None:
        with ThreadPoolExecutor(8) as pool:
            walked = list(pool.map(lambda s: walk_shard(root / s), shards))
        samples = _collect(root, shards, walked)
        write_table(samples, table)
    top = int(samples.labels.max())
    check(
        num_classes is None or top < num_classes,
        f"data: the shards of {root / split} contain class {top}, but there are {num_classes} classes",
    )
    return samples


def walk_shard(path: Place) -> list[Member]:
    """The images of one shard with their labels, in the order of the tar file.

    Raises:
        UserError: the tar file is broken, an image has no ``.cls``, or that is not a class index.
    """
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                key, extension = os.path.splitext(member.name)
                if extension.lower() in EXTENSIONS:
                    images[key] = (member.name, member.offset_data, member.size)
                elif extension == ".cls":
                    content = tar.extractfile(member)
                    labels[key] = int(content.read()) if content else -1
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"data: the shard {path} cannot be read ({error}): write it again") from error
    missing = next((key for key in images if labels.get(key, -1) < 0), None)
    check(missing is None, f"data: the shard {path} has an image {missing!r} without a class index in {missing}.cls")
    return [(*place, labels[key]) for key, place in images.items()]


def _collect(root: Place, shards: tuple[str, ...], walked: list[list[Member]]) -> Samples:
    members = [member for shard in walked for member in shard]
    check(bool(members), f"data: the shards under {root} contain no image")
    return Samples(
        root,
        Names.of(m[0] for m in members),
        np.array([m[3] for m in members], dtype=np.int64),
        shards,
        np.repeat(np.arange(len(shards)), [len(w) for w in walked]).astype(np.int64),
        np.array([m[1] for m in members], dtype=np.int64),
        np.array([m[2] for m in members], dtype=np.int64),
    )


def _stamps(root: Place, shards: tuple[str, ...]) -> IndexArray:
    """Size in bytes and time of the last change in ns of each shard, int64 [S, 2]."""
    if isinstance(root, RemotePath):
        return np.array(root.stamps(shards), dtype=np.int64).reshape(-1, 2)
    found = [(root / shard).stat() for shard in shards]
    return np.array([(one.st_size, one.st_mtime_ns) for one in found], dtype=np.int64).reshape(-1, 2)


def _read_table(table: Place, root: Place, shards: tuple[str, ...]) -> Samples | None:
    """The samples from `table`, or None if it is missing, torn, or tells of other shards."""
    try:
        with io.BytesIO(table.read_bytes()) as file, np.load(file) as stored:  # which would leave a torn file open
            known = tuple(stored["shards"].tolist()) == shards
            if not known or not np.array_equal(stored["stamps"], _stamps(root, shards)):
                return None
            names = Names(stored["blob"].tobytes(), stored["begins"], stored["ends"])
            return Samples(root, names, stored["labels"], shards, stored["shard"], stored["offset"], stored["size"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def write_table(samples: Samples, table: Place) -> None:
    """Keep the table of `samples` for the next start; a folder that cannot be written costs a walk each time."""
    content = io.BytesIO()
    np.savez(
        content,
        shards=np.array(samples.shards),
        stamps=_stamps(samples.root, samples.shards),
        blob=np.frombuffer(samples.names.blob, dtype=np.uint8),
        begins=samples.names.begins,
        ends=samples.names.ends,
        labels=samples.labels,
        shard=np.asarray(samples.shard),
        offset=np.asarray(samples.offset),
        size=np.asarray(samples.size),
    )
    with suppress(OSError):
        if isinstance(table, RemotePath):
            table.write_bytes(content.getvalue())
        else:
            write_bytes(table, content.getvalue(), durable=False)


def index_lines(members: Iterable[tuple[int, int, str]]) -> bytes:
    """DALI's index of (offset, size, name) triples; the component is called ``img`` for every image format."""
    lines = [f"img {offset} {size} {name}\n" for offset, size, name in members]
    return f"v1.2 {len(lines)}\n".encode() + "".join(lines).encode()


def write_shards(
    samples: Samples,
    target: Path,
    split: str,
    *,
    per_shard: int = 5000,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[str, ...]:
    """Write `samples` in shuffled order as ``SPLIT-NNNNNN.tar`` with indices; complete shards that exist are kept.

    Args:
        samples: any samples; their order in the shards is a function of their number alone.
        target: folder of the shards.
        split: prefix of their names.
        per_shard: images per shard.
        advance: called with the number of images done.
    """
    order = permutation(len(samples), SHUFFLE_SEED)
    parts = [order[i : i + per_shard] for i in range(0, len(order), per_shard)]

    def write(number: int) -> str:
        path = target / f"{split}-{number:06d}.tar"
        if not path.exists():
            _write_shard(samples, parts[number], path)
        advance(len(parts[number]))
        return path.name

    target.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(4) as pool:
        return tuple(pool.map(write, range(len(parts))))


def _write_shard(samples: Samples, part: IndexArray, path: Path) -> None:
    members = []
    with replacing(path, durable=False) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in part.tolist():
                extension = os.path.splitext(samples.names[index])[1].lower()
                for suffix, content in ((extension, samples.read(index)), (".cls", b"%d" % samples.labels[index])):
                    header = tarfile.TarInfo(f"{index:09d}{suffix}")
                    header.size = len(content)
                    offset = tar.offset + tarfile.BLOCKSIZE
                    tar.addfile(header, io.BytesIO(content))
                    members.append((suffix[1:], offset, len(content), header.name))
        lines = [" ".join(map(str, members[i] + members[i + 1])) for i in range(0, len(members), 2)]
        path.with_suffix(".idx").write_text(f"v1.2 {len(lines)}\n" + "\n".join(lines) + "\n")

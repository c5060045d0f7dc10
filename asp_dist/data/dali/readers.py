"""DALI's readers over one rank's part of an epoch, in exactly that order, for single files and for shards."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, types

from asp_dist.data.formats.shards import index_lines
from asp_dist.data.remote import Cache, Fetcher, RemotePath
from asp_dist.data.samples import IndexArray, Samples

# File systems on which plain reads beat memory maps.
NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "lustre", "ceph", "fuse", "gpfs", "beegfs", "9p", "afs"})

CHUNK = 1 << 16  # names handled at once


@dataclass(frozen=True)
class Reader:
    """The arguments of a DALI reader.

    Args:
        arguments: of ``fn.readers.file`` or ``fn.readers.webdataset``.
        tar: whether it is the latter.
        fetcher: gives the images instead, from an object store.
    """

    arguments: dict[str, Any]
    tar: bool
    fetcher: Fetcher | None = None

    def __call__(self, *, pad: bool = False) -> tuple[Any, Any]:
        """In a graph: encoded bytes, and text that ends in the position in the part, uint8 [B, ...] or int32 [B, 1]."""
        if self.fetcher is not None:
            encoded, position = fn.external_source(
                self.fetcher, 2, batch=True, batch_info=True, dtype=[types.UINT8, types.INT32], ndim=[1, 1]
            )
            # DALI deals the pipeline's seeds out in turn, and its own readers take the first: one is taken here as well, so
            # that the augmentation draws what it draws from a disk.
            taken = fn.random.uniform(range=(0.0, 1.0), shape=[1])
            return fn.reshape(encoded, rel_shape=taken * 0.0 + 1.0), position
        if self.tar:
            encoded = fn.readers.webdataset(ext=["img"], pad_last_batch=pad, name="reader", **self.arguments)
            return encoded, fn.get_property(encoded, key="source_info")
        encoded, position = fn.readers.file(pad_last_batch=pad, name="reader", **self.arguments)
        return encoded, position


def positions(output: Any, tar: bool) -> IndexArray:
    """The second output of a `Reader`, a DALI tensor list, as positions, int64 [B]."""
    if tar:
        return np.array([int(bytes(np.asarray(output.at(i))).rpartition(b":")[2]) for i in range(len(output))])
    return np.array(output.as_tensor()).reshape(-1).astype(np.int64)


@contextmanager
def reader_of(samples: Samples, part: IndexArray, batch: int, cache: Cache | None = None) -> Iterator[Reader]:
    """A reader of the samples `part` (int64 [M]) in that order; its lists live until the pipeline has been built.

    Args:
        samples: the split.
        part: the samples to read.
        batch: images per batch.
        cache: the node's copy of an object store's images.
    """
    if isinstance(samples.root, RemotePath):
        yield Reader({}, tar=False, fetcher=Fetcher(samples, part, batch, cache))
        return
    root = samples.root
    plain = {"dont_use_mmap": True} if on_network(root) else {}
    with tempfile.TemporaryDirectory(prefix="asp-dist-") as folder:
        if samples.shard is None:
            path = Path(folder) / "files"
            with path.open("wb") as file:
                for first in range(0, len(part), CHUNK):
                    names = samples.names.take(part[first : first + CHUNK])
                    file.writelines([b"%b %d\n" % (name, i) for i, name in enumerate(names, first)])
            yield Reader({"file_list": str(path), "file_root": os.fspath(root), **plain}, tar=False)
        else:
            paths, indices = _write_indices(samples, part, Path(folder))
            yield Reader({"paths": paths, "index_paths": indices, **plain}, tar=True)


def _write_indices(samples: Samples, part: IndexArray, folder: Path) -> tuple[list[str], list[str]]:
    """An index for each run of samples of one shard, named by position; (tar paths, index paths)."""
    assert samples.shard is not None and samples.offset is not None and samples.size is not None
    shard = samples.shard[part]
    cuts = np.flatnonzero(np.diff(shard)) + 1
    paths: list[str] = []
    indices: list[str] = []
    for positions_of_run in np.split(np.arange(len(part)), cuts):
        run = part[positions_of_run]
        lines = zip(samples.offset[run].tolist(), samples.size[run].tolist(), map(str, positions_of_run.tolist()))
        path = folder / f"{len(indices)}.idx"
        path.write_bytes(index_lines(lines))
        indices.append(str(path))
        paths.append(str(samples.root / samples.shards[int(shard[positions_of_run[0]])]))
    return paths, indices


def on_network(path: Path) -> bool:
    """Whether `path` lies on a network file system, by the mount table."""
    real = os.path.realpath(path)
    best, kind = "", ""
    try:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, name, *_ = line.split()
            if (real + "/").startswith(point.rstrip("/") + "/") and len(point) > len(best):
                best, kind = point, name
    except (OSError, ValueError):
        return False
    return kind.split(".")[0] in NETWORK

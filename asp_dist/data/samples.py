"""The samples of one split: names, labels and, for shards, where their bytes lie. Compact enough for millions."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
from numpy.typing import NDArray

from asp_dist.data.remote import Place, RemotePath
from asp_dist.errors import check

IndexArray = NDArray[np.int64]


class Names(Sequence[str]):
    """An immutable list of strings in one block of bytes: 1.28 million paths take 80 MB, and a manifest is its own block.

    Args:
        blob: UTF-8 text with the strings.
        begins: int64 [N], where each string begins in `blob`.
        ends: int64 [N], where it ends.
    """

    def __init__(self, blob: bytes, begins: IndexArray, ends: IndexArray) -> None:
        self.blob, self.begins, self.ends = blob, begins, ends

    @classmethod
    def of(cls, strings: Iterable[str | bytes]) -> Names:
        """From any strings."""
        encoded = [os.fsencode(s) for s in strings]
        ends = np.cumsum(np.fromiter((len(e) for e in encoded), dtype=np.int64, count=len(encoded)))
        begins = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]]) if encoded else ends
        return cls(b"".join(encoded), begins, ends)

    def __len__(self) -> int:
        return len(self.begins)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [os.fsdecode(n) for n in self.take(np.arange(len(self))[index])]
        return os.fsdecode(self.blob[self.begins[index] : self.ends[index]])

    def take(self, indices: IndexArray) -> list[bytes]:
        """The strings at `indices` (int64 [M]), in that order, encoded."""
        blob = self.blob
        return [blob[b:e] for b, e in zip(self.begins[indices].tolist(), self.ends[indices].tolist())]


def plain_name(name: str, where: str) -> str:
    """The last part of a path from inside an archive, to write a file under.

    Raises:
        UserError: the path is absolute, leaves its folder, or has no last part; `where` says which archive it is from.
    """
    parts = name.replace("\\", "/").split("/")
    sound = parts[0] != "" and not re.match(r"[A-Za-z]:$", parts[0]) and ".." not in parts and "\0" not in name
    check(
        sound and parts[-1] not in ("", "."),
        f"{where} has a member called {name!r}, which would be written outside of the target: this is not the official "
        "archive; fetch it again",
    )
    return parts[-1]


@dataclass(frozen=True)
class Samples:
    """One split of a data set.

    Args:
        root: folder that `names` (or `shards`) are relative to, here or in an object store.
        names: N file paths, or the names of members inside shards.
        labels: int64 [N], indices into the classes.
        shards: tar files relative to `root`; empty for single files.
        shard: int64 [N], index into `shards`.
        offset: int64 [N], byte offset of the image inside its shard.
        size: int64 [N], bytes of the image.
    """

    root: Place
    names: Names
    labels: IndexArray
    shards: tuple[str, ...] = ()
    shard: IndexArray | None = None
    offset: IndexArray | None = None
    size: IndexArray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with any name, label or order, but not with `root`."""
        digest = hashlib.sha256(self.names.blob)
        for array in (self.names.begins, self.names.ends, self.labels):
            digest.update(array.tobytes())
        digest.update("\n".join(self.shards).encode())
        for place in (self.shard, self.offset, self.size):
            digest.update(b"" if place is None else place.tobytes())
        return digest.hexdigest()[:16]

    def subset(self, indices: IndexArray) -> Samples:
        """The samples at `indices`, int64 [M], in that order."""
        names = Names(self.names.blob, self.names.begins[indices], self.names.ends[indices])
        shard, offset, size = (None if place is None else place[indices] for place in (self.shard, self.offset, self.size))
        return dataclasses.replace(self, names=names, labels=self.labels[indices], shard=shard, offset=offset, size=size)

    def place(self, index: int) -> str:
        """Where sample `index` lies, for messages: its path, or the member and its shard."""
        if self.shard is None:
            return str(self.root / self.names[index])
        return f"{self.names[index]} in shard {self.root / self.shards[int(self.shard[index])]}"

    def stored_size(self, index: int) -> int | None:
        """Bytes of the file that sample `index` lies in; None: there is none."""
        name = self.names[index] if self.shard is None else self.shards[int(self.shard[index])]
        try:
            path = self.root / name
            return path.size() if isinstance(path, RemotePath) else path.stat().st_size
        except OSError:
            return None

    def read(self, index: int, *, fresh: bool = False) -> bytes:
        """The encoded bytes of sample `index`.

        Args:
            index: the sample.
            fresh: read from storage, not from the system's cache. Pages that another process maps stay in the cache.

        Raises:
            OSError: the file is missing or cannot be read.
        """
        if self.shard is None:
            path, offset, size = self.root / self.names[index], 0, -1
        else:
            assert self.offset is not None and self.size is not None
            path = self.root / self.shards[int(self.shard[index])]
            offset, size = int(self.offset[index]), int(self.size[index])
        if isinstance(path, RemotePath):
            return path.read(offset, size)
        with path.open("rb") as file:
            if fresh:
                with suppress(OSError):  # a file system may not know the request
                    os.posix_fadvise(file.fileno(), offset, max(0, size), os.POSIX_FADV_DONTNEED)
            file.seek(offset)
            return file.read(size)

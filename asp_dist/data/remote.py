"""Data sets in an object store: paths there, images fetched ahead of DALI, and a copy of them on the node's own disk."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from asp_dist.errors import UserError
from asp_dist.files import WAITS_S, retry, write_bytes
from asp_dist.object_store import open_storage

if TYPE_CHECKING:
    from asp_dist.data.samples import IndexArray, Samples

T = TypeVar("T")
log = logging.getLogger(__name__)
READERS = 16  # threads that fetch images: a store answers late, and many at a time
AHEAD = 3  # batches that are fetched before DALI asks for them
# Answers of S3 that another attempt would get again.
REFUSED = re.compile(
    r"AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|"
    r"UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|INVALID_SIGNATURE)"
)
JOURNAL = "journal"  # begins the names of the cache's lists of its files


@functools.lru_cache(maxsize=8)
def _opened(scheme_and_host: str, options: str, process: int) -> tuple[Any, str]:
    """The file system of addresses that begin so; one for each process, as its threads do not survive a fork."""
    return open_storage(f"{scheme_and_host}{'?' if options else ''}{options}", "data.root")


class RemotePath:
    """A path in an object store, with what this package uses of `pathlib.Path`; a store that fails is asked again.

    Args:
        address: such as ``s3://bucket/folder``, or any that pyarrow or fsspec knows; options after a ``?`` stay with it.
    """

    def __init__(self, address: str) -> None:
        path, _, self._options = address.partition("?")
        self.address = path.rstrip("/")

    def __truediv__(self, name: str) -> RemotePath:
        scheme, _, path = f"{self.address}/{name}".partition("://")
        path = os.path.normpath(path) if ".." in name else path
        return RemotePath(f"{scheme}://{path}?{self._options}")

    def __str__(self) -> str:
        return self.address

    def __repr__(self) -> str:
        return f"RemotePath({self.address!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (self.address, self._options) == (other.address, other._options)

    def __hash__(self) -> int:
        return hash(self.address)

    @property
    def full(self) -> str:
        """The address with its options."""
        return f"{self.address}?{self._options}" if self._options else self.address

    @property
    def name(self) -> str:
        """The last part."""
        return self.address.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The path without the last part."""
        return RemotePath(f"{self.address.rpartition('/')[0]}?{self._options}")

    def _place(self) -> tuple[Any, str]:
        scheme, _, rest = self.address.partition("://")
        bucket, _, key = rest.partition("/")
        system, root = _opened(f"{scheme}://{bucket}", self._options, os.getpid())
        return system, f"{root}/{key}".rstrip("/")

    def _again(self, work: Callable[[Any, str], T]) -> T:
        system, path = self._place()

        def attempt() -> T:
            try:
                return work(system, path)
            except OSError as error:
                refused = REFUSED.search(str(error))
                if refused is None:
                    raise
                raise UserError(
                    f"data: the store refuses {self.address} ({refused[1]}): check the bucket's name, and the keys and the "
                    "endpoint in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...)"
                ) from error

        return retry(attempt, WAITS_S, self.address)

    def _kind(self) -> str:
        return str(self._again(lambda system, path: system.get_file_info(path)).type.name)

    def is_dir(self) -> bool:
        """Whether some file's name begins so."""
        return self._kind() == "Directory"

    def is_file(self) -> bool:
        """Whether there is a file of that name."""
        return self._kind() == "File"

    def size(self) -> int | None:
        """Bytes of the file; None: there is none."""
        found = self._again(lambda system, path: system.get_file_info(path))
        return found.size if found.is_file else None

    def stamps(self, names: tuple[str, ...]) -> list[tuple[int, int]]:
        """Size in bytes and time of the last change in ns of each of these files below."""

        def look(system: Any, path: str) -> list[tuple[int, int]]:
            return [(info.size, info.mtime_ns) for info in system.get_file_info([f"{path}/{name}" for name in names])]

        return self._again(look)

    def names(self, *, deep: bool = False) -> list[str]:
        """Names of the files below, sorted; with `deep`, of those in folders too, as paths from here."""
        from pyarrow import fs

        def look(system: Any, path: str) -> list[str]:
            found = system.get_file_info(fs.FileSelector(path, recursive=deep, allow_not_found=True))
            return sorted(info.path[len(path) + 1 :] for info in found if info.is_file)

        return self._again(look)

    def read(self, offset: int = 0, size: int = -1) -> bytes:
        """The file's bytes, or `size` of them from `offset` on. Raises OSError where it is missing or cannot be read."""

        def read(system: Any, path: str) -> bytes:
            with system.open_input_file(path) as file:
                return bytes(file.read_at(size, offset)) if size >= 0 else bytes(file.read())

        return self._again(read)

    def read_bytes(self) -> bytes:
        """The file's bytes."""
        return self.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """The file as text."""
        return self.read().decode(encoding)

    def open(self, mode: str = "rb") -> IO[bytes]:
        """The file for reading at any place, or ``wb`` for writing."""
        if mode == "rb":
            return cast(IO[bytes], self._again(lambda system, path: system.open_input_file(path)))
        assert mode == "wb", mode
        return cast(IO[bytes], self._again(lambda system, path: system.open_output_stream(path)))

    def write_bytes(self, data: bytes) -> None:
        """Write the file, whole or not at all."""

        def write(system: Any, path: str) -> None:
            with system.open_output_stream(path) as file:
                file.write(data)

        self._again(write)

    def upload(self, file: Path) -> None:
        """Write the file from one of this machine, piece by piece."""

        def write(system: Any, path: str) -> None:
            with file.open("rb") as source, system.open_output_stream(path) as target:
                shutil.copyfileobj(source, target, 1 << 24)

        self._again(write)


Place = Path | RemotePath


def place_of_data(root: str | Path) -> Place:
    """Where a data set lies."""
    return RemotePath(str(root)) if "://" in str(root) else Path(root)


class Cache:
    """Images of a split on the node's own disk, each with its checksum; shared by the processes of the node.

    Args:
        folder: the cache, of any data sets and runs.
        samples: the split.
        limit: bytes that it may take up in all, for this process's share of what is still free; None: no limit.
        writer: a name of this process's own among those that write.
        writers: how many there are.
    """

    def __init__(self, folder: Path, samples: Samples, limit: float | None, *, writer: str, writers: int) -> None:
        self.folder = folder / samples.fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[int, tuple[int, int]] = {}
        self._journal = self.folder / f"{JOURNAL}-{writer}"
        taken = sum(size for path in folder.glob(f"*/{JOURNAL}-*") for size, _ in _entries(path).values())
        self.room = float("inf") if limit is None else max(0.0, limit - taken) / writers
        self._full = False
        self.refresh()

    def refresh(self) -> None:
        """Learn what other processes have added."""
        for path in self.folder.glob(f"{JOURNAL}-*"):
            self._known.update(_entries(path))

    def _path(self, index: int) -> Path:
        return self.folder / f"{index // 1000:06d}" / f"{index:09d}"

    def get(self, index: int) -> bytes | None:
        """The image, or None: it is not here, or not what was written."""
        known = self._known.get(index)
        if known is None:
            return None
        try:
            data = self._path(index).read_bytes()
        except OSError:
            return None
        return data if (len(data), zlib.crc32(data)) == known else None

    def put(self, index: int, data: bytes) -> None:
        """Keep an image, if there is room; a disk that is full or fails ends the filling, not the training."""
        if self._full or index in self._known:
            return
        if len(data) > self.room:
            self._full = True
            log.info("the cache %s is full: the other images are read from the store", self.folder)
            return
        path = self._path(index)
        entry = (len(data), zlib.crc32(data))
        try:
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, data, durable=False)
            with self._journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps([index, *entry]) + "\n")
        except OSError as error:
            self._full = True
            log.warning("the cache %s takes no more (%s): the other images are read from the store", self.folder, error)
            return
        self.room -= len(data)
        self._known[index] = entry

    def remove(self) -> None:
        """Delete the split's images."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _entries(journal: Path) -> dict[int, tuple[int, int]]:
    """What a journal lists: index -> size and checksum; a line cut by a kill is passed over."""
    found = {}
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            index, size, crc = json.loads(line)
        except ValueError:
            continue
        found[index] = (size, crc)
    return found


class Fetcher:
    """Encoded images of one rank's part of an epoch, batch by batch, fetched ahead by threads; a source for DALI.

    Args:
        samples: the split.
        part: int64 [M], the samples in their order.
        batch: images per batch; the last one is filled up with its last image.
        cache: the node's copy; None: every image is read from the store.
    """

    def __init__(self, samples: Samples, part: IndexArray, batch: int, cache: Cache | None) -> None:
        self.samples, self.part, self.batch, self.cache = samples, part, batch, cache
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[int, Future[bytes]]] = deque()
        self._next = 0

    def __call__(self, info: Any) -> tuple[list[np.ndarray], np.ndarray]:
        """The batch number ``info.iteration``: uint8 [bytes] each, and their positions, int32 [B, 1]."""
        first = info.iteration * self.batch
        if first >= len(self.part):
            raise StopIteration
        if self._pool is None:
            self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="fetch")
        if not self._waiting or self._waiting[0][0] != first:  # the first call, or a restored pipeline's
            self._waiting.clear()
            self._next = first
        last = min(first + self.batch, len(self.part))
        ahead = min(first + (1 + AHEAD) * self.batch, len(self.part))
        while self._next < ahead:
            self._waiting.append((self._next, self._pool.submit(self._fetch, int(self.part[self._next]))))
            self._next += 1
        images = [np.frombuffer(self._waiting.popleft()[1].result(), dtype=np.uint8) for _ in range(first, last)]
        positions = np.arange(first, last, dtype=np.int32)
        missing = self.batch - len(images)
        images += images[-1:] * missing
        positions = np.concatenate([positions, np.repeat(positions[-1:], missing)])
        if last == len(self.part):
            self.close()
        return images, positions[:, None]

    def _fetch(self, index: int) -> bytes:
        data = None if self.cache is None else self.cache.get(index)
        if data is None:
            data = self.samples.read(index)
            if self.cache is not None:
                self.cache.put(index, data)
        return data

    def close(self) -> None:
        """End the threads; images that are under way are given up."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        self._waiting.clear()

"""Checkpoints and results in an object store: S3, Google's, HDFS through pyarrow, and anything fsspec supports.

An object store has no rename, so a checkpoint exists once its manifest does, which is written last. A store that fails for
a while is asked again; training continues meanwhile, and the manager says in the record what could not be saved.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from asp_dist.checkpoint.folder_lock import LEASE_FILE
from asp_dist.checkpoint.storage import MANIFEST, NAME, spare_name, step_of
from asp_dist.files import WAITS_S, retry, write_bytes
from asp_dist.tracking.rows import last_step
from asp_dist.tracking.schema import METRICS_FILE

T = TypeVar("T")
log = logging.getLogger(__name__)


class RemoteStore:
    """Checkpoints in an object store; see `Store`.

    Args:
        address: the folder of the checkpoints, such as ``s3://bucket/runs/name/checkpoints``.
        system: a pyarrow file system.
        path: the folder's path in it.
        waits: seconds between attempts to read or list while the store fails.
    """

    def __init__(self, address: str, system: Any, path: str, waits: tuple[float, ...] = WAITS_S) -> None:
        self.address = address.split("?")[0]
        self.system = system
        self.path = path
        self.waits = waits

    def names(self) -> list[str]:
        return sorted((name for name, complete in self._folders().items() if complete), key=step_of)

    def begin(self, name: str) -> None:
        self.remove(name)

    def write(self, name: str, file: str) -> IO[bytes]:
        self.system.create_dir(f"{self.path}/{name}", recursive=True)
        return cast(IO[bytes], self.system.open_output_stream(f"{self.path}/{name}/{file}"))

    def commit(self, name: str) -> None:
        """The manifest, written last, has done it."""

    def abort(self, name: str) -> None:
        try:
            self.remove(name)
        except OSError as error:
            log.warning("what was written of %s stays: %s", self.where(name), error)

    def read(self, name: str, file: str) -> bytes:
        return self._again(lambda: self._read(f"{self.path}/{name}/{file}"))

    def remove(self, name: str) -> None:
        folder = f"{self.path}/{name}"
        infos = self.system.get_file_info([f"{folder}/{MANIFEST}", folder])
        if infos[0].is_file:
            self.system.delete_file(f"{folder}/{MANIFEST}")
        if infos[1].type.name == "Directory":
            self.system.delete_dir(folder)

    def set_aside(self, name: str) -> str:
        """Copies, then deletes: an object store renames nothing."""
        from pyarrow import fs

        def taken(candidate: str) -> bool:
            return bool(self.system.get_file_info(fs.FileSelector(f"{self.path}/{candidate}", allow_not_found=True)))

        new = spare_name(name, taken)
        self.system.create_dir(f"{self.path}/{new}", recursive=True)
        for info in self.system.get_file_info(fs.FileSelector(f"{self.path}/{name}")):
            if info.is_file:
                self.system.copy_file(info.path, f"{self.path}/{new}/{info.base_name}")
        self.remove(name)
        return new

    def where(self, name: str) -> str:
        return f"{self.address}/{name}"

    def clean(self) -> None:
        for name, complete in self._folders().items():
            if not complete:
                self.abort(name)

    def _read(self, path: str) -> bytes:
        with self.system.open_input_stream(path) as stream:
            return bytes(stream.read())

    def _folders(self) -> dict[str, bool]:
        """Name -> whether its manifest is there."""
        from pyarrow import fs

        selector = fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        found: dict[str, bool] = {}
        for info in self._again(lambda: self.system.get_file_info(selector)):
            parts = info.path.removeprefix(self.path).strip("/").split("/")
            if NAME.fullmatch(parts[0]):
                found[parts[0]] = found.get(parts[0], False) or parts[1:] == [MANIFEST]
        return found

    def _again(self, work: Callable[[], T]) -> T:
        return retry(work, self.waits, self.address)


class StoredLease:
    """The lease of a run in an object store: see `hold_lease`.

    Args:
        address: the run's address, for people.
        system: a pyarrow file system.
        path: the run's path in it.
    """

    # A write costs money here, and may be late.
    beat_s, silence_s = 20.0, 100.0

    def __init__(self, address: str, system: Any, path: str) -> None:
        self.where, self._system, self._path = address, system, f"{path}/{LEASE_FILE}"

    def read(self) -> str:
        if not self._system.get_file_info(self._path).is_file:
            return ""
        with self._system.open_input_stream(self._path) as stream:
            return bytes(stream.read()).decode(errors="replace")

    def write(self, text: str) -> None:
        self._system.create_dir(self._path.rpartition("/")[0], recursive=True)
        with self._system.open_output_stream(self._path) as stream:
            stream.write(text.encode())

    def remove(self) -> None:
        self._system.delete_file(self._path)


class Mirror:
    """Copies of a run's small files next to its checkpoints in the object store.

    Args:
        system: a pyarrow file system.
        path: the run's path in it.
        folder: the run's folder here.
    """

    def __init__(self, system: Any, path: str, folder: Path) -> None:
        self.system = system
        self.path = path
        self.folder = folder

    def send(self, names: tuple[str, ...]) -> None:
        """Copy files of the folder, those that are there, to the store. Raises OSError if it does not answer."""
        self.system.create_dir(self.path, recursive=True)
        for name in names:
            file = self.folder / name
            if file.is_file():
                with self.system.open_output_stream(f"{self.path}/{name}") as stream:
                    stream.write(file.read_bytes())

    def lacks(self, names: tuple[str, ...]) -> bool:
        """Whether the store lacks one of these files of the folder. Raises OSError if it does not answer."""
        here = [name for name in names if (self.folder / name).is_file()]
        return not all(self.system.get_file_info(f"{self.path}/{name}").is_file for name in here)

    def fetch(self, names: tuple[str, ...]) -> list[str]:
        """Copy the record to the folder where it lacks it or is behind; returns the names of the files that were copied.

        A machine to which a run comes back has the record as it left it. Its files are kept, under names that end in
        ``.stale``.

        Args:
            names: the files of the record, the longest-lived last; `METRICS_FILE` among them says how far it goes.
        """
        stored = [name for name in names if self.system.get_file_info(f"{self.path}/{name}").is_file]
        ours = self.folder / METRICS_FILE
        behind = METRICS_FILE in stored and last_step(self._read(METRICS_FILE)) > last_step(
            ours.read_bytes() if ours.exists() else b""
        )
        fetched = []
        for name in stored:
            path = self.folder / name
            if path.exists() and not behind:
                continue
            data = self._read(name)
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_bytes() != data:
                os.replace(path, _unused(path.with_name(f"{name}.stale")))
            write_bytes(path, data)
            fetched.append(name)
        return fetched

    def read(self, name: str) -> bytes | None:
        """A file of the record in the store; None if it has none."""
        return self._read(name) if self.system.get_file_info(f"{self.path}/{name}").is_file else None

    def _read(self, name: str) -> bytes:
        with self.system.open_input_stream(f"{self.path}/{name}") as stream:
            return bytes(stream.read())


def _unused(path: Path) -> Path:
    """`path`, or the first ``path.N`` that does not exist."""
    candidates = (path, *(path.with_name(f"{path.name}.{n}") for n in range(2, 10_000)))
    return next(candidate for candidate in candidates if not candidate.exists())

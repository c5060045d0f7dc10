"""CIFAR-10 and CIFAR-100 from torchvision's format (the "python version") to an image folder."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np

from asp_dist.data.samples import plain_name
from asp_dist.errors import UserError
from asp_dist.files import replacing

URL = "https://www.cs.toronto.edu/~kriz/"
# data set: (archive, folder, training batches, validation batch, key of the labels, file and key of the names)
LAYOUTS: dict[str, tuple[str, str, tuple[str, ...], str, bytes, tuple[str, bytes]]] = {
    "cifar10": (
        "cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        b"labels",
        ("batches.meta", b"label_names"),
    ),
    "cifar100": (
        "cifar-100-python.tar.gz",
        "cifar-100-python",
        ("train",),
        "test",
        b"fine_labels",
        ("meta", b"fine_label_names"),
    ),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, lists and bytes, and nothing that could run code."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self.ALLOWED and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR file")


def _read(file: IO[bytes]) -> dict[bytes, Any]:
    content: dict[bytes, Any] = _ArrayUnpickler(file, encoding="bytes").load()
    return content


def read_source(dataset: str, source: Path) -> dict[str, dict[bytes, Any]]:
    """The batches of `dataset` by file name, from the archive or the extracted folder in `source` (or either itself).

    Raises:
        UserError: neither is there, or a file is broken.
    """
    archive, folder, train, val, _, (meta, _) = LAYOUTS[dataset]
    wanted = (*train, val, meta)
    candidates = [source, source / folder, source / archive]
    try:
        for place in candidates:
            if place.is_dir() and (place / meta).is_file():
                return {name: _read(io.BytesIO((place / name).read_bytes())) for name in wanted}
            if place.is_file():
                with tarfile.open(place) as tar:
                    return {name: _read(tar.extractfile(f"{folder}/{name}")) for name in wanted}  # type: ignore[arg-type]
    except (OSError, KeyError, tarfile.TarError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"--source {place}: cannot be read as {dataset} ({error}): fetch {URL}{archive} again") from error
    raise UserError(f"--source {source}: contains neither {archive} nor {folder}/: download {URL}{archive} into it")


def prepare_cifar(
    dataset: str,
    target: Path,
    source: Path,
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write ``train/CLASS/NNNNN.png`` and ``val/CLASS/NNNNN.png`` under `target`; existing files are kept.

    Args:
        dataset: ``cifar10`` or ``cifar100``.
        target: folder of the data set.
        source: where the archive or the extracted folder is.
        progress: opens a progress bar: title and total to ``advance``.

    Returns:
        Class ids (also the folders' names) and their names.

    Raises:
        UserError: as `read_source`.
    """
    _, _, train, val, label_key, (meta, name_key) = LAYOUTS[dataset]
    batches = read_source(dataset, source)
    names = tuple(plain_name(name.decode(), meta) for name in batches[meta][name_key])
    total = sum(len(batches[name][label_key]) for name in (*train, val))
    with progress(f"Writing {dataset}", total) as advance:
        for split, files in (("train", train), ("val", (val,))):
            for name in names:
                (target / split / name).mkdir(parents=True, exist_ok=True)
            number = 0
            for file in files:
                pixels = np.asarray(batches[file][b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                for image, label in zip(pixels, batches[file][label_key]):
                    _write(image, target / split / names[label] / f"{number:05d}.png")
                    number += 1
                    advance(1)
    return names, names


def _write(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    if path.exists():
        return
    with replacing(path, durable=False) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")

"""`asp-dist prepare`: data sets from where they come, as folders, manifests or shards. All of it can be resumed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from asp_dist.config import DataConfig
from asp_dist.data.formats.manifest import write_classes, write_manifest
from asp_dist.data.formats.shards import write_shards
from asp_dist.data.info import DataInfo, inspect_data, open_data_set
from asp_dist.data.prepare.cifar import LAYOUTS, prepare_cifar
from asp_dist.data.prepare.digits import prepare_digits
from asp_dist.data.prepare.imagenet import open_archives
from asp_dist.data.prepare.progress import progress_bar
from asp_dist.data.samples import Samples
from asp_dist.errors import UserError, check
from asp_dist.files import write_bytes

Target = Literal["digits", "cifar10", "cifar100", "imagenet", "manifest", "shards"]
Layout = Literal["folder", "shards"]


def prepare(
    dataset: Target,
    target: str | Path,
    *,
    source: str | Path | None = None,
    layout: Layout = "folder",
    per_shard: int = 5000,
    progress: bool = True,
) -> DataInfo:
    """Write a data set to `target`, or finish what an interrupted call began; returns its contents.

    Args:
        dataset: ``digits`` (embedded), ``cifar10`` and ``cifar100`` (from torchvision's files in `source`), ``imagenet``
            (from the three official archives in `source`), ``manifest`` (of the image folder `source`, into `target`;
            without `source`, next to the images of `target`), ``shards`` (of the data set `source`).
        target: folder to write to.
        source: where the data comes from.
        layout: ``folder`` or ``shards``, for ``imagenet``.
        per_shard: images per shard.
        progress: show a progress bar.

    Raises:
        UserError: no or a wrong `source`; a `target` that contains something else.
    """
    target = Path(target)
    bar = functools.partial(progress_bar, enabled=progress)
    if dataset == "digits":
        prepare_digits(target)
    elif dataset == "manifest":
        _prepare_manifest(Path(source) if source is not None else target, target)
    elif source is None:
        raise UserError(f"prepare {dataset} needs --source FOLDER, where the data comes from")
    elif not Path(source).exists():
        raise UserError(f"--source {source}: there is no such file or folder")
    elif (target / "classes.tsv").is_file():
        pass  # complete: it is written last
    elif dataset in LAYOUTS:
        write_classes(target, *prepare_cifar(dataset, target, Path(source), bar))
    elif dataset == "imagenet":
        archives = open_archives(Path(source))
        splits = {"train": archives.train, "val": archives.val}
        with bar("Writing ImageNet", len(archives.train) + len(archives.val)) as advance:
            for split, samples in splits.items():
                if layout == "shards":
                    write_shards(samples, target, split, per_shard=per_shard, advance=advance)
                else:
                    write_folder(samples, target / split, advance)
        write_classes(target, archives.synsets, archives.names)
    else:
        check(dataset == "shards", f"prepare {dataset}: there is no such data set")
        opened = open_data_set(DataConfig(root=str(source)))
        with bar("Writing shards", opened.info.num_train + opened.info.num_val) as advance:
            for split, samples in (("train", opened.train), ("val", opened.val)):
                write_shards(samples, target, split, per_shard=per_shard, advance=advance)
        write_classes(target, opened.info.classes, opened.info.names)
    return inspect_data(DataConfig(root=str(target)))


def _prepare_manifest(source: Path, target: Path) -> None:
    opened = open_data_set(DataConfig(root=str(source), format="folder"))
    target.mkdir(parents=True, exist_ok=True)
    for split, samples in (("train", opened.train), ("val", opened.val)):
        write_manifest(samples, target / f"{split}.tsv")
    write_classes(target, opened.info.classes, opened.info.names)


def write_folder(samples: Samples, folder: Path, advance: Callable[[int], None]) -> None:
    """Write every sample under its own name; existing files of the right size are kept.

    Args:
        samples: samples from inside archives, named ``CLASS/FILE``.
        folder: the split's folder.
        advance: called with the number of images done.
    """
    assert samples.size is not None
    for name in {os.path.dirname(name) for name in samples.names}:
        (folder / name).mkdir(parents=True, exist_ok=True)

    def write(index: int) -> None:
        path = folder / samples.names[index]
        assert samples.size is not None
        if not path.exists() or path.stat().st_size != samples.size[index]:
            write_bytes(path, samples.read(index), durable=False)
        advance(1)

    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(samples), 4096):
            list(pool.map(write, range(start, min(start + 4096, len(samples)))))

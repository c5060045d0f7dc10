"""`asp-dist prepare`: data sets from where they come, as folders, manifests or shards. All of it can be resumed."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal

from asp_dist.config import DataConfig
from asp_dist.data.formats.folder import scan_folder, scan_store
from asp_dist.data.formats.manifest import CLASSES, write_classes, write_manifest
from asp_dist.data.formats.shards import write_shards
from asp_dist.data.info import PREPARED, DataInfo, class_names, inspect_data, open_data_set
from asp_dist.data.prepare.cifar import LAYOUTS, prepare_cifar
from asp_dist.data.prepare.digits import prepare_digits
from asp_dist.data.prepare.imagenet import check_sums, open_archives
from asp_dist.data.prepare.progress import progress_bar
from asp_dist.data.remote import Place, RemotePath, place_of_data
from asp_dist.data.samples import Samples
from asp_dist.errors import UserError, check
from asp_dist.files import write_bytes, write_text

Target = Literal["digits", "cifar10", "cifar100", "imagenet", "manifest", "shards"]
Layout = Literal["folder", "shards"]
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # title and total to ``advance``


def prepare(
    dataset: Target,
    target: str | Path,
    *,
    source: str | Path | None = None,
    layout: Layout = "folder",
    per_shard: int = 5000,
    allow_incomplete: bool = False,
    checksums: bool = False,
    work: str | Path | None = None,
    progress: bool = True,
) -> DataInfo:
    """Write a data set to `target`, or finish what an interrupted call began; returns its contents.

    What is written, and from what, is kept in ``.prepare.json``: another data set or other shards never get in between.

    Args:
        dataset: ``digits`` (embedded), ``cifar10`` and ``cifar100`` (from torchvision's files in `source`), ``imagenet``
            (from the three official archives in `source`), ``manifest`` (of the image folder `source`, into `target`;
            without `source`, next to the images of `target`), ``shards`` (of the data set `source`).
        target: folder to write to; or a place in an object store, which a folder of this machine is uploaded to.
        source: where the data comes from.
        layout: ``folder`` or ``shards``, for ``imagenet``.
        per_shard: images per shard.
        allow_incomplete: accept archives of ``imagenet`` with fewer images than it has.
        checksums: compare these archives with their published sums first.
        work: that folder; it stays, and an interrupted upload goes on from it. None: a temporary one.
        progress: show a progress bar.

    Raises:
        UserError: no, a wrong or an incomplete `source`; a `target` that contains something else.
    """
    check(per_shard >= 1, f"--per-shard {per_shard}: give at least one image per shard")
    bar = functools.partial(progress_bar, enabled=progress)
    there = place_of_data(target)
    if dataset == "manifest" and (isinstance(there, RemotePath) or "://" in str(source or "")):
        return _prepare_manifest_in_store(place_of_data(source or target), there)
    if isinstance(there, RemotePath):
        options: dict[str, Any] = {"source": source, "layout": layout, "per_shard": per_shard}
        checks = {"allow_incomplete": allow_incomplete, "checksums": checksums}
        return _prepare_in_store(dataset, there, {**options, **checks}, work, bar)
    target = there
    if dataset == "digits":
        prepare_digits(target)
    elif dataset == "manifest":
        _prepare_manifest(Path(source) if source is not None else target, target)
    elif source is None:
        raise UserError(f"prepare {dataset} needs --source FOLDER, where the data comes from")
    elif not Path(source).exists():
        raise UserError(f"--source {source}: there is no such file or folder")
    else:
        return _prepare_from(dataset, target, Path(source), layout, per_shard, allow_incomplete, checksums, bar)
    return inspect_data(DataConfig(root=str(target)))


def _prepare_in_store(
    dataset: Target, target: RemotePath, options: dict[str, Any], work: str | Path | None, bar: Bar
) -> DataInfo:
    """Write the data set to a folder of this machine, and from there to an object store; files that are there are kept."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asp-dist-")) if work is None else work)
        prepare(dataset, folder / "data", **options)
        files = [path.relative_to(folder / "data") for path in sorted((folder / "data").rglob("*")) if path.is_file()]
        files = [file for file in files if file.name not in (PREPARED, CLASSES)]
        if not any(file.name.endswith((".tsv", ".tar")) for file in files):  # class folders are not walked in a store
            prepare("manifest", folder / "data")
            files += [Path("train.tsv"), Path("val.tsv")]
        with bar(f"Uploading to {target}", len(files)) as advance:

            def upload(file: Path) -> None:
                source, place = folder / "data" / file, target / file.as_posix()
                if place.size() != source.stat().st_size:
                    place.upload(source)
                advance(1)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(upload, files))
        (target / CLASSES).upload(folder / "data" / CLASSES)  # last: it marks the data set as complete
    return inspect_data(DataConfig(root=target.full))


def _prepare_manifest_in_store(source: Place, target: Place) -> DataInfo:
    check(
        isinstance(source, RemotePath) and isinstance(target, RemotePath),
        f"prepare manifest: {source} and {target} must be in one store, or both be folders of this machine",
    )
    assert isinstance(source, RemotePath) and isinstance(target, RemotePath)
    classes = tuple(sorted({name.partition("/")[0] for name in (source / "train").names(deep=True) if "/" in name}))
    for split in ("train", "val"):
        write_manifest(scan_store(source, split, classes), target / f"{split}.tsv")
    write_classes(target, classes, class_names(source, classes))
    return inspect_data(DataConfig(root=target.full))


def _prepare_from(
    dataset: Target,
    target: Path,
    source: Path,
    layout: Layout,
    per_shard: int,
    allow_incomplete: bool,
    checksums: bool,
    bar: Bar,
) -> DataInfo:
    """Write, or go on writing, what comes from `source`; returns its contents."""
    sharded = dataset == "shards" or (dataset == "imagenet" and layout == "shards")
    wanted = {"dataset": dataset, "layout": "shards" if sharded else "folder", "per_shard": per_shard if sharded else None}
    _check_record(target, wanted)
    if (target / CLASSES).is_file():  # complete: it is written last
        return inspect_data(DataConfig(root=str(target)))
    if dataset in LAYOUTS:

        def begin(title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
            _keep_record(target, wanted)
            return bar(title, total)

        write_classes(target, *prepare_cifar(dataset, target, source, begin))
        return inspect_data(DataConfig(root=str(target)))
    if dataset == "imagenet":
        if checksums:
            check_sums(source)
        archives = open_archives(source, allow_incomplete=allow_incomplete)
        splits, classes, names = {"train": archives.train, "val": archives.val}, archives.synsets, archives.names
    else:
        opened = open_data_set(DataConfig(root=str(source)))
        splits, classes, names = {"train": opened.train, "val": opened.val}, opened.info.classes, opened.info.names
    _keep_record(target, {**wanted, "source": {split: samples.fingerprint for split, samples in splits.items()}})
    with bar(f"Writing {dataset}", sum(map(len, splits.values()))) as advance:
        for split, samples in splits.items():
            if sharded:
                write_shards(samples, target, split, per_shard=per_shard, advance=advance)
            else:
                write_folder(samples, target / split, advance)
    if dataset == "imagenet" and not sharded:
        for split in splits:  # a start would walk 1,000 folders otherwise
            write_manifest(scan_folder(target, split, classes), target / f"{split}.tsv")
    write_classes(target, classes, names)
    info = inspect_data(DataConfig(root=str(target)))
    counts = {"train": info.num_train, "val": info.num_val}
    for split, samples in splits.items():
        if counts[split] != len(samples):
            (target / CLASSES).unlink()
            raise UserError(
                f"{target} has {counts[split]:,} images in {split} now, and {source} has {len(samples):,}: something else had "
                "been written there before. Remove it, or give another --target"
            )
    return info


def _keep_record(target: Path, wanted: dict[str, Any]) -> None:
    """Begin to write `wanted`, or go on: see `_check_record`."""
    _check_record(target, wanted)
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / PREPARED, json.dumps(wanted, indent=1))


def _check_record(target: Path, wanted: dict[str, Any]) -> None:
    """Raise `UserError` if another call of `prepare` wrote to `target`, with the first thing that differs."""
    try:
        known: dict[str, Any] = json.loads((target / PREPARED).read_text())
        different = next((name for name in wanted if name in known and known[name] != wanted[name]), None)
    except FileNotFoundError:
        return
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{target / PREPARED} cannot be read ({error}): remove {target}, or give another --target") from error
    if different is not None:
        what = "images of another source" if different == "source" else f"{different} = {known[different]}"
        instead = "" if different == "source" else f" instead of {wanted[different]}"
        raise UserError(
            f"{target} was prepared with {what}{instead}: go on with that, remove the folder, or give another --target"
        )


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

"""``asp-dist prepare`` and ``verify``: data sets before training."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser

DATA_SETS = Literal["digits", "cifar10", "cifar100", "imagenet", "manifest", "shards"]


def add_prepare_arguments(parser: ArgumentParser) -> None:
    """Options of ``prepare``."""
    parser.add_argument(
        "dataset",
        type=DATA_SETS,
        help="digits (embedded); cifar10, cifar100 (torchvision's files); imagenet (the official archives); manifest or "
        "shards (of a data set that is there).",
    )
    parser.add_argument("--source", type=str | None, default=None, help="where the data comes from.")
    parser.add_argument("--target", type=str | None, default=None, help="folder to write; default: data/DATASET.")
    parser.add_argument("--layout", type=Literal["folder", "shards"], default="folder", help="layout, for imagenet.")
    parser.add_argument("--per_shard", type=int, default=5000, help="images per shard.")
    parser.add_argument("--quiet", action="store_true", help="show no progress.")


def prepare(
    dataset: Any,
    *,
    source: str | None = None,
    target: str | None = None,
    layout: Any = "folder",
    per_shard: int = 5000,
    quiet: bool = False,
) -> int:
    """Write a data set in the form that training reads, or go on where an interrupted call stopped."""
    from asp_dist.data.preparation import prepare as prepare_data

    folder = target or (source if dataset == "manifest" and source else f"data/{dataset}")
    info = prepare_data(dataset, folder, source=source, layout=layout, per_shard=per_shard, progress=not quiet)
    print(
        f"{folder}: {info.num_train:,} training and {info.num_val:,} validation images, {len(info.classes)} classes, "
        f"as {info.format}"
    )
    return 0


def add_verify_arguments(parser: ArgumentParser) -> None:
    """Options of ``verify``."""
    parser.add_argument("data", type=str, help="the data set: folder, manifest or shards.")
    parser.add_argument("--train", type=str, default="train", help="name of the training split.")
    parser.add_argument("--val", type=str, default="val", help="name of the validation split.")
    parser.add_argument("--manifest", type=str | None, default=None, help="folder for manifests of the good files.")
    parser.add_argument("--keep", type=str, nargs="*", default=[], help="findings that stay in them, such as cmyk.")
    parser.add_argument("--threads", type=int | None, default=None, help="decoding threads; default: from the machine.")
    parser.add_argument("--quiet", action="store_true", help="show no progress.")


def verify(
    data: str,
    *,
    train: str = "train",
    val: str = "val",
    manifest: str | None = None,
    keep: list[Any] | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> int:
    """Decode every file and list what is wrong; 1 if anything is."""
    from asp_dist.data.verification import verify as verify_data

    found = verify_data(
        data,
        train=train,
        val=val,
        manifest=manifest,
        keep=tuple(keep or ()),
        threads=threads,
        progress=not quiet,
    )
    for finding in found.findings:
        print(f"{finding.kind:<14}{finding.place}  {finding.detail}")
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts().items() if count)
    print(f"{found.files:,} files: {counts or 'nothing wrong'}")
    if manifest is not None:
        print(f"manifests of the others: {manifest}; train with --data.root {manifest}")
    return 1 if found.findings else 0

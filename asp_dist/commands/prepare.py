"""``asp-dist prepare``: a data set in the form that training reads."""

from __future__ import annotations

from typing import Any, Literal

from jsonargparse import ArgumentParser

DATA_SETS = Literal["digits", "cifar10", "cifar100", "imagenet", "manifest", "shards"]


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``prepare``."""
    parser.add_argument(
        "dataset",
        type=DATA_SETS,
        help="digits (built in); cifar10, cifar100 (torchvision's files); imagenet (the official archives); manifest or "
        "shards (of an existing data set).",
    )
    parser.add_argument("--source", type=str | None, default=None, help="where the data comes from.")
    parser.add_argument(
        "--target", type=str | None, default=None, help="folder to write, or s3://BUCKET/PATH; default: data/DATASET."
    )
    parser.add_argument("--layout", type=Literal["folder", "shards"], default="folder", help="layout of imagenet.")
    parser.add_argument("--per-shard", type=int, default=5000, help="images per shard.")
    parser.add_argument("--allow-incomplete", action="store_true", help="accept imagenet archives with fewer images.")
    parser.add_argument("--checksums", action="store_true", help="check imagenet's archives (156 GB) by their MD5 sums.")
    parser.add_argument("--work", type=str | None, default=None, help="folder to write first, for a target in an object store.")
    parser.add_argument("--quiet", action="store_true", help="show no progress.")


def run(
    dataset: Any,
    *,
    source: str | None = None,
    target: str | None = None,
    layout: Any = "folder",
    per_shard: int = 5000,
    allow_incomplete: bool = False,
    checksums: bool = False,
    work: str | None = None,
    quiet: bool = False,
) -> int:
    """Write a data set in the form that training reads, or resume an interrupted call."""
    from asp_dist.data.prepare.preparation import prepare

    folder = target or (source if dataset == "manifest" and source else f"data/{dataset}")
    info = prepare(
        dataset,
        folder,
        source=source,
        layout=layout,
        per_shard=per_shard,
        allow_incomplete=allow_incomplete,
        checksums=checksums,
        work=work,
        progress=not quiet,
    )
    print(
        f"{folder}: {info.num_train:,} training and {info.num_val:,} validation images, {len(info.classes)} classes, "
        f"as {info.format}"
    )
    return 0

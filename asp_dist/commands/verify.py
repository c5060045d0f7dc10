"""``asp-dist verify``: corrupt files found before a training run finds them."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``verify``."""
    parser.add_argument("data", type=str, help="the data set: folder, manifest or shards.")
    parser.add_argument("--train", type=str, default="train", help="name of the training split.")
    parser.add_argument("--val", type=str, default="val", help="name of the validation split.")
    parser.add_argument("--manifest", type=str | None, default=None, help="folder for manifests of the files that decode.")
    parser.add_argument("--drop", type=str, nargs="*", default=[], help="left out of them too: cmyk, huge, duplicate.")
    parser.add_argument("--threads", type=int | None, default=None, help="decoding threads; default: all cores.")
    parser.add_argument("--quiet", action="store_true", help="show no progress.")


def run(
    data: str,
    *,
    train: str = "train",
    val: str = "val",
    manifest: str | None = None,
    drop: list[Any] | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> int:
    """Decode every file and list what is wrong, as it is found. Returns 1 if a file does not decode."""
    from asp_dist.data.prepare.verification import Finding, verify

    def show(finding: Finding) -> None:
        print(f"{finding.kind:<14}{finding.place}  {finding.detail}", flush=True)

    found = verify(
        data,
        train=train,
        val=val,
        manifest=manifest,
        drop=tuple(drop or ()),
        threads=threads,
        progress=not quiet,
        on_finding=show,
    )
    for note in found.notes:
        print(f"note: {note}")
    counts = ", ".join(f"{count} {kind}" for kind, count in found.counts().items() if count)
    print(f"{found.files:,} files: {counts or 'nothing wrong'}")
    if manifest is not None:
        print(f"manifests of the files that decode: {manifest}; train with --data.root {manifest}")
    return 1 if found.undecodable else 0

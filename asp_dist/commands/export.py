"""``asp-dist export`` and ``push``: a run's model for other programs, and for other people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

if TYPE_CHECKING:
    from asp_dist.export.export_run import Exported


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``export``."""
    parser.add_argument("run_dir", type=str, help="folder of a finished run, such as runs/quickstart.")
    formats = Literal["sparse", "onnx", "onnx-sparse", "mnn"]
    parser.add_argument("--format", type=formats, default="sparse", help="format of the file.")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: in the run's folder.")
    types = Literal["float32", "float16", "int8"]
    parser.add_argument("--weights", type=types, default="float32", help="type of the weights in the file, for sparse and mnn.")
    parser.add_argument("--images", type=int, default=1000, help="validation images at most to compare with torch on; 0: none.")


def run(
    run_dir: str, *, format: Any = "sparse", output: str | None = None, weights: Any = "float32", images: int = 1000
) -> int:
    """Write a run's model in another format, and compare it with torch where it will run."""
    from asp_dist.errors import check

    check(images >= 0, f"--images = {images} must not be negative")
    from asp_dist.export.export_run import export_run

    print_exported(export_run(Path(run_dir), format, Path(output) if output else None, weights=weights, images=images))
    return 0


def add_push_arguments(parser: ArgumentParser) -> None:
    """Options of ``push``."""
    parser.add_argument("run_dir", type=str, help="folder of a finished run, such as runs/quickstart.")
    parser.add_argument("--repo", type=str, required=True, metavar="USER/NAME", help="the repository; made if it is not there.")
    parser.add_argument("--private", action="store_true", help="make it a private one.")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, and send nothing.")
    parser.add_argument("--output", type=str | None, default=None, help="the folder; default: hub/ in the run's folder.")


def push(run_dir: str, *, repo: str, private: bool = False, dry_run: bool = False, output: str | None = None) -> int:
    """Write a run as a repository of the Hugging Face hub, and send it there."""
    import shutil

    from asp_dist.export import hub

    folder = Path(output) if output else Path(run_dir) / "hub"
    if output is None and folder.exists():
        shutil.rmtree(folder)  # an earlier one of this command's own
    files = hub.write_repository(Path(run_dir), folder, repo)
    for file in files:
        print(f"{file}  ({file.stat().st_size:,} bytes)")
    if not dry_run:
        print(hub.push(folder, repo, private=private))
    return 0


def print_exported(exported: Exported) -> None:
    """Print the file, its size beside the dense one's, and how it compares with torch."""
    share = exported.size / exported.dense_size
    print(
        f"{exported.file}  {exported.size:,} bytes, {share:.1%} of the dense network's {exported.dense_size:,} in this format"
    )
    found = exported.agreement
    if found is None:
        if exported.note:
            print(exported.note)
        return
    print(f"{found.runtime} against torch, {found.images} {'validation' if found.top1 is not None else 'random'} images:")
    print(f"  largest difference of a logit {found.difference:.1e} (logits reach {found.scale:.1f})")
    if found.top1 is not None:
        print(f"  top-1 {found.top1:.2%}, torch {found.torch_top1:.2%}; another first class in {found.differing} images")
    if found.note:
        print(f"  random ones, as {found.note}")

"""Preparing data sets from small archives in the official formats."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from asp_dist.config import DataConfig
from asp_dist.data.info import open_data_set
from asp_dist.data.prepare.imagenet import DEVKIT, META, TRAIN, TRUTH, VAL
from asp_dist.data.prepare.preparation import prepare
from asp_dist.errors import UserError


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def cifar_source(folder: Path, dataset: str, *, extracted: bool) -> np.ndarray:
    """A CIFAR archive of four images per batch, pickled by Python 2's protocol; returns the first training image."""
    pixels = np.random.default_rng(0).integers(0, 255, (4, 3072), dtype=np.uint8)
    if dataset == "cifar10":
        root, files = "cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        labels, meta = b"labels", ("batches.meta", {b"label_names": [b"cat", b"dog"]})
    else:
        root, files = "cifar-100-python", ["train", "test"]
        labels, meta = b"fine_labels", ("meta", {b"fine_label_names": [b"cat", b"dog"]})
    contents: dict[str, Any] = {name: {b"data": pixels, labels: [0, 1, 1, 0]} for name in files}
    contents[meta[0]] = meta[1]
    archive = folder / {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[dataset]
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            add(tar, f"{root}/{name}", pickle.dumps(content, protocol=2))
    if extracted:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        archive.unlink()
    return pixels[0].reshape(3, 32, 32).transpose(1, 2, 0)


@pytest.mark.parametrize(("dataset", "num_train"), [("cifar10", 20), ("cifar100", 4)])
@pytest.mark.parametrize("extracted", [False, True])
def test_cifar_becomes_a_folder(tmp_path: Path, dataset: Any, num_train: int, extracted: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    first = cifar_source(source, dataset, extracted=extracted)
    info = prepare(dataset, target, source=source, progress=False)
    assert (info.num_train, info.num_val, info.classes) == (num_train, 4, ("cat", "dog"))
    with Image.open(target / "train" / "cat" / "00000.png") as image:
        assert np.array_equal(np.asarray(image), first)
    # Interrupted before the end: what stands is kept, what lacks is written.
    (target / "classes.tsv").unlink()
    lost = target / "train" / "dog" / "00001.png"
    kept = (target / "train" / "cat" / "00000.png").stat().st_mtime_ns
    lost.unlink()
    assert prepare(dataset, target, source=source, progress=False) == info
    assert lost.is_file() and (target / "train" / "cat" / "00000.png").stat().st_mtime_ns == kept


def test_cifar_runs_no_code_and_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contains neither cifar-10-python.tar.gz nor cifar-10-batches-py/: download https"):
        prepare("cifar10", tmp_path / "t", source=tmp_path, progress=False)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="has no place in a CIFAR file"):
        prepare("cifar10", tmp_path / "t", source=tmp_path, progress=False)
    assert not (tmp_path / "pwned").exists()


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """The three archives of a two-class ImageNet: three training images per class, four for validation."""
    from scipy.io import savemat

    source = tmp_path / "source"
    source.mkdir()
    with tarfile.open(source / TRAIN, "w") as tar:
        for c, synset in enumerate(("n02000000", "n01000000")):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as nested:
                for i in range(3):
                    add(nested, f"{synset}_{i}.JPEG", jpeg(10 * c + i))
            add(tar, f"{synset}.tar", inner.getvalue())
    with tarfile.open(source / VAL, "w") as tar:
        for i in (4, 2, 1, 3):  # out of order, as archives may be
            add(tar, f"ILSVRC2012_val_{i:08d}.JPEG", jpeg(100 + i))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(1, "n02000000", "tench, Tinca tinca", 0), (2, "n01000000", "goldfish", 0), (3, "n00000000", "fish", 2)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kind)})
    with tarfile.open(source / DEVKIT, "w:gz") as tar:
        add(tar, META, meta.getvalue())
        add(tar, TRUTH, b"1\n2\n2\n1\n")
    return source


@pytest.mark.parametrize("layout", ["folder", "shards"])
def test_imagenet_from_the_official_archives(tmp_path: Path, imagenet: Path, layout: Any) -> None:
    target = tmp_path / "target"
    info = prepare("imagenet", target, source=imagenet, allow_incomplete=True, layout=layout, per_shard=4, progress=False)
    assert (info.num_train, info.num_val, info.format) == (6, 4, {"folder": "manifest"}.get(layout, layout))
    assert info.classes == ("n01000000", "n02000000") and info.names == ("goldfish", "tench, Tinca tinca")
    opened = open_data_set(DataConfig(root=str(target)))
    pairs = {opened.train.read(i): int(label) for i, label in enumerate(opened.train.labels)}
    assert pairs == {jpeg(0): 1, jpeg(1): 1, jpeg(2): 1, jpeg(10): 0, jpeg(11): 0, jpeg(12): 0}
    pairs = {opened.val.read(i): int(label) for i, label in enumerate(opened.val.labels)}
    assert pairs == {jpeg(101): 1, jpeg(102): 0, jpeg(103): 0, jpeg(104): 1}


@pytest.mark.parametrize("name", ["../../../../escaped/owned.txt", "/escaped/owned.txt", "n1/../../owned", "..", "C:\\x", "a/"])
@pytest.mark.parametrize("archive", [TRAIN, VAL, "inner"])
def test_nothing_is_written_outside_of_the_target(tmp_path: Path, imagenet: Path, archive: str, name: str) -> None:
    if archive == "inner":
        with tarfile.open(imagenet / TRAIN, "w") as tar:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as nested:
                add(nested, name, jpeg(1))
            add(tar, "n01000000.tar", inner.getvalue())
    else:
        with tarfile.open(imagenet / archive, "a") as tar:
            add(tar, name, jpeg(1))
    target = tmp_path / "deep" / "er" / "target"
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="would be written outside of the target"):
        prepare("imagenet", target, source=imagenet, allow_incomplete=True, progress=False)
    assert set(tmp_path.rglob("*")) == before and not Path("/escaped").exists()


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_a_class_of_cifar_is_no_way_out_of_the_target(tmp_path: Path, dataset: Any) -> None:
    source = tmp_path / "source"
    source.mkdir()
    cifar_source(source, dataset, extracted=True)
    meta = {"cifar10": "cifar-10-batches-py/batches.meta", "cifar100": "cifar-100-python/meta"}[dataset]
    key = {"cifar10": b"label_names", "cifar100": b"fine_label_names"}[dataset]
    (source / meta).write_bytes(pickle.dumps({key: [b"cat", b"../../../owned"]}, protocol=2))
    with pytest.raises(UserError, match="would be written outside of the target"):
        prepare(dataset, tmp_path / "a" / "b" / "target", source=source, progress=False)
    assert not (tmp_path / "owned").exists() and not (tmp_path / "a").exists()


def test_imagenet_goes_on_after_an_interruption(tmp_path: Path, imagenet: Path) -> None:
    target = tmp_path / "target"
    info = prepare("imagenet", target, source=imagenet, allow_incomplete=True, progress=False)
    (target / "classes.tsv").unlink()
    lost, torn, kept = (target / "train" / "n02000000" / f"n02000000_{i}.JPEG" for i in range(3))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    torn.write_bytes(b"half")
    assert prepare("imagenet", target, source=imagenet, allow_incomplete=True, progress=False) == info
    assert (lost.read_bytes(), torn.read_bytes()) == (jpeg(0), jpeg(1)) and kept.stat().st_mtime_ns == before


def test_an_incomplete_imagenet_is_refused(tmp_path: Path, imagenet: Path) -> None:
    """The hole of zeros that an interrupted download leaves ends a tar file without an error."""
    with pytest.raises(UserError, match=r"contain 6 training images of 2 classes and 4 .* has 1,281,167 of 1,000 and 50,000"):
        prepare("imagenet", tmp_path / "target", source=imagenet, progress=False)
    content = bytearray((imagenet / TRAIN).read_bytes())
    second = content.index(b"n01000000.tar")
    content[second : second + 1024] = bytes(1024)
    (imagenet / TRAIN).write_bytes(content)
    with pytest.raises(UserError, match=r"contain 3 training images of 1 classes.*no image of n01000000"):
        prepare("imagenet", tmp_path / "target", source=imagenet, progress=False)
    with pytest.raises(UserError, match=f"{TRAIN} has the MD5 sum [0-9a-f]{{32}} instead of 1d675b47d978889d74fa0da5fadfb00e"):
        prepare("imagenet", tmp_path / "target", source=imagenet, checksums=True, progress=False)
    assert not (tmp_path / "target").exists()


def interrupted(target: Path) -> None:
    """Leave a prepared folder of shards as an interruption does: without its last shard and the mark of completeness."""
    (target / "classes.tsv").unlink()
    (target / "train-000001.tar").unlink()


def test_a_folder_is_only_gone_on_with_as_it_was_begun(tmp_path: Path, imagenet: Path) -> None:
    target, folder = tmp_path / "shards", tmp_path / "folder"
    options: dict[str, Any] = {"source": imagenet, "allow_incomplete": True, "progress": False}
    prepare("imagenet", target, layout="shards", per_shard=3, **options)
    with pytest.raises(UserError, match="was prepared with layout = shards instead of folder"):
        prepare("imagenet", target, **options)
    with pytest.raises(UserError, match="was prepared with dataset = imagenet instead of cifar10"):
        prepare("cifar10", target, source=imagenet, progress=False)
    interrupted(target)
    with pytest.raises(UserError, match="was prepared with per_shard = 3 instead of 5"):
        prepare("imagenet", target, layout="shards", per_shard=5, **options)
    with pytest.raises(UserError, match="is incomplete: `asp-dist prepare` began"):
        open_data_set(DataConfig(root=str(target)))
    prepare("imagenet", folder, **options)
    for manifest in ("train.tsv", "val.tsv"):
        (folder / manifest).unlink()
    (folder / "train" / "n01000000" / "n01000000_0.JPEG").unlink()
    begun = prepare("shards", tmp_path / "others", source=folder, per_shard=3, progress=False)
    assert begun.num_train == 5
    interrupted(tmp_path / "others")
    (folder / "train" / "n01000000" / "more.JPEG").write_bytes(jpeg(50))
    with pytest.raises(UserError, match="was prepared with images of another source"):
        prepare("shards", tmp_path / "others", source=folder, per_shard=3, progress=False)
    assert prepare("imagenet", target, layout="shards", per_shard=3, **options).num_train == 6


def test_shards_of_something_else_are_not_counted_in(tmp_path: Path, imagenet: Path) -> None:
    """Files from before `prepare` kept a record: a shard of another size."""
    target = tmp_path / "shards"
    options: dict[str, Any] = {"source": imagenet, "allow_incomplete": True, "layout": "shards", "progress": False}
    prepare("imagenet", target, per_shard=3, **options)
    interrupted(target)
    (target / ".prepare.json").unlink()
    with pytest.raises(UserError, match=r"has 7 images in train now, and .* has 6"):
        prepare("imagenet", target, per_shard=2, **options)
    assert not (target / "classes.tsv").exists()


def test_imagenet_says_what_is_missing_or_broken(tmp_path: Path, imagenet: Path) -> None:
    (imagenet / VAL).write_bytes(b"torn")
    with pytest.raises(UserError, match="an archive is broken"):
        prepare("imagenet", tmp_path / "t", source=imagenet, allow_incomplete=True, progress=False)
    (imagenet / VAL).unlink()
    with pytest.raises(UserError, match=f"lacks {VAL}"):
        prepare("imagenet", tmp_path / "t", source=imagenet, allow_incomplete=True, progress=False)
    with pytest.raises(UserError, match="needs --source"):
        prepare("imagenet", tmp_path / "t", progress=False)


def test_manifest_and_shards_of_a_folder(tmp_path: Path, imagenet: Path) -> None:
    folder = tmp_path / "folder"
    prepare("imagenet", folder, source=imagenet, allow_incomplete=True, progress=False)
    apart = prepare("manifest", tmp_path / "apart", source=folder, progress=False)
    beside = prepare("manifest", folder, progress=False)
    shards = prepare("shards", tmp_path / "shards", source=folder, per_shard=2, progress=False)
    assert [i.format for i in (apart, beside, shards)] == ["manifest", "manifest", "shards"]
    for root in (tmp_path / "apart", folder, tmp_path / "shards"):
        opened = open_data_set(DataConfig(root=str(root)))
        assert opened.info.names == ("goldfish", "tench, Tinca tinca")
        pairs = {opened.train.read(i): int(label) for i, label in enumerate(opened.train.labels)}
        assert pairs == {jpeg(0): 1, jpeg(1): 1, jpeg(2): 1, jpeg(10): 0, jpeg(11): 0, jpeg(12): 0}

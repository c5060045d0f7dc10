"""Manifests and shards: reading, writing, bad input, and the same exactness as folders."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import config, loaders, same

from asp_dist.data import inspect_data, prepare_digits
from asp_dist.data.formats.manifest import read_manifest, write_classes, write_manifest
from asp_dist.data.formats.shards import read_shards, write_shards
from asp_dist.data.info import open_data_set
from asp_dist.errors import UserError


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The digits as a folder, with manifests, and as shards."""
    base = tmp_path_factory.mktemp("formats")
    folder, manifest, shards = (base / name for name in ("folder", "manifest", "shards"))
    prepare_digits(folder)
    opened = open_data_set(config(folder))
    for target in (manifest, shards):
        target.mkdir()
        write_classes(target, opened.info.classes, opened.info.names)
    for split, samples in (("train", opened.train), ("val", opened.val)):
        write_manifest(samples, manifest / f"{split}.tsv")
        assert len(write_shards(samples, shards, split, per_shard=300)) == -(-len(samples) // 300)
    return {"folder": folder, "manifest": manifest, "shards": shards}


@pytest.mark.parametrize("kind", ["manifest", "shards"])
def test_formats_are_recognised_and_hold_the_same(roots: dict[str, Path], kind: str) -> None:
    info = inspect_data(config(roots[kind]))
    assert (info.num_train, info.num_val, info.format) == (1438, 359, kind)
    assert info.classes == tuple("0123456789") and info.names[9] == "nine"
    folder, other = (open_data_set(config(roots[k])) for k in ("folder", kind))
    mine = Counter((int(label), folder.val.read(i)) for i, label in enumerate(folder.val.labels))
    assert mine == Counter((int(label), other.val.read(i)) for i, label in enumerate(other.val.labels))


def test_a_manifest_gives_the_batches_of_its_folder(roots: dict[str, Path]) -> None:
    first, second = (loaders(config(roots[k])).train.start(2) for k in ("folder", "manifest"))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["folder", "manifest", "shards"])
@pytest.mark.parametrize(
    ("world_size", "batch_size", "eval_batch"), [(1, 97, 50), (2, 64, 7), (3, 33, 359), (5, 35, 10), (8, 104, 64)]
)
def test_every_sample_is_read_once(
    roots: dict[str, Path], kind: str, world_size: int, batch_size: int, eval_batch: int
) -> None:
    """What DALI's reader itself says it read, over five epochs and all ranks."""
    data = config(roots[kind], batch_size=batch_size, eval_batch_size=eval_batch, input_size=8)
    samples = open_data_set(data).train
    steps = 1438 // batch_size
    tails = []
    for epoch in range(5):
        targets: list[int] = []
        for rank in range(world_size):
            train = loaders(data, rank, world_size).train
            batches = [t for _, t in train.start(epoch)]  # start() itself asserts the reader's positions
            assert len(batches) == steps
            targets += torch.cat(batches).tolist()
        order = loaders(data).train.plan.order(0, epoch, samples.shard)
        assert len(set(order.tolist())) == len(order) == steps * batch_size
        assert Counter(targets) == Counter(samples.labels[order].tolist())
        tails.append(tuple(sorted(set(range(1438)) - set(order.tolist()))))
    assert len(set(tails)) == 5 or not tails[0]
    seen: Counter[int] = Counter()
    counts = set()
    for rank in range(world_size):
        batches = [t for _, t in loaders(data, rank, world_size).val]
        counts.add(len(batches))
        seen.update(torch.cat(batches).tolist())
    assert len(counts) == 1 and sum(seen.values()) == 359
    assert [seen[d] for d in range(10)] == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


@pytest.mark.parametrize("kind", ["folder", "manifest", "shards"])
def test_a_state_restores_ten_batches_in_epoch_three(roots: dict[str, Path], kind: str) -> None:
    data = config(roots[kind], batch_size=64)
    train = loaders(data, 1, 2).train
    run = train.start(3)
    for _ in range(9):
        next(run)
    state = json.loads(json.dumps(train.state_dict()))
    again = loaders(data, 1, 2).train
    again.load_state_dict(state)
    second = again.start(3, 9)
    assert all(same(next(run), next(second)) for _ in range(10))


def test_shards_are_shuffled_and_kept(roots: dict[str, Path]) -> None:
    samples = read_shards(roots["shards"], "train")
    assert samples.shard is not None
    for shard in range(len(samples.shards)):
        assert len(np.unique(samples.labels[samples.shard == shard])) == 10
    path = roots["shards"] / samples.shards[0]
    before = path.stat().st_mtime_ns
    write_shards(open_data_set(config(roots["folder"])).train, roots["shards"], "train", per_shard=300)
    assert path.stat().st_mtime_ns == before
    index = path.with_suffix(".idx").read_text().splitlines()
    assert index[0] == "v1.2 300" and len(index) == 301
    extension, offset, size, name, label_extension, label_offset, label_size, _ = index[1].split()
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        inside = tar.extractfile(name)
        assert inside is not None and inside.read() == content[int(offset) : int(offset) + int(size)]
    assert (extension, label_extension) == ("png", "cls")
    label = content[int(label_offset) : int(label_offset) + int(label_size)]
    assert int(label) == samples.labels[0]


def test_a_torn_table_of_the_shards_is_made_anew(roots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(roots["shards"], tmp_path / "shards")
    table = tmp_path / "shards" / "train.index.npz"
    before = read_shards(tmp_path / "shards", "train")
    whole = table.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for torn in (b"", whole[:10], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        table.write_bytes(torn)
        again = read_shards(tmp_path / "shards", "train")
        assert again.fingerprint == before.fingerprint
        assert len(table.read_bytes()) == len(whole)


def test_a_shard_that_was_written_again_is_walked_again(roots: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(roots["shards"], tmp_path / "shards")
    first = read_shards(tmp_path / "shards", "val")
    shard = tmp_path / "shards" / first.shards[0]
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        member = next(m for m in tar if m.name.endswith(".cls"))
    label = int(content[member.offset_data : member.offset_data + member.size])
    other = b"%d" % ((label + 1) % 10)
    shard.write_bytes(content[: member.offset_data] + other + content[member.offset_data + member.size :])
    assert shard.stat().st_size == len(content)  # as large as before
    assert read_shards(tmp_path / "shards", "val").labels[0] == int(other)


def test_a_bad_file_in_a_shard_is_named_with_its_shard(roots: dict[str, Path], tmp_path: Path) -> None:
    opened = open_data_set(config(roots["folder"]))
    broken = open_data_set(config(roots["folder"])).train
    image = broken.root / broken.names[5]
    good = image.read_bytes()
    try:
        image.write_bytes(good[: len(good) // 2])
        write_shards(broken, tmp_path, "train", per_shard=719)
    finally:
        image.write_bytes(good)
    write_shards(opened.val, tmp_path, "val")
    with pytest.raises(UserError, match=r"rank 0, epoch 0, step 0: cannot decode 000000005.png in shard .*train-00000"):
        list(loaders(config(tmp_path, batch_size=1438)).train.start(0))


def test_manifests_take_spaces_and_foreign_separators(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes(b"a b/c d.jpg 12\r\nplain.jpg\t3\nlast.jpg 999")
    samples = read_manifest(path)
    assert samples.names[:] == ["a b/c d.jpg", "plain.jpg", "last.jpg"]
    assert samples.labels.tolist() == [12, 3, 999]
    with pytest.raises(UserError, match=r"line 3 of .*train.tsv is 'last.jpg 999'.*below 100"):
        read_manifest(path, num_classes=100)


@pytest.mark.parametrize("line", ["nolabel.jpg", "word.jpg\tcat", "\t5", "empty.jpg\t", "minus.jpg -1"])
def test_a_bad_manifest_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.tsv"
    path.write_text(f"good.jpg\t0\n{line}\n")
    with pytest.raises(UserError, match="line 2 of"):
        read_manifest(path)


def test_shards_without_labels_or_with_too_high_ones_are_refused(roots: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"contain class 9, but there are 3 classes"):
        read_shards(roots["shards"], "train", num_classes=3)
    image = next((roots["folder"] / "val" / "0").iterdir())
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        tar.add(image, "x.png")
    with pytest.raises(UserError, match=r"an image 'x' without a class index in x.cls"):
        read_shards(tmp_path, "train")
    (tmp_path / "train-000000.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match="cannot be read"):
        read_shards(tmp_path, "train")

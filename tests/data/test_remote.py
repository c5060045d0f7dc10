"""Data sets in an object store: the batches of a disk, bit for bit, retries, and the copy on the node."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import loaders, same
from s3_server import S3Server, s3_server

from asp_dist import cli
from asp_dist.config import AugmentConfig, Config, DataConfig
from asp_dist.data import inspect_data
from asp_dist.data.prepare.digits import prepare_digits
from asp_dist.data.prepare.preparation import prepare
from asp_dist.data.prepare.verification import verify
from asp_dist.data.remote import Cache, RemotePath, place_of_data
from asp_dist.errors import UserError
from asp_dist.object_store import open_storage
from asp_dist.training.preflight import look_at_data

AUGMENT = AugmentConfig(scale=(0.3, 1.0), color_jitter=0.2, policy="randaugment", erase=0.5)
IMAGES = 360  # of training; 120 of validation


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the digits, as PNG files in class folders."""
    whole, part = prepare_digits(tmp_path_factory.mktemp("whole") / "digits"), tmp_path_factory.mktemp("data") / "digits"
    for split, count in (("train", IMAGES), ("val", 120)):
        files = sorted((whole / split).rglob("*.png"))
        for file in random.Random(0).sample(files, count):
            target = part / file.relative_to(whole)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return part


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with s3_server(tmp_path_factory.mktemp("server")) as running:
            system, path = open_storage(running.address(""))
            system.create_dir(path)
            yield running


@pytest.fixture(scope="module")
def store(server: S3Server, disk: Path) -> str:
    """The images in the store, with manifests that `prepare` wrote there."""
    root = RemotePath(server.address("digits"))
    for file in sorted(disk.rglob("*.png")):
        (root / file.relative_to(disk).as_posix()).upload(file)
    info = prepare("manifest", root.full, progress=False)
    assert (info.num_train, info.num_val, info.format) == (IMAGES, 120, "manifest")
    return root.full


def config(root: str | Path, **changes: Any) -> DataConfig:
    plain = DataConfig(root=str(root), threads=1, batch_size=120, input_size=16, augment=AUGMENT)
    return dataclasses.replace(plain, **changes)


def epoch_of(data: Any, epoch: int = 0, step: int = 0, **more: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = loaders(data, **more)
    try:
        return [(images.clone(), labels.clone()) for images, labels in made.train.start(epoch, step)]
    finally:
        made.close()


@pytest.mark.parametrize("form", ["manifest", "shards"])
def test_an_epoch_from_the_store_is_the_epoch_from_disk(
    store: str, disk: Path, server: S3Server, tmp_path: Path, form: str
) -> None:
    local: Path = disk
    if form == "shards":
        prepare("shards", tmp_path / "shards", source=disk, per_shard=100, progress=False)
        local, store = tmp_path / "shards", RemotePath(server.address("shards")).full
        info = prepare("shards", store, source=disk, per_shard=100, progress=False)
        assert (info.num_train, info.format) == (IMAGES, "shards")
    for rank in (0, 1):
        here, there = (epoch_of(config(root), rank=rank, world_size=2) for root in (local, store))
        assert len(here) == len(there) == 3
        assert all(same(a, b) for a, b in zip(here, there))
    here, there = (list(loaders(config(root, eval_batch_size=50)).val) for root in (local, store))
    assert [len(labels) for _, labels in there] == [50, 50, 20]
    assert all(same(a, b) for a, b in zip(here, there))


def test_a_stopped_epoch_goes_on_bit_for_bit(store: str) -> None:
    whole = epoch_of(config(store))
    first = loaders(config(store))
    batches = first.train.start(0)
    next(batches)
    state = first.train.state_dict()
    again = loaders(config(store))
    again.train.load_state_dict(state)
    rest = [(images.clone(), labels.clone()) for images, labels in again.train.start(0, 1)]
    assert len(rest) == 2 and all(same(a, b) for a, b in zip(whole[1:], rest))


def test_a_503_now_and_then_is_retried(store: str, server: S3Server) -> None:
    whole = epoch_of(config(store))
    server.fail(7)
    try:
        assert all(same(a, b) for a, b in zip(whole, epoch_of(config(store)), strict=True))
    finally:
        server.fail(0)
    assert sum(line.endswith("503") for line in server.requests()) >= IMAGES // 8


def test_with_the_cache_the_second_epoch_makes_no_request(store: str, server: S3Server, disk: Path, tmp_path: Path) -> None:
    data = config(store, cache=str(tmp_path / "cache"))
    before = len(server.images_read())
    both = [loaders(data, rank=rank, world_size=2) for rank in (0, 1)]  # two processes of one node
    first = [[(i.clone(), t.clone()) for i, t in made.train.start(0)] for made in both]
    asked = server.images_read()[before:]
    assert len(asked) == len(set(asked)) == IMAGES, "each image once"
    second = [[(i.clone(), t.clone()) for i, t in made.train.start(1)] for made in both]
    assert len(server.images_read()) == before + IMAGES, "and none again, though the ranks have others now"
    for rank, epochs in enumerate(zip(first, second)):
        for epoch, batches in enumerate(epochs):
            assert all(same(a, b) for a, b in zip(batches, epoch_of(config(disk), epoch, rank=rank, world_size=2), strict=True))
    both[0].remove_caches()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_is_bounded_checked_and_never_in_the_way(store: str, server: S3Server, tmp_path: Path) -> None:
    whole = epoch_of(config(store))
    data = config(store, cache=str(tmp_path / "cache"), cache_gb=50e-6)  # 50 kB of some 250
    assert all(same(a, b) for a, b in zip(whole, epoch_of(data), strict=True))
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and not path.name.startswith("journal")]
    assert 20_000 < sum(path.stat().st_size for path in files) <= 50_000

    files[0].write_bytes(files[0].read_bytes()[:-1] + b"\0\0")
    files[1].write_bytes(b"\0" * files[1].stat().st_size)
    files[2].unlink()
    before = len(server.images_read())
    assert all(same(a, b) for a, b in zip(whole, epoch_of(data), strict=True))
    assert len(server.images_read()) - before == IMAGES - len(files) + 3, "what is damaged or gone is read from the store"

    blocked = tmp_path / "blocked"
    made = loaders(config(store, cache=str(blocked)))
    assert made.train.cache is not None
    made.train.cache.folder.rmdir()
    made.train.cache.folder.write_text("no folder")
    assert all(same(a, b) for a, b in zip(whole, made.train.start(0), strict=True))


def test_what_a_kill_left_in_the_journal_is_passed_over(store: str, tmp_path: Path) -> None:
    made = loaders(config(store, cache=str(tmp_path)))
    cache = made.train.cache
    assert cache is not None and made.train.samples is not None
    cache.put(3, b"abc")
    with cache._journal.open("a") as journal:
        journal.write("[4, 10, 1")
    other = Cache(tmp_path, made.train.samples, None, writer="9", writers=1)
    assert (other.get(3), other.get(4)) == (b"abc", None)


def test_verify_and_prepare_work_in_the_store(
    store: str, disk: Path, server: S3Server, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = verify(store, progress=False)
    assert (report.files, report.undecodable) == (480, 0)
    root = RemotePath(server.address("bad"))
    for split in ("train", "val"):
        for name in ("a", "b"):
            source = place_of_data(store) / next(n for n in RemotePath(store).names(deep=True) if n.startswith(f"{split}/"))
            (root / f"{split}/{name}/1.png").write_bytes(source.read_bytes())
            (root / f"{split}/{name}/2.png").write_bytes(b"no image " + name.encode())
    prepare("manifest", root.full, progress=False)
    clean = root / "clean"
    found = verify(root.full, manifest=clean.full, progress=False)
    assert found.undecodable == 4
    assert inspect_data(config(clean.full)).num_train == 2
    assert len(epoch_of(config(clean.full, batch_size=2))) == 1

    command = ["prepare", "shards", "--source", str(disk), "--per-shard", "150", "--target", server.address("again")]
    command += ["--work", str(tmp_path / "work"), "--quiet"]
    assert cli.main(command) == 0
    assert "360 training and 120 validation images, 10 classes, as shards" in capsys.readouterr().out
    before = len(server.requests())
    assert cli.main(command) == 0
    puts = [line for line in server.requests()[before:] if line.startswith(("PUT", "POST"))]
    assert all("classes.tsv" in line for line in puts), "what is there already is not sent again"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"root": "s3://images/nowhere?OPTIONS"}, "nothing is there"),
        ({"backend": "torch"}, "data.backend = torch reads folders of this machine alone"),
    ],
)
def test_mistakes_are_said_at_once(store: str, changes: dict[str, Any], words: str) -> None:
    changes = {name: value.replace("OPTIONS", store.partition("?")[2]) for name, value in changes.items()}
    with pytest.raises(UserError, match=words):
        inspect_data(dataclasses.replace(config(store), **changes))


def test_a_store_that_refuses_or_is_not_there_is_said(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    address = server.address("digits").replace("s3://images/", "s3://another-bucket/")
    with pytest.raises(UserError, match=r"the store refuses s3://another-bucket/x \(NO_SUCH_BUCKET\): check the bucket"):
        (RemotePath(address).parent / "x").write_bytes(b"")
    monkeypatch.setattr("asp_dist.data.remote.WAITS_S", ())
    away = server.address("digits").replace(f":{server.port}", ":9")
    with pytest.raises(UserError, match=r"data.root = s3://images/digits: the store does not answer .*AWS_ENDPOINT_URL"):
        look_at_data(Config(data=config(away)))


def test_folders_without_a_manifest_are_not_walked_at_every_start(server: S3Server) -> None:
    root = RemotePath(server.address("bare"))
    (root / "train/a/1.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"has no manifest and no shards.*prepare manifest --source s3://"):
        inspect_data(config(root.full))


def test_a_cache_of_a_local_folder_and_one_in_a_store_are_refused() -> None:
    with pytest.raises(UserError, match=r"data.cache = /fast .* is a folder: leave data.cache out"):
        config("data/digits", cache="/fast")
    with pytest.raises(UserError, match="must be a folder of the node"):
        config("s3://images/digits", cache="s3://images/cache")

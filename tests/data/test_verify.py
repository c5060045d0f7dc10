"""Bad files: `verify` finds all and only those, and training on one of them ends with its name."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest
from data_helpers import BAD, config, jpeg, loaders
from PIL import Image

from asp_dist.cli import main
from asp_dist.data import DataError, Loaders, prepare_digits
from asp_dist.data.info import open_data_set
from asp_dist.data.prepare.verification import KINDS, Finding, verify
from asp_dist.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight sound images in two classes and two splits."""
    for i in range(8):
        folder = tmp_path / ("train" if i < 6 else "val") / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(jpeg(100 + i))
    return tmp_path


def test_a_sound_data_set_has_no_findings(root: Path) -> None:
    report = verify(root, progress=False)
    assert report.findings == () and report.files == 8
    grey, alpha, palette = (root / "train" / "cat" / f"{n}.png" for n in ("grey", "alpha", "palette"))
    image = Image.open(io.BytesIO(jpeg(3)))
    for path, mode in ((grey, "L"), (alpha, "RGBA"), (palette, "P")):
        image.convert(mode).save(path)
    image.save(root / "train" / "cat" / "w.webp")
    assert verify(root, progress=False).findings == ()


def test_every_kind_is_found_and_nothing_else(root: Path) -> None:
    expected = {}
    for kind, content in BAD.items():
        path = root / "train" / "cat" / f"{kind.replace(' ', '_')}.jpg"
        if content is None:
            path.symlink_to("nowhere.jpg")
        else:
            path.write_bytes(content)
        expected[str(path)] = kind
    gif = root / "train" / "dog" / "gif.jpg"
    Image.open(io.BytesIO(jpeg(4))).save(gif, "GIF")
    expected[str(gif)] = "not an image"
    for split, name in (("train", "again.jpg"), ("val", "leak.jpg")):
        copy = root / split / "dog" / name
        shutil.copy(root / "train" / "dog" / "0.jpg", copy)
        expected[str(copy)] = "duplicate"
    seen: list[Finding] = []
    report = verify(root, progress=False, manifest=root / "clean", drop=("cmyk", "duplicate"), on_finding=seen.append)
    assert tuple(seen) == report.findings and report.undecodable == 5
    assert {f.place: f.kind for f in report.findings} == expected
    assert report.counts() == dict(zip(KINDS, [1, 1, 2, 1, 1, 0, 2]))
    leak = next(f for f in report.findings if f.place.endswith("leak.jpg"))
    assert leak.split == "val" and leak.detail == f"of {root / 'train' / 'dog' / '0.jpg'}"
    clean = open_data_set(config(root / "clean"))
    assert (clean.info.num_train, clean.info.num_val, clean.info.format) == (6, 2, "manifest")
    assert clean.info.classes == ("cat", "dog")
    assert len(list(loaders(config(root / "clean", batch_size=6)).train.start(0))) == 1
    verify(root, progress=False, manifest=root / "whole")
    whole = open_data_set(config(root / "whole"))
    assert (len(whole.train), len(whole.val)) == (8, 3)  # no benchmark loses a file that decodes unless it is asked for
    with pytest.raises(UserError, match="names no kind of finding"):
        verify(root, drop=("ugly",))  # type: ignore[arg-type]


def test_what_decodes_is_no_failure_of_the_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "train" / "cat" / "cmyk.jpg").write_bytes(BAD["cmyk"] or b"")
    assert main(["verify", str(root), "--quiet"]) == 0
    assert "cmyk" in capsys.readouterr().out
    (root / "train" / "cat" / "empty.jpg").write_bytes(b"")
    assert main(["verify", str(root), "--quiet"]) == 1


def exhaust(data: Loaders) -> None:
    """Twenty epochs: a truncated file may survive a crop of its upper part."""
    for epoch in range(20):
        list(data.train.start(epoch))


@pytest.mark.parametrize("kind", [k for k in BAD if k != "cmyk"])
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_training_on_a_bad_file_ends_with_its_name(root: Path, kind: str, backend: str) -> None:
    path = root / "train" / "cat" / "zz_bad.jpg"
    content = BAD[kind]
    if content is None:
        path.write_bytes(jpeg(5))
        data = loaders(config(root, backend=backend, batch_size=7))
        path.unlink()  # gone after the start
    else:
        path.write_bytes(content)
        data = loaders(config(root, backend=backend, batch_size=7))
    with pytest.raises(DataError, match=f"rank 0, epoch 0.*{path}: .*asp-dist verify {root} "):
        exhaust(data)


def test_cmyk_is_decoded(root: Path) -> None:
    (root / "train" / "cat" / "cmyk.jpg").write_bytes(BAD["cmyk"] or b"")
    assert len(list(loaders(config(root, batch_size=7)).train.start(0))) == 1


def test_verify_reads_shards_and_manifests(tmp_path: Path) -> None:
    from asp_dist.data.formats.manifest import write_manifest
    from asp_dist.data.formats.shards import write_shards

    root = prepare_digits(tmp_path / "digits")
    opened = open_data_set(config(root))
    victim = root / opened.train.names[3]
    victim.write_bytes(victim.read_bytes()[:60])
    (tmp_path / "shards").mkdir()
    for split, samples in (("train", opened.train), ("val", opened.val)):
        write_manifest(samples, root / f"{split}.tsv")
        write_shards(samples, tmp_path / "shards", split)
    (found,) = verify(root, progress=False).findings
    assert (os.path.realpath(found.place), found.kind) == (str(victim), "truncated")
    (found,) = verify(tmp_path / "shards", progress=False).findings
    assert found.place == f"000000003.png in shard {tmp_path / 'shards' / 'train-000000.tar'}"


def test_huge_images_empty_classes_and_what_is_not_taken_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = root / "train"
    Image.new("1", (12_000, 8_000)).save(train / "cat" / "wide.png")
    (train / "c").mkdir()
    (train / "cat" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(train / "cat" / "more" / "lost.png")
    (train / "cat" / "._1.jpg").write_bytes(b"macOS")
    (train / "cat" / "readme.txt").write_text("hello")
    assert main(["verify", str(root), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "huge          " in out and "12000 × 8000 pixels" in out
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert "note: 1 classes have no image in train: c" in notes and "note: 1 classes have no image in val: c" in notes
    assert {Path(line.removeprefix("note: ").split(" is ")[0]).name for line in notes[1:] if " is " in line} == {
        *("more", "._1.jpg", "readme.txt"),
    }


def test_a_manifest_in_a_linked_folder_finds_its_files(root: Path, tmp_path: Path) -> None:
    deep = tmp_path / "one" / "two" / "three"
    deep.mkdir(parents=True)
    (tmp_path / "link").symlink_to(deep)
    verify(root, manifest=tmp_path / "link", progress=False)
    opened = open_data_set(config(tmp_path / "link"))
    assert opened.train.read(0) == open_data_set(config(root)).train.read(0)

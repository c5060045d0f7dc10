"""The loaders of every backend, on scikit-learn's digits: counts, order, draws, resuming and bad input."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import config, loaders, same
from timm.data.auto_augment import RandAugment

from asp_dist.config import AugmentConfig, DaliConfig
from asp_dist.data import DataError, inspect_data, prepare_digits
from asp_dist.data.bad_files import DataReadError, Suspects, examine
from asp_dist.data.dali.dali_loader import PipelineRun
from asp_dist.data.images import ImageSpec
from asp_dist.data.info import open_data_set
from asp_dist.data.samples import Samples
from asp_dist.data.torch_loader import build_transform
from asp_dist.errors import UserError


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


def test_digits_are_complete_stratified_and_quick_the_second_time(digits: Path) -> None:
    info = inspect_data(config(digits))
    assert (info.num_train, info.num_val, info.format) == (1438, 359, "folder")
    assert info.classes == tuple("0123456789") and info.names[3] == "three"
    for digit in range(10):
        train, val = (len(list((digits / split / str(digit)).iterdir())) for split in ("train", "val"))
        assert 174 <= train + val <= 183 and val == round((train + val) / 5)
    before = (digits / "classes.tsv").stat().st_mtime_ns
    assert prepare_digits(digits) == digits
    assert (digits / "classes.tsv").stat().st_mtime_ns == before


def test_digits_refuse_a_folder_with_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="contains something other"):
        prepare_digits(tmp_path)


@pytest.mark.parametrize("backend", ["dali", "torch", "synthetic"])
def test_shapes_types_and_steps(digits: Path, backend: str) -> None:
    data = config(digits, backend=backend, synthetic_samples=(1438, 359))
    built = loaders(data, rank=1, world_size=2, accumulate=3)
    assert built.train.steps_per_epoch == 11 and built.train.samples_per_epoch == 1320
    batches = list(built.train.start(0))
    assert len(batches) == 33
    for images, targets in batches:
        assert images.shape == (20, 3, 16, 16) and images.dtype == torch.float32
        assert targets.shape == (20,) and targets.dtype == torch.int64
    assert len(list(built.train.start(0, step=9))) == 6
    assert built.val.num_samples == 359
    assert sum(len(targets) for _, targets in built.val) == 179


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize(("world_size", "batch"), [(1, 100), (3, 64), (8, 7)])
def test_validation_counts_every_image_once(digits: Path, backend: str, world_size: int, batch: int) -> None:
    if backend == "torch" and world_size == 8:
        pytest.skip("the same code as for 3, slower")
    counts: Counter[int] = Counter()
    steps = set()
    for rank in range(world_size):
        val = loaders(config(digits, backend=backend, eval_batch_size=batch), rank, world_size).val
        batches = [targets for _, targets in val]
        steps.add(len(batches))
        counts.update(torch.cat(batches).tolist())
    assert len(steps) == 1
    assert [counts[digit] for digit in range(10)] == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


def test_backends_serve_the_same_order_and_nearly_the_same_pixels(digits: Path) -> None:
    dali, other = (loaders(config(digits, backend=b)) for b in ("dali", "torch"))
    for (_, first), (_, second) in zip(dali.train.start(4), other.train.start(4), strict=True):
        assert torch.equal(first, second)
    for (first, _), (second, _) in zip(dali.val, other.val, strict=True):
        value_range = 1 / 0.225
        assert (first - second).abs().mean().item() / value_range < 0.01


def test_images_arrive_in_the_networks_memory_order(digits: Path) -> None:
    first, last = (loaders(config(digits), channels_last=is_last) for is_last in (False, True))
    for one, other in (
        [next(one.train.start(0)) for one in (first, last)],
        [next(iter(one.val)) for one in (first, last)],
    ):
        assert same(one, other) and other[0].is_contiguous(memory_format=torch.channels_last)


def test_hidden_files_are_no_images(digits: Path, tmp_path: Path) -> None:
    """macOS leaves ``._1.jpg`` beside ``1.jpg`` on foreign file systems."""
    shutil.copytree(digits, tmp_path / "digits")
    (tmp_path / "digits" / "train" / "0" / "._0001.png").write_bytes(b"Mac OS X")
    assert len(open_data_set(config(tmp_path / "digits")).train) == 1438


def test_nonsense_for_the_decoder_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.dali\.decoder_load = 1\.5 is outside"):
        DaliConfig(decoder_load=1.5)
    with pytest.raises(UserError, match=r"data\.dali\.preallocate = \[0, 6430\]: give width and height"):
        DaliConfig(preallocate=(0, 6430))


def test_augmentation_differs_between_ranks_epochs_and_seeds_but_repeats(digits: Path) -> None:
    # The same sample for both ranks: without crops, the tensors would be equal.
    data = config(digits, batch_size=4, augment=AugmentConfig(repeats=4, scale=(0.3, 1.0)))
    ranks = [next(loaders(data, rank, 4).train.start(0)) for rank in range(4)]
    assert len({int(targets[0]) for _, targets in ranks}) == 1
    images = [batch[0] for batch in ranks]
    assert not any(torch.equal(images[0], other) for other in images[1:])
    assert same(ranks[2], next(loaders(data, 2, 4).train.start(0)))
    assert not same(ranks[2], next(loaders(data, 2, 4, seed=1).train.start(0)))
    assert not same(ranks[2], next(loaders(data, 2, 4).train.start(1)))


@pytest.mark.parametrize(("backend", "policy"), [("dali", "none"), ("dali", "randaugment"), ("torch", "autoaugment")])
def test_a_state_restores_the_exact_next_batches(digits: Path, backend: str, policy: Any) -> None:
    augment = AugmentConfig(policy=policy, color_jitter=0.3, erase=0.5)
    data = config(digits, backend=backend, augment=augment)
    train = loaders(data, 1, 2, accumulate=2).train
    run = train.start(3)
    for _ in range(6):
        next(run)
    state = json.loads(json.dumps(train.state_dict()))
    assert (state["epoch"], state["step"]) == (3, 3)
    expected = list(run)
    again = loaders(data, 1, 2, accumulate=2).train
    again.load_state_dict(state)
    second = again.start(3, 3)
    got = [next(second), next(second)]
    # A state of a resumed run restores as well.
    third = loaders(data, 1, 2, accumulate=2).train
    third.load_state_dict(json.loads(json.dumps(again.state_dict())))
    got += list(third.start(3, 4))
    assert len(got) == len(expected) == 16
    assert all(same(a, b) for a, b in zip(got, expected))


def test_a_state_of_another_topology_goes_on_at_the_same_offset_and_says_so(
    digits: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = config(digits, batch_size=96)
    seen: Counter[int] = Counter()
    state: dict[str, Any] = {}
    plan = loaders(data).train.plan
    order = plan.order(0, 3)
    for rank in range(2):
        train = loaders(data, rank, 2).train
        run = train.start(3)
        for _ in range(5):
            seen.update(next(run)[1].tolist())
        state = train.state_dict()
    for rank in range(3):
        train = loaders(data, rank, 3).train
        with caplog.at_level(logging.WARNING):
            train.load_state_dict(state)
        for _, targets in train.start(3, 5):
            seen.update(targets.tolist())
    assert "world size 2 -> 3" in caplog.text and "continues from step 5" in caplog.text
    assert train.samples is not None
    assert seen == Counter(train.samples.labels[order].tolist())


def test_a_file_that_does_not_decode_is_named_with_its_rank(tmp_path: Path) -> None:
    root = prepare_digits(tmp_path / "digits")
    bad = sorted((root / "train" / "4").iterdir())[7]
    bad.write_bytes(b"no image at all")
    for backend in ("dali", "torch"):
        with pytest.raises(DataError, match=f"rank 0, epoch 0.*{bad}.*asp-dist verify"):
            list(loaders(config(root, backend=backend, batch_size=719)).train.start(0))
    val = sorted((root / "val" / "4").iterdir())[0]
    val.write_bytes(b"")
    with pytest.raises(DataError, match=f"rank 0, validation.*{val}: empty file"):
        list(loaders(config(root)).val)


class Threads:
    """As a DALI pipeline in a reference cycle: a process that lets go of another's waits for threads that it lacks."""

    def __init__(self) -> None:
        self.process, self.itself = os.getpid(), self

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os._exit(9)


def test_a_worker_does_not_let_go_of_what_came_with_the_fork(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage collection in a worker found a pipeline of the process before, and hung."""
    read = Samples.read

    def collect(samples: Samples, index: int, **more: Any) -> bytes:
        gc.collect()
        return read(samples, index, **more)

    monkeypatch.setattr(Samples, "read", collect)
    gc.disable()
    try:
        Threads()
        _, targets = next(loaders(config(digits, backend="torch")).train.start(0))
    finally:
        gc.enable()
    assert len(targets) > 0


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_storage_that_does_not_answer_is_no_bad_file(tmp_path: Path, backend: Any) -> None:
    """A restart may read what this attempt could not: a run must not end for good in its sixtieth hour."""
    root = prepare_digits(tmp_path / "digits")
    for split in ("train", "val"):
        file = sorted((root / split / "4").iterdir())[0]
        file.unlink()
        file.symlink_to("/proc/self/mem")  # whose first byte cannot be read: EIO
    loader = loaders(config(root, backend=backend, batch_size=719))
    for batches, where in ((loader.train.start(0), "rank 0, epoch 0"), (iter(loader.val), "rank 0, validation")):
        with pytest.raises(RuntimeError, match=rf"{where}.*4/.*Input/output error.*restart") as caught:
            list(batches)
        assert isinstance(caught.value, DataReadError)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Critical error in pipeline: CUDA runtime API error cudaErrorECCUncorrectable (214)", RuntimeError),
        ("Critical error in pipeline: CUDA allocation failed", RuntimeError),
        ("Critical error in pipeline: a worker thread is gone", DataReadError),
    ],
)
def test_a_pipeline_that_fails_over_sound_files_with_a_patched_pipeline(
    digits: Path, message: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: PipelineRun) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(PipelineRun, "advance", fail)
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        list(loaders(config(digits)).train.start(0))
    assert type(caught.value) is kind


def test_a_file_is_bad_only_if_it_fails_twice(digits: Path) -> None:
    samples = open_data_set(config(digits)).train
    seen: Counter[bytes] = Counter()
    passing, lasting = samples.read(3), samples.read(5)

    def look(encoded: bytes) -> str | None:
        seen[encoded] += 1
        return "torn" if encoded == lasting or (encoded == passing and seen[encoded] == 1) else None

    assert examine(samples, range(8), look) == Suspects(bad=((5, "torn"),))


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        inspect_data(config(tmp_path / "absent"))
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="is empty"):
        inspect_data(config(tmp_path))
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(UserError, match="at least two classes"):
        inspect_data(config(tmp_path))
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(UserError, match="no image under"):
        inspect_data(config(tmp_path))


def test_progressive_sizes_follow_the_epochs(digits: Path) -> None:
    train = loaders(config(digits, progressive_sizes=(8, 12, 16)), epochs=6).train
    assert [next(train.start(epoch))[0].shape[-1] for epoch in range(6)] == [8, 8, 12, 12, 16, 16]


@pytest.mark.parametrize(("magnitude", "of_ten"), [(0, 0), (9, 3), (27, 9), (30, 10)])
def test_randaugment_has_the_same_magnitude_in_timms_loader(magnitude: int, of_ten: int) -> None:
    augment = AugmentConfig(policy="randaugment", policy_magnitude=magnitude)
    transform: Any = build_transform(ImageSpec(), augment)
    (policy,) = (part for part in transform.transforms if isinstance(part, RandAugment))
    assert {op.magnitude for op in policy.ops} == {of_ten}

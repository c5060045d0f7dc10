"""The DALI graphs: the GPU form without a GPU, the augmentations' effect, and agreement with torchvision."""

from __future__ import annotations

import dataclasses
import io
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp

from asp_dist.config import AugmentConfig, DaliConfig, DataConfig
from asp_dist.data.dali.pipeline import Placement, train_pipeline, val_pipeline
from asp_dist.data.dali.policies import magnitudes, randaugment_step
from asp_dist.data.dali.readers import Reader, on_network
from asp_dist.data.dali.resize import TorchResize
from asp_dist.data.images import ImageSpec
from asp_dist.data.torch_loader import build_transform
from asp_dist.errors import UserError

EVERYTHING = AugmentConfig(hflip=0.5, vflip=0.5, color_jitter=0.4, erase=0.25)
GPU = Placement("gpu")
POLICIES = ("none", "randaugment", "trivialaugment", "autoaugment")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Sixteen photograph-like JPEGs of odd sizes: smooth colors, so that resampling is not dominated by noise."""
    return write_images(tmp_path_factory.mktemp("images"), [(150 + 7 * i, 190 - 3 * i) for i in range(16)])


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """The same, square, so that a crop of the whole area with aspect ratio 1 leaves no choice."""
    return write_images(tmp_path_factory.mktemp("square"), [(96, 96)] * 16)


def write_images(folder: Path, sizes: list[tuple[int, int]]) -> Reader:
    generator = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        small = Image.fromarray(generator.integers(0, 255, (9, 11, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=95)
    lines = "".join(f"{i}.jpg {i}\n" for i in range(16))
    (folder / "files").write_text(lines)
    return Reader({"file_list": str(folder / "files"), "file_root": str(folder)}, tar=False)


def run(pipeline: Any) -> torch.Tensor:
    pipeline.build()
    images, _ = pipeline.run()
    return torch.from_numpy(np.array(images.as_tensor()))


def train_batch(reader: Reader, augment: AugmentConfig, seed: int = 1, batch_size: int = 16, **spec: Any) -> torch.Tensor:
    wanted = ImageSpec(**{"size": (64, 64), **spec})
    arguments: dict[str, Any] = {"batch_size": batch_size, "num_threads": 1, "device_id": None, "seed": seed}
    return run(train_pipeline(reader, wanted, augment, Placement(), **arguments))


@pytest.mark.parametrize(("policy", "interpolation"), list(zip(POLICIES, ["nearest", "bilinear", "bicubic", "lanczos"])))
def test_gpu_graphs_serialize_without_a_gpu(reader: Reader, policy: Any, interpolation: str) -> None:
    spec = ImageSpec(interpolation=interpolation)
    augment = dataclasses.replace(EVERYTHING, policy=policy)
    arguments = {"batch_size": 8, "num_threads": 2, "device_id": None}
    train = train_pipeline(reader, spec, augment, GPU, enable_checkpointing=True, **arguments).serialize()
    for operator in (b"decoders__ImageRandomCrop", b"CropMirrorNormalize", b"ColorTwist", b"Erase", b"Flip"):
        assert operator in train
    assert b"PythonFunction" not in train  # which only the CPU's has
    assert train.count(b"mixed") >= 1 and train.count(b"gpu") > 5
    assert b"jpeg_fancy_upsampling" in train  # without it, chroma differs from what the CPU decodes
    for mode in ("center", "squash"):
        val = val_pipeline(reader, dataclasses.replace(spec, crop_mode=mode), GPU, **arguments).serialize()
        assert all(word in val for word in (b"decoders__Image", b"mixed", b"gpu", b"jpeg_fancy_upsampling"))


@pytest.mark.parametrize("tar", [False, True])
def test_gpu_graphs_serialize_for_shards(tar: bool, reader: Reader) -> None:
    shards = Reader({"paths": ["a.tar"], "index_paths": ["a.idx"]}, tar=True) if tar else reader
    arguments = {"batch_size": 8, "num_threads": 2, "device_id": None}
    assert b"mixed" in train_pipeline(shards, ImageSpec(), EVERYTHING, GPU, **arguments).serialize()
    assert b"mixed" in val_pipeline(shards, ImageSpec(), GPU, **arguments).serialize()


def test_what_the_decoder_is_told_reaches_a_gpu_graph_alone(reader: Reader) -> None:
    arguments = {"batch_size": 8, "num_threads": 2, "device_id": None}
    words = (b"hw_decoder_load", b"preallocate_width_hint", b"preallocate_height_hint")
    spec = ImageSpec(interpolation="lanczos")  # whose graph on the CPU can be serialized
    told = Placement("gpu", dali=DaliConfig(decoder_load=0.5, preallocate=(5980, 6430)))
    for place, count in ((GPU, 0), (told, 3), (dataclasses.replace(told, device="cpu"), 0)):
        train = train_pipeline(reader, spec, EVERYTHING, place, **arguments).serialize()
        val = val_pipeline(reader, spec, place, **arguments).serialize()
        assert sum(word in train for word in words) == sum(word in val for word in words) == count


@pytest.mark.parametrize("policy", ["none", "randaugment"])
def test_the_memory_order_changes_no_pixel(reader: Reader, policy: Any) -> None:
    augment = dataclasses.replace(EVERYTHING, policy=policy)
    arguments = {"batch_size": 16, "num_threads": 2, "device_id": None, "seed": 3}
    first, last = Placement(), Placement(channels_last=True)
    for one, other in (
        [train_pipeline(reader, ImageSpec((64, 48)), augment, place, **arguments) for place in (first, last)],
        [val_pipeline(reader, ImageSpec((64, 64)), place, **arguments) for place in (first, last)],
    ):
        assert torch.equal(run(one), run(other).permute(0, 3, 1, 2))


@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_validation_agrees_with_torchvision(reader: Reader, crop_pct: float, interpolation: str, crop_mode: str) -> None:
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    spec = ImageSpec((64, 64), crop_pct, crop_mode, interpolation)
    mine = run(val_pipeline(reader, spec, Placement(), batch_size=16, num_threads=1, device_id=None))
    resize: Any = spec.resize if crop_mode == "squash" else spec.resize[0]
    theirs = transforms.Compose(
        [
            transforms.Resize(resize, InterpolationMode(interpolation), antialias=True),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )
    root = Path(reader.arguments["file_root"])
    for i in range(16):
        with Image.open(io.BytesIO((root / f"{i}.jpg").read_bytes())) as image:
            difference = (mine[i] - theirs(image.convert("RGB"))).abs().mean().item()
        assert difference <= 0.01 / 0.225, f"image {i}: {difference * 0.225:.4f} of the range"


def test_each_augmentation_changes_what_it_should(square: Reader) -> None:
    still = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    plain = train_batch(square, still)
    assert torch.equal(plain, train_batch(square, still, seed=2))  # nothing left to draw
    flipped = train_batch(square, dataclasses.replace(still, hflip=1.0))
    assert torch.allclose(flipped, plain.flip(-1))
    assert torch.allclose(train_batch(square, dataclasses.replace(still, vflip=1.0)), plain.flip(-2), atol=0.02)
    jitter = train_batch(square, dataclasses.replace(still, color_jitter=0.4))
    assert (jitter - plain).abs().mean() > 0.05
    for policy in POLICIES[1:]:
        changed = train_batch(square, dataclasses.replace(still, policy=policy))  # type: ignore[arg-type]
        assert changed.shape == plain.shape and (changed - plain).abs().mean() > 0.05
    cropped = train_batch(square, dataclasses.replace(still, scale=(0.1, 0.3)))
    assert (cropped - plain).abs().mean() > 0.05


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [40, 150])  # smaller and larger than the images
def test_training_crops_are_resized_as_by_pil(square: Reader, interpolation: str, side: int) -> None:
    whole = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    spec = ImageSpec((side, side), interpolation=interpolation)
    mine = train_batch(square, whole, size=spec.size, interpolation=interpolation)
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    for i, images in enumerate(mine):
        with Image.open(Path(square.arguments["file_root"]) / f"{i}.jpg") as image:
            theirs = np.array(image.resize(spec.size, Image.Resampling[interpolation.upper()]))
        levels = (images * std + mean) * 255 - torch.from_numpy(theirs).permute(2, 0, 1)
        assert levels.abs().max() < 2.01 and levels.abs().mean() < 0.1


def test_a_padded_crop_is_the_image_moved_with_zeros_around_it(square: Reader) -> None:
    still = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    spec = ImageSpec((64, 64))
    zero = -torch.tensor(spec.mean) / torch.tensor(spec.std)
    plain, moved = train_batch(square, still), train_batch(square, dataclasses.replace(still, pad=4))
    padded = zero[:, None, None].expand(16, 3, 72, 72).clone()
    padded[:, :, 4:68, 4:68] = plain
    places = []
    for whole, image in zip(padded, moved):
        found = [
            (y, x) for y in range(9) for x in range(9) if torch.allclose(whole[:, y : y + 64, x : x + 64], image, atol=1e-4)
        ]
        assert len(found) == 1
        places += found
    assert len(set(places)) > 8 and {0, 8} & {place for pair in places for place in pair}


@pytest.mark.parametrize("policy", ["randaugment", "augmix"])
def test_timms_policies_run_at_every_magnitude(policy: Any) -> None:
    """Small magnitudes ask for an image of no bits, which newer versions of PIL refuse."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    seen = set()
    for magnitude in (1, 3, 30):
        augment = AugmentConfig(
            policy=policy, policy_magnitude=magnitude, policy_ops=4, policy_std=0.5, pad=2, scale=(1.0, 1.0)
        )
        transform = build_transform(ImageSpec((32, 32)), augment)
        for seed in range(60):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            result = transform(image)
            assert result.shape == (3, 32, 32) and result.isfinite().all()
            seen.add(float(result.sum()))
    assert len(seen) > 100


def test_what_dali_has_not_is_refused() -> None:
    augment = AugmentConfig(policy="augmix")
    with pytest.raises(UserError, match=r"DALI has no such thing: set data\.backend to torch"):
        DataConfig(augment=augment)
    assert DataConfig(augment=augment, backend="torch").augment == augment


@pytest.mark.parametrize(("mean", "std"), [(27, 0.5), (15, 0.5), (9, 1.0), (30, 0.5), (27, 0.0), (27, 101.0)])
def test_randaugments_magnitudes_are_timms(mean: int, std: float) -> None:
    """Against timm's own operation, which tells the magnitude that it drew."""
    drawn: list[float] = []

    def note(level: float, _: Any) -> tuple[float]:
        drawn.append(level)
        return (0.0,)

    spread = std if std <= 100 else math.inf
    operation = AugmentOp("Rotate", prob=1.0, magnitude=mean / 3, hparams={"magnitude_std": spread})
    operation.level_fn = note
    image = Image.new("RGB", (4, 4))
    random.seed(0)
    for _ in range(20000):
        operation(image)
    mine = np.array(magnitudes(mean, std)) / 3
    assert abs(mine.mean() - np.mean(drawn)) < 0.06
    assert abs(mine.std() - np.std(drawn)) < 0.06
    assert mine.min() >= min(drawn) - 0.35 and mine.max() <= max(drawn) + 0.35


def test_randaugment_applies_an_operation_with_its_probability(square: Reader) -> None:
    still = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, policy="randaugment", policy_ops=1)
    plain = train_batch(square, dataclasses.replace(still, policy="none"))
    assert torch.equal(plain, train_batch(square, dataclasses.replace(still, policy_prob=0.0)))
    for increasing in (False, True):
        changed = {}
        for probability in (0.3, 1.0):
            augment = dataclasses.replace(still, policy_prob=probability, policy_std=0.5, policy_increasing=increasing)
            batch = train_batch(square, augment, batch_size=192)  # each of the 16 images 12 times
            changed[probability] = ((batch - plain.repeat(12, 1, 1, 1)).flatten(1).abs().amax(1) > 1e-4).float()
        shares = {probability: float(which.mean()) for probability, which in changed.items()}
        error = (0.3 * 0.7 / len(changed[0.3])) ** 0.5
        assert (
            0.75 < shares[1.0] < 1.0
        )  # one of the fourteen operations is the identity, and some images have nothing to equalize
        assert abs(shares[0.3] - 0.3 * shares[1.0]) < 4 * error


def test_a_translation_stays_within_its_share_of_the_image() -> None:
    """DALI's own limit is 100 pixels, whatever the image's size."""
    for size in ((32, 32), (224, 160)):
        policy = randaugment_step(AugmentConfig(), size)
        limits = {str(name): augmentation.mag_range for name, augmentation in policy.augmentations.items()}
        moves = {name: limit for name, limit in limits.items() if "translate" in name}
        assert moves == {"translate_x": (0, round(0.45 * size[1])), "translate_y": (0, round(0.45 * size[0]))}


def test_images_resized_by_threads_stay_in_their_places() -> None:
    images = [np.full((8 + i, 12, 3), i, dtype=np.uint8) for i in range(11)]
    sizes = [np.array([5, 6 + i], dtype=np.int32) for i in range(11)]
    for threads in (1, 3, 16):
        resized = TorchResize("bicubic", threads)(images, sizes)
        assert [(image.shape, image.min(), image.max()) for image in resized] == [((5, 6 + i, 3), i, i) for i in range(11)]


def test_erasing_puts_the_mean_on_a_rectangle_with_its_probability(square: Reader) -> None:
    still = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)
    plain = train_batch(square, still)
    always = train_batch(square, dataclasses.replace(still, erase=1.0))
    for i in range(16):
        rows, columns = torch.nonzero((always[i] != plain[i]).any(0), as_tuple=True)
        height, width = (int(x.max() - x.min()) + 1 for x in (rows, columns))
        assert 0.01 < height * width / 64**2 < 0.36  # 2 % to a third of the area
        inside = always[i][:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert inside.abs().max() < 0.02  # the mean color, normalized, but for rounding to uint8
    changed = [
        bool((train_batch(square, dataclasses.replace(still, erase=0.25), seed)[i] != plain[i]).any())
        for seed in range(8)
        for i in range(16)
    ]
    assert 0.15 < sum(changed) / len(changed) < 0.35


def test_network_file_systems_are_known_by_the_mount_table(tmp_path: Path) -> None:
    assert not on_network(tmp_path)

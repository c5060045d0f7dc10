"""The network, the images and their augmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from asp_dist.config.checks import check, check_address, check_fraction, check_positive


@dataclass(frozen=True)
class ModelConfig:
    """The network: any name in timm's registry, which `asp_dist.models` adds the paper's networks to.

    Args:
        name: timm model name, such as ``resnet50``.
        pretrained: start from timm's published weights (needs a network), or from `weights` if that is set.
        weights: a local ``.safetensors`` or ``.pth`` file to start from.
        kwargs: further arguments of ``timm.create_model``, such as ``drop_path_rate``.
    """

    name: str = "resnet18"
    pretrained: bool = False
    weights: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


AutoAugment = Literal["none", "randaugment", "trivialaugment", "autoaugment"]


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training images. DALI runs it, on the CPU or the GPU.

    Args:
        scale: smallest and largest share of the area that a random resized crop keeps.
        ratio: smallest and largest aspect ratio of that crop.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of brightness, contrast and saturation jitter; 0 turns it off.
        policy: automatic augmentation policy.
        policy_ops: RandAugment's number of operations per image.
        policy_magnitude: RandAugment's magnitude, 0 to 30.
        erase: probability of random erasing.
        repeats: repeated augmentation: how often each image appears in a batch's pool (1 is off).
        mixup: alpha of mixup (0 is off), by timm on the batch.
        cutmix: alpha of cutmix (0 is off), by timm on the batch.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    policy: AutoAugment = "none"
    policy_ops: int = 2
    policy_magnitude: int = 9
    erase: float = 0.0
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "erase"):
            check_fraction(f"data.augment.{name}", getattr(self, name))
        low, high = self.scale
        check(0 < low <= high <= 1, f"data.augment.scale = {self.scale} must satisfy 0 < low <= high <= 1")
        low, high = self.ratio
        check(0 < low <= high, f"data.augment.ratio = {self.ratio} must satisfy 0 < low <= high")
        check(self.repeats >= 1, f"data.augment.repeats = {self.repeats} must be at least 1")
        check(
            0 <= self.policy_magnitude <= 30,
            f"data.augment.policy_magnitude = {self.policy_magnitude} is outside 0..30",
        )


Backend = Literal["dali", "torch", "synthetic"]
DataFormat = Literal["auto", "folder", "manifest", "shards"]


@dataclass(frozen=True)
class DataConfig:
    """The images and how they reach the network.

    Args:
        root: the data set: a folder with ``train/CLASS/*`` and ``val/CLASS/*``, manifests, or tar shards.
        backend: ``dali`` (default), ``torch`` (timm's loader) or ``synthetic`` (random tensors that cost nothing).
        format: how `root` is laid out; ``auto`` looks.
        train: name of the training split's folder, manifest or shard prefix under `root`.
        val: the same for the validation split.
        batch_size: images per optimizer step, over all workers and accumulation steps.
        eval_batch_size: images per worker in a validation batch; None: the training batch per worker.
        input_size: image side in pixels; None: from the model's timm data config.
        progressive_sizes: image sides of the training images over the epochs, spread evenly; empty: `input_size`.
        threads: decoding threads per worker; None: from the CPUs that the worker may use.
        prefetch: batches that the pipeline works ahead.
        synthetic_samples: (training, validation) samples of the synthetic source.
        synthetic_classes: number of classes of the synthetic source.
        augment: augmentation of the training images.
    """

    root: str = "data/digits"
    backend: Backend = "dali"
    format: DataFormat = "auto"
    train: str = "train"
    val: str = "val"
    batch_size: int = 64
    eval_batch_size: int | None = None
    input_size: int | None = None
    progressive_sizes: tuple[int, ...] = ()
    threads: int | None = None
    prefetch: int = 2
    synthetic_samples: tuple[int, int] = (1024, 256)
    synthetic_classes: int = 10
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        check_address("data.root", self.root)
        check(self.batch_size >= 1, f"data.batch_size = {self.batch_size} must be at least 1")
        for name in ("eval_batch_size", "input_size", "threads", "prefetch", "synthetic_classes"):
            check_positive(f"data.{name}", getattr(self, name))

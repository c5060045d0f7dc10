"""The DALI graphs of the training and validation pipelines. Where they work is a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nvidia.dali import fn, math, pipeline_def, types

from asp_dist.config import AugmentConfig, DaliConfig
from asp_dist.data.dali.policies import apply_policy
from asp_dist.data.dali.readers import Reader
from asp_dist.data.dali.resize import MODES, torch_resize
from asp_dist.data.images import ImageSpec, erases_batches

INTERPOLATION = {
    "nearest": types.INTERP_NN,
    "bilinear": types.INTERP_LINEAR,
    "bicubic": types.INTERP_CUBIC,
    "lanczos": types.INTERP_LANCZOS3,
}
ERASE_AREA = (0.02, 1 / 3)  # as in timm
ERASE_LOG_RATIO = (-1.2039728043259361, 1.2039728043259361)  # aspect ratio from 0.3 to 1 / 0.3


@dataclass(frozen=True)
class Placement:
    """Where a graph works, and in which memory order its images leave it.

    Args:
        device: ``cpu`` or ``gpu``.
        channels_last: whether images leave as [H, W, 3] instead of [3, H, W].
        dali: how DALI uses a GPU.
    """

    device: str = "cpu"
    channels_last: bool = False
    dali: DaliConfig = DaliConfig()

    @property
    def layout(self) -> str:
        """DALI's name of the memory order."""
        return "HWC" if self.channels_last else "CHW"

    @property
    def decoder(self) -> dict[str, Any]:
        """The decoders' arguments: a GPU pipeline starts from bytes on the CPU."""
        if self.device == "cpu":
            return {"device": "cpu"}
        arguments: dict[str, Any] = {"device": "mixed"}
        if self.dali.decoder_load is not None:
            arguments["hw_decoder_load"] = self.dali.decoder_load
        if self.dali.preallocate is not None:
            arguments["preallocate_width_hint"], arguments["preallocate_height_hint"] = self.dali.preallocate
        return arguments


def checked(encoded: Any) -> tuple[Any, Any]:
    """`encoded` again, once every image's header has been parsed, and the images' shapes, int64 [B, 3].

    DALI 2.4's decoder crashes the process (SIGSEGV in most runs with 256 images) when it meets an image that it
    cannot parse while others of the batch are being decoded. Parsing the headers first, in an operator that the
    decoder depends on through the shape below, turns that into an exception. It costs nothing that can be measured.
    """
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    return fn.reshape(encoded, rel_shape=fn.cast(shape[0:1] * 0 + 1, dtype=types.FLOAT)), shape


def augment_colors(images: Any, augment: AugmentConfig, size: tuple[int, int]) -> Any:
    """Color jitter, then the automatic policy, on uint8 images [H, W, 3] of `size`."""
    if augment.color_jitter > 0:
        low, high = max(0.0, 1 - augment.color_jitter), 1 + augment.color_jitter
        images = fn.color_twist(
            images,
            brightness=fn.random.uniform(range=(low, high)),
            contrast=fn.random.uniform(range=(low, high)),
            saturation=fn.random.uniform(range=(low, high)),
        )
    return apply_policy(images, augment, size)


def padded_crop(images: Any, size: tuple[int, int], pad: int) -> Any:
    """A crop of `size` at a random place of the images with `pad` pixels of zeros around them."""
    start = fn.random.uniform(values=list(range(-pad, pad + 1)), shape=[2], dtype=types.INT32)
    return fn.slice(images, start=start, shape=list(size), axis_names="HW", out_of_bounds_policy="pad", fill_values=0)


def erase(images: Any, augment: AugmentConfig, spec: ImageSpec) -> Any:
    """Random erasing (arXiv 1708.04896): with its probability, a rectangle becomes the mean color."""
    probability = augment.erase
    if probability <= 0 or erases_batches(augment):
        return images
    area = fn.random.uniform(range=ERASE_AREA)
    ratio = fn.random.uniform(range=ERASE_LOG_RATIO)
    ratio = types.Constant(2.718281828459045) ** ratio
    chosen = fn.cast(fn.random.coin_flip(probability=probability), dtype=types.FLOAT)
    height = _min1(fn.cast(area * ratio, dtype=types.FLOAT) ** 0.5) * chosen
    width = _min1(fn.cast(area / ratio, dtype=types.FLOAT) ** 0.5) * chosen
    top = fn.random.uniform(range=(0.0, 1.0)) * (1.0 - height)
    left = fn.random.uniform(range=(0.0, 1.0)) * (1.0 - width)
    return fn.erase(
        images,
        anchor=fn.stack(top, left),
        shape=fn.stack(height, width),
        axis_names="HW",
        normalized_anchor=True,
        normalized_shape=True,
        fill_value=[255 * m for m in spec.mean],
    )


def _min1(value: Any) -> Any:
    return math.min(value, 1.0)


def normalize(images: Any, spec: ImageSpec, place: Placement, **kwargs: Any) -> Any:
    """uint8 [H, W, 3] to normalized float32; `kwargs` crop and mirror on the way."""
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT,
        output_layout=place.layout,
        mean=[255 * m for m in spec.mean],
        std=[255 * s for s in spec.std],
        **kwargs,
    )


def train_images(encoded: Any, spec: ImageSpec, augment: AugmentConfig, place: Placement) -> Any:
    """Random resized crop, color, policy, erasing, flips and normalization of encoded images."""
    decoded = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    if augment.pad:
        images = fn.decoders.image(checked(encoded)[0], **place.decoder, **decoded)
    else:
        images = fn.decoders.image_random_crop(
            checked(encoded)[0],
            **place.decoder,
            **decoded,
            random_area=list(augment.scale),
            random_aspect_ratio=list(augment.ratio),
            num_attempts=10,
        )
    if place.device == "cpu" and spec.interpolation in MODES:
        images = torch_resize(images, spec.size, spec.interpolation)
    else:
        images = fn.resize(images, size=spec.size, interp_type=INTERPOLATION[spec.interpolation], antialias=True)
    if augment.pad:
        images = padded_crop(images, spec.size, augment.pad)
    images = augment_colors(images, augment, spec.size)
    images = erase(images, augment, spec)
    if augment.vflip > 0:
        images = fn.flip(images, horizontal=0, vertical=fn.random.coin_flip(probability=augment.vflip))
    mirror = fn.random.coin_flip(probability=augment.hflip) if augment.hflip > 0 else 0
    return normalize(images, spec, place, mirror=mirror)


def val_images(encoded: Any, spec: ImageSpec, place: Placement) -> Any:
    """Resize, center crop and normalization of encoded images, as timm's evaluation does, to the pixel.

    torchvision rounds the longer side down and a half pixel of the crop's place to the even one; DALI would round both
    up, and crops would lie a pixel apart. Like PIL, neither backend turns an image by its EXIF orientation.
    """
    encoded, shape = checked(encoded)
    images: Any = fn.decoders.image(
        encoded,
        **place.decoder,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # on a GPU too, as libjpeg-turbo does it on the CPU
    )
    size: Any = spec.resize
    mode = "default"
    if spec.crop_mode == "center" and spec.size[0] == spec.size[1]:
        size = shape[0:2] * spec.resize[0] // math.min(shape[0], shape[1])
    elif spec.crop_mode == "center":
        mode = "not_smaller"
    if place.device == "cpu" and spec.interpolation in MODES and mode == "default":
        return normalize(torch_resize(images, size, spec.interpolation, crop=spec.size), spec, place)
    if not isinstance(size, tuple):
        size = fn.cast(size, dtype=types.FLOAT)
    images = fn.resize(images, size=size, mode=mode, interp_type=INTERPOLATION[spec.interpolation], antialias=True)
    places = {f"crop_pos_{axis}": _center(images.shape()[i], spec.size[i]) for i, axis in enumerate("yx")}
    return normalize(images, spec, place, crop=spec.size, rounding="truncate", **places)


def _center(side: Any, crop: int) -> Any:
    """The relative place of a center crop, between 0 and 1, that truncates to torchvision's ``round((side - crop) / 2)``."""
    spare = fn.cast(side, dtype=types.INT32) - crop
    half = spare // 2
    start = half + (spare & 1) * (half & 1)  # half a pixel goes to the even one
    return fn.cast(start + 0.25, dtype=types.FLOAT) / math.max(fn.cast(spare, dtype=types.FLOAT), 1.0)


@pipeline_def(enable_conditionals=True)  # type: ignore[untyped-decorator]
def train_pipeline(reader: Reader, spec: ImageSpec, augment: AugmentConfig, place: Placement) -> Any:
    """Training images float32 [B, 3, H, W], or [B, H, W, 3] where channels are last, and the reader's positions."""
    encoded, position = reader()
    return train_images(encoded, spec, augment, place), position


@pipeline_def  # type: ignore[untyped-decorator]
def val_pipeline(reader: Reader, spec: ImageSpec, place: Placement) -> Any:
    """Validation images as the training images, and the reader's positions; the last batch is padded."""
    encoded, position = reader(pad=True)
    return val_images(encoded, spec, place), position

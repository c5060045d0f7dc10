"""Automatic augmentation policies in DALI; RandAugment as timm has it, with a magnitude that varies."""

from __future__ import annotations

import statistics
import warnings
from typing import Any

from nvidia.dali.auto_aug import auto_augment, rand_augment, trivial_augment
from nvidia.dali.auto_aug.core import Policy

from asp_dist.config import AugmentConfig

BINS = 31  # RandAugment's magnitudes, 0 to 30
DRAWS = 40  # magnitudes, equally likely, that stand for a normal distribution
UNIFORM = 100.0  # a standard deviation above it means a uniform magnitude, as in timm
FARTHEST = 0.45  # share of the side that a translation moves at most: timm's, and 100 of 224 pixels in DALI


def apply_policy(images: Any, augment: AugmentConfig, size: tuple[int, int]) -> Any:
    """The policy on uint8 images [H, W, 3] of `size`."""
    # DALI's own policies use deprecated names of DALI's operators, and DALI resets the filters before it warns.
    with warnings.catch_warnings(record=True):
        if augment.policy == "randaugment" and augment.policy_prob > 0:
            policy = randaugment_step(augment, size)
            for _ in range(augment.policy_ops):
                images = auto_augment.apply_auto_augment(policy, images, fill_value=128)
        elif augment.policy == "trivialaugment":
            images = trivial_augment.trivial_augment_wide(images)
        elif augment.policy == "autoaugment":
            images = auto_augment.auto_augment(images)
    return images


def randaugment_step(augment: AugmentConfig, size: tuple[int, int]) -> Policy:
    """One step of RandAugment (arXiv 1909.13719): one of the operations, with its probability, at one of the magnitudes.

    DALI's own has one magnitude and applies every operation; a policy of AutoAugment's form, in which each pair of an operation
    and a magnitude is a choice, has the rest.
    """
    suite = (
        rand_augment.get_rand_augment_suite if augment.policy_increasing else rand_augment.get_rand_augment_non_monotonic_suite
    )
    operations = suite(max_translate_abs=tuple(round(FARTHEST * side) for side in size))
    choices = [
        [(operation, augment.policy_prob, None if operation.mag_range is None else magnitude)]
        for operation in operations
        for magnitude in magnitudes(augment.policy_magnitude, augment.policy_std)
    ]
    return Policy("RandAugment", num_magnitude_bins=BINS, sub_policies=choices)


def magnitudes(mean: int, std: float) -> list[int]:
    """Magnitudes in [0, 30], equally likely, for a normal one of this mean and, on timm's scale of 0 to 10, this deviation.

    Above a deviation of 100 they are uniform up to `mean`, as timm's are.
    """
    if std == 0:
        return [mean]
    if std > UNIFORM:
        return [round(mean * (i + 0.5) / DRAWS) for i in range(DRAWS)]
    normal = statistics.NormalDist(mean, 3 * std)
    return [min(max(round(normal.inv_cdf((i + 0.5) / DRAWS)), 0), BINS - 1) for i in range(DRAWS)]

"""How many workers an elastic group has: as many as the cluster offers, of the sizes that the batch can be dealt to."""

from __future__ import annotations

from collections.abc import Sequence

from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class DividingScalingPolicy(ElasticScalingPolicy):
    """Ray Train's elastic policy, which leaves workers that the batch does not divide among on their nodes, idle.

    Lives in Ray Train's controller.

    Args:
        scaling_config: Ray's own.
        sizes: the sizes that a group may have.
    """

    def __init__(self, scaling_config: ScalingConfig, sizes: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.sizes = tuple(sizes)

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        offered = super()._count_possible_workers(reserved_resources)
        return max((size for size in self.sizes if size <= offered), default=0)

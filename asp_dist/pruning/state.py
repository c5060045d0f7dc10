"""Saving a pruner and restoring it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asp_dist.pruning.masks import Masks


class PrunerState(Masks):
    """The part of `Pruner` that makes runs resumable."""

    _fresh: Tensor
    _local_counts: Tensor
    _count_from: int

    def _write_pruned(self, means: Tensor | None) -> None:
        raise NotImplementedError

    def _count_layers(self) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the model's own state: plain types and tensors of whole layers.

        Independent of the world size and of sharding; a collective under FSDP2.
        """
        return {
            "steps": self.steps,
            "frozen": self.frozen,
            "skipped": self.skipped,
            "center": self.center,
            "thresholds": self.thresholds.clone(),
            "sigmas": self.sigmas.clone(),
            "measured": self.measured.clone(),
            "fresh": self._fresh.clone(),
            "count_from": self._count_from,
            "control": self.control.state_dict(),
            "dense": {s.info.name: s.gather(s.dense).detach().clone() for s in self.shards},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. After a freeze the model's own state must be loaded before, and after the Pruner was built.

        Raises:
            ValueError: the state is of other layers, or the model's weights are not those that the frozen mask leaves.
        """
        if list(state["dense"]) != list(self.costs.names):
            different = sorted(set(state["dense"]) ^ set(self.costs.names)) or ["(another order)"]
            raise ValueError(f"the pruner's state is of other layers; first difference: {different[0]!r}")
        for shard in self.shards:
            shard.scatter_(state["dense"][shard.info.name].to(self.device), shard.dense)
        self.steps, self.frozen, self.skipped = state["steps"], state["frozen"], state["skipped"]
        self.center = state["center"]
        self.thresholds, self.sigmas = state["thresholds"].clone(), state["sigmas"].clone()
        self.measured, self._count_from = state["measured"].clone(), state["count_from"]
        self.control.load_state_dict(state["control"])
        if not self.frozen:
            self._write_pruned(None)
        for shard in self.shards:
            if self.frozen and not torch.equal(shard.pruned == 0, shard.dense != 0):
                raise ValueError(
                    f"layer {shard.info.name!r}: the model's weights are not those of the frozen mask. Building a Pruner "
                    "prunes the model: load the model's state after that, and before the pruner's"
                )
        self._local_counts = self._count_layers()
        self._fresh = state["fresh"].clone()

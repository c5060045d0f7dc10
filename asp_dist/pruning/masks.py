"""The end of pruning: the exact budget and the frozen mask; and what is done with masks before and after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from asp_dist.pruning import projection
from asp_dist.pruning.density import weight_threshold
from asp_dist.pruning.layers import unwrapped
from asp_dist.pruning.operators import blocks
from asp_dist.pruning.report import Report
from asp_dist.pruning.shards import LayerShard, RankReducer, flat, local


class Masks(Report):
    """The masking side of `Pruner`."""

    shards: list[LayerShard]
    reducer: RankReducer
    device: torch.device
    floors: Tensor

    def _count_all(self) -> Tensor:
        return torch.stack([torch.count_nonzero(shard.pruned) for shard in self.shards]).double()

    def _refresh_counts(self) -> None:
        """Count every layer now, for a report; a collective. What the control has seen stays: a report changes no training."""
        (counts,) = self.reducer.reduce(self._count_all())
        self.measured = counts.cpu().round() / self.numel

    @torch.no_grad()
    def finalize(self) -> None:
        """Project onto the budget exactly and freeze the mask; the remaining weights go on training. Does nothing twice.

        Weights are ordered by |w| / b over the network, as the learned thresholds express it; see `projection.keep_counts`.
        From here on `dense` keeps, of the dense weights, those that the mask removed, and zero elsewhere.
        While it sorts the weights it takes, once, the memory of up to 1.7 copies of them more, and of 3.6 in half precision.
        """
        if self.frozen:
            return
        magnitudes = projection.SortedMagnitudes(self.shards, self.reducer)
        thresholds = weight_threshold(self.thresholds, self.sigmas)
        kept = projection.keep_counts(magnitudes, thresholds, self.limits, self.floors)
        tiny = {}
        for shard, mask in zip(self.shards, projection.keep_masks(magnitudes, kept)):
            dense, pruned = shard.flat_dense(), shard.flat_pruned()
            tiny[dense.dtype] = torch.finfo(dense.dtype).tiny
            # The forward pass goes on with the weights that the operator made; where it had none, with the dense ones.
            pruned.copy_(torch.where(mask, torch.where(pruned == 0, dense, pruned), 0.0))
            pruned.masked_fill_(mask & (pruned == 0), tiny[dense.dtype])
            dense.masked_fill_(mask, 0.0)
            dense.masked_fill_(~mask & (dense == 0), tiny[dense.dtype])
        self.frozen = True
        self._refresh_counts()

    def _apply_frozen_masks(self) -> None:
        for shard in self.shards:
            shard.flat_pruned().masked_fill_(shard.flat_dense() != 0, 0.0)

    @contextmanager
    def dense(self, names: Sequence[str] | None = None) -> Iterator[None]:
        """Put the dense weights in place, of all layers or of the named ones, while the context lasts.

        After `finalize` the dense weights are the trained ones, with the removed ones as they were when the mask was frozen.
        """
        chosen = [s for s in self.shards if names is None or s.info.name in names]
        kept = [shard.pruned.clone() for shard in chosen]
        with torch.no_grad():
            for shard in chosen:
                shard.pruned.copy_(shard.pruned + shard.dense if self.frozen else shard.dense)
        try:
            yield
        finally:
            with torch.no_grad():
                for shard, values in zip(chosen, kept):
                    shard.pruned.copy_(values)

    @torch.no_grad()
    def apply_masks_(self, other: nn.Module) -> None:
        """Zero, in a model of the same architecture (an average of the weights, say), every weight that is pruned here."""
        theirs = dict(unwrapped(other).named_parameters())
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for shard in self.shards:
            parameter = theirs[names[id(shard.parameter)]]
            local(parameter.data).masked_fill_(shard.pruned == 0, 0.0)

    @torch.no_grad()
    def check_agreement(self) -> None:
        """Compare thresholds, and checksums of replicated weights, over the ranks; a collective.

        Raises:
            RuntimeError: ranks differ; names a layer that does, for thresholds the one that differs most.
        """
        sums = [
            0.0 if shard.sharded else float(_checksum(flat(shard.pruned))) for shard in self.shards
        ]  # Integers below 2^53, exact in float64.
        mine = torch.stack([self.thresholds, torch.tensor(sums, dtype=torch.float64)]).to(self.device)
        spread = self.reducer.spread(mine).cpu()
        for what, row in zip(("thresholds", "weights"), spread):
            if bool((row != 0).any()):
                differs = row if what == "thresholds" else (row != 0).double()
                name = self.costs.names[int(differs.argmax())]
                raise RuntimeError(f"ranks disagree: layer {name!r} has different {what} after step {self.steps}")


def _checksum(values: Tensor) -> Tensor:
    """The sum of the bits of a flat tensor's numbers, taken as integers, below 2^52."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return torch.stack([some.sum() for (some,) in blocks(values.view(integers))]).sum() % (1 << 52)

"""Which layers cost accuracy: each layer's dense weights put back in turn, on a fixed share of the validation images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from asp_dist.config import TrainingConfig
from asp_dist.data.base import Batch
from asp_dist.pruning import Pruner
from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.schema import VAL_TOP1
from asp_dist.training.evaluation import evaluate_model
from asp_dist.training.world import World


def pick_subset(batches: Iterable[Batch], images: int, world: World, num_samples: int) -> list[Batch]:
    """This rank's share of `images` validation images, spread evenly over its samples; the same at every call.

    Validation goes through the classes in order, so its first images alone would be of a few classes.

    Args:
        batches: this rank's validation batches.
        images: how many images all ranks take together.
        world: the ranks.
        num_samples: validation images of all ranks.

    Returns:
        About full batches, as many on every rank (some may be empty).
    """
    stride = max(1, num_samples // max(1, images))
    picked: list[Batch] = []
    seen = 0
    for inputs, targets in batches:
        first = -seen % stride
        picked.append((inputs[first::stride].clone(), targets[first::stride].clone()))
        seen += len(targets)
    groups = [picked[i : i + stride] for i in range(0, len(picked), stride)]
    return [(torch.cat([b[0] for b in group]), torch.cat([b[1] for b in group])) for group in groups]


def layer_accuracy(
    model: nn.Module,
    pruner: Pruner,
    batches: Sequence[Batch],
    config: TrainingConfig,
    world: World,
    *,
    extra_sparsity: float | None = None,
) -> dict[str, LayerRow]:
    """For each pruned layer, top-1 with that layer's dense weights put back; a collective, the model is left as it was.

    Costs one pass over `batches` per layer (two with `extra_sparsity`), each rank over its own share.

    Args:
        model: the network that `pruner` prunes.
        pruner: keeps the dense weights.
        batches: from `pick_subset`.
        config: precision and memory order of the forward pass.
        world: the ranks.
        extra_sparsity: also measure with this share of the layer's remaining weights, its smallest, set to zero; in (0, 1).

    Returns:
        Layer name -> ``dense_top1``, ``dense_gain`` (over the pruned network's top-1 on the same images) and with
        ``extra_pruned_top1`` (fractions).
    """
    base = evaluate_model(model, batches, config, world)[VAL_TOP1]
    found: dict[str, LayerRow] = {}
    for info in pruner.pruned_weights:
        with pruner.dense([info.name]):
            top1 = evaluate_model(model, batches, config, world)[VAL_TOP1]
        found[info.name] = {"dense_top1": top1, "dense_gain": top1 - base}
        if extra_sparsity is not None:
            with extra_pruned(pruner, info.name, extra_sparsity):
                top1 = evaluate_model(model, batches, config, world)[VAL_TOP1]
            found[info.name]["extra_pruned_top1"] = top1
    return found


@contextmanager
def extra_pruned(pruner: Pruner, name: str, share: float) -> Iterator[None]:
    """Set the smallest `share` of a layer's nonzero weights to zero while the context lasts (under FSDP, of each shard's)."""
    layer = next(layer for layer in pruner.layers if layer.info.name == name)
    magnitudes = layer.pruned.abs()[layer.pruned != 0].flatten()
    count = int(share * magnitudes.numel())
    limit = magnitudes.float().kthvalue(count).values if count else -1.0
    with pruner.replaced({name: layer.pruned.masked_fill(layer.pruned.abs() <= limit, 0.0)}):
        yield


def add_to_rows(rows: list[LayerRow], accuracy: dict[str, LayerRow]) -> None:
    """Put the results into the layers' rows, in place."""
    for row in rows:
        row.update(accuracy.get(row["name"], {}))

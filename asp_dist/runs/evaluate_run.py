"""``asp-dist evaluate``: a network's accuracy on any data set, and its zeros."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config

from asp_dist.data import build_loaders, inspect_data
from asp_dist.data.base import Batch
from asp_dist.runs.subject import data_for, find_subject, outputs_for
from asp_dist.tracking.schema import VAL_LOSS, VAL_SAMPLES, VAL_TOP1, VAL_TOP5
from asp_dist.training.build import place_model
from asp_dist.training.evaluation import evaluate_model
from asp_dist.training.validation import count_zeros
from asp_dist.training.world import World


def evaluate(
    given: Path | str,
    world: World,
    *,
    model_name: str | None = None,
    average: bool = False,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracy and sparsity of a network; a collective.

    Args:
        given: a run's folder (its ``model.safetensors``), a checkpoint's, a weights file, or a name of timm's.
        world: the ranks, which share the images.
        model_name: the network of a file that does not say it.
        average: take the average of the weights out of the run's last checkpoint, or the checkpoint that is given.
        data: fields of `DataConfig` in place of the run's; with another ``root`` classes are matched by their names.

    Returns:
        ``what`` was evaluated, on which ``data`` (its address), ``top1``, ``top5`` (fractions), ``loss``, ``samples``,
        ``sparsity`` over the prunable weights, and the counts ``nonzero_weights`` and ``prunable_weights``.

    Raises:
        UserError: there is no such network, its data are gone, or their classes are others.
    """
    with tempfile.TemporaryDirectory(prefix="asp_dist_evaluate") as folder:
        subject = find_subject(str(given), model_name, Path(folder), average=average)
    chosen = data_for(subject, data or {}, world.world_size)
    outputs = outputs_for(subject, inspect_data(chosen).classes, chosen.root)
    training = dataclasses.replace(subject.config.training, parallel="ddp", sync_batch_norm=False)
    model_data = resolve_model_data_config(subject.model)
    model = place_model(training, subject.model, world)
    loaders = build_loaders(
        chosen, model_data=model_data, seed=training.seed, rank=world.rank, world_size=world.world_size, device=world.device
    )
    try:
        results = evaluate_model(model, _renumbered(loaders.val, outputs), training, world)
    finally:
        loaders.close()
    nonzero, prunable = count_zeros(subject.prunable)
    return {
        "what": subject.what,
        "data": f"{chosen.root}, {chosen.val}",
        "top1": results[VAL_TOP1],
        "top5": results[VAL_TOP5],
        "loss": results[VAL_LOSS],
        "samples": results[VAL_SAMPLES],
        "sparsity": 1.0 - nonzero / prunable if prunable else 0.0,
        "nonzero_weights": nonzero,
        "prunable_weights": prunable,
    }


def _renumbered(batches: Iterable[Batch], outputs: torch.Tensor | None) -> Iterator[Batch]:
    """The batches with the network's numbers of the classes in place of the data's."""
    for images, targets in batches:
        yield images, targets if outputs is None else outputs.to(targets.device)[targets]

"""Validation in the run, and what the run leaves behind."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from asp_dist.checkpoint.format import Manifest
from asp_dist.config import config_hash
from asp_dist.files import write_text
from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.schema import (
    EVAL,
    MODEL_FILE,
    SUMMARY_FILE,
    VAL,
    VAL_EMA,
    VAL_EMA_TOP1,
    VAL_SAMPLES,
    VAL_TOP1,
)
from asp_dist.training import health
from asp_dist.training.evaluation import evaluate_models
from asp_dist.training.layer_accuracy import add_to_rows, layer_accuracy, pick_subset
from asp_dist.training.run import Run, full_state, load_learned
from asp_dist.weight_files import save_safetensors


def validate(run: Run) -> bool:
    """Validate the model, and its average if there is one; log it; a collective.

    Returns:
        Whether this is the best validation at the budget so far. Before the budget holds, none is: a better accuracy
        at a lower sparsity is not a better model.

    Raises:
        Stopped: a rank was asked to stop meanwhile; nothing is logged.
        BadNumbers: see `health.check_layers`.
    """
    world = run.world
    world.broadcast_(list(run.buffers.tensors.values()))  # DDP trains with rank 0's batch norm statistics
    training = run.config.training
    on_batch = partial(health.raise_if_stopped, run)
    models = [run.model]
    if run.ema is not None:
        world.broadcast_(list(run.ema.module.buffers()))
        models.append(averaged_model(run))
    numbers_of = evaluate_models(models, run.loaders.judge, training, world, on_batch)
    results: dict[str, Any] = dict(numbers_of[0])
    for average in numbers_of[1:]:
        results.update({name.replace(VAL, VAL_EMA): value for name, value in average.items()})
    run.results = results
    run.snapshot = run.pruner.snapshot() if run.pruner is not None else None
    numbers = run.snapshot.metrics() if run.snapshot is not None else {}
    if run.snapshot is not None:
        rows = run.snapshot.rows()
        if layer_accuracy_due(run):
            add_to_rows(rows, measure_layers(run))
        run.tracker.log_layers(run.step, rows)
        health.check_layers(run, rows)
        health.check_allocation(run, numbers)
    run.tracker.log(run.step, {"kind": EVAL, "epoch": run.step / run.steps_per_epoch, **run.results, **numbers})
    score = max(run.results[VAL_TOP1], run.results.get(VAL_EMA_TOP1, 0.0))
    at_budget = run.pruner is None or run.pruner.frozen
    improved = at_budget and (run.best is None or score > run.best[VAL_TOP1])
    if improved:
        run.best = {"step": run.step, VAL_TOP1: score}
    return improved


def layer_accuracy_due(run: Run) -> bool:
    """Whether this validation also measures what each layer costs: every few epochs, and in the last one."""
    tracking = run.config.tracking
    due = (run.closed_epochs + 1) % tracking.layer_accuracy_every == 0 or run.step == run.total_steps
    return tracking.layer_accuracy_images > 0 and due


def measure_layers(run: Run) -> dict[str, LayerRow]:
    """Accuracy with each layer dense again, on the run's fixed share of the validation images; a collective."""
    assert run.pruner is not None
    if not run.layer_subset:
        images, judge = run.config.tracking.layer_accuracy_images, run.loaders.judge
        run.layer_subset = pick_subset(judge, images, run.world, judge.num_samples)
    return layer_accuracy(run.model, run.pruner, run.layer_subset, run.config.training, run.world)


def averaged_model(run: Run) -> nn.Module:
    """A copy of the averaged model with the current masks; the average itself keeps all its weights."""
    assert run.ema is not None
    model = copy.deepcopy(run.ema.module)
    if run.pruner is not None:
        run.pruner.apply_masks_(model)
    return model


@dataclass(frozen=True)
class Selected:
    """The weights that a run leaves behind.

    Attributes:
        average: whether they are the average.
        step: the step that they are of.
        results: their validation.
        on: what they were chosen on; None: nothing.
    """

    average: bool
    step: int
    results: dict[str, Any]
    on: str | None


def select_weights(run: Run) -> Selected:
    """Choose by ``output.select``, and set `run` to the best checkpoint's weights if it asks for them; a collective.

    A run whose budget was never met before its end has no best one: then it is the last.
    """
    select, results, step = run.config.output.select, run.results, run.step
    chosen_on = "validation" if run.loaders.select is None else "held-out training images"
    if select.startswith("best"):
        found: list[dict[str, Any]] = []

        def find() -> Manifest | None:
            best = run.checkpoints.best()
            if best is not None:
                found.append(best.state)
            return None if best is None else best.manifest

        manifest = run.world.on_main(find)
        if manifest is not None:
            state = run.world.share_state(found[0] if found else None)
            load_learned(run, state)
            if run.pruner is not None and state["pruner"] is not None:
                run.pruner.load_state_dict(state["pruner"])
            run.snapshot, results, step = None, manifest.metrics, manifest.step
        return Selected(select == "best-average", step, results, chosen_on)
    better = run.ema is not None and results[VAL_EMA_TOP1] >= results[VAL_TOP1]
    on = chosen_on if select == "auto" and run.ema is not None else None
    return Selected(better if select == "auto" else select == "average", step, results, on)


def finish_run(run: Run) -> dict[str, Any]:
    """Write ``model.safetensors`` and ``summary.json`` and return the summary, on every rank; a collective.

    The file holds the weights that `select_weights` chose.
    """
    run.checkpoints.wait()  # two writers at once might fill the disk where one does not
    chosen = select_weights(run)
    results, use_average = chosen.results, chosen.average
    prefix = VAL_EMA if use_average else VAL
    model = averaged_model(run) if use_average else run.model
    weights, _ = full_state(model, run.optimizer) if not use_average else (model.state_dict(), {})
    if run.loaders.select is not None:  # now for the images that chose nothing
        last = evaluate_models([model], run.loaders.val, run.config.training, run.world)[0]
        results = {name.replace(VAL, prefix, 1): value for name, value in last.items()} | {VAL_SAMPLES: last[VAL_SAMPLES]}
    if run.pruner is not None and run.snapshot is None:
        run.snapshot = run.pruner.snapshot()  # stopped and resumed between the last validation and here
    counts: Any = run.snapshot.summary() if run.snapshot is not None else dense_summary(run.model)
    summary: dict[str, Any] = {  # the keys of `RunSummary`
        "model": run.config.model.name,
        "top1": results[f"{prefix}top1"],
        "top5": results[f"{prefix}top5"],
        "val_loss": results[f"{prefix}loss"],
        "val_samples": results[VAL_SAMPLES],
        **counts,
        "best": run.best,
        "weights": "average" if use_average else "model",
        "selected": {"by": run.config.output.select, "step": chosen.step, "on": chosen.on},
        "images_per_second": run.meter.images_per_second,
        "epochs": run.epochs,
        "steps": run.step,
        "bad_steps": run.skipped,
        "seconds": run.meter.total_seconds,
        "world_size": run.world.world_size,
        "device": run.world.device.type,
        "precision": run.config.training.precision,
        "batch_size": run.config.data.batch_size,
        "data_root": run.config.data.root,
        "num_classes": len(run.loaders.info.classes),
        "classes": list(run.loaders.info.names),
        "wandb_run_id": getattr(run.tracker, "wandb_id", None),
        "config_hash": config_hash(run.config),
        "finished": time.time(),
    }
    summary = run.world.share(summary)
    if run.world.is_main:
        text = {"format": "pt", "model": run.config.model.name, "classes": json.dumps(list(run.loaders.info.classes))}
        save_safetensors(run.folder / MODEL_FILE, weights, metadata=text)
        write_text(run.folder / SUMMARY_FILE, json.dumps(summary, indent=1))
    return summary


def dense_summary(model: nn.Module) -> dict[str, Any]:
    """The counts of a run without pruning."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        "sparsity": 0.0,
        "sparsity_all": 0.0,
        "target_sparsity": 0.0,
        "nonzero_weights": total,
        "prunable_weights": total,
        "total_weights": total,
    }


def count_zeros(weights: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Nonzero and all weights in `weights`."""
    return sum(int(w.count_nonzero()) for w in weights.values()), sum(w.numel() for w in weights.values())

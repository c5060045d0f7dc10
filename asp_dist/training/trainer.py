"""The training loop: plain PyTorch, the same alone, under torchrun and under Ray Train."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from asp_dist.checkpoint.folder_lock import hold_folder
from asp_dist.checkpoint.manager import Event
from asp_dist.checkpoint.record import claim_run_dir, finished_summary, run_dir, store_config, with_absolute_paths
from asp_dist.config import Config
from asp_dist.files import allow_many_files
from asp_dist.tracking import build_tracker
from asp_dist.tracking.schema import LR, TRAIN, WARNING
from asp_dist.training import checkpointing, health
from asp_dist.training.build import DTYPES, advice_for_gpus
from asp_dist.training.evaluation import evaluate_model
from asp_dist.training.hooks import Hooks, Stopped
from asp_dist.training.meter import of_gpu
from asp_dist.training.run import Run, build_run
from asp_dist.training.validation import finish_run, validate
from asp_dist.training.world import World

log = logging.getLogger(__name__)
Batches = Iterator[tuple[Tensor, Tensor]]

__all__ = ["evaluate_model", "train", "train_step"]


def train(config: Config, world: World, hooks: Hooks | None = None) -> dict[str, Any]:
    """Train, prune and evaluate as `config` says, from the start or from the run's latest checkpoint.

    Args:
        config: the run.
        world: this rank among the others; all ranks call this function.
        hooks: where reports go, and what may ask to stop.

    Returns:
        The run's summary, on every rank.

    Raises:
        UserError: the configuration does not fit the data, the model, the workers, or the run in the folder.
        Stopped: `hooks` asked for it; a checkpoint is saved.
        BadNumbers: ``training.max_bad_steps`` steps in a row had a loss or gradient that is not finite.
        FolderBusy: another process still writes to the run's folder.
    """
    config, hooks = with_absolute_paths(config), hooks or Hooks()
    allow_many_files()
    with ExitStack() as held:
        world.on_main(lambda: held.enter_context(hold_folder(run_dir(config), hooks.folder_wait_s)))
        world.on_main(lambda: held.enter_context(checkpointing.hold_storage(config, hooks.folder_wait_s)))
        return _train(config, world, hooks)


def _train(config: Config, world: World, hooks: Hooks) -> dict[str, Any]:
    log.info("rank %d of %d on %s with %d threads", world.rank, world.world_size, world.device, torch.get_num_threads())
    world.on_main(lambda: checkpointing.fetch_record(config))
    identity = world.on_main(lambda: claim_run_dir(config))
    done = world.on_main(lambda: finished_summary(config))
    if done is not None:
        log.info("%s is finished already", run_dir(config))
        world.on_main(lambda: checkpointing.send_missing_results(config))
        return done
    checkpoints = checkpointing.build_checkpoint_manager(config, identity["id"], hooks.saved)
    places = [place for place in identity["places"] if place != config.output.storage]
    run = build_run(config, world, hooks, checkpoints, identity["id"])
    code = 1
    try:
        resumed = checkpointing.resume(run, places)
        world.on_main(lambda: store_config(config))
        run.tracker = build_tracker(config, run.folder, rank=world.rank, resume_step=run.step)
        checkpointing.log_events(run, resumed.events)
        if world.device.type == "cuda" and run.step == 0:
            advice = advice_for_gpus(config, run.model, min(run.input_size[1:]), world.world_size)
            checkpointing.log_events(run, [Event(WARNING, text) for text in advice])
        if resumed.elsewhere:
            checkpointing.save(run, best=resumed.best)
        try:
            for epoch in range(run.closed_epochs, run.epochs):
                if out_of_patience(run):
                    end_early(run)
                    break
                train_epoch(run, epoch)
                close_epoch(run, epoch)
        except Stopped as stopped:
            problem = checkpointing.save_and_wait(run)
            raise Stopped(stopped.reason, stopped.step, problem) from None
        log_profile(run, run.profile.close())
        summary = finish_run(run)
        code = 0
        return summary
    finally:
        checkpoints.wait()
        checkpointing.log_events(run, checkpoints.events())
        if world.is_main and not code:
            checkpointing.send_results(run)  # wandb's upload may take minutes, and the machine may be gone by then
        run.tracker.finish({} if code else summary, exit_code=code)
        if world.is_main and not code:
            run.hooks.finished(run.folder)
            checkpointing.send_results(run, checkpointing.GROWING)
        run.loaders.close()
        if not code and not config.data.cache_keep:
            run.loaders.remove_caches()


def train_epoch(run: Run, epoch: int) -> None:
    """The optimizer steps of `epoch` that are still to do."""
    config = run.config
    if run.step >= run.end_of(epoch):
        return  # it was stopped between its last step and its validation
    batches = run.loaders.train.start(epoch, run.step - epoch * run.steps_per_epoch)
    run.ddp_model.train()
    if run.mixup is not None:
        run.mixup.mixup_enabled = not 0 < config.data.augment.mixup_off_epoch <= epoch
    while run.step < run.end_of(epoch):
        start = time.perf_counter()
        decision = train_step(run, batches)
        run.step += 1
        run.meter.step_done(time.perf_counter() - start)
        if run.step % config.training.log_every == 0 or run.step == run.end_of(epoch):
            log_step(run)
        run.hooks.after_step(run)
        log_profile(run, run.profile.step())
        stop = decision.stop
        if stop or decision.save or run.step == run.end_of(epoch):
            stop = health.settle(run) or stop
        if stop:
            raise Stopped(stop, run.step)
        if decision.save and run.step < run.end_of(epoch):
            checkpointing.save(run)


def out_of_patience(run: Run) -> bool:
    """Whether the last better validation at the budget is ``training.patience`` epochs ago."""
    patience, best = run.config.training.patience, run.best
    if patience is None or best is None:
        return False
    return run.closed_epochs - best["step"] / run.steps_per_epoch >= patience


def end_early(run: Run) -> None:
    """Make the state the final one, as the last epoch would have: project, validate and save it."""
    text = f"no better validation for {run.config.training.patience} epochs: the run ends after step {run.step}"
    run.tracker.log(run.step, {"event": "early stop", "message": text})
    if run.pruner is not None:
        run.pruner.finalize()
    checkpointing.save(run, best=validate(run))


def train_step(run: Run, batches: Batches) -> health.StepDecision:
    """One optimizer step on the next micro-batches; without an update if a loss or gradient is not finite.

    Returns:
        What all ranks agreed on: whether the step was bad, whether to save, whether to stop.
    """
    run.scheduler.step_update(run.step)
    run.buffers.keep(run.step)
    accumulate = run.config.training.accumulate
    loss = torch.zeros((), device=run.world.device)
    for micro in range(accumulate):
        with run.meter.clock("data"):
            images, targets = next(batches)
        with run.meter.clock("forward_backward"):
            loss += forward_backward(run, images, targets, last=micro == accumulate - 1)
    return update(run, loss)


def update(run: Run, loss: Tensor) -> health.StepDecision:
    """Update the weights by their gradients, unless ranks agree that a loss or gradient is not finite."""
    if run.scaler is not None:
        run.scaler.unscale_(run.optimizer)
    if run.pruner is not None:
        run.pruner.mask_gradients()
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    norm = get_total_norm(gradients)
    full_norm = health.full_norm(norm)
    flags = health.step_flags(run, loss, full_norm, checkpoint_due=checkpointing.due(run))
    if health.reads_late(run):
        decision = health.take_late(run, flags)
        carried = None if run.pruner is None else run.pruner.carry(flags)
        take_step(run, norm)
        run.meter.add(loss, full_norm, bad=flags[health.BAD] > 0)
        health.send(run, flags, carried)
    else:
        stop = health.settle(run)
        decision = health.decide(run.world.sum_(flags))
        decision = dataclasses.replace(decision, stop=decision.stop or stop)
        if decision.bad:
            health.skip_step(run, step=run.step, bad_loss=decision.bad_loss)
        else:
            health.found_good(run.optimizer)
            take_step(run, norm)
            run.average_weights(run.step)
            run.bad_steps = 0
            run.meter.add(loss, full_norm)
    if run.scaler is not None:
        health.update_scale(run.scaler, bad=decision.bad > 0)
    run.optimizer.zero_grad(set_to_none=True)
    return decision


def take_step(run: Run, norm: Tensor) -> None:
    """Clip the gradients and step the optimizer."""
    clip, mode = run.config.optimizer.clip_grad, run.config.optimizer.clip_mode
    if clip is not None and mode == "norm":
        clip_grads_with_norm_(run.model.parameters(), clip, norm)
    elif clip is not None:
        dispatch_clip_grad(model_parameters(run.model, exclude_head=mode == "agc"), clip, mode=mode)
    run.optimizer.step()


def forward_backward(run: Run, images: Tensor, targets: Tensor, *, last: bool) -> Tensor:
    """Add one micro-batch's share to the gradients; ranks exchange them at the `last` one. Returns its share of the loss."""
    training = run.config.training
    if run.erasing is not None:
        images = run.erasing(images)
    if run.mixup is not None:
        images, targets = run.mixup(images, targets)
    if training.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    no_sync = getattr(run.ddp_model, "no_sync", None)
    with nullcontext() if last or no_sync is None else no_sync():
        autocast = torch.autocast(run.world.device.type, DTYPES[training.precision], enabled=training.precision != "float32")
        with autocast, run.meter.clock("forward"):
            loss: Tensor = run.loss(run.ddp_model(images), targets) / training.accumulate
        (loss if run.scaler is None else run.scaler.scale(loss)).backward(loss.detach() * 0.0 + 1.0 if run.late else None)
    return loss.detach()


def log_profile(run: Run, place: str | None) -> None:
    """Say where a profile lies, once it is written."""
    if place is not None:
        run.tracker.log(run.step, {"event": "profile", "message": place})


def log_step(run: Run) -> None:
    """Log the means since the last row, and the pruner's numbers; a collective."""
    checkpointing.log_events(run, run.checkpoints.events())
    row: dict[str, float | int | str] = {
        "kind": TRAIN,
        "epoch": run.step / run.steps_per_epoch,
        LR: max(group["lr"] for group in run.optimizer.param_groups),
        **run.meter.row(),
        **of_gpu(run.world.device),
    }
    now = run.pruner.snapshot() if run.pruner is not None else None
    if now is not None:
        row.update(now.metrics())
    run.tracker.log(run.step, row)
    every = run.config.tracking.layers_every
    if now is not None and every and run.step % every < run.config.training.log_every:
        run.tracker.log_layers(run.step, now.rows())


def close_epoch(run: Run, epoch: int) -> None:
    """Validate and save at the end of `epoch`, as far as they are due."""
    last = run.step == run.total_steps
    if last and run.pruner is not None:
        run.pruner.finalize()
    improved = False
    if last or (epoch + 1) % run.config.training.eval_every == 0:
        improved = validate(run)
    run.closed_epochs = epoch + 1
    if last or improved or run.closed_epochs % run.config.output.checkpoint_epochs == 0:
        checkpointing.save(run, best=improved)
    run.hooks.report({"epoch": run.closed_epochs, "step": run.step, **run.results})

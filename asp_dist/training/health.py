"""Bad numbers, and what the ranks agree on at every step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from asp_dist.pruning.names import ALLOCATION_AT_BOUNDS, LayerRow
from asp_dist.tracking.schema import EVENT
from asp_dist.training.build import FUSED
from asp_dist.training.hooks import PREEMPTION, RESIZE, TIME_LIMIT, Stopped

if TYPE_CHECKING:
    from asp_dist.training.run import Run

# The reasons to stop that ranks can tell each other, the weightiest last; others arrive as "request".
REASONS = ("request", TIME_LIMIT, RESIZE, PREEMPTION, "SIGTERM", "SIGINT")

# What ranks tell each other at every step, by its place: how many of them found the step bad, its loss bad, a checkpoint due,
# and were asked to stop for each of the reasons.
BAD, BAD_LOSS, SAVE, STOP = range(4)
FLAGS = STOP + len(REASONS)

# After a bad step so many are read at once, so that the next bad one can be told by its gradients.
WATCHED_STEPS = 100

# Share of the layers that may have their allocation at its bound.
MOST_AT_BOUNDS = 0.5


class BadNumbers(ArithmeticError):  # noqa: N818
    """Too many steps in a row had a loss or gradient that is not finite; the message names the layers."""


@dataclass(frozen=True)
class StepDecision:
    """What all ranks do after this step's gradients: skip the update, stop, save.

    Attributes:
        bad: how many ranks' loss or gradients are not finite; 0: the step is good.
        bad_loss: whether some rank's loss is not; one rank's gradients reach all ranks, its loss reaches them by this alone.
        stop: why to stop after this step; None: continue.
        save: whether a checkpoint is due.
    """

    bad: int
    bad_loss: bool
    stop: str | None
    save: bool


GO_ON = StepDecision(bad=0, bad_loss=False, stop=None, save=False)


def full_norm(norm: Tensor) -> Tensor:
    """The norm over all shards."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class LateFlags:
    """Flags on their way to the host, which does not wait for them.

    Args:
        step: the optimizer step that they belong to.
        flags: [FLAGS], summed over the ranks; see `step_flags`.
    """

    def __init__(self, step: int, flags: Tensor) -> None:
        self.step = step
        self._event: torch.cuda.Event | None = None
        if flags.device.type == "cuda":
            self._values = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            self._values.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = flags.clone()

    def decision(self) -> StepDecision:
        """What they say, once they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return decide(self._values)


def step_flags(run: Run, loss: Tensor, norm: Tensor, *, checkpoint_due: bool) -> Tensor:
    """What this rank has to tell the others, who sum it: see `BAD` and what follows it.

    Args:
        run: the run; its hooks are asked whether to stop.
        loss: this rank's loss.
        norm: the gradients' norm, after averaging over ranks.
        checkpoint_due: whether this rank's clock asks for a checkpoint.

    Returns:
        float32 [FLAGS], on the device.
    """
    bad_loss = ~loss.isfinite()
    bad = bad_loss | ~norm.isfinite()
    told = torch.zeros(FLAGS - SAVE, device=loss.device)
    stop = _stop_place(run)
    for place in [SAVE] * checkpoint_due + ([] if stop is None else [stop]):
        told[place - SAVE].fill_(1.0)  # by a launch: a tensor from a number of the host would wait for all launches before
    return torch.cat([torch.stack([bad, bad_loss]).float(), told])


def decide(flags: Tensor) -> StepDecision:
    """The decision that the sums of the ranks' flags stand for, on the CPU, or to be read from the device now."""
    values = flags.tolist()
    return StepDecision(int(values[BAD]), values[BAD_LOSS] > 0, _reason(values), values[SAVE] > 0)


def _reason(values: list[float]) -> str | None:
    """The last of `REASONS` that some rank gave."""
    return next((reason for reason, count in zip(REASONS[::-1], values[STOP:][::-1]) if count > 0), None)


def reads_late(run: Run) -> bool:
    """Whether the host may learn of a bad step after the next one: the optimizer skips it on the device, by itself."""
    skips = type(run.optimizer) in FUSED and all(group.get("fused") for group in run.optimizer.param_groups)
    return run.late and skips and run.scaler is None and run.step >= run.watched_until


def take_late(run: Run, flags: Tensor) -> StepDecision:
    """Let the optimizer skip this step if this rank's flags say so, and act on those of the step before.

    Call it before the optimizer's step, and `send` after it. All ranks skip the same steps: a gradient that is not finite
    reaches all of them, and a loss that is not leaves no gradient finite.
    """
    optimizer: Any = run.optimizer
    optimizer.grad_scale, optimizer.found_inf = None, flags[BAD]
    before, run.pending = run.pending, None
    return GO_ON if before is None else account(run, before.decision(), before.step)


def send(run: Run, flags: Tensor, carried: Tensor | None) -> None:
    """Let the host read this step's flags later: sums that the pruner's all-reduce has `carried`, or one's own."""
    run.pending = LateFlags(run.step, run.world.sum_(flags) if carried is None else carried)


def found_good(optimizer: Any) -> None:
    """Undo `take_late`, for a step that the host decides on."""
    if getattr(optimizer, "found_inf", None) is not None:
        optimizer.found_inf = None


def settle(run: Run) -> str | None:
    """Act on flags that are still on their way; on all ranks alike. Returns why to stop, or None."""
    if run.pending is None:
        return None
    pending, run.pending = run.pending, None
    return account(run, pending.decision(), pending.step).stop


def account(run: Run, decision: StepDecision, step: int) -> StepDecision:
    """Count a step that was decided on the device; batch norm forgets a bad one, and what came after it.

    The average of the weights waits for it: a bad step's statistics would stay in there.

    Raises:
        RuntimeError: some ranks have skipped the step and others have not, so that their weights differ now.
    """
    if 0 < decision.bad < run.world.world_size:
        raise RuntimeError(
            f"ranks disagree: in step {step + 1} numbers went bad on {decision.bad} of {run.world.world_size} ranks after the "
            "gradients had been exchanged, by a fault of memory perhaps. Go on from the last checkpoint"
        )
    if not decision.bad:
        run.average_weights(step)
        run.bad_steps = 0
        return decision
    run.watched_until = step + WATCHED_STEPS
    skip_step(run, step=step, bad_loss=decision.bad_loss, names="its loss or gradients were not finite")
    return decision


def raise_if_stopped(run: Run) -> None:
    """Raise `Stopped` on every rank once one of them is asked to stop; a collective, for between the steps."""
    told, stop = torch.zeros(FLAGS), _stop_place(run)
    if stop is not None:
        told[stop] = 1.0
    reason = _reason(run.world.sum_(told.to(run.world.device)).tolist())
    if reason is not None:
        raise Stopped(reason, run.step)


def _stop_place(run: Run) -> int | None:
    """The flag of the reason to stop that this rank was given."""
    reason = run.hooks.stop_requested() or (TIME_LIMIT if time.monotonic() > run.deadline else None)
    return None if reason is None else STOP + (REASONS.index(reason) if reason in REASONS else 0)


def check_layers(run: Run, rows: list[LayerRow]) -> None:
    """Look at the layers' rows of a validation; a collective.

    A layer without any weight left cuts the network: the user is warned. Once the mask is frozen, no removed weight may come
    back: something writes it behind the pruner's back, and the budget is no longer met.

    Raises:
        BadNumbers: a frozen layer has removed weights that are not zero; names it.
    """
    pruned = {row["name"]: float(row["measured_sparsity"]) for row in rows if row["pruned"]}
    dead = [name for name, sparsity in pruned.items() if sparsity >= 1.0]
    if dead:
        run.tracker.alert("Dead layers", f"no weight is left in {_few(dead)}; raise pruning.min_density")
    regrown = run.pruner.regrown_layers() if run.pruner is not None else []
    if regrown:
        raise BadNumbers(
            f"the mask is frozen, but after step {run.step} removed weights are not zero in {_few(regrown)}: something writes "
            "weights that are pruned"
        )


def check_allocation(run: Run, metrics: dict[str, float]) -> None:
    """Warn where most layers' learned allocation is at its bound: it no longer follows the task."""
    share = metrics.get(ALLOCATION_AT_BOUNDS, 0.0)
    if share > MOST_AT_BOUNDS:
        text = f"in {share:.0%} of the layers, where it no longer follows the task: lower pruning.track.rate"
        run.tracker.alert("Allocation at its bounds", text)


def skip_step(run: Run, *, step: int, bad_loss: bool, names: str | None = None) -> None:
    """Count a bad step and leave the weights alone; batch norm forgets the batch.

    With float16 a gradient that overflows at a scale above 1 is the scaler's business: the scale falls, and nothing counts.

    Args:
        run: the run.
        step: the optimizer step, from 0.
        bad_loss: whether some rank's loss is not finite; the same on every rank, as is what follows from it.
        names: what was bad; None: to be found in the gradients.

    Raises:
        BadNumbers: ``training.max_bad_steps`` in a row; names the layers.
    """
    run.buffers.restore(step)
    if run.scaler is not None and run.scaler.get_scale() > 1.0 and not bad_loss:
        run.tracker.log(step + 1, {"kind": EVENT, "event": "scale", "message": "float16 gradients overflowed"})
        return
    run.bad_steps += 1
    run.skipped += 1
    names = bad_layers(run) if names is None else names
    text = f"step {step + 1} skipped: {names}"
    run.tracker.log(step + 1, {"kind": EVENT, "event": "skipped_step", "message": text})
    limit = run.config.training.max_bad_steps
    if run.bad_steps >= limit:
        run.checkpoints.wait()
        kept = run.checkpoints.store.names()
        raise BadNumbers(
            f"training.max_bad_steps = {limit} steps in a row had a loss or gradient that is not finite; the last, step "
            f"{step + 1}: {names}. Last good checkpoint: {kept[-1] if kept else 'none'}. A lower optimizer.lr, "
            "optimizer.clip_grad or another training.precision may help"
        )


def update_scale(scaler: torch.amp.GradScaler, *, bad: bool) -> None:
    """Let the scale fall or grow by what all ranks agreed on: a scaler knows its own rank's gradients, or its shards, alone.

    Ranks with different scales would average gradients in different units.
    """
    if not bad:
        scaler.update()
        return
    state = scaler.state_dict()
    scale = state["scale"] * state["backoff_factor"]
    scaler.update(scale)
    scaler.load_state_dict({**state, "scale": scale, "_growth_tracker": 0})


def bad_layers(run: Run) -> str:
    """The parameters whose gradients are not finite on this rank, nearest to the output first, in words."""
    parameters = [(n, p) for n, p in run.model.named_parameters() if p.grad is not None]
    weights = [n for n, p in parameters if not bool(_local(p).isfinite().all())]
    if weights:
        return f"weights not finite in {_few(weights)}"
    bad = [n for n, p in parameters if p.grad is not None and not bool(_local(p.grad).isfinite().all())]
    if not bad:
        return "the loss is not finite"
    which = "every layer" if len(bad) == len(parameters) else _few(bad[::-1])
    return f"gradients not finite in {which}"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

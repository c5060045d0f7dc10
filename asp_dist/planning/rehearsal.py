"""``asp-dist rehearse``: a recipe's whole schedule in a few hundred small steps, pruned and dense, and judged."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from asp_dist.checkpoint.record import run_dir
from asp_dist.config import Config
from asp_dist.errors import check
from asp_dist.planning.squeeze import squeeze
from asp_dist.pruning import Snapshot, Track
from asp_dist.pruning.names import ALLOCATION_AT_BOUNDS, MEASURED_SPARSITY
from asp_dist.report import try_report, write_report
from asp_dist.tracking import read_rows
from asp_dist.tracking.schema import IDENTITY_FILE, METRICS_FILE, REPORT_FILE, TRAIN, TRAIN_LOSS
from asp_dist.training.health import MOST_AT_BOUNDS
from asp_dist.training.hooks import Hooks, Stopped
from asp_dist.training.preflight import preflight
from asp_dist.training.run import Run
from asp_dist.training.trainer import train
from asp_dist.training.world import World, init_world

REPEATED_STEPS = 10  # taken twice, before and after the restart
# The limits of the invariants. How far the density may be off: at every step after the ramp for a control that tracks it; at
# the freeze for the sparsity loss, with a ramp or in its published form, which leaves a standing error.
TRACK_ERROR, LOSS_ERROR, PUBLISHED_ERROR = 0.002, 0.02, 0.05
MOST_FLIPS = 0.01  # of all mask bits, in a step after the ramp
MOST_MOVE = 0.5  # of a threshold in a step, in units of σ, after the ramp
LEAST_LEARNED = 0.5  # of what the dense rehearsal learns, by the training loss
LITTLE = 0.05  # of the first loss: a smaller fall is hardly learning

Row = tuple[int, float, float]  # step, training loss, measured sparsity


@dataclass(frozen=True)
class StepRecord:
    """The pruner after one optimizer step.

    Attributes:
        step: optimizer steps done.
        target: scheduled density of the first budget's cost, the mean over layers where each has its own.
        density: counted density of that cost.
        flipped: share of the mask's bits that changed.
        move: largest change of a threshold, in units of σ.
        empty: layers without a weight.
        full: layers with all weights.
        at_bounds: share of the layers whose allocation is at its bound.
        share: how much of the sparsity the ramp asks for, in [0, 1].
        frozen: whether the mask is frozen.
    """

    step: int
    target: float
    density: float
    flipped: float
    move: float
    empty: int
    full: int
    at_bounds: float
    share: float
    frozen: bool


@dataclass(frozen=True)
class Verdict:
    """One invariant: what was found, what is allowed, and whether that holds.

    Attributes:
        name: the invariant.
        found: what was found, in words.
        limit: what is allowed, in words.
        good: whether it is kept.
    """

    name: str
    found: str
    limit: str
    good: bool


@dataclass(frozen=True)
class Rehearsal:
    """What `rehearse` found; `dataclasses.asdict` makes it plain JSON types.

    Attributes:
        folder: the rehearsal's folder, with both runs and the report.
        changes: what differs from the recipe, a line each.
        verdicts: the invariants.
        steps: the record of each step.
        top1: top-1 of the pruned and of the dense rehearsal.
    """

    folder: str
    changes: list[str]
    verdicts: list[Verdict]
    steps: list[StepRecord]
    top1: tuple[float, float]

    @property
    def good(self) -> bool:
        """Whether every invariant is kept."""
        return all(verdict.good for verdict in self.verdicts)


@dataclass
class StepRecorder(Hooks):
    """Records the pruner after each step, and stops the run once.

    Args:
        stop_at: the step to stop after; None: run to the end.
    """

    stop_at: int | None = None
    steps: list[StepRecord] = field(default_factory=list)
    _masks: list[Tensor] = field(default_factory=list)
    _thresholds: Tensor | None = None
    _done: int = 0

    def after_step(self, run: Run) -> None:
        """Record the pruner's state."""
        self._done = run.step
        if run.pruner is None:
            return
        now = run.pruner.snapshot()
        masks = [layer.flat_pruned() != 0 for layer in run.pruner.layers]
        flips = sum(int((new ^ old).sum()) for new, old in zip(masks, self._masks))
        moved = 0.0 if self._thresholds is None else float((now.thresholds - self._thresholds).abs().max())
        self.steps.append(_record(run, now, flips / float(now.numel.sum()), moved))
        self._masks, self._thresholds = masks, now.thresholds

    def stop_requested(self) -> str | None:
        """After `stop_at`."""
        return "SIGTERM" if self.stop_at is not None and self._done + 1 >= self.stop_at else None

    def finished(self, run_dir: Path) -> None:
        """Write the run's report."""
        try_report(run_dir)


def _record(run: Run, now: Snapshot, flipped: float, move: float) -> StepRecord:
    pruner = run.pruner
    assert pruner is not None
    return StepRecord(
        step=run.step,
        target=float(now.targets[0].mean()),
        density=float(now.budgets[0].density(now.densities).mean()),
        flipped=flipped,
        move=move,
        empty=int((now.kept == 0).sum()),
        full=int((now.kept == now.numel).sum()),
        at_bounds=now.further.get(ALLOCATION_AT_BOUNDS, 0.0),
        share=pruner.ramp.share(run.step),
        frozen=pruner.frozen,
    )


def rehearse(config: Config, *, steps: int = 300, batch_size: int = 32, input_size: int = 32) -> Rehearsal:
    """Run a recipe's whole schedule in `steps` small steps on this machine, pruned and dense, and judge it.

    The pruned rehearsal is stopped and resumed on the way; the steps after the restart must repeat those before it, bit for
    bit.

    Args:
        config: the run.
        steps: optimizer steps, about.
        batch_size: images per optimizer step.
        input_size: image side in pixels.

    Raises:
        UserError: the configuration is wrong, or cannot be rehearsed so.
    """
    check(config.pruning.enabled, "pruning.enabled = false: there is nothing to rehearse")
    check(steps >= 40, f"--steps {steps}: give at least 40, or no part of the schedule has a step of its own")
    folder = Path(config.output.dir).expanduser().absolute() / f"{config.name}-rehearsal"
    pruned, changes = squeeze(config, folder, steps=steps, batch_size=batch_size, input_size=input_size)
    for name in ("pruned", "dense"):  # of an earlier rehearsal
        if (folder / name / IDENTITY_FILE).is_file():
            shutil.rmtree(folder / name)
    dense = replace(pruned, name="dense", pruning=replace(pruned.pruning, enabled=False))
    checked = preflight(pruned)
    restart = checked.total_steps // 3
    restart += restart % checked.steps_per_epoch == 0  # after an epoch's last step none is saved
    pruned = replace(pruned, output=replace(pruned.output, checkpoint_steps=restart))
    world = init_world(config.training.device, config.cluster.timeout_s)
    try:
        reference = train(dense, world, StepRecorder())
        before = _stop(pruned, world, restart)
        watch = StepRecorder()
        summary = train(pruned, world, watch)
    finally:
        world.close()
    rows, recorded = _losses(pruned), [*before.steps[:restart], *watch.steps]
    verdicts = judge(
        pruned,
        recorded,
        losses=[row[1] for row in rows],
        dense_losses=[row[1] for row in _losses(dense)],
        repeated=(before.rows, rows[restart : restart + REPEATED_STEPS]),
        summary=summary,
    )
    write_report([run_dir(pruned), run_dir(dense)], folder / REPORT_FILE)
    return Rehearsal(str(folder), changes, verdicts, recorded, (summary["top1"], reference["top1"]))


@dataclass(frozen=True)
class _Stopped:
    """A run up to its stop: the steps' records, and the logged rows of the steps that are taken again."""

    steps: list[StepRecord]
    rows: list[Row]


def _stop(config: Config, world: World, restart: int) -> _Stopped:
    """Train to some steps past `restart`, and go back to the checkpoint of that step."""
    watch = StepRecorder(stop_at=restart + REPEATED_STEPS)
    with suppress(Stopped):
        train(config, world, watch)
    rows = _losses(config)[restart:]
    for checkpoint in (run_dir(config) / "checkpoints").iterdir():
        if int(checkpoint.name.rpartition("-")[2]) > restart:
            shutil.rmtree(checkpoint)
    return _Stopped(watch.steps, rows)


def _losses(config: Config) -> list[Row]:
    """(step, training loss, measured sparsity) of each step that was logged."""
    rows = read_rows(run_dir(config) / METRICS_FILE)
    return [(r["step"], r[TRAIN_LOSS], r.get(MEASURED_SPARSITY, 0.0)) for r in rows if r["kind"] == TRAIN and TRAIN_LOSS in r]


def judge(
    config: Config,
    steps: list[StepRecord],
    *,
    losses: list[float],
    dense_losses: list[float],
    repeated: tuple[list[Row], list[Row]],
    summary: dict[str, Any],
) -> list[Verdict]:
    """The invariants of a rehearsal, each with what was found.

    Args:
        config: the pruned rehearsal.
        steps: its record of each step.
        losses: its training loss at each step.
        dense_losses: the dense rehearsal's.
        repeated: the logged rows of the same steps, before and after the restart.
        summary: the pruned rehearsal's summary.
    """
    pruning = [one for one in steps if not one.frozen]
    behind = [one for one in pruning if one.share >= 1.0]
    if config.pruning.ramp.shape == "constant":
        behind = behind[len(behind) // 2 :]  # the published update needs time to arrive
    before, after = repeated
    same = len(before) > 0 and before == after[: len(before)]
    verdicts = [
        _budget(config, behind),
        _most("mask bits flipped per step after the ramp", [one.flipped for one in behind], MOST_FLIPS, "{:.3%}"),
        _most("threshold's largest move per step after the ramp", [one.move for one in behind], MOST_MOVE, "{:.3f} σ"),
        _most("layers with the allocation at its bound", [one.at_bounds for one in steps], MOST_AT_BOUNDS, "{:.1%}"),
        _most("layers without a weight", [float(one.empty) for one in steps], 0.0, "{:.0f}"),
        _most("steps skipped for a loss or gradient that is not finite", [float(summary["bad_steps"])], 0.0, "{:.0f}"),
        _learned(losses, dense_losses),
        _exact(config, summary),
        Verdict("restart equals no restart", f"{len(before)} steps {'equal' if same else 'differ'}", "equal bits", same),
    ]
    return verdicts


def _most(name: str, values: list[float], limit: float, form: str) -> Verdict:
    largest = max(values, default=0.0)
    return Verdict(name, form.format(largest), f"at most {form.format(limit)}", largest <= limit)


def _budget(config: Config, behind: list[StepRecord]) -> Verdict:
    """At every step after the ramp for a control that tracks the budget; for others, in the last step before the freeze."""
    if not behind:
        return Verdict("budget after the ramp", "no step", "a step before the freeze", False)
    above_only = config.budget.all()[0].bound == "at_most"
    errors = [one.density - one.target if above_only else abs(one.density - one.target) for one in behind]
    if isinstance(config.pruning.build_control(), Track):
        return _most("density off the target, at every step after the ramp", errors, TRACK_ERROR, "{:.4f}")
    limit = PUBLISHED_ERROR if config.pruning.ramp.shape == "constant" else LOSS_ERROR
    return _most("density off the target, before the freeze", errors[-1:], limit, "{:.4f}")


def _learned(losses: list[float], dense_losses: list[float]) -> Verdict:
    """By the mean training loss of the last tenth, against the first steps' and the dense rehearsal's.

    Where the dense one hardly learns, the two are compared by a share of the first loss.
    """
    last = max(1, len(dense_losses) // 10)
    first = sum(dense_losses[:5]) / len(dense_losses[:5])
    dense, pruned = (sum(one[-last:]) / last for one in (dense_losses, losses))
    learns = first - dense > LITTLE * first
    allowed = dense + ((1.0 - LEAST_LEARNED) * (first - dense) if learns else LITTLE * first)
    found = f"{first:.3f} → {pruned:.3f}, dense {dense:.3f}" + ("" if learns else ", which hardly learns: give more --steps")
    return Verdict("training loss", found, f"at most {allowed:.3f}", math.isfinite(pruned) and pruned <= allowed)


def _exact(config: Config, summary: dict[str, Any]) -> Verdict:
    """Counted after the freeze."""
    budget = config.budget.all()[0]
    found, wanted = summary["budget_sparsity"], summary["target_sparsity"]
    if budget.cost != "parameters" or budget.scope != "network":
        good = abs(found - wanted) <= LOSS_ERROR or (budget.bound == "at_most" and found >= wanted)
        limit = f"{wanted:.4%} to within {LOSS_ERROR:.0%}"
        return Verdict("budget after the freeze", f"{found:.4%} of the {budget.cost} saved", limit, good)
    kept, allowed = summary["nonzero_weights"], round((1.0 - wanted) * summary["prunable_weights"])
    good = kept == allowed or (budget.bound == "at_most" and kept <= allowed)
    return Verdict("budget after the freeze", f"{kept:,} weights", f"exactly {allowed:,}", good)

"""`asp-dist bench saving` and `bench tracking`: what checkpoints and records add to training, in stretches that alternate."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

from rich.console import Console

from asp_dist.config import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from asp_dist.errors import check
from asp_dist.tracking import Tracker, build_tracker
from asp_dist.training import checkpointing
from asp_dist.training.hooks import Hooks
from asp_dist.training.run import Run, build_run
from asp_dist.training.trainer import Batches, log_step, train_step
from asp_dist.training.world import init_world

Extra = Callable[[Run], None]  # what is done after a step


def _config(model: str, batch_size: int, input_size: int, steps: int, device: Any, folder: str) -> Config:
    """A run of `steps` steps on random images, tracked offline at the default intervals."""
    return Config(
        name="bench",
        model=ModelConfig(name=model),
        data=DataConfig(
            backend="synthetic", batch_size=batch_size, input_size=input_size, synthetic_samples=(steps * batch_size, 1)
        ),
        schedule=ScheduleConfig(epochs=1),
        training=TrainingConfig(device=device),
        tracking=TrackingConfig(wandb="offline"),
        cluster=ClusterConfig(mode="local"),
        output=OutputConfig(dir=folder),
    )


def _save(every: int) -> Extra:
    def extra(run: Run) -> None:
        if run.step % every == 1:  # early in its stretch, so that it is written while steps run, as in training
            checkpointing.save(run)

    return extra


def _track(every: int) -> Extra:
    def extra(run: Run) -> None:
        if run.step % every == 0:
            log_step(run)

    return extra


class _Stretch(NamedTuple):
    """Seconds by the clock, of this process's processors, and of waiting for the extra work."""

    seconds: float
    processor: float
    blocked: float


def _stretch(run: Run, batches: Batches, steps: int, extra: Extra | None) -> _Stretch:
    start, used, blocked = time.perf_counter(), time.process_time(), 0.0
    for _ in range(steps):
        train_step(run, batches)
        run.step += 1
        if extra is not None:
            before = time.perf_counter()
            extra(run)
            blocked += time.perf_counter() - before
    run.checkpoints.wait()
    return _Stretch(time.perf_counter() - start, time.process_time() - used, blocked)


def bench_extra(
    what: str,
    model: str = "resnet50",
    *,
    batch_size: int = 8,
    input_size: int = 224,
    steps: int = 50,
    rounds: int = 3,
    device: Any = "auto",
) -> dict[str, Any]:
    """Time stretches of `steps` training steps without and with checkpoints or tracking, in turn.

    Args:
        what: ``saving``: one checkpoint per stretch; ``tracking``: a row every ``training.log_every`` steps, counts of
            all layers included, to ``metrics.jsonl`` and wandb, offline.
        model: a timm name.
        batch_size: images per step.
        input_size: image side, pixels.
        steps: steps of a stretch; for ``tracking`` a multiple of the steps between two rows.
        rounds: timed rounds of one stretch of each kind; one more warms up.
        device: where.

    Returns:
        ``seconds`` of the stretches of each kind, the rounds' ``ratios`` with over without and their median ``ratio``, the
        same by processor time of this process (``cpu_ratios``, ``cpu_ratio``), which others on the machine disturb less,
        ``blocked_share``: how long the training waits for it, as a share of a stretch without, and ``seconds_per_step``; for
        ``saving`` also the checkpoint's ``bytes``.

    Raises:
        UserError: a stretch of that many steps would not contain what is measured.
    """
    every = 2 if what == "saving" else TrainingConfig().log_every
    check(steps % every == 0, f"--steps {steps}: use a multiple of {every} for {what}")
    with tempfile.TemporaryDirectory(prefix="asp-dist-bench-") as folder:
        config = _config(model, batch_size, input_size, 2 * steps * (rounds + 1), device, folder)
        checkpoints = checkpointing.build_checkpoint_manager(config, "bench")
        run = build_run(config, init_world(config.training.device), Hooks(), checkpoints, "bench")
        tracker = build_tracker(config, run.folder, rank=0) if what == "tracking" else Tracker()
        extra = _save(steps) if what == "saving" else _track(config.training.log_every)
        stretches: dict[str, list[_Stretch]] = {"without": [], "with": []}
        batches = run.loaders.train.start(0)
        try:
            for index in range(rounds + 1):
                for kind in ("without", "with") if index % 2 else ("with", "without"):
                    run.tracker = tracker if kind == "with" else Tracker()
                    stretches[kind].append(_stretch(run, batches, steps, extra if kind == "with" else None))
        finally:
            tracker.finish(exit_code=1)
            run.loaders.close()
        last = Path(folder, "bench", "checkpoints")
        sizes = [sum(p.stat().st_size for p in path.iterdir()) for path in last.glob("step-*")]
    without, with_ = stretches["without"][1:], stretches["with"][1:]  # the first round warms up
    ratios = [a.seconds / b.seconds for a, b in zip(with_, without)]
    cpu_ratios = [a.processor / b.processor for a, b in zip(with_, without)]
    usual = median(stretch.seconds for stretch in without)
    return {
        "what": what,
        "model": model,
        "batch_size": batch_size,
        "input_size": input_size,
        "steps": steps,
        "device": str(run.world.device),
        "seconds": {"without": [s.seconds for s in without], "with": [s.seconds for s in with_]},
        "seconds_per_step": usual / steps,
        "ratios": ratios,
        "ratio": median(ratios),
        "cpu_ratios": cpu_ratios,
        "cpu_ratio": median(cpu_ratios),
        "blocked_share": median(stretch.blocked for stretch in with_) / usual,
        **({"bytes": sizes[-1]} if sizes else {}),
    }


def print_extra(result: dict[str, Any], file: IO[str] | None = None) -> None:
    """Print what `bench_extra` returned."""
    size = f" of {result['bytes'] / 1e6:.0f} MB" if "bytes" in result else ""
    extra = f"one checkpoint{size}" if result["what"] == "saving" else "tracking at the default intervals"
    console = Console(file=file, highlight=False, soft_wrap=True)
    console.print(
        f"{result['model']} at {result['input_size']}², batch {result['batch_size']}, {result['device']}, "
        f"{1000 * result['seconds_per_step']:.0f} ms per step: {result['steps']} steps with {extra}, over those without "
        f"(medians of {len(result['ratios'])} rounds, and the range):"
    )
    for name, ratio, ratios in (("clock", "ratio", "ratios"), ("processor time", "cpu_ratio", "cpu_ratios")):
        low, high = min(result[ratios]), max(result[ratios])
        console.print(f"  by {name}: {result[ratio]:.4f} × ({low:.4f} to {high:.4f})")
    console.print(f"  training is blocked on it for {result['blocked_share']:.2%} of the time")

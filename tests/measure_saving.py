"""What a checkpoint every 50 steps costs: alternating stretches of steps with and without one, synthetic data.

python tests/measure_saving.py [model] [image side] [batch] [stretches]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from small_runs import small_config

from asp_dist.training import Hooks, World
from asp_dist.training.checkpointing import build_keeper, save
from asp_dist.training.run import build_run
from asp_dist.training.trainer import train_step

STEPS = 50


def measure(model: str, side: int, batch: int, stretches: int) -> None:
    """Print the seconds of each stretch, and the ratio of the two kinds."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        config = small_config(
            Path(folder),
            model__name=model,
            data__input_size=side,
            data__batch_size=batch,
            data__synthetic_samples=(batch * STEPS * (2 * stretches + 2), 10),
            schedule__epochs=1,
        )
        run = build_run(config, World(), Hooks(), build_keeper(config, "x"), "x")
        batches = run.loaders.train.start(0)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        processor: dict[bool, list[float]] = {False: [], True: []}
        blocked = []
        for stretch in range(-1, 2 * stretches):  # the first warms up, with a save
            saving = stretch % 2 == 1 or stretch < 0
            start, used = time.perf_counter(), time.process_time()
            for step in range(STEPS):
                train_step(run, batches)
                run.step += 1
                if saving and step == 0:
                    before = time.perf_counter()
                    save(run)
                    blocked.append(time.perf_counter() - before)
            run.keeper.wait()
            if stretch >= 0:
                seconds[saving].append(time.perf_counter() - start)
                processor[saving].append(time.process_time() - used)
        plain, saved = (sum(seconds[kind]) / stretches for kind in (False, True))
        work, more = (sum(processor[kind]) / stretches for kind in (False, True))
        bytes_ = sum(p.stat().st_size for p in (run.folder / "checkpoints" / run.keeper.store.names()[-1]).iterdir())
        print(
            f"{model} at {side}, batch {batch}: {plain / STEPS:.4f} s per step, checkpoint of {bytes_ / 1e6:.0f} MB; "
            f"{STEPS} steps {plain:.2f} s without and {saved:.2f} s with one: {saved / plain - 1:+.2%} "
            f"(processor time {more / work - 1:+.2%}); the step waits "
            f"{1000 * sum(blocked[1:]) / stretches:.0f} ms for the copy ({sum(blocked[1:]) / stretches / plain:.2%})"
        )
        run.loaders.close()


if __name__ == "__main__":
    name, *numbers = sys.argv[1:] or ["resnet18"]
    measure(name, *(list(map(int, numbers)) + [64, 32, 3][len(numbers) :]))

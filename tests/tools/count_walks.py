"""Counts the files of the package that a reader meets on five walks, and prints them.

python tests/tools/count_walks.py

Four walks are really run, with every call recorded, in a run of a small network on the handwritten digits: what runs is what
has to be read. A walk ends where a part is asked for its own state: what is behind a `state_dict` or a `load_state_dict` is
the part's business. The walk of a configuration field is the files that have its name.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from small_runs import digits_config

import asp_dist
from asp_dist.data import prepare_digits
from asp_dist.pruning import Ramp
from asp_dist.tracking import build_tracker
from asp_dist.training import checkpointing
from asp_dist.training.hooks import Hooks
from asp_dist.training.run import Run, build_run
from asp_dist.training.trainer import forward_backward, train_step
from asp_dist.training.world import init_world

PACKAGE = Path(asp_dist.__file__).parent
LIMITS = {"batch": 9, "gradient": 8, "config field": 3, "metric": 5, "checkpoint": 10}
FIELD = "rate"  # pruning.track.rate


def files_of(call: Callable[[], Any]) -> set[str]:
    """The package's files of which a function runs during `call`, in any thread, except behind a part's own state."""
    found = set()
    inside = threading.local()  # how many calls deep this thread is in a part's state

    def record(frame: FrameType, event: str, _: object) -> None:
        name, function = frame.f_code.co_filename, frame.f_code.co_name
        depth = getattr(inside, "depth", 0)
        if function in ("state_dict", "load_state_dict") and name.startswith(str(PACKAGE)):
            inside.depth = max(0, depth + {"call": 1, "return": -1}.get(event, 0))
        elif event == "call" and not depth:
            found.add(name)

    threading.setprofile(record)
    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {str(Path(name).relative_to(PACKAGE)) for name in found if name.startswith(str(PACKAGE))}


def small_run(folder: Path) -> Run:
    """A run that prunes and tracks, at its first step."""
    config = digits_config(
        folder,
        prepare_digits(folder / "digits"),
        pruning__control="track",
        pruning__ramp=Ramp("cubic", 0.0, 0.3, freeze_at=0.8),
        data__augment__mixup=0.0,
        training__ema_decay=None,
        tracking__wandb="offline",
    )
    run = build_run(config, init_world("cpu"), Hooks(), checkpointing.build_checkpoint_manager(config, "walk"), "walk")
    run.tracker = build_tracker(config, run.folder, rank=0)
    return run


def walks(folder: Path) -> dict[str, set[str]]:
    """The files of each walk."""
    run = small_run(folder)
    batches = run.loaders.train.start(0)
    for _ in range(4):
        train_step(run, batches)
        run.step += 1
    found = {"batch": files_of(lambda: forward_backward(run, *next(batches), last=True))}
    found["gradient"] = files_of(run.optimizer.step)
    found["metric"] = files_of(lambda: run.tracker.log(run.step, run.meter.row()))  # train/loss, as `log_step` does it
    run.tracker.finish()
    run = small_run(folder)

    def save_and_resume() -> None:
        checkpointing.save(run)
        run.checkpoints.wait()
        checkpointing.resume(run)

    run.step = 4
    found["checkpoint"] = files_of(save_and_resume)
    run.tracker.finish()
    run.loaders.close()
    found["config field"] = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(rf"self\.options\.{FIELD}\b|^    {FIELD}: float = |track: Track\b", path.read_text(), re.MULTILINE)
    }
    return found


def main() -> int:
    """Print the walks; 1 if one is longer than it may be."""
    with tempfile.TemporaryDirectory() as folder:
        found = walks(Path(folder))
    for name, limit in LIMITS.items():
        print(f"{name}: {len(found[name])} files, at most {limit}\n    " + "\n    ".join(sorted(found[name])))
    return int(any(len(found[name]) > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())

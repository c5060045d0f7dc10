"""``asp-dist train``: on Ray, under torchrun, or in this process."""

from __future__ import annotations

import dataclasses
import json as json_
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jsonargparse import ArgumentParser

from asp_dist.config import Config
from asp_dist.errors import check
from asp_dist.files import repeating
from asp_dist.quick_checks import check_quickly
from asp_dist.tracking.schema import METRICS_FILE

if TYPE_CHECKING:
    from asp_dist.tracking import Console
    from asp_dist.training.world import World

T = TypeVar("T")
PROFILE_STEPS = 5
RANK_IGNORED = (
    "note: RANK and WORLD_SIZE are set, but not by torchrun: training on Ray all the same; with --cluster.mode local, this "
    "process would be that rank"
)


def _style(quiet: bool, as_json: bool) -> Any:
    return "quiet" if quiet else "json" if as_json else "auto"


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``train``."""
    parser.add_argument("--quiet", action="store_true", help="show no progress.")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="show the N largest layers on the live screen.")
    parser.add_argument("--json", action="store_true", help="print each row of metrics, and the summary, as JSON lines.")
    parser.add_argument("--dry-run", action="store_true", help="run three steps end to end, under a separate name.")
    parser.add_argument("--profile", action="store_true", help="profile a few steps of rank 0, into profile/ of the run.")


def run(
    config: Config,
    *,
    quiet: bool = False,
    json: bool = False,
    dry_run: bool = False,
    profile: bool = False,
    layers: int = 0,
) -> int:
    """Train and prune, on Ray or in this process, and print the results."""
    check_quickly(config)
    check(layers >= 0, f"--layers = {layers} must not be negative")
    from asp_dist.checkpoint.record import run_dir
    from asp_dist.tracking import Console
    from asp_dist.training.preflight import preflight
    from asp_dist.training.world import has_rank, init_world, is_one_rank

    if dry_run:
        config = as_dry_run(config)
    if profile and not config.training.profile_steps:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, profile_steps=PROFILE_STEPS))
    shown: Any = {"layers": layers, "folder": run_dir(config)}
    if config.cluster.mode == "ray" and not is_one_rank(config):
        if has_rank():
            print(RANK_IGNORED, file=sys.stderr)
        checked = preflight(config)
        with Console(config, checked.total_steps, style=_style(quiet, json), **shown) as console:
            summary = _train_on_ray(config, console)
        _show_results(config, summary, quiet=quiet, as_json=json)
        return 0
    answer = _result_of(lambda: preflight(config)) if int(os.environ.get("RANK", "0")) == 0 else None
    world = init_world(config.training.device, config.cluster.timeout_s)
    try:
        checked = world.on_main(answer)
        with Console(config, checked.total_steps, style=_style(quiet or not world.is_main, json), **shown) as console:
            summary = _train_here(config, world, console)
    finally:
        world.close()
    if world.is_main:
        _show_results(config, summary, quiet=quiet, as_json=json)
    return 0


def _result_of(work: Callable[[], T]) -> Callable[[], T]:
    """Do `work`, which knows nothing of other ranks, now; what is returned gives its result, or raises its error, later."""
    try:
        result = work()
    except Exception as error:
        caught = error

        def fail() -> T:
            raise caught

        return fail
    return lambda: result


def as_dry_run(config: Config) -> Config:
    """The same run, three optimizer steps long, with a checkpoint and an evaluation, under a name of its own."""
    return dataclasses.replace(
        config,
        name=f"{config.name}-dry-run",
        training=dataclasses.replace(config.training, max_steps=3, log_every=1),
        output=dataclasses.replace(config.output, checkpoint_steps=2),
        tracking=dataclasses.replace(config.tracking, wandb="disabled"),
    )


def _train_on_ray(config: Config, console: Console) -> dict[str, Any]:
    from asp_dist.cluster.driver import run as run_on_ray

    return run_on_ray(config, on_row=console.update)


def _train_here(config: Config, world: World, console: Console) -> dict[str, Any]:
    from asp_dist.checkpoint.record import run_dir
    from asp_dist.report import try_report
    from asp_dist.training.hooks import SignalHooks
    from asp_dist.training.trainer import train

    with SignalHooks(try_report) as hooks, _following(run_dir(config) / METRICS_FILE, console):
        return train(config, world, hooks)


@contextmanager
def _following(path: Path, console: Console) -> Iterator[None]:
    """Show the rows of a metrics file while they come."""
    from asp_dist.tracking import Tail

    tail = Tail(path, from_end=True)

    def show() -> None:
        for row in tail.read():
            console.update(row)

    try:
        with repeating(show, 0.3, "console"):
            yield
    finally:
        show()


def _show_results(config: Config, summary: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    from asp_dist.checkpoint.record import run_dir
    from asp_dist.report import print_results
    from asp_dist.tracking import read_layers

    folder = run_dir(config)
    if as_json:
        print(json_.dumps({"kind": "summary", **summary}))
    elif not quiet:
        print_results(summary, read_layers(folder), folder, next_command=f"{command_here()} evaluate {folder}")


def command_here() -> str:
    """How ``asp-dist`` can be called from here: by its name where the shell finds it, else by its path."""
    own = Path(sys.executable).with_name("asp-dist")
    return "asp-dist" if shutil.which("asp-dist") or not own.exists() else os.path.relpath(own)

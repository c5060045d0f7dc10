"""The trainer: plain PyTorch that runs the same in one process, under torchrun and under Ray Train."""

from asp_dist.training.evaluate import evaluate
from asp_dist.training.health import BadNumbers
from asp_dist.training.hooks import Hooks, SignalHooks, Stopped
from asp_dist.training.preflight import Preflight, preflight
from asp_dist.training.rundir import run_dir
from asp_dist.training.trainer import train
from asp_dist.training.world import World, init_world

__all__ = [
    "BadNumbers",
    "Hooks",
    "Preflight",
    "SignalHooks",
    "Stopped",
    "World",
    "evaluate",
    "init_world",
    "preflight",
    "run_dir",
    "train",
]

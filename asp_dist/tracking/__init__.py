"""Tracking: the run's rows go to ``metrics.jsonl``, to wandb and to a terminal."""

from asp_dist.tracking.console import Console
from asp_dist.tracking.layer_rows import read_layers, write_json
from asp_dist.tracking.rows import Tail, read_rows
from asp_dist.tracking.tracker import Tracker, build_tracker

__all__ = ["Console", "Tail", "Tracker", "build_tracker", "read_layers", "read_rows", "write_json"]

"""Tracking: the run's rows go to ``metrics.jsonl`` and wandb, to a terminal, and into a report."""

from asp_dist.tracking.console import Console
from asp_dist.tracking.dashboard import create_dashboard
from asp_dist.tracking.layers import read_layers, write_json
from asp_dist.tracking.metrics import Tail, read_rows
from asp_dist.tracking.report import write_report
from asp_dist.tracking.results import print_results
from asp_dist.tracking.tracker import Tracker, build_tracker

__all__ = [
    "Console",
    "Tail",
    "Tracker",
    "build_tracker",
    "create_dashboard",
    "print_results",
    "read_layers",
    "read_rows",
    "write_json",
    "write_report",
]

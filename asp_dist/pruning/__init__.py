"""Pruning by an adaptive sparsity loss (arXiv 2006.02768), as a companion of any torch optimizer.

pruner = Pruner(model, optimizer, Budget.parameters(sparsity=0.9))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asp_dist.pruning.options import (
    Budget,
    Control,
    Hard,
    Operator,
    Pattern,
    Power,
    Ramp,
    Select,
    Soft,
    SparsityLoss,
    Track,
)

if TYPE_CHECKING:
    from asp_dist.pruning.control.controller import Controller, Problem, StepStats
    from asp_dist.pruning.layers import WeightInfo, find_weights, register_prunable
    from asp_dist.pruning.macs import macs_per_weight
    from asp_dist.pruning.pruner import Pruner
    from asp_dist.pruning.snapshot import PrunedLayer, Snapshot

# What needs torch is imported when it is used: a configuration contains only the options, and is read without torch.
_LAZY = {
    "Controller": "control.controller",
    "Problem": "control.controller",
    "StepStats": "control.controller",
    "WeightInfo": "layers",
    "find_weights": "layers",
    "register_prunable": "layers",
    "macs_per_weight": "macs",
    "Pruner": "pruner",
    "PrunedLayer": "snapshot",
    "Snapshot": "snapshot",
}

__all__ = [
    "Budget",
    "Control",
    "Controller",
    "Hard",
    "Operator",
    "Pattern",
    "Power",
    "Problem",
    "PrunedLayer",
    "Pruner",
    "Ramp",
    "Select",
    "Snapshot",
    "Soft",
    "SparsityLoss",
    "StepStats",
    "Track",
    "WeightInfo",
    "find_weights",
    "macs_per_weight",
    "register_prunable",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)

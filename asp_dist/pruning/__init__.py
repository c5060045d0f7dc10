"""Pruning by an adaptive sparsity loss (arXiv 2006.02768), as a companion of any torch optimizer.

pruner = Pruner(model, optimizer, Budget.parameters(sparsity=0.9))
"""

from asp_dist.pruning.budget import Budget
from asp_dist.pruning.layers import WeightInfo, find_weights, register_prunable
from asp_dist.pruning.macs import macs_per_weight
from asp_dist.pruning.pruner import Pruner
from asp_dist.pruning.report import PrunedLayer
from asp_dist.pruning.schedule import Ramp

__all__ = [
    "Budget",
    "PrunedLayer",
    "Pruner",
    "Ramp",
    "WeightInfo",
    "find_weights",
    "macs_per_weight",
    "register_prunable",
]

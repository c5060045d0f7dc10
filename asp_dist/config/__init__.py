"""The configuration of a run: frozen, typed dataclasses, one per concern.

A YAML file under ``configs/`` fills them, and the command line overrides any field by its dotted name
(``--budget.sparsity 0.95``). Values are checked on construction, so a wrong one fails before anything starts.
Sparsity and density are fractions in [0, 1]; durations are in epochs unless the name says otherwise.
"""

from asp_dist.config.checks import UserError, check, may_pass
from asp_dist.config.cluster import ClusterConfig, OutputConfig, ResumeConfig, TrackingConfig
from asp_dist.config.data import AugmentConfig, AutoAugment, Backend, DataConfig, DataFormat, ModelConfig
from asp_dist.config.pruning import BudgetConfig, BudgetTerm, Cost, PruningConfig
from asp_dist.config.run import FREE_ON_RESUME, Config, config_hash, differences, flatten, from_dict, to_dict
from asp_dist.config.training import OptimizerConfig, Precision, ScheduleConfig, TrainingConfig

__all__ = [
    "FREE_ON_RESUME",
    "AugmentConfig",
    "AutoAugment",
    "Backend",
    "BudgetConfig",
    "BudgetTerm",
    "ClusterConfig",
    "Config",
    "Cost",
    "DataConfig",
    "DataFormat",
    "ModelConfig",
    "OptimizerConfig",
    "OutputConfig",
    "Precision",
    "PruningConfig",
    "ResumeConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainingConfig",
    "UserError",
    "check",
    "config_hash",
    "differences",
    "flatten",
    "from_dict",
    "may_pass",
    "to_dict",
]

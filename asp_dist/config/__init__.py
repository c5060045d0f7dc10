"""The configuration of a run.

A YAML file under ``configs/`` fills its dataclasses, and the command line overrides any field by its dotted name
(``--budget.sparsity 0.95``).
"""

from asp_dist.config.fields import (
    AugmentConfig,
    AutoAugment,
    Backend,
    BudgetConfig,
    ClusterConfig,
    Config,
    DaliConfig,
    DataConfig,
    DataFormat,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    Precision,
    PruningConfig,
    ResumeConfig,
    ScheduleConfig,
    TrackingConfig,
    TrainingConfig,
)
from asp_dist.config.reading import (
    FREE_ON_RESUME,
    check_fixed,
    check_names,
    config_hash,
    differences,
    flatten,
    from_dict,
    is_among,
    refuse_change,
    to_dict,
)

__all__ = [
    "FREE_ON_RESUME",
    "AugmentConfig",
    "AutoAugment",
    "Backend",
    "BudgetConfig",
    "ClusterConfig",
    "Config",
    "DaliConfig",
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
    "check_fixed",
    "check_names",
    "config_hash",
    "differences",
    "flatten",
    "from_dict",
    "is_among",
    "refuse_change",
    "to_dict",
]

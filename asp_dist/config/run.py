"""A whole run, its plain form, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from asp_dist.config.checks import check
from asp_dist.config.cluster import ClusterConfig, OutputConfig, ResumeConfig, TrackingConfig
from asp_dist.config.data import DataConfig, ModelConfig
from asp_dist.config.pruning import BudgetConfig, PruningConfig
from asp_dist.config.training import OptimizerConfig, ScheduleConfig, TrainingConfig


@dataclass(frozen=True)
class Config:
    """A whole run.

    Args:
        name: name of the run, and of its folder under `output.dir`.
    """

    name: str = "run"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    budget: BudgetConfig = BudgetConfig()
    pruning: PruningConfig = PruningConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: OutputConfig = OutputConfig()
    resume: ResumeConfig = ResumeConfig()

    def __post_init__(self) -> None:
        check(bool(self.name) and "/" not in self.name, f"name = {self.name!r} must be a plain folder name")


# Fields that say where and how a run is watched, not what it computes: a resumed run may change them freely.
FREE_ON_RESUME = ("cluster", "tracking", "resume", "output", "data.threads", "data.prefetch", "training.log_every")


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as plain JSON types, nested as the dataclasses are."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(tree: dict[str, Any], cls: Any = Config) -> Any:
    """The inverse of `to_dict`. Raises `UserError` for values out of range, TypeError for unknown fields."""
    hints = get_type_hints(cls)
    arguments = dict(tree)
    for name, value in tree.items():
        kind = hints.get(name)
        if dataclasses.is_dataclass(kind):
            arguments[name] = from_dict(value, kind)
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            arguments[name] = tuple(from_dict(v, item) if dataclasses.is_dataclass(item) else v for v in value)
    return cls(**arguments)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keyed by dotted names; `kwargs` and lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and key != "kwargs":
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any], allowed: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ and that a resumed run may not change: name -> (old, new)."""
    free = (*FREE_ON_RESUME, *allowed)
    before, after = flatten(old), flatten(new)
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not any(name == f or name.startswith(f"{f}.") for f in free)
    }


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits that identify what the run computes, whatever its cluster and tracking."""
    flat = flatten(to_dict(config))
    fixed = {k: v for k, v in flat.items() if not any(k == f or k.startswith(f"{f}.") for f in FREE_ON_RESUME)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]

"""Configurations as plain trees and back, and how two of them differ."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from asp_dist.config.fields import Config
from asp_dist.errors import UserError

# Fields that say where and how a run is computed and watched, not what: a resumed run may change them freely.
FREE_ON_RESUME = (
    *("cluster", "tracking", "resume", "output", "data.threads", "data.prefetch", "data.dali", "data.eval_batch_size"),
    *("data.cache", "data.cache_gb", "data.cache_keep"),
    *("training.log_every", "training.max_bad_steps", "training.max_minutes", "training.device", "training.compile"),
    *("training.profile_steps", "pruning.agreement_every"),
)
# Fields that no resumed run can change, not even by resume.allow_changes, and why.
_AT_START = "it says how a run starts, and this one has started"
FIXED_ON_RESUME = {
    "model.name": "the checkpoints have the weights of another network",
    "model.pretrained": _AT_START,
    "model.weights": _AT_START,
    "model.new_classifier": _AT_START,
    "optimizer.name": "the checkpoints have another optimizer's state",
    "training.parallel": "the checkpoints have the optimizer's state in another form",
    "budget.scope": "the control's state belongs to budgets of the other scope",
    "pruning.control": "the checkpoints have another control's state",
    "pruning.loss.initial_threshold": _AT_START,
    "pruning.track.allocation": _AT_START,
    "pruning.select": "the checkpoints have the thresholds of other layers",
}


def to_dict(config: Any) -> dict[str, Any]:
    """`config` as plain JSON types, nested as the dataclasses are."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(tree: dict[str, Any], cls: Any = Config, *, prefix: str = "", base: Any = None) -> Any:
    """The inverse of `to_dict`; fields that `tree` lacks have the values of `base`, or else their defaults.

    Raises:
        UserError: a value is out of range; names the field with `prefix` before it.
        TypeError: an unknown field.
    """
    hints = get_type_hints(cls)
    arguments = {} if base is None else {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    for name, value in tree.items():
        kind, place = hints.get(name), f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
            arguments[name] = from_dict(value, kind, prefix=f"{place}.", base=arguments.get(name, default))
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            arguments[name] = tuple(
                from_dict(v, item, prefix=f"{place}.{i}.") if dataclasses.is_dataclass(item) else v for i, v in enumerate(value)
            )
        else:
            arguments[name] = value
    try:
        return cls(**arguments)
    except UserError:
        raise
    except ValueError as error:
        # The library's own options do not know their place in a configuration.
        names_field = re.match(r"\w+ = ", str(error))
        raise UserError(f"{prefix}{error}" if names_field else f"{prefix.rstrip('.')}: {error}") from error


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


# What a field that a stored configuration lacks, written by another version, is.
DEFAULTS = flatten(to_dict(Config()))


def is_among(name: str, fields: Iterable[str]) -> bool:
    """Whether the dotted `name` is one of `fields`, or lies in one of them."""
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted names whose values differ, but for those that a resumed run may change freely: name -> (old, new).

    A field that one of them lacks has its default there.
    """
    before, after = ({**DEFAULTS, **flatten(tree)} for tree in (old, new))
    return {
        name: (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not is_among(name, FREE_ON_RESUME)
    }


def check_names(fields: Iterable[str]) -> None:
    """Raise `UserError` if one of these names in ``resume.allow_changes`` is no field, and no part of the configuration."""
    for field in fields:
        if not any(is_among(name, (field,)) for name in DEFAULTS):
            close = difflib.get_close_matches(field, DEFAULTS, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"resume.allow_changes names {field!r}, which is not a field of the configuration{hint}")


def check_fixed(changed: dict[str, tuple[Any, Any]]) -> None:
    """Raise `UserError` if a field that `differences` found is one that no resumed run can change."""
    for name, (before, now) in changed.items():
        for field, reason in FIXED_ON_RESUME.items():
            if is_among(name, (field,)):
                refuse_change(name, before, now, reason)


def refuse_change(name: str, before: Any, now: Any, reason: str) -> NoReturn:
    """Raise the `UserError` of a change that a resumed run cannot make."""
    raise UserError(
        f"{name} = {now!r} cannot take effect in this run, which had {before!r}: {reason}. Leave it as it was, or give the new "
        "run another name (--name)"
    )


def config_hash(config: Config) -> str:
    """Twelve hexadecimal digits that identify what the run computes, regardless of its cluster and tracking."""
    flat = flatten(to_dict(config))
    fixed = {name: value for name, value in flat.items() if not is_among(name, FREE_ON_RESUME)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]

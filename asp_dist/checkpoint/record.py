"""The run's folder: whose it is, and the files that say so."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from pathlib import Path
from typing import Any

import yaml

from asp_dist import __version__
from asp_dist.checkpoint.folder_lock import writing_to
from asp_dist.config import Config, check_fixed, check_names, config_hash, differences, from_dict, is_among, to_dict
from asp_dist.errors import UserError, may_pass
from asp_dist.files import write_text
from asp_dist.tracking.schema import CONFIG_FILE, IDENTITY_FILE, MODEL_FILE, SUMMARY_FILE


def run_dir(config: Config) -> Path:
    """The run's folder, absolute: ``OUTPUT.DIR/NAME``."""
    return Path(config.output.dir).expanduser().absolute() / config.name


def with_absolute_paths(config: Config) -> Config:
    """`config` with its files named from the root, so that the same run has the same configuration."""

    def absolute(path: str) -> str:
        return path if "://" in path else os.path.normpath(Path(path).expanduser().absolute())

    weights, start = config.model.weights, config.resume.from_run
    return dataclasses.replace(
        config,
        resume=dataclasses.replace(config.resume, from_run=start and absolute(start)),
        model=dataclasses.replace(config.model, weights=weights and absolute(weights)),
        data=dataclasses.replace(config.data, root=absolute(config.data.root)),
    )


def check_run_dir(config: Config) -> dict[str, Any] | None:
    """The identity of the run in the folder, None if there is none; changes nothing.

    Raises:
        UserError: it contains a run with another configuration, or one that must not be touched.
        OSError: the file system does not answer.
    """
    check_names(config.resume.allow_changes)
    folder = run_dir(config)
    if not (folder / CONFIG_FILE).is_file():
        return None
    try:
        old = yaml.safe_load((folder / CONFIG_FILE).read_text())
        identity: dict[str, Any] = json.loads((folder / IDENTITY_FILE).read_text())
        changed = differences(old, to_dict(with_absolute_paths(config)))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        if isinstance(error, OSError) and may_pass(error):
            raise
        raise UserError(
            f"{folder} contains a run whose {CONFIG_FILE} or {IDENTITY_FILE} cannot be read ({error}): choose another name, or "
            "remove the folder"
        ) from error
    check_fixed(changed)
    changed = {name: values for name, values in changed.items() if not is_among(name, config.resume.allow_changes)}
    if changed:
        lines = "".join(f"\n  {name}: {before!r} there, {now!r} here" for name, (before, now) in changed.items())
        raise UserError(
            f"{folder} contains a run with another configuration:{lines}\nchoose another name (--name), or resume with the "
            f"changed fields: --resume.allow_changes '[{', '.join(changed)}]'"
        )
    if not config.resume.enabled:
        raise UserError(f"{folder} already contains a run and resume.enabled is false: choose another name (--name)")
    return identity


def claim_run_dir(config: Config) -> dict[str, Any]:
    """Make the folder this run's, or find that it is; returns the run's identity. For rank 0.

    The configuration of a run that the folder already contains stays there until `store_config` is called.

    The identity keeps, as ``places``, every ``output.storage`` that the run has had (None: its own folder): checkpoints may
    lie in any of them.

    Raises:
        UserError: see `check_run_dir`; or the folder cannot be written.
    """
    folder = run_dir(config)
    identity = check_run_dir(config)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if identity is None:
            identity = {"id": uuid.uuid4().hex[:12], "asp_dist": __version__, "places": []}
        if config.output.storage not in identity["places"]:
            identity["places"].append(config.output.storage)
            write_text(folder / IDENTITY_FILE, json.dumps(identity, indent=1))
        if not (folder / CONFIG_FILE).is_file():
            store_config(config)
    return identity


def store_config(config: Config) -> None:
    """Write the run's configuration into its folder. For rank 0, once its changes are known to take effect."""
    write_text(run_dir(config) / CONFIG_FILE, yaml.safe_dump(to_dict(with_absolute_paths(config)), sort_keys=False))


def finished_summary(config: Config) -> dict[str, Any] | None:
    """The summary of this very configuration, if the folder contains its complete results."""
    folder = run_dir(config)
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text())
    except (OSError, ValueError):
        return None
    mine = config_hash(with_absolute_paths(config))
    return summary if summary.get("config_hash") == mine and (folder / MODEL_FILE).is_file() else None


def load_config(folder: Path) -> Config:
    """The configuration stored in a run's folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    try:
        tree = yaml.safe_load((folder / CONFIG_FILE).read_text())
        config: Config = from_dict(tree)
    except OSError as error:
        raise UserError(f"{folder} is not a run folder: {CONFIG_FILE} is missing") from error
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    return config

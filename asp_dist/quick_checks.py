"""What can be known to be wrong within a second: without torch and timm, which take five to import."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path

from asp_dist.config import Config
from asp_dist.errors import UserError, missing_data

FEWEST = 500  # a timm whose source reads differently is left to the full check
MODEL = re.compile(r"^@register_model\b.*\ndef (\w+)\(", re.MULTILINE)
WORD = re.compile(r"'(\w+)'")


def check_quickly(config: Config, *, here: bool = True) -> None:
    """Raise `UserError` for an unknown model or optimizer, and for files and folders that are not there.

    Args:
        config: the run.
        here: whether it runs on this machine, so that its files must be here.
    """
    model, optimizer = config.model.name, config.optimizer.name.removeprefix("lookahead_")
    models = model_names()
    if len(models) > FEWEST and "/" not in model and ":" not in model and model.partition(".")[0] not in models:
        raise UserError(f"model.name = {model!r} is not in timm's registry{closest(model, models)}")
    optimizers = optimizer_names()
    if optimizers and optimizer.lower() not in optimizers:
        name = config.optimizer.name
        raise UserError(f"optimizer.name = {name!r} is not an optimizer of timm{closest(optimizer, optimizers)}")
    if not here:
        return
    remote = "://" in config.data.root
    if config.data.backend != "synthetic" and not remote and not Path(config.data.root).expanduser().is_dir():
        raise missing_data(config.data.root)
    if config.model.weights is not None and "://" not in config.model.weights:
        file = Path(config.model.weights).expanduser()
        if not file.is_file():
            raise UserError(f"model.weights = {config.model.weights}: there is no such file")


def closest(name: str, known: set[str]) -> str:
    """The names most like `name`, in words; empty if none is."""
    close = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"; the closest are {', '.join(close)}" if close else ""


def model_names() -> set[str]:
    """The networks of timm and of this package, read from their source: importing them takes seconds."""
    return {name for file in (*_sources("timm", "models"), *_sources("asp_dist", "")) for name in MODEL.findall(_text(file))}


def optimizer_names() -> set[str]:
    """What timm's optimizers may be called: every word of the source that registers them."""
    return {word for file in _sources("timm", "optim") if "factory" in file.name for word in WORD.findall(_text(file))}


def _sources(package: str, folder: str) -> list[Path]:
    found = importlib.util.find_spec(package)
    return [] if found is None or found.origin is None else sorted((Path(found.origin).parent / folder).glob("*.py"))


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")

"""What is evaluated: a run, one of its checkpoints, a weights file, or a network of timm's with its published weights."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.data import ImageNetInfo
from torch import Tensor, nn

from asp_dist.checkpoint.format import CheckpointError, read_checkpoint
from asp_dist.checkpoint.record import load_config
from asp_dist.checkpoint.storage import MANIFEST, LocalStore
from asp_dist.config import Config, DataConfig, ModelConfig
from asp_dist.errors import UserError, check
from asp_dist.models import check_model_name
from asp_dist.pretrained import read_weights
from asp_dist.runs.finished import count_classes, load_model, metadata_of, model_file, prunable_weights, weights_of
from asp_dist.tracking.schema import CONFIG_FILE, MODEL_FILE
from asp_dist.weight_files import save_safetensors

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Subject:
    """A network, and how it is to be run.

    Args:
        what: where its weights come from, for people.
        model: the network, on the CPU.
        config: of its run; of a file or of timm's network, the defaults.
        classes: the data's names of its outputs, in order; None: not known.
        prunable: its weights that may be zero, by name.
    """

    what: str
    model: nn.Module
    config: Config
    classes: tuple[str, ...] | None
    prunable: dict[str, Tensor]


def find_subject(given: str, model_name: str | None, folder: Path, *, average: bool) -> Subject:
    """The network that `given` means.

    Args:
        given: a run's folder, a checkpoint's, a weights file, or a name of timm's.
        model_name: the name of a file's network, where the file does not say it.
        folder: for a copy of the weights, in the form that timm loads.
        average: take the average of the weights: of a run, out of its last checkpoint.

    Raises:
        UserError: there is no such thing, or it lacks what is asked for.
    """
    path = Path(given)
    if (path / MANIFEST).is_file():
        return _checkpoint(path, folder, average=average)
    if path.is_dir():
        if not average:
            config = load_config(path)  # first: a folder without a run is told from a run that is not finished
            return _file_of_run(path, model_file(path), config)
        names = LocalStore(path / "checkpoints").names()
        check(bool(names), f"{path} has no checkpoint, which would have the average of the weights")
        return _checkpoint(path / "checkpoints" / names[-1], folder, average=True)
    check(not average, f"{given} is no run and no checkpoint: only these have an average of the weights; leave --average out")
    if path.is_file():
        return _file(path, model_name, folder)
    if "/" in given or given.endswith((".safetensors", ".pth", ".pt")):
        raise UserError(f"{given} is not there: give a run's folder, a checkpoint's, a weights file, or a name of timm's")
    return _of_timm(given)


def _file_of_run(run_dir: Path, file: Path, config: Config) -> Subject:
    model = load_model(config, file, count_classes(run_dir, file))
    return Subject(str(file), model, config, classes_in(file), prunable_weights(run_dir, load_file(file)))


def _checkpoint(path: Path, folder: Path, *, average: bool) -> Subject:
    run_dir = path.resolve().parent.parent
    try:
        manifest, state = read_checkpoint(LocalStore(path.resolve().parent), path.name)
    except CheckpointError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    weights: dict[str, Tensor] | None = state["ema"] if average else state["model"]
    if weights is None:
        raise UserError(f"{path} has no average of the weights: training.ema_decay was not set")
    prunable = weights_of(weights, set(state["pruner"]["dense"]) if state["pruner"] else set())
    if average:  # as it is validated: under the mask of the weights themselves
        prunable = {name: weight.masked_fill(state["model"][name] == 0, 0.0) for name, weight in prunable.items()}
    config = load_config(run_dir)
    model = _with_weights(config, {**weights, **prunable}, folder)
    what = f"{path}, step {manifest.step}" + (", the average of the weights" if average else "")
    return Subject(what, model, config, classes_in(run_dir / MODEL_FILE), prunable)


def _file(path: Path, model_name: str | None, folder: Path) -> Subject:
    if (path.parent / CONFIG_FILE).is_file() and path.name == MODEL_FILE and model_name is None:
        return _file_of_run(path.parent, path, load_config(path.parent))
    name = model_name or metadata_of(path).get("model")
    if name is None:
        raise UserError(f"{path} does not say which network it is of: give its name, --model NAME")
    weights = {key: value for key, value in read_weights(str(path)).items() if isinstance(value, Tensor)}
    model = _with_weights(Config(model=ModelConfig(name=name)), weights, folder)
    matrices = {key: value for key, value in weights.items() if value.dim() > 1}
    return Subject(str(path), model, Config(), classes_in(path) or _imagenets(model), matrices)


def _of_timm(name: str) -> Subject:
    check(timm.is_model(name), f"{name!r} is no folder, no file, and no name in timm's registry")
    cfg = timm.get_pretrained_cfg(name)
    check(
        cfg is not None and cfg.has_weights,
        f"timm has no published weights for {name}: give a run's folder, a checkpoint's, or a weights file",
    )
    try:
        model = timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"the weights of {name} cannot be fetched: {str(error).strip().splitlines()[0]}") from error
    matrices = {key: value for key, value in model.state_dict().items() if value.dim() > 1}
    return Subject(f"timm's {name}, its published weights", model, Config(), _imagenets(model), matrices)


def _with_weights(config: Config, weights: dict[str, Tensor], folder: Path) -> nn.Module:
    """The network of `config` with `weights`, through timm's own loading, which reads files."""
    check_model_name(config.model.name)
    file = folder / MODEL_FILE
    save_safetensors(file, {name: tensor.contiguous() for name, tensor in weights.items()}, {"format": "pt"})
    cfg = timm.get_pretrained_cfg(config.model.name, allow_unregistered=True)
    heads = cfg.classifier if cfg is not None else None
    head = heads[0] if isinstance(heads, tuple | list) else heads
    last = weights.get(f"{head}.weight")
    if last is None:  # a network of this project's own, whose classifier is its last matrix
        last = [weight for weight in weights.values() if weight.dim() > 1][-1]
    return load_model(config, file, last.shape[0])


def classes_in(file: Path) -> tuple[str, ...] | None:
    """The data's names of the classes in the metadata of a run's model `file`; None where it does not say."""
    classes = metadata_of(file).get("classes")
    return None if classes is None else tuple(json.loads(classes))


def _imagenets(model: nn.Module) -> tuple[str, ...] | None:
    """ImageNet's synsets for a network with as many outputs."""
    count = getattr(model, "num_classes", None)
    return tuple(ImageNetInfo().label_names()) if count == IMAGENET_CLASSES else None


def outputs_for(subject: Subject, classes: tuple[str, ...], root: str) -> torch.Tensor | None:
    """For each class of the data the number of the network's output; None: they are the same.

    Raises:
        UserError: the network has no output for some class.
    """
    count = getattr(subject.model, "num_classes", len(classes))
    if subject.classes is None or len(subject.classes) != count:
        check(
            count == len(classes),
            f"{subject.what} has {count} classes, not known by name, and {root} has {len(classes)}: give its own data set",
        )
        return None
    if subject.classes == classes:
        return None
    number = {name: index for index, name in enumerate(subject.classes)}
    unknown = [name for name in classes if name not in number]
    check(
        not unknown,
        f"{root} has {len(unknown)} classes that {subject.what} does not know, such as {unknown[0] if unknown else ''!r}: its "
        f"classes are {', '.join(subject.classes[:3])}, ...",
    )
    return torch.tensor([number[name] for name in classes])


def data_for(subject: Subject, changes: dict[str, Any], world_size: int) -> DataConfig:
    """The data set to evaluate on: that of the run, with `changes`; only its validation images are read."""
    data = dataclasses.replace(subject.config.data, **{key: value for key, value in changes.items() if value is not None})
    if changes.get("root") is not None:
        data = dataclasses.replace(data, train=data.val, format=changes.get("format") or "auto")
    batch = data.eval_batch_size or min(64, data.batch_size)
    return dataclasses.replace(data, eval_batch_size=batch, batch_size=world_size, select_fraction=0.0)

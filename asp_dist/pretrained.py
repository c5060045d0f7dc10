"""Starting weights from a file: what fits the network is loaded, and the log says what was and what was not."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import _builder, load_state_dict
from torch import Tensor, nn

from asp_dist.errors import UserError, check, may_pass
from asp_dist.weight_files import load_sparse

log = logging.getLogger(__name__)
# What torch.load and safetensors raise for files that are not what they should be.
UNREADABLE = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    UnpicklingError,
    SafetensorError,
)
_patching = threading.RLock()


def read_weights(file: str) -> dict[str, Any]:
    """The entries of a weights file by name; of a training checkpoint, the average of the weights or else the weights.

    Args:
        file: a ``.safetensors`` file, plain or sparse (`asp_dist.weight_files`), or what ``torch.save`` wrote.
            Nothing in it is executed.

    Raises:
        UserError: there is no such file, or it cannot be read as weights.
        OSError: the file system does not answer.
    """
    check(Path(file).is_file(), f"model.weights = {file!r} is not a file: give a .safetensors or .pth file")
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                sparse = "sparse_shapes" in (opened.metadata() or {})
            if sparse:
                return load_sparse(Path(file))
        return dict(load_state_dict(file, weights_only=True))
    except OSError as error:
        # In a file that is cut short, torch seeks to before its beginning.
        if may_pass(error) and error.errno != errno.EINVAL:
            raise
        raise UserError(f"model.weights = {file!r} cannot be read ({error.strerror or error}): fetch it again") from error
    except UNREADABLE as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"model.weights = {file!r} cannot be read as weights ({lines[0]}): give a .safetensors file, or a .pth file "
            "that torch.save wrote of model.state_dict()"
        ) from error


@contextmanager
def starting_weights(file: str, name: str, weights: dict[str, Any], *, new_classifier: bool = False) -> Iterator[None]:
    """Within it, a model that timm builds with ``pretrained=True`` starts from `weights`.

    timm itself keeps a classifier only if the file is for as many classes as the registry says, and is silent about what
    it leaves out. Only its builder knows how a model converts the names and shapes of older files, so its own loading is
    stepped into, rather than repeated.

    Args:
        file: where the weights come from, for messages.
        name: the model's name, for messages.
        weights: what `read_weights` gave.
        new_classifier: whether the classifier may be left random.
    """
    with _patching:
        timms = _builder.load_pretrained

        def load(model: nn.Module, **arguments: Any) -> None:
            _load(timms, model, file, name, dict(weights), new_classifier, **arguments)

        _builder.load_pretrained = load
        try:
            yield
        finally:
            _builder.load_pretrained = timms


def _load(
    timms: Callable[..., None],
    model: nn.Module,
    file: str,
    name: str,
    weights: dict[str, Any],
    new_classifier: bool,
    *,
    pretrained_cfg: dict[str, Any],
    num_classes: int,
    filter_fn: Callable[..., dict[str, Tensor]] | None = None,
    **options: Any,
) -> None:
    """Load what fits of `weights` into `model`; see `timm.models.load_pretrained` for the other arguments.

    Raises:
        UserError: nothing fits; something other than the classifier has another shape; or there is no classifier for as many
            classes, and none is to be trained anew.
    """
    what = f"model.weights = {file!r}"
    misfit = f"{what} does not fit model.name = {name!r}"
    tensors = {key: value for key, value in weights.items() if isinstance(value, Tensor)}
    unused = [key for key in weights if key not in tensors]
    if filter_fn is not None:
        try:
            tensors = _filtered(filter_fn, tensors, model)
        except (LookupError, AttributeError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{misfit}: {type(error).__name__}: {error}") from error
    wanted: dict[str, Tensor] = model.state_dict()
    fitting = {key: tensors[key] for key in wanted if key in tensors}
    dropped = _drop_classifiers(fitting, pretrained_cfg, num_classes)
    check(
        any(key in fitting for key, _ in model.named_parameters()),
        f"{misfit}: it has {_few(weights)}, and none of the network's {_few(wanted)}",
    )
    convolutions = _as_tuple(pretrained_cfg.get("first_conv"))  # timm adapts them to another number of channels
    different = [
        f"{key} is {list(value.shape)}, not {list(wanted[key].shape)}"
        for key, value in fitting.items()
        if value.shape != wanted[key].shape and key.removesuffix(".weight") not in convolutions
    ]
    check(not different, f"{misfit}: {_few(different, shown=1)}")
    classifiers = [f"{name}.weight" for name in _as_tuple(pretrained_cfg.get("classifier"))]
    check(
        new_classifier or all(key in fitting for key in classifiers if key in wanted),
        f"{what} has {_classes_of(dropped) or 'no classifier'}, the data {num_classes} classes: add "
        "model.new_classifier = true to train a new classifier on these weights",
    )
    # What is left is complete in timm's eyes: a classifier that fits, and no offset of its labels.
    source = {
        **pretrained_cfg,
        "source": "",
        "num_classes": num_classes,
        "label_offset": 0,
        "state_dict": dict(fitting),
    }
    try:
        timms(model, pretrained_cfg=source, num_classes=num_classes, **{**options, "strict": False})
    except RuntimeError as error:
        raise UserError(f"{misfit}: {' '.join(str(error).split())}") from error
    # Files from before torch 0.4.1 lack the counts of batches, which no network here computes with.
    absent = wanted.keys() - fitting.keys() - dropped.keys()
    missing = [key for key in wanted if key in absent and not key.endswith(".num_batches_tracked")]
    unused += [key for key in tensors if key not in wanted]
    notes = []
    if dropped:
        notes.append(f"{', '.join(dropped)} left random: the file has {_classes_of(dropped)}, the data {num_classes}")
    if missing:
        notes.append(f"{len(missing)} missing from the file, left random: {_few(missing)}")
    if unused:
        notes.append(f"{len(unused)} of the file unexpected, not used: {_few(unused)}")
    level = logging.WARNING if notes else logging.INFO
    log.log(level, "%s: %s", what, "; ".join([f"{len(fitting)} of {len(wanted)} tensors of {name} loaded", *notes]))


def _filtered(filter_fn: Callable[..., dict[str, Tensor]], weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`weights` by the model's own names; some of timm's filters want the model as well."""
    try:
        return filter_fn(weights, model)
    except TypeError:
        return filter_fn(weights)


def _drop_classifiers(fitting: dict[str, Tensor], pretrained_cfg: dict[str, Any], num_classes: int) -> dict[str, int]:
    """Remove classifiers for another number of classes from `fitting`; returns their tensors' names and that number."""
    dropped: dict[str, int] = {}
    for classifier in _as_tuple(pretrained_cfg.get("classifier")):
        names = [key for key in (f"{classifier}.weight", f"{classifier}.bias") if key in fitting]
        rows = fitting[names[0]].shape[0] if names and fitting[names[0]].dim() else num_classes
        if rows != num_classes:
            dropped.update(dict.fromkeys(names, rows))
    for key in dropped:
        del fitting[key]
    return dropped


def _classes_of(dropped: dict[str, int]) -> str:
    return ", ".join(map(str, sorted(set(dropped.values())))) + " classes" if dropped else ""


def _as_tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def _few(names: Iterable[str], shown: int = 3) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")

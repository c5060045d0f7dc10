"""Which parameters of a model are prunable weights: found by the module's type and by identity, never by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from asp_dist.pruning.options import Select

PrunableNames = Callable[[nn.Module], Iterator[str]]


def _weight(module: nn.Module) -> Iterator[str]:
    yield "weight"


def _attention(module: nn.Module) -> Iterator[str]:
    # q, k and v have weights of their own only where their widths differ; else they share in_proj_weight.
    yield from ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _recurrent(module: nn.Module) -> Iterator[str]:
    yield from (name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 2)


# Module types whose named parameters are matrices of weights. Subclasses count; the first match in the list decides.
_BY_TYPE: list[tuple[type[nn.Module], PrunableNames]] = [
    (_ConvNd, _weight),
    (nn.Linear, _weight),
    (nn.Bilinear, _weight),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _recurrent),
]

# Types of packages that this one must not import, by their qualified name anywhere among a module's base classes.
_BY_QUALIFIED_NAME: dict[str, PrunableNames] = {
    "timm.layers.cond_conv2d.CondConv2d": _weight,
}

_STANDARDISED = "its weights are standardised in forward, which turns stored zeros into nonzero effective weights"
# Types that are refused, by qualified name, with the reason.
_REFUSED: dict[str, str] = {
    "timm.layers.std_conv.StdConv2d": _STANDARDISED,
    "timm.layers.std_conv.StdConv2dSame": _STANDARDISED,
    "timm.layers.std_conv.ScaledStdConv2d": _STANDARDISED,
    "timm.layers.std_conv.ScaledStdConv2dSame": _STANDARDISED,
}


_COMPUTED = "its weights are computed from other parameters (a parametrization), which undoes zeros"


def register_prunable(module_type: type[nn.Module], *parameter_names: str) -> None:
    """Declare that the named parameters of `module_type` (and its subclasses) are prunable weights."""

    def names(module: nn.Module) -> Iterator[str]:
        yield from parameter_names

    _BY_TYPE.insert(0, (module_type, names))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel` and `torch.compile`, whose wrappers would change the layers' names."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@dataclass(frozen=True)
class WeightInfo:
    """One matrix of weights in a model.

    Attributes:
        name: the module's name; with the parameter's appended where that is not ``weight``.
        module_name: the module's name in ``model.named_modules()``.
        parameter: the parameter, dense shape.
        kind: the module's class name.
        reason: why it stays dense; empty if it is pruned.
    """

    name: str
    module_name: str
    parameter: nn.Parameter
    kind: str
    reason: str = ""

    @property
    def numel(self) -> int:
        """Number of weights in the whole, unsharded parameter."""
        return self.parameter.numel()


def _qualified_names(module: nn.Module) -> list[str]:
    return [f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__]


def _candidates(module: nn.Module) -> tuple[list[str], str]:
    """Names of a module's weight parameters, and the reason to refuse them (empty: none)."""
    qualified = _qualified_names(module)
    refusal = next((_REFUSED[name] for name in qualified if name in _REFUSED), "")
    for module_type, names in _BY_TYPE:
        if isinstance(module, module_type):
            return list(names(module)), refusal
    for name in qualified:
        if name in _BY_QUALIFIED_NAME:
            return list(_BY_QUALIFIED_NAME[name](module)), refusal
    return [], refusal


def _parameter(module: nn.Module, name: str) -> tuple[nn.Parameter | None, str]:
    """The named parameter of a module, or what it is computed from; and in that case the reason to refuse it."""
    parameter = module._parameters.get(name)
    if parameter is not None or getattr(module, name, None) is None:
        return parameter, ""
    sources = [p for own, p in module.named_parameters() if name in own.split(".") or own.startswith(f"{name}_")]
    return (max(sources, key=lambda p: p.numel()), _COMPUTED) if sources else (None, "")


def find_weights(model: nn.Module, select: Select = Select()) -> list[WeightInfo]:
    """All matrices of weights of `model`, in the order of its modules, each with the reason if it stays dense.

    A parameter that several modules share is listed once, under its first name.

    Args:
        model: any module.
        select: which of them are pruned.

    Raises:
        ValueError: a glob matches nothing; or a layer cannot be pruned for the reason given and is not excluded.
    """
    found, refusals = _all_weights(model)
    for option, patterns in (("include", select.include), ("exclude", select.exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(info.name, pattern) for info in found):
                names_seen = ", ".join(info.name for info in found[:5])
                raise ValueError(f"{option} pattern {pattern!r} matches no layer; the layers are {names_seen}, ...")

    def reason(index: int) -> str:
        name, numel = found[index].name, found[index].numel
        if not select.first and index == 0:
            return "the first layer"
        if not select.last and index == len(found) - 1:
            return "the last layer"
        if any(fnmatchcase(name, pattern) for pattern in select.exclude):
            return "excluded by name"
        if select.include and not any(fnmatchcase(name, pattern) for pattern in select.include):
            return "not included by name"
        return f"fewer than {select.min_weights} weights" if numel < select.min_weights else ""

    weights = [replace(info, reason=reason(index)) for index, info in enumerate(found)]
    refused = [(info, refusal) for info, refusal in zip(weights, refusals) if refusal and not info.reason]
    if refused:
        listed = ", ".join(info.name for info, _ in refused[:3]) + (", ..." if len(refused) > 3 else "")
        raise ValueError(
            f"{len(refused)} layers cannot be pruned ({listed}): {refused[0][0].kind}: {refused[0][1]}. "
            "Exclude them by name (exclude=...) to prune the rest of the network"
        )
    return weights


def _all_weights(model: nn.Module) -> tuple[list[WeightInfo], list[str]]:
    """Every trainable matrix of `model` once, and why each is refused (empty: it is not)."""
    found: list[WeightInfo] = []
    refusals: list[str] = []
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        names, refusal = _candidates(module)
        for parameter_name in names:
            parameter, computed = _parameter(module, parameter_name)
            if parameter is None or id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            parts = [module_name] if parameter_name == "weight" else [module_name, parameter_name]
            name = ".".join(part for part in parts if part) or parameter_name
            found.append(WeightInfo(name, module_name, parameter, type(module).__name__))
            refusals.append(refusal or computed)
    return found, refusals


def optimizer_groups(weights: Sequence[WeightInfo], optimizers: Sequence[Optimizer]) -> list[tuple[int, int]]:
    """The optimizer, and the parameter group in it, that trains each of `weights`.

    Raises:
        ValueError: none trains one of them: it would be pruned, and never change otherwise; or several do.
    """
    places: dict[int, list[tuple[int, int]]] = {}
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                places.setdefault(id(parameter), []).append((number, index))
    found = [places.get(id(info.parameter), []) for info in weights]
    missing = [info.name for info, place in zip(weights, found) if not place]
    if missing:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise ValueError(
            f"{kinds} does not train {len(missing)} of the {len(weights)} layers to prune ({_few(missing)}), so they would "
            "never change: give it their parameters, give all optimizers (a, b), freeze them (requires_grad_(False)), or "
            "exclude them by name (exclude=...)"
        )
    shared = [info.name for info, place in zip(weights, found) if len(place) > 1]
    if shared:
        raise ValueError(f"more than one optimizer or parameter group trains {_few(shared)}")
    return [place[0] for place in found]


def _few(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")

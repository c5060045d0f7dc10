"""Arithmetic on vectors with one number per layer, made one Triton kernel.

A control is a few hundred small operations on [L] numbers. Launched one by one they would take longer than the passes over all
weights. So the operations are recorded once, as torch ran them, and written out as the source of a kernel whose lanes are the
layers. The control's mathematics stays in one place, for the CPU and the GPU.
"""

from __future__ import annotations

import hashlib
import linecache
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Body = Callable[..., list[Tensor]]
_recording = False


@torch.library.custom_op("asp_dist::loop_begin", mutates_args=())
def loop_begin(carried: Sequence[Tensor], times: int) -> list[Tensor]:
    """Marks, in a recorded program, where a loop begins: the operations up to `loop_end` are repeated."""
    return [one.clone() for one in carried]


@torch.library.custom_op("asp_dist::loop_end", mutates_args=())
def loop_end(carried: Sequence[Tensor]) -> list[Tensor]:
    """Marks where the loop ends; what it carries into the next round."""
    return [one.clone() for one in carried]


def repeat(times: int, body: Body, carried: list[Tensor]) -> list[Tensor]:
    """``carried = body(*carried)``, `times` times; recorded as a loop."""
    if _recording:
        return loop_end(body(*loop_begin(carried, times)))
    for _ in range(times):
        carried = body(*carried)
    return carried


def record(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> fx.GraphModule:
    """The operations that `function` runs on `inputs`.

    Raises:
        RuntimeError: the function reads a value, as ``float(tensor)`` does.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # slow to import, and the CPU never needs it

    global _recording
    _recording = True
    try:
        return make_fx(function)(*inputs)
    finally:
        _recording = False


HEADER = """import triton
import triton.language as tl


@triton.jit
def greater_of(a, b):
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def lesser_of(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def inverse_erf(y):
    # Giles, "Approximating the erfinv function" (2010), in the central region and the tail; then Newton's method.
    w = -tl.log((1.0 - y) * (1.0 + y))
    c = w - 2.5
    near = 1.50140941 + c * (0.246640727 + c * (-0.00417768164 + c * (-0.00125372503 + c * 0.00021858087)))
    t = tl.sqrt(w) - 3.0
    far = 2.83297682 + t * (1.00167406 + t * (0.00943887047 + t * (-0.0076224613 + t * 0.00573950773)))
    x = tl.where(w < 5.0, near, far) * y
    for _ in tl.static_range(3):
        x = x - (tl.math.erf(x) - y) * tl.exp(x * x) * 0.886226925452758
    return tl.where(y == 1.0, float("inf"), x)


@triton.jit
def program({arguments}, L: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    inside = lane < L
    zeros = tl.zeros((BLOCK,), tl.float64)
"""


def _literal(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return 'float("nan")' if math.isnan(value) else f'float("{"-" if value < 0 else ""}inf")'


class _Writer:
    """Writes a recorded graph as the source of a kernel.

    Args:
        module: the recorded operations.
        layers: L.
    """

    def __init__(self, module: fx.GraphModule, layers: int) -> None:
        self.module, self.layers = module, layers
        self.names: dict[fx.Node, str] = {}
        self.tables: dict[fx.Node, str] = {}  # inputs of several rows, which only `select` reads
        self.carried: list[list[str]] = []
        self.constants: list[Tensor] = []
        self.lines: list[str] = []
        self.indent = "    "

    def write(self) -> str:
        inputs, outputs = 0, 0
        self._load_constants()
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self._input(node, f"input{inputs}", node.meta["val"].shape)
                inputs += 1
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                for number, value in enumerate(node.args[0]):
                    if value.meta["val"].shape != ():
                        self._line(f"tl.store(output{number} + lane, zeros + {self.names[value]}, mask=inside)")
                    else:
                        self._line(f"tl.store(output{number}, {self.names[value]})")
                outputs = len(node.args[0])
        names = [f"input{i}" for i in range(inputs)] + [f"constant{i}" for i in range(len(self.constants))]
        arguments = ", ".join([*names, *(f"output{i}" for i in range(outputs))])
        return HEADER.replace("{arguments}", arguments) + "\n".join(self.lines) + "\n"

    def _load_constants(self) -> None:
        """All before the first loop: what is defined in a loop is not known behind it."""
        known: dict[str, str] = {}
        for node in self.module.graph.nodes:
            if node.op != "get_attr":
                continue
            if node.target not in known:
                constant = getattr(self.module, str(node.target))
                self._input(node, f"constant{len(self.constants)}", constant.shape)
                self.constants.append(constant.double())
                known[node.target] = f"({self.names[node]} != 0.0)" if constant.dtype == torch.bool else self.names[node]
            self.names[node] = known[node.target]

    def _line(self, text: str) -> None:
        self.lines.append(self.indent + text)

    def _input(self, node: fx.Node, name: str, shape: torch.Size) -> None:
        if len(shape) == 2:
            self.tables[node] = name
            return
        self.names[node] = f"v_{name}"
        where = f"{name} + lane, mask=inside, other=1.0" if len(shape) else name
        self._line(f"v_{name} = tl.load({where})")

    def _value(self, argument: Any) -> str:
        return self.names[argument] if isinstance(argument, fx.Node) else _literal(argument)

    def _call(self, node: fx.Node) -> None:
        target: Any = node.target
        arguments: Any = node.args
        if target is torch.ops.asp_dist.loop_begin.default:
            carried = [f"{node.name}_{number}" for number in range(len(arguments[0]))]
            for name, start in zip(carried, arguments[0]):
                vector = start.meta["val"].shape != ()
                self._line(f"{name} = {'zeros + ' if vector else ''}{self.names[start]}")
            self._line(f"for _ in range({arguments[1]}):")
            self.indent += "    "
            self.carried.append(carried)
            self.names[node] = node.name
        elif target is torch.ops.asp_dist.loop_end.default:
            carried = self.carried.pop()
            for number, value in enumerate(arguments[0]):
                self._line(f"next_{number} = {self.names[value]}")
            for number, name in enumerate(carried):
                self._line(f"{name} = next_{number}")
            self.indent = self.indent[:-4]
            self.names[node] = carried[0].rsplit("_", 1)[0]
        elif target is operator.getitem:
            self.names[node] = f"{self.names[arguments[0]]}_{arguments[1]}"
        else:
            self.names[node] = f"v_{node.name}"
            self._line(f"v_{node.name} = {self._expression(node)}")

    def _expression(self, node: fx.Node) -> str:
        target: Any = node.target
        arguments: Any = node.args
        name = target.overloadpacket.__name__
        if name == "select":
            table, _, row = arguments
            return f"tl.load({self.tables[table]} + {row * self.layers} + lane, mask=inside, other=1.0)"
        kind = node.meta["val"]
        a, b, c = ([self._value(one) for one in arguments if isinstance(one, fx.Node | int | float)] + [""] * 3)[:3]
        if name in ("full_like", "zeros_like", "ones_like", "full", "scalar_tensor"):
            value = {"zeros_like": "0.0", "ones_like": "1.0", "scalar_tensor": a}.get(name, b)
            return f"zeros + {value}" if kind.shape != () else f"tl.full((), {value}, tl.float64)"
        if name in ("clamp", "clamp_min", "clamp_max"):
            return self._clamp(node, name)
        if name == "nan_to_num":
            given = [*arguments[1:], None, None, None][:3]
            nan, high, low = (node.kwargs.get(key, value) for key, value in zip(("nan", "posinf", "neginf"), given))
            bounded = f'tl.where({a} == float("-inf"), {_literal(-1.7976931348623157e308 if low is None else low)}, {a})'
            bounded = f'tl.where({a} == float("inf"), {_literal(1.7976931348623157e308 if high is None else high)}, {bounded})'
            return f"tl.where({a} != {a}, {_literal(nan or 0.0)}, {bounded})"
        if name in ("sum", "amax", "amin", "mean"):
            if arguments[0].meta["val"].shape == ():
                return a
            neutral = {"amax": '-float("inf")', "amin": 'float("inf")'}.get(name, "0.0")
            call = {"amax": "tl.max", "amin": "tl.min"}.get(name, "tl.sum")
            reduced = f"{call}(tl.where(inside, {a}, {neutral}), axis=0)"
            return f"{reduced} / {self.layers}.0" if name == "mean" else reduced
        if name == "logit":
            eps = float(arguments[1])
            inner = f"lesser_of(greater_of({a}, {eps!r}), {1.0 - eps!r})"
            return f"tl.log({inner} / (1.0 - {inner}))"
        if name == "pow" and not isinstance(arguments[1], fx.Node):
            if arguments[1] != 2:
                raise NotImplementedError(f"a power of {arguments[1]}")
            return f"{a} * {a}"
        if name == "_to_copy":
            return f"{a}.to(tl.float64)"
        if kind.dtype == torch.bool and name == "mul":
            name = "bitwise_and"
        if name not in EXPRESSIONS:
            raise NotImplementedError(f"torch's operator {name}")
        return EXPRESSIONS[name].format(a=a, b=b, c=c)

    def _clamp(self, node: fx.Node, name: str) -> str:
        low: Any
        high: Any
        given = [*node.args[1:], None, None][:2]
        low, high = node.kwargs.get("min", given[0]), node.kwargs.get("max", given[1])
        if name == "clamp_max":
            low, high = None, given[0]
        text = self._value(node.args[0])
        if low is not None:
            text = f"greater_of({text}, {self._value(low)})"
        return text if high is None else f"lesser_of({text}, {self._value(high)})"


EXPRESSIONS = {
    "add": "{a} + {b}", "sub": "{a} - {b}", "rsub": "{b} - {a}", "mul": "{a} * {b}", "div": "{a} / {b}",
    "reciprocal": "1.0 / {a}", "neg": "-{a}", "abs": "tl.abs({a})", "exp": "tl.exp({a})", "log": "tl.log({a})",
    "floor": "tl.floor({a})", "sqrt": "tl.sqrt({a})", "square": "{a} * {a}", "pow": "tl.exp({b} * tl.log({a}))",
    "sigmoid": "1.0 / (1.0 + tl.exp(-{a}))",
    "erfc": "1.0 - tl.math.erf({a})", "erfinv": "inverse_erf({a})",
    "maximum": "greater_of({a}, {b})", "minimum": "lesser_of({a}, {b})", "where": "tl.where({a}, {b}, {c})",
    "lt": "{a} < {b}", "le": "{a} <= {b}", "gt": "{a} > {b}", "ge": "{a} >= {b}", "eq": "{a} == {b}", "ne": "{a} != {b}",
    "bitwise_and": "{a} & {b}", "bitwise_or": "{a} | {b}", "logical_and": "{a} & {b}", "logical_or": "{a} | {b}",
    "isnan": "{a} != {a}", "expand": "{a}", "clone": "{a}", "detach": "{a}", "alias": "{a}", "lift_fresh_copy": "{a}",
}  # fmt: skip


def source_of(module: fx.GraphModule, layers: int) -> tuple[str, list[Tensor]]:
    """A recorded program as the source of a Triton kernel named ``program``.

    Returns:
        The source, and the constants that the kernel takes between its inputs and its outputs.

    Raises:
        NotImplementedError: it has an operation that is not known here.
    """
    writer = _Writer(module, layers)
    return writer.write(), writer.constants


def load(source: str) -> Any:
    """The kernel of `source`, as `triton.jit` gives it."""
    name = f"<asp_dist program {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # Triton reads the source again
    namespace: dict[str, Any] = {"__name__": "asp_dist.pruning.kernels.programs"}
    exec(compile(source, name, "exec"), namespace)
    return namespace["program"]

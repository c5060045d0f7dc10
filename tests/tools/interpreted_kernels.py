"""Run every kernel by Triton's interpreter on CPU tensors, and print how far it is from the plain passes, as JSON.

The interpreter is chosen when Triton is imported, so this runs in a process of its own:

    TRITON_INTERPRET=1 python tests/tools/interpreted_kernels.py {passes|programs} [CASE ...]
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from device_form import CONTROLS, train
from torch import Tensor

from asp_dist.pruning.kernels import ops, tiles
from asp_dist.pruning.kernels.tiles import ROWS, Tiles
from asp_dist.pruning.weights import flat

SHAPES = {
    "small": [(1,), (5,), (4095,), (4096,), (4097,), (3, 7, 5, 5)],
    "large": [(3_000_001,), (2, 3)],
    "channels_last": [(32, 16, 3, 3), (7, 5, 3, 1), (64, 10)],
    "empty shard": [(0,), (100,), (0, 4)],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """The plain forms in place of the kernels."""
    os.environ["TRITON_INTERPRET"] = "0"
    yield
    os.environ["TRITON_INTERPRET"] = "1"


def made(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, last: bool) -> Tensor:
    """Random weights with some that are exactly zero."""
    weights = torch.randn(shape, generator=generator)
    weights[torch.rand(shape, generator=generator) < 0.1] = 0.0
    weights = weights.to(dtype)
    return weights.contiguous(memory_format=torch.channels_last) if last and len(shape) == 4 else weights


def numbers(gradient: Tensor, weights: Tensor, threshold: Tensor) -> list[Tensor]:
    """In float64: Σ over pruned weights of gradient·weight / 4, the size of its terms, Σw, the size of its terms, Σw²."""
    whole = weights.double()
    terms = gradient.double() * whole * (weights.float().abs() <= threshold.float()) if gradient.numel() else 0.0 * whole
    return [terms.sum() / 4.0, terms.abs().sum(), whole.sum(), whole.abs().sum(), whole.square().sum()]


def run(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, operator: int, last: bool) -> dict[str, list[Tensor]]:
    """All passes over the same random layers, once each."""
    generator = torch.Generator().manual_seed(len(shapes))
    dense = [flat(made(shape, dtype, generator, last)) for shape in shapes]
    gradients = [flat(made(shape, dtype, generator, last)) for shape in shapes]
    gradients[-1] = gradients[-1][:0]  # a layer without a gradient
    pruned = [torch.full_like(one, 7.0) for one in dense]
    tiles, layers = Tiles(dense), len(shapes)
    thresholds = torch.linspace(0.1, 2.0, layers, dtype=torch.float64)
    means = torch.linspace(-0.1, 0.1, layers, dtype=torch.float64)
    share = torch.tensor([*([0.5] * layers), 1.0], dtype=torch.float64)
    shard = torch.tensor([*(index % 2 for index in range(layers)), ROWS + 1], dtype=torch.int32)
    out = torch.full((ROWS + 2, layers), 7.0, dtype=torch.float64)  # as an all-reduce leaves it
    before = [one.clone() for one in gradients]
    ops.threshold_products(gradients, dense, tiles.tables(), thresholds, torch.tensor(4.0), tiles.partials, 0.3)
    ops.layer_moments(dense, tiles.tables(), tiles.partials)
    at_moments = [one.clone() for one in dense]
    power = 50.0 if dtype == torch.float16 else 3.0  # of a weight in units of its threshold, that overflows
    ops.write_layers(dense, pruned, tiles.tables(), thresholds, means, tiles.partials, 1.05, operator, power, operator == 0)
    ops.combine_tiles(tiles.partials, tiles.tables(), share, shard, thresholds, out)
    counted = torch.zeros_like(out)
    ops.count_nonzero(pruned, tiles.tables(), tiles.partials)
    ops.combine_tiles(tiles.partials, tiles.tables(), share, shard, thresholds, counted)
    cleared = [one.clone() for one in before]
    ops.clear_removed(cleared, dense, tiles.tables())
    exact = [numbers(g, w, b) for g, w, b in zip(before, at_moments, thresholds)]
    return {
        "sums": [out[:3]],
        "exact": [torch.tensor(exact, dtype=torch.float64).T],
        "counts": [out[3:], counted[3:4]],
        "dense": dense,
        "pruned": pruned,
        "gradients": gradients,
        "cleared": cleared,
    }


def passes() -> dict[str, Any]:
    """For each case: the worst relative error of a sum, differing counts and masks, and the worst error of a value."""
    found: dict[str, Any] = {}
    for name, shapes in SHAPES.items():
        for kind, dtype in DTYPES.items():
            for operator in range(len(ops.OPERATORS)):
                if name != "small" and (kind, operator) not in (("float32", 0), ("bfloat16", 2)):
                    continue
                # The interpreter takes as long for a tile of any size.
                size = 1 << 17 if name == "large" else 1 << 12
                for module in (tiles, sys.modules.get("asp_dist.pruning.kernels.multi_tensor", tiles)):
                    module.TILE = size  # type: ignore[attr-defined]
                last = name == "channels_last"
                one = run(shapes, dtype, operator, last)
                again = run(shapes, dtype, operator, last) if (kind, operator) == ("float32", 0) else one
                with plain():
                    other = run(shapes, dtype, operator, last)
                products, sizes, total, absolute, squares = one["exact"][0]
                sums = one["sums"][0] / 0.5  # the share of each rank
                errors = [
                    (sums[0] - products).abs() / sizes.clamp_min(1e-30),
                    (sums[1] - total).abs() / absolute.clamp_min(1e-30),
                    (sums[2] - squares).abs() / squares.clamp_min(1e-30),
                ]
                both = [(a, b) for key in ("dense", "pruned", "gradients", "cleared") for a, b in zip(one[key], other[key])]
                found[f"{name}, {kind}, {ops.OPERATORS[operator].__name__}"] = {
                    "sums": max(float(error.max()) for error in errors),
                    "counts": sum(int((a != b).sum()) for a, b in zip(one["counts"], other["counts"])),
                    "masks": sum(int(((a == 0) != (b == 0)).sum()) for a, b in both),
                    "values": max(float(((a - b).abs() / b.abs().clamp_min(1.0)).max()) for a, b in both if a.numel()),
                    "repeated": all(torch.equal(a, b) for key in one for a, b in zip(one[key], again[key])),
                }
    return found


def programs(names: Sequence[str]) -> dict[str, Any]:
    """For each control: how far a short training by its kernel is from the same on the CPU."""
    found = {}
    for name in names or CONTROLS:
        host, device = (train(name, torch.float32, on_device=on_device, steps=5) for on_device in (False, True))
        control = device.pruner._device_control
        assert control is not None
        found[name] = {
            "kernel": not control._plain,
            "thresholds": max(float((a - b).abs().max()) for a, b in zip(host.thresholds, device.thresholds)),
            "loss": max(abs(a - b) for a, b in zip(host.losses, device.losses)),
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy, of a logarithm whose value is not used
        print(json.dumps(passes() if sys.argv[1] == "passes" else programs(sys.argv[2:])))

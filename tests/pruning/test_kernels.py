"""The Triton kernels, by Triton's interpreter on the CPU, against the plain passes; and compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from device_form import CONTROLS, build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from asp_dist.pruning.kernels import device_passes, fused, multi_tensor, ops
from asp_dist.pruning.kernels.tiles import ROWS, TILE

SCRIPT = Path(__file__).parents[1] / "tools" / "interpreted_kernels.py"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = (80, 90, 100)
WRITES = [{"RATIO": 1.05, "OPERATOR": n, "CENTER": center} for n, center in ((0, True), (2, True))]
# Each kernel with its constants, and how many warps run it.
KERNELS: list[tuple[str, dict[str, Any], int]] = [
    ("_products", {"SCALED": True, "TILE": TILE}, multi_tensor.WARPS),
    ("_moments", {"TILE": TILE}, multi_tensor.WARPS),
    *(("_write", {**constants, "TILE": TILE}, multi_tensor.WARPS) for constants in WRITES),
    ("_count", {"TILE": TILE}, multi_tensor.WARPS),
    ("_clear_removed", {"TILE": TILE}, multi_tensor.WARPS),
    ("_combine", {"ROWS": ROWS, "BLOCK": multi_tensor.COMBINED_TILES}, 4),
]
# Types of the kernels' arguments; all others are pointers to float64.
ADDRESSES = ("gradients", "dense", "pruned", "tensors", "numel", "tile_start")
TYPES = {
    **dict.fromkeys(ADDRESSES, "*i64"),
    **dict.fromkeys(("kinds", "tile_layer", "first", "shard"), "*i32"),
    **dict.fromkeys(("scale", "power"), "fp32"),
    **dict.fromkeys(("tiles", "layers"), "i32"),
    "unscale": "*fp32",
}


def interpreted(*arguments: str) -> dict[str, dict[str, Any]]:
    """What the script of the same name prints, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_interpreted_kernels_compute_what_the_plain_passes_do() -> None:
    """Sizes from 1 to 3 million, odd ones, channels_last, empty shards; three types, three operators; twice."""
    found = interpreted("passes")
    assert len(found) == 15
    for case, one in found.items():
        print(case, one)
        assert one["sums"] <= 1e-6
        assert one["counts"] == one["masks"] == 0
        assert one["values"] <= (1e-5 if "Power" in case else 0.0)
        assert one["repeated"]


@pytest.mark.slow
def test_interpreted_controls_compute_what_the_cpu_does() -> None:
    several = [name for name in CONTROLS if name not in ("loss, multiplier", "track")]  # the others do what these do
    for case, one in interpreted("programs", *several).items():
        print(case, one)
        assert one["kernel"], "the control's operations ran one by one"
        assert one["thresholds"] <= 1e-7
        assert one["loss"] <= 1e-4


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and shared memory of a compiled kernel."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([str(CUOBJDUMP), "--dump-resource-usage", str(file)], capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], architecture: int, warps: int) -> Any:
    source = ASTSource(
        kernel, {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}, constants
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_spills(architecture: int, tmp_path: Path) -> None:
    for name, constants, warps in KERNELS:
        kernel = getattr(multi_tensor, name)
        types = {argument: TYPES.get(argument, "*fp64") for argument in kernel.arg_names}
        used = resources(compiled(kernel, types, constants, architecture, warps).asm["cubin"], tmp_path)
        print(f"sm_{architecture} {name} {constants}: {used}")
        assert used["STACK"] == used["LOCAL"] == 0
        assert 0 < used["REG"] * 32 * warps <= 65536


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["loss, published", "track"])
def test_controls_compile_without_spills(name: str, architecture: int, tmp_path: Path) -> None:
    _, _, pruner = build(name, torch.float32, on_device=True)
    control = pruner._device_control
    assert control is not None
    layers = len(pruner.layers)
    told = torch.zeros(5, layers, dtype=torch.float64)
    inputs = [control.passes.packed, told, torch.zeros(()), control.skips, *control._changing()]
    source, constants = fused.source_of(fused.record(control.compute, inputs), layers)
    kernel = fused.load(source)
    outputs = [control.weight_thresholds, control.means, control.skips, *control._changing()]
    pointers = {torch.float32: "*fp32", torch.float64: "*fp64"}
    types = dict(zip(kernel.arg_names, (pointers[one.dtype] for one in (*inputs, *constants, *outputs))))
    built = compiled(kernel, types, {"L": layers, "BLOCK": 64}, architecture, 2)
    used = resources(built.asm["cubin"], tmp_path)
    print(f"sm_{architecture} {name}: {used}, {len(source.splitlines())} lines")
    assert used["STACK"] == used["LOCAL"] == 0


def test_every_way_through_the_controls_can_be_written_as_a_kernel() -> None:
    for name in CONTROLS:
        _, _, pruner = build(name, torch.float32, on_device=True)
        control = pruner._device_control
        assert control is not None
        told = torch.zeros(5, len(pruner.layers), dtype=torch.float64)
        inputs = [control.passes.packed, told, torch.zeros(()), control.skips, *control._changing()]
        source, _ = fused.source_of(fused.record(control.compute, inputs), len(pruner.layers))
        assert "def program(" in source


def test_kernels_that_differ_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that computes something else, and one that raises: a warning, and the passes layer by layer."""
    device = torch.device("cpu")
    assert device_passes.works(device)

    def wrong(*arguments: Any) -> None:
        arguments[-1].fill_(3.0)

    def broken(*arguments: Any) -> None:
        raise RuntimeError("no such device")

    for stand_in, message in ((wrong, "other sums"), (broken, "no such device")):
        device_passes.works.cache_clear()
        real: Any = ops.combine_tiles
        calls: list[int] = []

        def half_of_the_calls(*arguments: Any, stand_in: Any = stand_in, real: Any = real, calls: list[int] = calls) -> None:
            calls.append(1)
            (stand_in if len(calls) % 2 else real)(*arguments)  # the first call of each pair is the device's

        monkeypatch.setattr(ops, "combine_tiles", half_of_the_calls)
        with pytest.warns(UserWarning, match=message):
            assert not device_passes.works(device)
        monkeypatch.undo()
    device_passes.works.cache_clear()

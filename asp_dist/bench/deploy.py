"""``asp-dist bench deploy``: a run's network, dense and pruned, in every runtime that is installed, in turn."""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from asp_dist.checkpoint.record import load_config
from asp_dist.errors import UserError, check
from asp_dist.export.export_run import input_shape
from asp_dist.export.mnn_file import convert_to_mnn
from asp_dist.export.onnx_file import export_onnx
from asp_dist.export.runtimes import MNN_RUNTIME, ONNX_RUNTIME, OPENVINO, Array, Logits
from asp_dist.files import write_text
from asp_dist.runs.finished import count_classes, load_model, model_file, prunable_weights
from asp_dist.tracking.schema import DEPLOY_FILE
from asp_dist.training.validation import count_zeros

WARM = 3  # calls of each before the clock counts
GAIN = 1.05  # a smaller ratio is no gain: medians of one machine differ by as much from run to run


@dataclass
class Candidate:
    """A network in a runtime: its function, its file's size (None: it has none of its own), and the times so far in seconds."""

    runtime: str
    dense: bool
    call: Logits
    size: int | None
    times: list[float]


def bench_deploy(
    run_dir: Path, *, input_sizes: list[int], threads: int = 1, batch_size: int = 1, rounds: int = 30
) -> dict[str, Any]:
    """Time the network of `run_dir` and its dense twin in torch, ONNX Runtime, OpenVINO and MNN, as far as they are installed.

    The dense twin has random weights where the pruned network has zeros. Every candidate is called once per round.

    Args:
        run_dir: a finished run.
        input_sizes: sides of the images, in pixels; none: that of the run.
        threads: of every runtime.
        batch_size: images per call.
        rounds: timed calls of each.

    Returns:
        The machine, the sparsity, and for each size the rows and the verdict; the same is in ``deploy.json`` of the run.

    Raises:
        UserError: the run is not finished, or a number is not positive.
    """
    for name, value in (("--threads", threads), ("--batch-size", batch_size), ("--rounds", rounds)):
        check(value >= 1, f"{name} = {value} must be at least 1")
    check(all(side >= 1 for side in input_sizes), f"--input-size {input_sizes} must be positive")
    config, file = load_config(run_dir), model_file(run_dir)
    pruned = load_model(config, file, count_classes(run_dir, file)).eval()
    weights = prunable_weights(run_dir, dict(pruned.state_dict()))
    dense = dense_twin(pruned, list(weights))
    native = input_shape(config, pruned)
    nonzero, total = count_zeros(weights)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = [(native[0], side, side) for side in input_sizes] or [native]
        block = config.pruning.pattern.block
        sizes = [_at_size(pruned, dense, shape, threads, batch_size, rounds, block) for shape in shapes]
    finally:
        torch.set_num_threads(before)
    result = {
        "model": config.model.name,
        "sparsity": 1.0 - nonzero / total if total else 0.0,
        "machine": machine(),
        "threads": threads,
        "batch_size": batch_size,
        "rounds": rounds,
        "sizes": sizes,
    }
    write_text(run_dir / DEPLOY_FILE, json.dumps(result, indent=1) + "\n")
    return result


def dense_twin(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy of `model` with random weights, as large as a layer's others, in place of the zeros of the tensors in `names`."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if name in names:
                kept = weight[weight != 0]
                spread = float(kept.square().mean().sqrt()) if len(kept) else 0.01
                noise = spread * torch.randn(weight.shape, generator=generator)
                weight.copy_(torch.where(weight == 0, noise, weight))
    return twin


def machine() -> str:
    """The processor, and the widest of its instruction sets that runtimes look for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    flags = set(found.get("flags", "").split())
    known = [name for name in ("amx_tile", "avx512_bf16", "avx512f", "avx2", "asimd") if name in flags]
    return f"{found.get('model name', 'processor')}, {known[0] if known else 'no vector instructions known'}"


def _at_size(
    pruned: nn.Module, dense: nn.Module, shape: tuple[int, int, int], threads: int, batch_size: int, rounds: int, block: int
) -> dict[str, Any]:
    """All candidates at one size of image, timed in turn."""
    images = np.random.default_rng(0).standard_normal((batch_size, *shape), dtype=np.float32)
    left_out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="asp_dist_deploy") as folder:
        candidates = list(_candidates({False: pruned, True: dense}, shape, threads, Path(folder), left_out, images, block))
        for number in range(WARM + rounds):
            for candidate in candidates:
                start = time.perf_counter()
                candidate.call(images)
                if number >= WARM:
                    candidate.times.append(time.perf_counter() - start)
    rows = [
        {
            "runtime": one.runtime,
            "network": _kind(one.dense),
            "median": statistics.median(one.times),
            "fastest": min(one.times),
            "slowest": max(one.times),
            "size": one.size,
        }
        for one in candidates
    ]
    return {"input": list(shape), "rows": rows, "left_out": left_out, **verdict(rows, shape)}


def verdict(rows: list[dict[str, Any]], shape: tuple[int, int, int]) -> dict[str, Any]:
    """The fastest pruned network against the fastest dense one, by medians: ``gain``, and ``verdict`` in words."""
    dense, pruned = (
        min((row for row in rows if row["network"] == kind), key=lambda row: float(row["median"]))
        for kind in ("dense", "pruned")
    )
    gain = dense["median"] / pruned["median"]
    where = f"at {shape[1]}×{shape[2]}"
    if gain >= GAIN:
        words = f"{gain:.2f} × faster {where}, in {pruned['runtime']}, than the fastest dense network, in {dense['runtime']}"
    else:
        words = f"no gain {where}: {gain:.2f} × the speed of the fastest dense network, in {dense['runtime']}"
    return {"gain": gain, "verdict": words}


def _candidates(
    networks: dict[bool, nn.Module],
    shape: tuple[int, int, int],
    threads: int,
    folder: Path,
    left_out: list[str],
    images: Array,
    block: int,
) -> Iterator[Candidate]:
    """Each network in each runtime; what cannot run goes to `left_out`, with the reason."""
    for dense, model in networks.items():
        yield Candidate("torch", dense, _in_torch(model), None, [])
        with _leaving_out(left_out, f"torch.compile, {_kind(dense)}"):
            compiled = _in_torch(torch.compile(model))
            compiled(images)
            yield Candidate("torch.compile", dense, compiled, None, [])
        graph = folder / f"{_kind(dense)}.onnx"
        with _leaving_out(left_out, f"ONNX, {_kind(dense)}"):
            export_onnx(model, shape, graph)
        if not graph.exists():
            continue
        for runtime in (ONNX_RUNTIME, OPENVINO, MNN_RUNTIME):
            if runtime.version is None:
                left_out.append(f"{runtime.name}: not installed (pip install {runtime.package})")
                continue
            with _leaving_out(left_out, f"{runtime.name}, {_kind(dense)}"):
                file = graph
                if runtime is MNN_RUNTIME:
                    file = folder / f"{_kind(dense)}.mnn"
                    convert_to_mnn(graph, file, sparse=not dense, block=block)
                call = runtime.open(file, threads)
                call(images)
                yield Candidate(f"{runtime.name} {runtime.version}", dense, call, file.stat().st_size, [])


def _kind(dense: bool) -> str:
    return "dense" if dense else "pruned"


@contextlib.contextmanager
def _leaving_out(left_out: list[str], name: str) -> Iterator[None]:
    """A runtime that fails is left out, with its reason: the others are measured all the same."""
    try:
        yield
    except (UserError, RuntimeError, ValueError, OSError, NotImplementedError) as error:
        left_out.append(f"{name}: {(str(error).strip().splitlines() or [type(error).__name__])[0]}")


def _in_torch(model: Callable[[torch.Tensor], torch.Tensor]) -> Logits:
    def logits(images: Array) -> Array:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    return logits


def print_deploy(result: dict[str, Any]) -> None:
    """Print a table per size of image, and the verdicts."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(f"{result['model']}, {result['sparsity']:.2%} zeros, on {result['machine']}")
    for at in result["sizes"]:
        side = "×".join(map(str, at["input"][1:]))
        title = (
            f"{side}, batch {result['batch_size']}, {result['threads']} thread(s), medians of {result['rounds']} calls in turn"
        )
        table = Table(title=title, title_justify="left")
        for name in ("runtime", "network", "ms", "range", "file"):
            table.add_column(name, justify="left" if name in ("runtime", "network") else "right")
        for row in sorted(at["rows"], key=lambda row: row["median"]):
            times = f"{row['median'] * 1e3:.2f}", f"{row['fastest'] * 1e3:.2f} to {row['slowest'] * 1e3:.2f}"
            size = "" if row["size"] is None else f"{row['size'] / 1e6:.2f} MB"
            table.add_row(row["runtime"], row["network"], *times, size)
        console.print(table)
        for text in at["left_out"]:
            console.print(f"left out: {text}", markup=False)
    for at in result["sizes"]:
        console.print(at["verdict"], markup=False)

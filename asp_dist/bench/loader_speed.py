"""`asp-dist bench data`: how fast the loaders feed a model, in runs that alternate so that a busy machine hits them alike."""

from __future__ import annotations

import dataclasses
import math
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asp_dist.bench.loader_sources import Source, bare_sources, loader_sources, torchvision_source
from asp_dist.config import DataConfig
from asp_dist.data.base import LoaderOptions
from asp_dist.data.images import build_spec, default_threads
from asp_dist.data.info import open_data_set
from asp_dist.data.prepare.progress import progress_bar
from asp_dist.data.samples import Names, Samples
from asp_dist.errors import UserError, check

LIMITS = {"training": "random-crop decode", "validation": "decode"}


def repeated(samples: Samples, count: int) -> Samples:
    """`samples` over and over until there are `count` of them or more, in whole rounds."""
    rounds = max(1, math.ceil(count / len(samples)))
    tiled: dict[str, Any] = {
        name: np.tile(value, rounds)
        for name in ("labels", "shard", "offset", "size")
        if (value := getattr(samples, name)) is not None
    }
    names = Names(samples.names.blob, np.tile(samples.names.begins, rounds), np.tile(samples.names.ends, rounds))
    return dataclasses.replace(samples, names=names, **tiled)


@dataclass(frozen=True)
class LoaderTiming:
    """One run of a source.

    Args:
        rate: images per second, from the arrival of the first batch on.
        cpu: processor seconds per image, of this process and its workers, which a busy machine does not change much.
    """

    rate: float
    cpu: float


def measure(source: Source) -> LoaderTiming:
    """Run `source` to its end."""
    used = _processor_seconds()
    batches = source()
    first = next(batches)
    begin = time.perf_counter()
    images = sum(batches)
    seconds = time.perf_counter() - begin
    del batches
    return LoaderTiming(images / seconds, (_processor_seconds() - used) / (first + images))


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def model_throughput(model: str, size: tuple[int, int], device: torch.device, batch: int = 0) -> float:
    """Images per second that the training of timm's `model` takes on `device` alone, measured over a few steps.

    Raises:
        UserError: timm has no such model.
    """
    import timm

    try:
        network = timm.create_model(model, num_classes=1000).to(device)
    except RuntimeError as error:
        raise UserError(f"--model {model}: {error}") from error
    cuda = device.type == "cuda"
    images = torch.randn(batch or (128 if cuda else 8), 3, *size, device=device)
    targets = torch.zeros(len(images), dtype=torch.int64, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = torch.nn.functional.cross_entropy(network(images), targets)
        loss.backward()
        if cuda:
            torch.cuda.synchronize(device)

    step()
    begin, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - begin < 2.0:
        step()
        steps += 1
    return steps * len(images) / (time.perf_counter() - begin)


def bench_data(
    root: str | Path,
    *,
    model: str = "resnet50",
    input_size: int | None = None,
    interpolation: str | None = None,
    batch_size: int = 64,
    samples: int = 2000,
    rounds: int = 3,
    threads: int | None = None,
    required_rate: float | None = None,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Compare DALI, timm's loader and torchvision's, the bare read and the bare decoders on the training images.

    Args:
        root: the data set.
        model: timm model whose data config and required_rate count.
        input_size: image side; None: the model's.
        interpolation: resampling of every loader; None: the model's.
        batch_size: images per batch.
        samples: images per run at least; a smaller data set is repeated.
        rounds: how often each source runs, in turn; medians are compared.
        threads: DALI's threads and the other loaders' workers; None: from the machine.
        required_rate: images per second to feed; None: measured for `model` on `device`.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: show a progress bar.

    Returns:
        ``sources`` (name -> images_per_second, runs, cpu_seconds per image, share of the decode limit), ``ratios`` by
        speed and ``ratios_cpu`` by processor time, ``required_rate`` and ``cores_needed`` or ``gpus_needed``; plain types.

    Raises:
        UserError: no data set, no such model, a data set smaller than a batch.
    """
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg, is_model

    check(is_model(model), f"--model {model}: timm has no such model")
    chosen = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    pretrained = get_pretrained_cfg(model)
    model_data = resolve_data_config(pretrained_cfg=pretrained.to_dict() if pretrained else {})
    if interpolation is not None:
        model_data["interpolation"] = interpolation
    config = DataConfig(root=str(root), input_size=input_size, batch_size=batch_size)
    many = repeated(open_data_set(config).train, samples)
    spec = build_spec(config, model_data)
    options = LoaderOptions(spec, config.augment, chosen, threads=threads or default_threads(), prefetch=config.prefetch)
    sources: dict[str, Source] = {
        **bare_sources(many, batch_size, options),
        **loader_sources(many, batch_size, options),
        "torchvision, training": torchvision_source(many, batch_size, options, train=True),
        "torchvision, validation": torchvision_source(many, batch_size, options, train=False),
    }
    runs: dict[str, list[LoaderTiming]] = {name: [] for name in sources}
    with progress_bar("Measuring", rounds * len(sources), progress) as advance:
        for _ in range(rounds):
            for name, source in sources.items():
                runs[name].append(measure(source))
                advance(1)
    wanted = required_rate or model_throughput(model, spec.size, chosen)
    return _summary(runs, many, options, model, wanted)


def _summary(
    runs: dict[str, list[LoaderTiming]], samples: Samples, options: LoaderOptions, model: str, required_rate: float
) -> dict[str, Any]:
    medians = {name: statistics.median(run.rate for run in done) for name, done in runs.items()}
    cpu = {name: statistics.median(run.cpu for run in done) for name, done in runs.items()}
    sources: dict[str, dict[str, Any]] = {}
    for name, done in runs.items():
        limit = LIMITS.get(name.rpartition(", ")[2])
        share = {} if limit is None else {"share_of_decode": medians[name] / medians[limit]}
        if limit is not None:
            share["share_of_decode_cpu"] = cpu[limit] / cpu[name]
        rates = [run.rate for run in done]
        sources[name] = {"images_per_second": medians[name], "runs": rates, "cpu_seconds": cpu[name], **share}
    ratios = {
        f"DALI / {other}, {part}": medians[f"DALI, {part}"] / medians[f"{other}, {part}"]
        for part in LIMITS
        for other in ("timm", "torchvision")
    }
    ratios_cpu = {
        f"DALI / {other}, {part}": cpu[f"{other}, {part}"] / cpu[f"DALI, {part}"]
        for part in LIMITS
        for other in ("timm", "torchvision")
    }
    gpu = options.device.type == "cuda"
    needed = required_rate / medians["DALI, training"] if gpu else required_rate * cpu["DALI, training"]
    return {
        "samples": len(samples),
        "threads": options.threads,
        "device": str(options.device),
        "image_size": list(options.spec.size),
        "interpolation": options.spec.interpolation,
        "sources": sources,
        "ratios": ratios,
        "ratios_cpu": ratios_cpu,
        "model": model,
        "required_rate": required_rate,
        "gpus_needed" if gpu else "cores_needed": math.ceil(needed),
    }


def print_bench(result: dict[str, Any]) -> None:
    """Print what `bench_data` returned as a table and two sentences."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Images per second, {result['threads']} threads, {result['device']}")
    for heading in ("source", "median", "runs", "CPU ms/image", "of the decode limit", "by CPU"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, row in result["sources"].items():
        shares = [f"{row[key]:.0%}" if key in row else "" for key in ("share_of_decode", "share_of_decode_cpu")]
        rates = " ".join(f"{r:.0f}" for r in row["runs"])
        table.add_row(name, f"{row['images_per_second']:.0f}", rates, f"{1000 * row['cpu_seconds']:.2f}", *shares)
    console = Console()
    console.print(table)
    for title, key in (("By images per second", "ratios"), ("By processor time", "ratios_cpu")):
        console.print(f"{title}: " + ", ".join(f"{name}: {value:.2f}" for name, value in result[key].items()))
    unit = "gpus" if "gpus_needed" in result else "cores"
    console.print(
        f"{result['model']} trains {result['required_rate']:.0f} images/s on this device alone: "
        f"{result[f'{unit}_needed']} {unit} of this kind feed it."
    )

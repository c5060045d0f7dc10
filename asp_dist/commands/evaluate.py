"""``asp-dist evaluate``: accuracy and sparsity of a network, on any data set."""

from __future__ import annotations

import json as json_
from typing import Any, Literal

from jsonargparse import ArgumentParser


def add_arguments(parser: ArgumentParser) -> None:
    """Options of ``evaluate``."""
    parser.add_argument("what", type=str, help="a run's folder, a checkpoint's, a weights file, or a name of timm's.")
    parser.add_argument("--average", action="store_true", help="the average of the weights, out of the (last) checkpoint.")
    parser.add_argument("--model", type=str | None, default=None, help="the network of a file that does not say it.")
    parser.add_argument("--data.root", type=str | None, default=None, help="another data set; classes are matched by name.")
    parser.add_argument("--data.val", type=str | None, default=None, help="the folder of its images; '.': its own.")
    formats, backends = Literal["auto", "folder", "manifest", "shards"], Literal["dali", "torch"]
    parser.add_argument("--data.format", type=formats | None, default=None, help="its layout.")
    parser.add_argument("--data.backend", type=backends | None, default=None, help="the loader.")
    parser.add_argument("--data.input_size", type=int | None, default=None, help="image side in pixels.")
    parser.add_argument("--data.eval_batch_size", type=int | None, default=None, help="images per batch and worker.")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute.")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON.")


def run(
    what: str,
    *,
    average: bool = False,
    model: str | None = None,
    data: dict[str, Any] | None = None,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Evaluate a network and print its accuracy and sparsity; under torchrun, the ranks share the images."""
    from asp_dist.runs.evaluate_run import evaluate
    from asp_dist.training.world import init_world

    world = init_world(device)
    try:
        result = evaluate(what, world, model_name=model, average=average, data=data)
    finally:
        world.close()
    if not world.is_main:
        return 0
    if json:
        print(json_.dumps(result))
        return 0
    print(f"{result['what']}\non {result['samples']:,} images of {result['data']}:")
    print(f"top-1     {result['top1']:.2%}\ntop-5     {result['top5']:.2%}\nloss      {result['loss']:.4f}")
    print(f"sparsity  {result['sparsity']:.4%}  ({result['nonzero_weights']:,} nonzero prunable weights)")
    return 0

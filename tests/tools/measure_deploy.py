"""What sparse kernels gain, by network, sparsity and pattern: untrained networks, every layer at the same sparsity.

    python tests/tools/measure_deploy.py FILE [--networks resnet50:224 resnet18:64]

Each measurement is printed, and appended to FILE as one JSON row.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from asp_dist.bench.deploy import bench_deploy
from asp_dist.config import Config, DataConfig, ModelConfig, PruningConfig, to_dict
from asp_dist.pruning import Budget, Pattern, Pruner, Track
from asp_dist.weight_files import save_safetensors


def make_run(folder: Path, name: str, side: int, sparsity: float, block: int) -> None:
    """What a finished run leaves, of a network that nobody trained."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # zero in timm's fresh ResNets: whole layers would be folded away
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    pattern, control = Pattern(block), Track(allocation="uniform", rate=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, Budget.parameters(sparsity=sparsity), control=control, pattern=pattern)
    pruner.finalize()
    pruner.remove()
    data, pruning = DataConfig(root="/nowhere", input_size=side), PruningConfig(pattern=pattern)
    config = Config(model=ModelConfig(name=name), data=data, pruning=pruning)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "summary.json").write_text(json.dumps({"num_classes": 10}))
    save_safetensors(folder / "model.safetensors", dict(model.state_dict()), {"format": "pt"})


def refuse(model: Any) -> Any:
    raise RuntimeError("left out here: a minute for each network, and never the fastest")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--networks", nargs="+", default=["resnet50:224", "mobilenetv3_large_100:224", "resnet18:64", "resnet18:224"]
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    setattr(torch, "compile", refuse)  # noqa: B010 (its type is an overloaded function)
    for network in arguments.networks:
        name, _, side = network.partition(":")
        for sparsity in (0.8, 0.9, 0.95):
            for block in (1, 4):
                with tempfile.TemporaryDirectory() as folder:
                    make_run(Path(folder), name, int(side), sparsity, block)
                    result = bench_deploy(Path(folder), input_sizes=[], rounds=10)
                row = {"network": network, "sparsity": sparsity, "block": block, **result}
                with arguments.file.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
                print(network, sparsity, block, result["sizes"][0]["verdict"], flush=True)

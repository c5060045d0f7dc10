"""A run as a repository on the Hugging Face hub: timm's weights and configuration, the results, and the recipe."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import yaml
from timm.models import save_for_hf
from timm.models._hub import HF_SAFE_WEIGHTS_NAME

from asp_dist.checkpoint.record import load_config
from asp_dist.errors import UserError, check
from asp_dist.export.export_run import input_shape
from asp_dist.runs.finished import count_classes, load_model, metadata_of, model_file
from asp_dist.tracking.layer_rows import is_pruned, read_layers
from asp_dist.tracking.schema import CONFIG_FILE, LAYERS_FILE, REPORT_FILE, SUMMARY_FILE

log = logging.getLogger(__name__)
RECIPE_FILE = "recipe.yaml"
CARD = """---
library_name: timm
pipeline_tag: image-classification
tags:
- timm
- pruning
- sparsity
- asp_dist
model-index:
- name: {title}
  results:
  - task:
      type: image-classification
    dataset:
      name: {data}
      type: {data}
    metrics:
    - type: accuracy
      value: {top1:.4f}
---

# {title}

{model}, pruned to {sparsity:.2%} zeros while it was trained, by asp_dist ("Weight Pruning via Adaptive Sparsity Loss",
[arXiv 2006.02768](https://arxiv.org/abs/2006.02768)).

| | |
|---|---|
{results}

```python
import timm

model = timm.create_model("hf-hub:{repo}", pretrained=True)
```

The zeros are in place: the file is as large as the dense network's, and the network as fast, until a runtime for sparse weights
has it. `report.html` has the curves of the training and the layers over time.

## Layers

| layer | weights | left | sparsity |
|---|---|---|---|
{layers}

## Recipe

{recipe_name}, as `asp-dist train {recipe_file}` takes it:

```yaml
{recipe}```
"""


def write_repository(run_dir: Path, folder: Path, repo: str) -> list[Path]:
    """Write a finished run into `folder` as a repository of the hub.

    Args:
        run_dir: the run.
        folder: a folder that is empty or not there.
        repo: its name, ``user/name``, for the card.

    Returns:
        The files: the weights and ``config.json`` as timm reads them, the card, the recipe, and what the run recorded.

    Raises:
        UserError: the run is not finished, or the folder has something in it.
    """
    check(repo.count("/") == 1 and all(repo.split("/")), f"--repo {repo} must be of the form user/name")
    check(not folder.exists() or not any(folder.iterdir()), f"{folder} is not empty: give another folder")
    config, file = load_config(run_dir), model_file(run_dir)
    summary: dict[str, Any] = json.loads((run_dir / SUMMARY_FILE).read_text(encoding="utf-8"))
    model = load_model(config, file, count_classes(run_dir, file))
    labels = json.loads(metadata_of(file).get("classes", "null"))
    about = {"label_names": labels} if labels else {}
    save_for_hf(
        model, str(folder), model_config=about, safe_serialization=True, data_config={"input_size": input_shape(config, model)}
    )
    shutil.copyfile(file, folder / HF_SAFE_WEIGHTS_NAME)  # with its own metadata
    (folder / "README.md").write_text(_card(run_dir, repo, config.model.name, summary), encoding="utf-8")
    (folder / RECIPE_FILE).write_text(_recipe(run_dir), encoding="utf-8")
    for name in (SUMMARY_FILE, LAYERS_FILE, REPORT_FILE):
        if (run_dir / name).is_file():
            shutil.copyfile(run_dir / name, folder / name)
    return sorted(folder.iterdir())


def _recipe(run_dir: Path) -> str:
    """The run's configuration without what is of its machine: its folders and its trackers' accounts."""
    tree: dict[str, Any] = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    for group in ("output", "resume", "tracking", "cluster"):
        tree.pop(group, None)
    tree.get("data", {}).pop("cache", None)
    if "root" in tree.get("data", {}):
        tree["data"]["root"] = f"data/{Path(str(tree['data']['root'])).name}"
    return yaml.safe_dump(tree, sort_keys=False)


def _card(run_dir: Path, repo: str, model: str, summary: dict[str, Any]) -> str:
    data = Path(str(summary["data_root"])).name or "images"
    dense_macs = summary.get("dense_macs")
    results = [
        ("top-1", f"{summary['top1']:.2%} of {summary['val_samples']:,} validation images of {data}"),
        ("top-5", f"{summary['top5']:.2%}"),
        ("weights left", f"{summary.get('nonzero_weights', 0):,} of {summary.get('prunable_weights', 0):,} prunable ones"),
        *([("multiply-adds left", f"{summary['macs'] / dense_macs:.1%}")] if dense_macs and summary.get("macs") else []),
        ("trained for", f"{summary['epochs']} epochs, {summary['steps']:,} steps of {summary['batch_size']} images"),
        ("chosen by", f"`{summary['selected']['by']}`, step {summary['selected']['step']}"),
    ]
    layers = []
    for row in read_layers(run_dir):
        sparsity = row.get("measured_sparsity") if is_pruned(row) else 0.0
        left = row["weights"] if sparsity is None else round(row["weights"] * (1.0 - sparsity))
        layers.append(f"| {row['name']} | {row['weights']:,} | {left:,} | {sparsity or 0.0:.2%} |")
    return CARD.format(
        title=repo.partition("/")[2],
        repo=repo,
        model=model,
        data=data,
        top1=summary["top1"],
        sparsity=summary.get("sparsity") or 0.0,
        results="\n".join(f"| {name} | {value} |" for name, value in results),
        layers="\n".join(layers),
        recipe_name=f"`{RECIPE_FILE}`",
        recipe_file=RECIPE_FILE,
        recipe=_recipe(run_dir),
    )


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Send `folder` to the hub as the repository `repo`, which is made if it is not there; returns its address.

    Raises:
        UserError: the hub does not answer, or refuses.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(library_name="asp_dist")
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="A run of asp_dist")
    except (HfHubHTTPError, LocalTokenNotFoundError, httpx.HTTPError, OSError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{repo} cannot be sent to the hub ({said}): log in by `hf auth login`, or set HF_TOKEN") from error
    return str(address)

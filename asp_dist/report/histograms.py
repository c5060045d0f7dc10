"""Histograms of a run's weights before and after pruning, from its latest checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from asp_dist.tracking.schema import MODEL_FILE

BINS = 80
RANGE = 4.0  # in units of a layer's standard deviation
DENSE = "dense."


@dataclass(frozen=True)
class Histogram:
    """Counts of one layer's weights over `BINS` equal bins of [-`RANGE`, `RANGE`] standard deviations.

    The outermost bins include everything beyond.

    Attributes:
        name: the layer.
        before: counts of the dense weights.
        after: counts of the weights that are not zero.
        sigma: standard deviation of the dense weights.
    """

    name: str
    before: list[int]
    after: list[int]
    sigma: float


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint folder with a pruner's dense weights, or None."""
    files = sorted((run_dir / "checkpoints").glob("step-*/pruner.safetensors"))
    files = [file for file in files if (file.parent / MODEL_FILE).exists()]
    return files[-1].parent if files else None


def histograms(run_dir: Path) -> list[Histogram]:
    """One histogram per pruned layer, in the order of the checkpoint; empty without a checkpoint."""
    folder = latest_checkpoint(run_dir)
    if folder is None:
        return []
    import torch
    from safetensors import safe_open

    found = []
    with (
        safe_open(str(folder / "pruner.safetensors"), framework="pt") as pruner,
        safe_open(str(folder / MODEL_FILE), framework="pt") as model,
    ):
        weights = set(model.keys())
        for key in (k for k in pruner.keys() if k.startswith(DENSE)):  # noqa: SIM118  # not a mapping
            name = key.removeprefix(DENSE)
            weight = f"{name}.weight" if f"{name}.weight" in weights else name
            if weight not in weights:
                continue
            pruned = model.get_tensor(weight).float().flatten()
            dense = pruner.get_tensor(key).float().flatten()
            # Once the mask is frozen the pruner keeps the removed weights alone, the model has the others.
            dense = torch.where(dense != 0, dense, pruned)
            sigma = float(dense.std()) if dense.numel() > 1 else 1.0
            sigma = sigma or 1.0
            left = pruned[pruned != 0]
            counts = [torch.histc((v / sigma).clamp(-RANGE, RANGE), BINS, -RANGE, RANGE).long().tolist() for v in (dense, left)]
            found.append(Histogram(name, counts[0], counts[1], sigma))
    return found

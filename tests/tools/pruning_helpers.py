"""What the tests of the pruning engine share: the recorded trajectories and small networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asp_dist.pruning import Budget

REFERENCE = Path(__file__).parent / "reference" / "adaptive_sparsity_loss.npz"

# The sparsity losses of the recorded trajectories, as budgets.
CASES = {
    "asl_budget_equal": Budget.parameters(density=0.1),
    "asl_budget_at_most_density": Budget.parameters(density=0.1, bound="at_most"),
    "asl_per_layer": Budget.parameters(density=0.1, scope="layer"),
}


class Recorded:
    """The recorded trajectories of the authors' published implementation, in float64."""

    def __init__(self) -> None:
        with np.load(REFERENCE) as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.inputs = torch.from_numpy(self.arrays["x"])
        self.labels = torch.from_numpy(self.arrays["y"])

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys begin with `prefix`, keyed by the rest."""
        found = {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}
        return {name: torch.from_numpy(values.copy()) for name, values in found.items()}

    def network(self, *, norms: bool = True) -> nn.Sequential:
        """The recorded network in its initial state; without batch norm, the norms are identities."""
        network = parity_network(norms=norms)
        network.load_state_dict(self.state("init."), strict=norms)
        return network


def parity_network(*, norms: bool = True) -> nn.Sequential:
    """The network of the recorded trajectories (tests/tools/reference), in float64."""

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if norms else nn.Identity()

    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), norm(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False), norm(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 1), norm(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    ).double()


def published_sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    """The optimizer of the recorded trajectories."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, **options)


def small_network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two prunable layers (1,152 and 2,304 weights) between two small ones; no batch norm."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 10)),
    ).to(dtype)


def small_batch(step: int, size: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images and labels of one step, always the same."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.randint(0, 10, (size,), generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One plain training step on `small_batch`, in the model's own type."""
    dtype = next(model.parameters()).dtype
    images, labels = small_batch(step, dtype=dtype)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images).float() if dtype.itemsize < 4 else model(images), labels).backward()
    optimizer.step()

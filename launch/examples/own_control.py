"""A control of your own: every layer gets the same density, which follows the ramp.

A control is a frozen object with its options; it builds a controller, which moves the thresholds once per step.

python launch/examples/own_control.py
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asp_dist.pruning import Budget, Control, Controller, Problem, Pruner, Ramp, StepStats


@dataclass(frozen=True)
class Uniform(Control):
    """The same density in every layer."""

    def controller(self, problem: Problem) -> Controller:
        """The controller for one network."""
        return UniformController(problem)


class UniformController(Controller):
    """Asks the density model, which counts the layers now and then, for the threshold of a density."""

    def start(self, sigmas: Tensor) -> Tensor:
        """The thresholds at the start, in units of each layer's σ."""
        return self._thresholds(sigmas, 0)

    def move(self, thresholds: Tensor, stats: StepStats) -> Tensor:
        """The thresholds of the next step."""
        return self._thresholds(stats.sigmas, stats.step + 1)

    def _thresholds(self, sigmas: Tensor, step: int) -> Tensor:
        density = self.problem.targets(step)[0]
        return self.problem.density_model.threshold(density.expand_as(sigmas))


def main() -> None:
    """Fit a random teacher and print the layers."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ramp = Ramp("cubic", 0.0, 0.5, freeze_at=0.8, total_steps=300)
    pruner = Pruner(model, optimizer, Budget.parameters(sparsity=0.75), control=Uniform(), ramp=ramp)
    for _ in range(300):
        inputs = torch.randn(64, 32)
        loss = nn.functional.mse_loss(model(inputs), teacher(inputs).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pruner.finalize()
    snapshot = pruner.snapshot()
    for layer in snapshot.layers:
        print(f"layer {layer.name}: {layer.measured_sparsity:.1%} of {layer.numel} weights are zero")
    print(f"done: loss {loss.item():.4f}, sparsity {snapshot.summary()['sparsity']:.4f}")


if __name__ == "__main__":
    main()

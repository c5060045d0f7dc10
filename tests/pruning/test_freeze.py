"""The frozen mask: removed weights leave no trace in norms, momentum or matrix updates, and kept weights may become zero."""

from __future__ import annotations

import pytest
import torch
from pruning_helpers import small_network, train_step
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from asp_dist.config import OptimizerConfig
from asp_dist.pruning import Budget, Pruner, Ramp, Select, Track
from asp_dist.training.build import build_optimizer

OPTIMIZERS = ["sgd", "adamw", "lamb", "lars", "muon", "adafactor", "lookahead_adamw"]


def frozen(name: str, steps: int = 6) -> tuple[nn.Sequential, torch.optim.Optimizer, Pruner]:
    """A small network after `steps`, with its mask just frozen."""
    network = small_network(dtype=torch.float32)
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=0.01), network)
    ramp, budget = Ramp("cubic", 0.0, 0.5, total_steps=steps), Budget.parameters(sparsity=0.8)
    pruner = Pruner(network, optimizer, budget, control=Track(), ramp=ramp, select=Select(min_weights=500))
    for step in range(steps):
        train_step(network, optimizer, step)
    pruner.finalize()
    return network, optimizer, pruner


def gradients_of(network: nn.Module, pruner: Pruner, step: int, removed: float) -> None:
    """Gradients of a step, those of removed weights replaced."""
    generator = torch.Generator().manual_seed(step)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for layer in pruner.layers:
        gradient = layer.gradient()
        assert gradient is not None
        gradient[layer.is_removed()] = removed


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_removed_weights_leave_no_trace_after_the_freeze(name: str) -> None:
    """Their gradients may be anything: norm, momentum and updates are the same."""
    norms: list[list[float]] = []
    weights: list[list[Tensor]] = []
    for removed in (0.0, 1000.0):
        network, optimizer, pruner = frozen(name)
        norms.append([])
        for step in range(4):
            gradients_of(network, pruner, step, removed)
            pruner.mask_gradients()
            norms[-1].append(float(clip_grad_norm_(network.parameters(), 1.0)))
            optimizer.step()
        weights.append([parameter.detach().clone() for parameter in network.parameters()])
        for layer in pruner.layers:
            assert bool((layer.pruned[layer.is_removed()] == 0).all())
            for value in optimizer.state.get(layer.parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == layer.dense.shape:
                    assert float(value[layer.is_removed()].abs().max()) < 1e-20  # an epsilon of some
    assert norms[0] == norms[1]
    assert all(torch.equal(one, two) for one, two in zip(*weights))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_the_step_masks_the_gradients_by_itself(name: str) -> None:
    """In a loop that does not clip, nothing needs to be called."""
    weights: list[list[Tensor]] = []
    for removed in (0.0, 1000.0):
        network, optimizer, pruner = frozen(name)
        for step in range(4):
            gradients_of(network, pruner, step, removed)
            optimizer.step()
        weights.append([parameter.detach().clone() for parameter in network.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights))


def test_kept_weights_that_become_zero_are_saved_and_restored() -> None:
    network, optimizer, pruner = frozen("sgd")
    layer = pruner.layers[0]
    kept = (~layer.is_removed()).flatten().nonzero().flatten()[:3]
    with torch.no_grad():
        layer.pruned.view(-1)[kept] = 0.0
    model, state = {k: v.clone() for k, v in network.state_dict().items()}, pruner.state_dict()
    again, _, other = frozen("sgd", steps=2)
    again.load_state_dict(model)
    other.load_state_dict(state)
    assert other.regrown_layers() == []
    train_step(again, optimizer, 7)
    with torch.no_grad():
        layer.pruned.view(-1)[kept] = 0.5  # they are kept: they may come back
    assert pruner.regrown_layers() == []
    with pytest.raises(ValueError, match="not those of the frozen mask"):
        other.load_state_dict(state | {"kept_zeros": {}})


def test_a_removed_weight_that_is_written_is_found() -> None:
    _, _, pruner = frozen("sgd")
    assert pruner.regrown_layers() == []
    layer = pruner.layers[1]
    with torch.no_grad():
        layer.pruned.view(-1)[layer.is_removed().flatten().nonzero()[0]] = 1.0
    assert pruner.regrown_layers() == [layer.info.name]

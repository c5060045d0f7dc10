"""`control="loss"` with the hard operator follows the recorded trajectories of the published method to 1e-9 (float64)."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from device_form import on_the_device
from pruning_helpers import CASES, Recorded, published_sgd
from torch import nn

from asp_dist.pruning import Pruner, SparsityLoss
from asp_dist.pruning.names import SPARSITY_LOSS

TOLERANCE = 1e-9
STEPS = 120


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


@pytest.mark.parametrize("form", ["on the CPU", "on the device"])
@pytest.mark.parametrize("case", CASES)
def test_recorded_trajectory(case: str, form: str, recorded: Recorded) -> None:
    network = recorded.network()
    optimizer = published_sgd(network)
    with on_the_device() if form == "on the device" else nullcontext():
        pruner = Pruner(network, optimizer, CASES[case], control=SparsityLoss(initial_threshold=0.8, threshold_lr=1e-3))
    sizes = torch.tensor([layer.numel for layer in pruner.snapshot().layers], dtype=torch.float64)
    thresholds, task, sparsity, density = [pruner.thresholds.numpy().copy()], [], [], []
    for step in range(STEPS):
        now = pruner.snapshot()
        predicted = torch.tensor([1.0 - layer.predicted_sparsity for layer in now.layers], dtype=torch.float64)
        sparsity.append(now.metrics()[SPARSITY_LOSS])
        density.append(float((predicted * sizes).sum() / sizes.sum()))
        # The published layers subtract the mean of their weights in the forward pass. The recorded final state is the one
        # after the last optimizer step, before any further forward pass: it is not centered.
        pruner.center = step < STEPS - 1
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(recorded.inputs[step]), recorded.labels[step])
        loss.backward()
        optimizer.step()
        task.append(loss.item())
        thresholds.append(pruner.thresholds.numpy().copy())

    names = [str(name) for name in recorded.arrays[f"{case}/names"]]
    assert [layer.name for layer in pruner.snapshot().layers] == names
    for name, values in (
        ("thresholds", np.stack(thresholds)),
        ("task_loss", np.array(task)),
        ("sparsity_loss", np.array(sparsity)),
        ("predicted_density", np.array(density)),
    ):
        expected = recorded.arrays[f"{case}/{name}"]
        assert values.shape == expected.shape
        np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE, err_msg=name)
    final = recorded.state(f"{case}/final.")
    assert set(final) == set(network.state_dict())
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, final[name], rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_pruned_weights_are_the_recorded_zeros(case: str, recorded: Recorded) -> None:
    """The recorded weights are worth following: a sizeable share is exactly zero, in other places than at the start."""
    final, names = recorded.state(f"{case}/final."), [str(n) for n in recorded.arrays[f"{case}/names"]]
    zeros = sum(int((final[f"{name}.weight"] == 0).sum()) for name in names)
    total = sum(final[f"{name}.weight"].numel() for name in names)
    thresholds = recorded.arrays[f"{case}/thresholds"]
    assert 0.5 < zeros / total < 0.95
    assert np.abs(thresholds[-1] - thresholds[0]).max() > 0.05

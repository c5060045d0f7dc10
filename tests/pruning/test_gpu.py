"""The engine on a real GPU: what the other tests can only show on the CPU or on fake tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from device_form import CONTROLS, build
from torch import nn
from torch.profiler import ProfilerActivity, profile

from asp_dist.pruning import Budget, Pruner, Select
from asp_dist.pruning.kernels import device_passes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def errors_at_waits() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")


def test_the_kernels_compute_what_the_plain_passes_do() -> None:
    device_passes.works.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert device_passes.works(torch.device("cuda", 0))


@pytest.mark.parametrize("name", CONTROLS)
def test_a_training_is_that_of_the_cpu_and_never_waits(name: str) -> None:
    """Five steps with the same gradients; from the second one on, an operation that waits for the device is an error."""
    host_model, host_optimizer, host = build(name, torch.float32, on_device=False)
    model, _, first = build(name, torch.float32, on_device=False)
    first.remove()
    model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, fused=True)
    options = {"input_shape": (3, 8, 8), "select": Select(min_weights=100), **CONTROLS[name]}
    pruner = Pruner(model, optimizer, agreement_every=0, **options)
    assert isinstance(pruner.passes, device_passes.DevicePasses)
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        gradients = [torch.randn(parameter.shape, generator=generator) for parameter in host_model.parameters()]
        for parameter, other, gradient in zip(host_model.parameters(), model.parameters(), gradients):
            parameter.grad, other.grad = gradient.clone(), gradient.cuda()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        host_optimizer.step()
        torch.testing.assert_close(pruner.thresholds.cpu(), host.thresholds, rtol=1e-5, atol=1e-6)
    assert pruner._device_control is not None and not pruner._device_control._plain
    same = [(a == 0).eq((b == 0).cpu()).float().mean() for a, b in zip(host_model.parameters(), model.parameters())]
    assert min(map(float, same)) > 0.999


def test_a_frozen_step_launches_two_kernels() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    pruner = Pruner(model, optimizer, Budget.parameters(sparsity=0.9), agreement_every=0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    pruner.finalize()
    optimizer.step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        optimizer.step()
    launched = sum(event.count for event in profiler.key_averages() if event.key.startswith("_clear_removed"))
    assert launched == 2

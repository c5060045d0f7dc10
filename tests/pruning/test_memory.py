"""What the engine adds to the memory of training: one copy of the prunable weights, and little beside it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from asp_dist.pruning import Budget, Power, Pruner, Track

FORMS: dict[str, dict[str, Any]] = {
    "loss, as published": {},
    "track": {"control": Track()},
    "track, power": {"control": Track(), "operator": Power()},
    "half the gradient": {"operator": Power(), "gradient_scale": 0.5},
    "no gradient": {"control": Track(), "gradient_scale": 0.0},
}
# Copies of the weights in their own type, the dense ones included, that the moment of the freeze takes at most.
FREEZE = {torch.float32: 2.7, torch.bfloat16: 4.6}


def peak(function: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator handed out, beyond what it had handed out before, while `function` ran."""
    gc.collect()  # or an earlier test's garbage is handed back meanwhile, and counted against `function`
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    highest = now = 0
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def network(dtype: torch.dtype) -> tuple[nn.Module, torch.optim.SGD]:
    """A ResNet-50 with gradients, and an optimizer whose step takes no memory."""
    torch.manual_seed(0)
    model = timm.create_model("resnet50").to(dtype=dtype, memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False)


def test_the_measure_sees_a_temporary() -> None:
    """1,000,000 numbers of 4 bytes, twice at once, then once more."""

    def twice() -> None:
        first = torch.empty(1_000_000)
        torch.empty(1_000_000)
        del first
        torch.empty(500_000)

    assert peak(twice) == 8_000_000


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_copy_and_at_most_5_percent(dtype: torch.dtype) -> None:
    """In every step, of building the pruner too; at the freeze, once, what `finalize` says."""
    model, optimizer = network(dtype)
    copies = {}
    for form, options in FORMS.items():
        pruners: list[Pruner] = []

        def train(options: dict[str, Any] = options, pruners: list[Pruner] = pruners) -> None:
            budget = Budget.parameters(sparsity=0.9)
            pruners.append(Pruner(model, optimizer, budget, agreement_every=1, **options))
            optimizer.step()

        most = peak(train)
        copy = sum(info.parameter.nbytes for info in pruners[0].pruned_weights)
        copies[form] = most / copy
        print(f"{form}, {dtype}: {most / copy:.4f} copies")
        pruners[0].remove()
    assert all(1.0 <= number <= 1.05 for number in copies.values()), copies
    assert 1.0 < 1.0 + peak(pruners[0].finalize) / copy <= FREEZE[dtype]

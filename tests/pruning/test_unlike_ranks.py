"""Two ranks whose processors round differently: the run goes on, and both have the same thresholds and masks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from waiting import HANG_S

STEPS, CHECKED = 60, 10


def train(folder: Path) -> None:
    """Train and prune a small network as one of two ranks, and write what it saw."""
    from asp_dist.pruning import Budget, Pruner, Ramp, Select, Track

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, 24, 3), nn.GELU(), nn.Flatten(), nn.Linear(24 * 36, 40), nn.Tanh(), nn.Linear(40, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
    pruner = Pruner(
        network,
        optimizer,
        Budget.parameters(sparsity=0.8),
        control=Track(),
        ramp=Ramp("cubic", 0.1, 0.5, freeze_at=0.75, total_steps=STEPS),
        select=Select(min_weights=500),
        agreement_every=CHECKED,
    )
    model = DistributedDataParallel(network)
    seen: dict[str, Any] = {"capability": torch.backends.cpu.get_cpu_capability(), "masks": [], "thresholds": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(100 * step + rank))
            nn.functional.cross_entropy(model(images), torch.arange(8)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == CHECKED - 2:  # the next step's check is the second one
                seen["drifted"] = torch.cat([layer.flat_dense().clone() for layer in pruner.layers])
            if (step + 1) % CHECKED == 0:
                seen["masks"].append(torch.cat([layer.pruned.flatten() != 0 for layer in pruner.layers]))
                seen["thresholds"].append(pruner.thresholds.clone())
    seen["warnings"] = [str(warning.message) for warning in caught]
    seen["kept"] = sum(int(layer.pruned.count_nonzero()) for layer in pruner.layers)
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_that_round_differently_go_on_with_the_same_masks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank, capability in enumerate(("", "default")):
        environment = {
            **os.environ,
            **{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            "PYTHONPATH": os.pathsep.join(sys.path),
            **({"ATEN_CPU_CAPABILITY": capability} if capability else {}),
        }
        ranks.append(subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=environment, stderr=subprocess.PIPE))
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=HANG_S)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    if one["capability"] == two["capability"]:
        pytest.skip("this processor has no vector instructions that torch could leave out")
    assert not torch.equal(one["drifted"], two["drifted"])  # else nothing is shown
    assert any("ranks round differently" in message for message in one["warnings"])
    assert sum("ranks round differently" in message for message in one["warnings"] + two["warnings"]) == 2
    for a, b in zip(one["masks"], two["masks"]):
        assert torch.equal(a, b)
    for a, b in zip(one["thresholds"], two["thresholds"]):
        assert torch.allclose(a, b, rtol=1e-9, atol=0)
    prunable = sum(mask.numel() for mask in one["masks"][-1:])
    assert one["kept"] == two["kept"] == round(0.2 * prunable)


if __name__ == "__main__":
    train(Path(sys.argv[1]))

"""What a snapshot has: layers, metrics, rows and the summary, counted against the model's own zeros."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from asp_dist.pruning import Budget, Control, Pruner, Ramp, SparsityLoss, Track


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.Flatten(), nn.Linear(576, 10)
    )


def build(budget: Budget, *, input_shape: tuple[int, ...] | None = (3, 6, 6), r: float = 1.0) -> Pruner:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Pruner(model, optimizer, budget, control=SparsityLoss(initial_threshold=r), input_shape=input_shape)


def zeros(pruner: Pruner) -> list[int]:
    return [int((info.parameter == 0).sum()) for info in pruner.pruned_weights]


def test_layers() -> None:
    pruner = build(Budget.parameters(sparsity=0.9))
    conv, linear = pruner.snapshot().layers
    assert (conv.name, conv.kind, conv.shape, conv.numel, conv.macs) == ("2", "Conv2d", (16, 8, 3, 3), 1152, 1152 * 36)
    assert (linear.name, linear.kind, linear.numel, linear.macs) == ("4", "Linear", 5760, 5760)
    assert conv.threshold == linear.threshold == 1.0
    assert conv.predicted_sparsity == pytest.approx(0.682689492)
    assert [round(layer.measured_sparsity * layer.numel) for layer in pruner.snapshot().layers] == zeros(pruner)
    # These weights start uniform: half of what lies within one standard deviation, 1/√3 of the range.
    assert conv.measured_sparsity == pytest.approx(3**-0.5, abs=0.03)
    assert conv.sigma == pytest.approx(72**-0.5 / 3**0.5, rel=0.05)


def test_summary_counts_the_model() -> None:
    pruner = build(Budget.parameters(sparsity=0.9))
    summary, removed = pruner.snapshot().summary(), sum(zeros(pruner))
    total = sum(p.numel() for p in pruner.model.parameters())
    assert summary["prunable_weights"] == 6912
    assert summary["nonzero_weights"] == 6912 - removed
    assert summary["total_weights"] == total == 6912 + 216 + 8 + 16 + 10
    assert summary["sparsity"] == pytest.approx(removed / 6912)
    assert summary["sparsity_all"] == pytest.approx(removed / total)
    assert summary["target_sparsity"] == pytest.approx(0.9)
    dense_macs = 216 * 36 + 1152 * 36 + 5760
    assert summary["dense_macs"] == dense_macs
    assert summary["macs"] == pytest.approx(dense_macs - 36 * zeros(pruner)[0] - zeros(pruner)[1])
    # The sparse file: a bitmap and the kept values of each pruned layer, all else dense.
    assert summary["bytes"] == pytest.approx(4 * (6912 - removed) + 144 + 720 + 4 * (216 + 8 + 16 + 10))
    json.dumps(summary)


def test_metrics() -> None:
    pruner = build(Budget.macs(sparsity=0.8))
    row, counts = pruner.snapshot().metrics(), zeros(pruner)
    dense = 1152 * 36 + 5760
    assert row["sparsity/target"] == pytest.approx(0.8)
    assert row["sparsity/measured"] == pytest.approx(sum(counts) / 6912)
    assert row["sparsity/cost"] == pytest.approx((36 * counts[0] + counts[1]) / dense)
    assert row["sparsity/predicted"] == pytest.approx(0.682689492)
    assert row["sparsity/loss"] == pytest.approx(10 * (0.317310508 - 0.2) ** 2)
    assert row["cost/macs_density"] == pytest.approx(1 - (36 * counts[0] + counts[1]) / (dense + 216 * 36))
    assert row["train/threshold_lr"] == pytest.approx(0.001)


def test_rows_list_every_matrix() -> None:
    rows = build(Budget.parameters(sparsity=0.9)).snapshot().rows()
    assert [row["name"] for row in rows] == ["0", "2", "4"]
    assert [row["pruned"] for row in rows] == [False, True, True]
    assert rows[0]["reason"] == "fewer than 1000 weights"
    assert rows[0]["macs"] == 216 * 36
    json.dumps(rows)


def test_without_a_trace_there_are_no_multiply_adds() -> None:
    pruner = build(Budget.parameters(sparsity=0.9), input_shape=None)
    assert pruner.snapshot().summary()["macs"] is None
    assert "cost/macs_density" not in pruner.snapshot().metrics()
    assert pruner.snapshot().layers[0].macs is None


@pytest.mark.parametrize("control", [SparsityLoss(density="measured"), Track()])
def test_snapshots_change_no_training(control: Control) -> None:
    def train(report: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        ramp = Ramp("cubic", total_steps=12)
        budget = Budget.parameters(sparsity=0.9)
        pruner = Pruner(model, optimizer, budget, control=control, ramp=ramp)
        for step in range(12):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(4, 3, 6, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            if report:
                pruner.snapshot().metrics()
                pruner.snapshot().rows()
        return model.state_dict(), pruner.thresholds

    (plain, thresholds), (reported, same_thresholds) = train(False), train(True)
    assert torch.equal(thresholds, same_thresholds)
    assert all(torch.equal(plain[name], reported[name]) for name in plain)

"""What a pruner says of itself: layers, run metrics and the summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asp_dist.pruning.budget import Limit, NetworkCosts
from asp_dist.pruning.control import Control, LossControl
from asp_dist.pruning.density import gaussian_density
from asp_dist.pruning.layers import WeightInfo
from asp_dist.pruning.losses import sparsity_loss


@dataclass(frozen=True)
class PrunedLayer:
    """One pruned layer at one moment.

    Attributes:
        name: the layer's name.
        kind: its module's type.
        shape: shape of its weights.
        numel: number of its weights.
        macs: multiply-adds of one sample when dense; None: not traced.
        threshold: r, in units of σ.
        sigma: standard deviation of the dense weights.
        predicted_sparsity: erf(r/√2), in [0, 1].
        measured_sparsity: counted share of zeros, in [0, 1].
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    macs: float | None
    threshold: float
    sigma: float
    predicted_sparsity: float
    measured_sparsity: float


class Report:
    """The reading side of `Pruner`."""

    model: nn.Module
    weights: list[WeightInfo]
    pruned_weights: list[WeightInfo]
    limits: list[Limit]
    costs: NetworkCosts
    numel: Tensor
    measured: Tensor
    thresholds: Tensor
    sigmas: Tensor
    control: Control
    sparsity_weight: float
    steps: int
    frozen: bool
    skipped: int
    _macs: list[float] | None

    def _refresh_counts(self) -> None:
        raise NotImplementedError

    def _learning_rate(self) -> float:
        raise NotImplementedError

    def sparsity_loss(self) -> float:
        """λ·(sum of the budgets' losses) at the current thresholds."""
        densities = self.control.model.density(self.thresholds)
        targets = self.control.targets(self.steps)
        return self.sparsity_weight * sum(
            float(sparsity_loss(limit, densities, t).value) for limit, t in zip(self.limits, targets)
        )

    def predicted(self) -> Tensor:
        """Densities [L] that the Gaussian model predicts, as published (r not clamped)."""
        return gaussian_density(self.thresholds)

    def rows_of(self, macs: Sequence[float] | None) -> list[PrunedLayer]:
        """The pruned layers with their current numbers."""
        predicted = 1.0 - self.predicted()
        return [
            PrunedLayer(
                name=info.name,
                kind=info.kind,
                shape=tuple(info.parameter.shape),
                numel=info.numel,
                macs=None if macs is None else macs[i] * info.numel,
                threshold=float(self.thresholds[i]),
                sigma=float(self.sigmas[i]),
                predicted_sparsity=float(predicted[i]),
                measured_sparsity=1.0 - float(self.measured[i]),
            )
            for i, info in enumerate(self.pruned_weights)
        ]

    @property
    def layers(self) -> list[PrunedLayer]:
        """The pruned layers with their numbers, counted now; a collective under FSDP2."""
        self._refresh_counts()
        return self.rows_of(self.costs.macs_per_weight)

    def measured_density(self) -> Tensor:
        """Counted densities [L] as of the last counts."""
        return self.measured

    def metrics(self) -> dict[str, float]:
        """The run's numbers, for a log: sparsity (target, predicted, measured, of all weights), loss and costs.

        Counts every layer; a collective.
        """
        self._refresh_counts()
        first = self.limits[0]
        whole = self.numel.sum()
        kept = float((self.measured * self.numel).sum())
        total = float(whole) + self.costs.other_parameters
        row = {
            "sparsity/target": 1.0 - float(self.control.targets(self.steps)[0].mean()),
            "sparsity/predicted": 1.0 - float((self.predicted() * self.numel).sum() / whole),
            "sparsity/measured": 1.0 - kept / float(whole),
            "sparsity/all": (float(whole) - kept) / total,
            "sparsity/cost": 1.0 - float(first.density(self.measured).mean()),
            "sparsity/loss": self.sparsity_loss(),
            "cost/bytes": self._cost("bytes"),
        }
        if self.costs.macs_per_weight is not None:
            dense = sum(self.costs.per_weight("macs")[i] * n for i, n in enumerate(self.costs.numel))
            row["cost/macs_density"] = self._cost("macs") / max(dense + self.costs.other_macs, 1.0)
        if isinstance(self.control, LossControl) and not self.control.derived:
            row["train/threshold_lr"] = self.control.learning_rate(self._learning_rate())
        return row

    def _cost(self, cost: Any) -> float:
        per_weight = torch.tensor(self.costs.per_weight(cost), dtype=torch.float64)
        pruned = float((per_weight * self.numel * self.measured).sum()) + sum(self.costs.fixed(cost))
        return pruned + self.costs.elsewhere(cost)

    def rows(self) -> list[dict[str, Any]]:
        """One row per matrix of weights, pruned or not, as plain JSON types, in the order of the model."""
        by_name = {layer.name: layer for layer in self.layers}
        rows: list[dict[str, Any]] = []
        for index, info in enumerate(self.weights):
            layer = by_name.get(info.name)
            rows.append(
                {
                    "name": info.name,
                    "type": info.kind,
                    "shape": list(info.parameter.shape),
                    "weights": info.numel,
                    "macs": None if self._macs is None else self._macs[index] * info.numel,
                    "threshold": layer.threshold if layer else None,
                    "sigma": layer.sigma if layer else None,
                    "predicted_sparsity": layer.predicted_sparsity if layer else None,
                    "measured_sparsity": layer.measured_sparsity if layer else 0.0,
                    "pruned": layer is not None,
                    "reason": info.reason,
                }
            )
        return rows

    def summary(self) -> dict[str, Any]:
        """The network's totals: counted, as plain JSON types.

        ``sparsity`` is over the prunable weights and ``sparsity_all`` over all parameters; ``macs`` and ``bytes`` are of the
        whole network (None where multiply-adds were not traced).
        """
        self._refresh_counts()
        prunable = int(self.numel.sum())
        nonzero = int((self.measured * self.numel).round().sum())
        total = prunable + self.costs.other_parameters
        first = self.limits[0]
        traced = self.costs.macs_per_weight is not None
        dense_macs = None
        if traced:
            dense_macs = (
                sum(m * n for m, n in zip(self.costs.per_weight("macs"), self.costs.numel)) + self.costs.other_macs
            )
        return {
            "sparsity": 1.0 - nonzero / prunable,
            "sparsity_all": (prunable - nonzero) / total,
            "target_sparsity": 1.0 - float(first.target_density.mean()),
            "budget_cost": first.cost,
            "budget_sparsity": 1.0 - float(first.density(self.measured).mean()),
            "nonzero_weights": nonzero,
            "prunable_weights": prunable,
            "total_weights": total,
            "pruned_layers": len(self.pruned_weights),
            "macs": self._cost("macs") if traced else None,
            "dense_macs": dense_macs,
            "bytes": self._cost("bytes"),
            "skipped_steps": self.skipped,
            "frozen": self.frozen,
        }

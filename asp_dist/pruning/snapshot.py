"""What a pruner says about itself at one moment: the layers, the metrics, the rows of a table and the summary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from asp_dist.pruning import names
from asp_dist.pruning.budget import NetworkCosts, ResolvedBudget
from asp_dist.pruning.density import gaussian_density
from asp_dist.pruning.layers import WeightInfo
from asp_dist.pruning.names import LayerRow, PruningSummary
from asp_dist.pruning.options import Cost


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


@dataclass(frozen=True)
class Snapshot:
    """The state of a pruner at one moment, counted once. Nothing here communicates. L layers are pruned.

    Attributes:
        weights: all matrices of weights, in the order of the model.
        macs_per_weight: multiply-adds of one sample per weight of each of them; None: not traced.
        costs: what the network costs.
        budgets: the budgets.
        targets: target density of each budget now.
        thresholds: float64 [L], in units of σ.
        sigmas: float64 [L], standard deviations of the dense weights.
        kept: float64 [L], nonzero weights.
        further: the controller's own metrics.
        skipped: optimizer steps that a gradient scaler skipped.
        frozen: whether the mask is frozen.
    """

    weights: tuple[WeightInfo, ...]
    macs_per_weight: tuple[float, ...] | None
    costs: NetworkCosts
    budgets: tuple[ResolvedBudget, ...]
    targets: tuple[Tensor, ...]
    thresholds: Tensor
    sigmas: Tensor
    kept: Tensor
    further: dict[str, float]
    skipped: int
    frozen: bool

    @cached_property
    def numel(self) -> Tensor:
        """Weights of each pruned layer, float64 [L]."""
        return torch.tensor(self.costs.numel, dtype=torch.float64)

    @cached_property
    def densities(self) -> Tensor:
        """Counted densities, float64 [L]."""
        return self.kept / self.numel

    @cached_property
    def layers(self) -> tuple[PrunedLayer, ...]:
        """The pruned layers, in the order of the model."""
        predicted = 1.0 - gaussian_density(self.thresholds)
        macs = self.costs.macs_per_weight
        return tuple(
            PrunedLayer(
                name=info.name,
                kind=info.kind,
                shape=tuple(info.parameter.shape),
                numel=info.numel,
                macs=None if macs is None else macs[i] * info.numel,
                threshold=float(self.thresholds[i]),
                sigma=float(self.sigmas[i]),
                predicted_sparsity=float(predicted[i]),
                measured_sparsity=1.0 - float(self.densities[i]),
            )
            for i, info in enumerate(info for info in self.weights if not info.reason)
        )

    def cost(self, cost: Cost) -> float:
        """What the whole network costs now."""
        per_weight = torch.tensor(self.costs.per_weight(cost), dtype=torch.float64)
        return float((per_weight * self.kept).sum()) + sum(self.costs.fixed(cost)) + self.costs.unpruned_cost(cost)

    def dense_macs(self) -> float:
        """Multiply-adds of one sample of the dense network."""
        pruned = sum(m * n for m, n in zip(self.costs.per_weight("macs"), self.costs.numel))
        return pruned + self.costs.other_macs

    def metrics(self) -> dict[str, float]:
        """The run's numbers, for a log: sparsity (target, predicted, measured, of all weights), the loss and the costs."""
        prunable, kept = float(self.numel.sum()), float(self.kept.sum())
        predicted = float((gaussian_density(self.thresholds) * self.numel).sum())
        row = {
            names.TARGET_SPARSITY: 1.0 - float(self.targets[0].mean()),
            names.PREDICTED_SPARSITY: 1.0 - predicted / prunable,
            names.MEASURED_SPARSITY: 1.0 - kept / prunable,
            names.TOTAL_SPARSITY: (prunable - kept) / (prunable + self.costs.other_parameters),
            names.COST_SPARSITY: 1.0 - float(self.budgets[0].density(self.densities).mean()),
            names.BYTES: self.cost("bytes"),
        }
        if self.costs.macs_per_weight is not None:
            row[names.MACS_DENSITY] = self.cost("macs") / max(self.dense_macs(), 1.0)
        return row | self.further

    def rows(self) -> list[LayerRow]:
        """One row per matrix of weights, pruned or not, in the order of the model."""
        pruned = {layer.name: layer for layer in self.layers}
        rows: list[LayerRow] = []
        for index, info in enumerate(self.weights):
            layer = pruned.get(info.name)
            macs = None if self.macs_per_weight is None else self.macs_per_weight[index] * info.numel
            rows.append(
                {
                    "name": info.name,
                    "type": info.kind,
                    "shape": list(info.parameter.shape),
                    "weights": info.numel,
                    "macs": macs,
                    "threshold": layer.threshold if layer else None,
                    "sigma": layer.sigma if layer else None,
                    "predicted_sparsity": layer.predicted_sparsity if layer else None,
                    "measured_sparsity": layer.measured_sparsity if layer else 0.0,
                    "pruned": layer is not None,
                    "reason": info.reason,
                }
            )
        return rows

    def summary(self) -> PruningSummary:
        """The network's totals."""
        prunable, nonzero = int(self.numel.sum()), int(self.kept.sum())
        total = prunable + self.costs.other_parameters
        first, traced = self.budgets[0], self.costs.macs_per_weight is not None
        return {
            "sparsity": 1.0 - nonzero / prunable,
            "sparsity_all": (prunable - nonzero) / total,
            "target_sparsity": 1.0 - float(first.target_density.mean()),
            "budget_cost": first.cost,
            "budget_sparsity": 1.0 - float(first.density(self.densities).mean()),
            "nonzero_weights": nonzero,
            "prunable_weights": prunable,
            "total_weights": total,
            "pruned_layers": len(self.layers),
            "macs": self.cost("macs") if traced else None,
            "dense_macs": self.dense_macs() if traced else None,
            "bytes": self.cost("bytes"),
            "skipped_steps": self.skipped,
            "frozen": self.frozen,
        }

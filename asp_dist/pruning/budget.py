"""Budgets: a cost that is linear in the layers' densities, Σ c_l·d_l + constant, and a limit on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asp_dist.pruning.layers import WeightInfo
from asp_dist.pruning.options import Bound, Budget, Cost, Scope


@dataclass(frozen=True)
class NetworkCosts:
    """What a network costs when it is dense; L layers are pruned.

    Attributes:
        names: names of the L layers.
        numel: weights of each layer.
        macs_per_weight: multiply-adds of one sample per weight of each layer; None: not traced.
        itemsize: bytes of one stored weight of each layer.
        other_parameters: parameters outside the L layers, biases and norms included.
        other_macs: multiply-adds of the matrices that stay dense.
        other_bytes: bytes of all other tensors of the model.
    """

    names: tuple[str, ...]
    numel: tuple[int, ...]
    macs_per_weight: tuple[float, ...] | None
    itemsize: tuple[int, ...]
    other_parameters: int = 0
    other_macs: float = 0.0
    other_bytes: int = 0

    def per_weight(self, cost: Cost) -> list[float]:
        """Cost of one kept weight of each layer.

        Raises:
            ValueError: multiply-adds are asked for, and the input's shape was not given.
        """
        if cost == "parameters":
            return [1.0] * len(self.numel)
        if cost == "bytes":
            return [float(size) for size in self.itemsize]
        if self.macs_per_weight is None:
            raise ValueError("a multiply-adds budget needs the input's shape: Pruner(..., input_shape=(3, 224, 224))")
        return list(self.macs_per_weight)

    def fixed(self, cost: Cost) -> list[float]:
        """Cost of each layer that no pruning saves: the bitmap of the sparse file, one bit per weight, for bytes."""
        return [float(math.ceil(n / 8)) if cost == "bytes" else 0.0 for n in self.numel]

    def unpruned_cost(self, cost: Cost) -> float:
        """Cost of everything outside the L layers."""
        return {"parameters": self.other_parameters, "macs": self.other_macs, "bytes": self.other_bytes}[cost]


@dataclass(frozen=True)
class ResolvedBudget:
    """A budget on a given network, in the units of its cost.

    Attributes:
        cost: which cost.
        bound: ``equal`` or ``at_most``.
        scope: ``network`` or ``layer``.
        per_weight: float64 [L], cost of one kept weight.
        dense: float64 [L], cost of each layer with all its weights kept (without what no pruning saves).
        allowed: float64, what Σ per_weight·kept may be: one number for a network, [L] for layers; an integer for weights.
        target_density: the share of the dense cost that may be kept, not rounded to whole weights; shaped as `allowed`.
    """

    cost: Cost
    bound: Bound
    scope: Scope
    per_weight: Tensor
    dense: Tensor
    allowed: Tensor
    target_density: Tensor

    def to(self, device: torch.device) -> ResolvedBudget:
        """The same with its tensors on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("per_weight", "dense", "allowed", "target_density")}
        return dataclasses.replace(self, **tensors)

    def density(self, layer_densities: Tensor) -> Tensor:
        """Share of the dense cost that the given layer densities [L] keep: one number, or [L] for layers."""
        if self.scope == "layer":
            return layer_densities
        return (self.dense * layer_densities).sum() / self.dense.sum()


def resolve_budget(budget: Budget, costs: NetworkCosts) -> ResolvedBudget:
    """The budget on a given network.

    Raises:
        ValueError: the limit is below what the network costs with every prunable weight gone, or above its dense cost.
    """
    numel = torch.tensor(costs.numel, dtype=torch.float64)
    per_weight = torch.tensor(costs.per_weight(budget.cost), dtype=torch.float64)
    fixed = torch.tensor(costs.fixed(budget.cost), dtype=torch.float64)
    dense = per_weight * numel
    if budget.scope == "network":
        dense_cost, fixed_cost = dense.sum(), fixed.sum()
    else:
        dense_cost, fixed_cost = dense, fixed
    if budget.count is not None:
        allowed = torch.as_tensor(float(budget.count) - costs.unpruned_cost(budget.cost), dtype=torch.float64) - fixed_cost
        if float(allowed) > float(dense_cost):
            if budget.bound == "equal":
                whole = float(dense_cost) + costs.unpruned_cost(budget.cost)
                raise ValueError(f"budget of {budget.count:,} {budget.cost}: the dense network has only {whole:,.0f}")
            allowed = dense_cost.clone()
    else:
        density = budget.density if budget.density is not None else 1.0 - (budget.sparsity or 0.0)
        allowed = dense_cost * density - fixed_cost
    if bool((allowed <= 0).any()):
        floor = float(fixed_cost.sum()) + (costs.unpruned_cost(budget.cost) if budget.count is not None else 0.0)
        raise ValueError(
            f"{budget} cannot be met: with every prunable weight gone the network still costs {floor:,.0f} {budget.cost}"
        )
    target = (allowed / dense_cost.clamp_min(1e-300)).clamp(max=1.0)
    if budget.cost == "parameters":
        # The budget is an integer count; the small term keeps 0.1 × 30 from becoming 2.
        allowed = allowed.round() if budget.bound == "equal" else (allowed + 1e-6).floor()
    return ResolvedBudget(budget.cost, budget.bound, budget.scope, per_weight, dense, allowed, target)


def check_floors(budgets: Sequence[ResolvedBudget], floors: Tensor, names: Sequence[str]) -> None:
    """Raise `ValueError` where the layers' floors, [L] weights that stay, cost more than a budget allows."""
    for budget in budgets:
        least = budget.per_weight * floors
        if budget.scope == "network" and float(least.sum()) > float(budget.allowed):
            raise ValueError(
                f"the budget allows {float(budget.allowed):,.0f} {budget.cost} in the prunable layers, but the floors on their "
                f"densities (min_density) alone cost {float(least.sum()):,.0f}: lower min_density or raise the budget"
            )
        if budget.scope == "layer" and bool((least > budget.allowed).any()):
            worst = int((least - budget.allowed).argmax())
            raise ValueError(
                f"layer {names[worst]!r}: the budget allows {float(budget.allowed[worst]):,.0f} {budget.cost}, but the floor "
                f"on its density (min_density) costs {float(least[worst]):,.0f}: lower min_density or raise the budget"
            )


def network_costs(model: nn.Module, weights: Sequence[WeightInfo], macs: Sequence[float] | None) -> NetworkCosts:
    """What `model` costs, of whose `weights` those without a reason against it are pruned.

    Args:
        model: the network.
        weights: all its matrices of weights.
        macs: multiply-adds per weight of each of them; None: not traced.
    """
    chosen = [info for info in weights if not info.reason]
    pruned = {id(info.parameter) for info in chosen}
    others = {id(p): p for p in model.parameters() if id(p) not in pruned}
    buffers = {id(b): b for b in model.buffers()}
    return NetworkCosts(
        names=tuple(info.name for info in chosen),
        numel=tuple(info.numel for info in chosen),
        macs_per_weight=None if macs is None else tuple(m for m, info in zip(macs, weights) if not info.reason),
        itemsize=tuple(info.parameter.element_size() for info in chosen),
        other_parameters=sum(p.numel() for p in others.values()),
        other_macs=sum(m * i.numel for m, i in zip(macs or [], weights) if i.reason),
        other_bytes=sum(t.numel() * t.element_size() for t in [*others.values(), *buffers.values()]),
    )

"""Budgets: a cost that is linear in the layers' densities, Σ c_l·d_l + constant, and a limit on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from asp_dist.pruning.layers import WeightInfo

Cost = Literal["parameters", "macs", "bytes"]
Bound = Literal["equal", "at_most"]
Scope = Literal["network", "layer"]


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

    def elsewhere(self, cost: Cost) -> float:
        """Cost of everything outside the L layers."""
        return {"parameters": self.other_parameters, "macs": self.other_macs, "bytes": self.other_bytes}[cost]


@dataclass(frozen=True)
class Limit:
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

    def density(self, layer_densities: Tensor) -> Tensor:
        """Share of the dense cost that the given layer densities [L] keep: one number, or [L] for layers."""
        if self.scope == "layer":
            return layer_densities
        return (self.dense * layer_densities).sum() / self.dense.sum()


@dataclass(frozen=True)
class Budget:
    """A budget in the user's words. Make one by `Budget.parameters`, `Budget.macs` or `Budget.bytes`.

    Exactly one of the three says how much:

    Attributes:
        cost: ``parameters`` (weights), ``macs`` (multiply-adds of one sample), ``bytes`` (of the exported sparse file: a
            bitmap and the kept values).
        sparsity: share of the prunable layers' dense cost to save, in [0, 1).
        density: share of it to keep, in (0, 1].
        count: absolute limit on the whole network, what is not pruned included.
        bound: ``equal`` or ``at_most``.
        scope: ``network``, or ``layer``: every layer by itself.
    """

    cost: Cost
    sparsity: float | None = None
    density: float | None = None
    count: int | None = None
    bound: Bound = "equal"
    scope: Scope = "network"

    def __post_init__(self) -> None:
        given = {n: v for n in ("sparsity", "density", "count") if (v := getattr(self, n)) is not None}
        if len(given) != 1:
            raise ValueError(f"Budget.{self.cost}: give exactly one of sparsity, density and count, not {given}")
        if self.sparsity is not None and not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"Budget.{self.cost}: sparsity = {self.sparsity} is outside [0, 1)")
        if self.density is not None and not 0.0 < self.density <= 1.0:
            raise ValueError(f"Budget.{self.cost}: density = {self.density} is outside (0, 1]")
        if self.count is not None and self.count <= 0:
            raise ValueError(f"Budget.{self.cost}: count = {self.count} must be greater than 0")
        if self.count is not None and self.scope == "layer":
            raise ValueError(f"Budget.{self.cost}: count = {self.count} is a limit on the network; scope is 'layer'")
        if self.bound not in ("equal", "at_most"):
            raise ValueError(f"Budget.{self.cost}: bound = {self.bound!r} is neither 'equal' nor 'at_most'")
        if self.scope not in ("network", "layer"):
            raise ValueError(f"Budget.{self.cost}: scope = {self.scope!r} is neither 'network' nor 'layer'")

    @classmethod
    def parameters(
        cls,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        count: int | None = None,
        bound: Bound = "equal",
        scope: Scope = "network",
    ) -> Self:
        """A budget of weights. See the class for the arguments."""
        return cls("parameters", sparsity, density, count, bound, scope)

    @classmethod
    def macs(
        cls,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        count: int | None = None,
        bound: Bound = "equal",
        scope: Scope = "network",
    ) -> Self:
        """A budget of multiply-adds. See the class for the arguments."""
        return cls("macs", sparsity, density, count, bound, scope)

    @classmethod
    def bytes(
        cls,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        count: int | None = None,
        bound: Bound = "equal",
        scope: Scope = "network",
    ) -> Self:
        """A budget of bytes in the exported sparse file. See the class for the arguments."""
        return cls("bytes", sparsity, density, count, bound, scope)

    def resolve(self, costs: NetworkCosts) -> Limit:
        """The budget as a limit on a network.

        Raises:
            ValueError: the limit is below what the network costs with every prunable weight gone, or above its dense cost.
        """
        numel = torch.tensor(costs.numel, dtype=torch.float64)
        per_weight = torch.tensor(costs.per_weight(self.cost), dtype=torch.float64)
        fixed = torch.tensor(costs.fixed(self.cost), dtype=torch.float64)
        dense = per_weight * numel
        if self.scope == "network":
            dense_cost, fixed_cost = dense.sum(), fixed.sum()
        else:
            dense_cost, fixed_cost = dense, fixed
        if self.count is not None:
            allowed = torch.as_tensor(float(self.count) - costs.elsewhere(self.cost), dtype=torch.float64) - fixed_cost
            if float(allowed) > float(dense_cost):
                if self.bound == "equal":
                    whole = float(dense_cost) + costs.elsewhere(self.cost)
                    raise ValueError(f"budget of {self.count:,} {self.cost}: the dense network has only {whole:,.0f}")
                allowed = dense_cost.clone()
        else:
            density = self.density if self.density is not None else 1.0 - (self.sparsity or 0.0)
            allowed = dense_cost * density - fixed_cost
        if bool((allowed <= 0).any()):
            floor = float(fixed_cost.sum()) + (costs.elsewhere(self.cost) if self.count is not None else 0.0)
            raise ValueError(
                f"{self} cannot be met: with every prunable weight gone the network still costs {floor:,.0f} {self.cost}"
            )
        target = (allowed / dense_cost.clamp_min(1e-300)).clamp(max=1.0)
        if self.cost == "parameters":
            # The budget is an integer count; the small term keeps 0.1 × 30 from becoming 2.
            allowed = allowed.round() if self.bound == "equal" else (allowed + 1e-6).floor()
        return Limit(self.cost, self.bound, self.scope, per_weight, dense, allowed, target)


def check_floors(limits: Sequence[Limit], floors: Tensor, names: Sequence[str]) -> None:
    """Raise `ValueError` where the layers' floors, [L] weights that stay, cost more than a limit allows."""
    for limit in limits:
        least = limit.per_weight * floors
        if limit.scope == "network" and float(least.sum()) > float(limit.allowed):
            raise ValueError(
                f"the budget allows {float(limit.allowed):,.0f} {limit.cost} in the prunable layers, but the floors on their "
                f"densities (min_density) alone cost {float(least.sum()):,.0f}: lower min_density or raise the budget"
            )
        if limit.scope == "layer" and bool((least > limit.allowed).any()):
            worst = int((least - limit.allowed).argmax())
            raise ValueError(
                f"layer {names[worst]!r}: the budget allows {float(limit.allowed[worst]):,.0f} {limit.cost}, but the floor on "
                f"its density (min_density) costs {float(least[worst]):,.0f}: lower min_density or raise the budget"
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

"""From a run's configuration to its pruner."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from asp_dist.config import Config, UserError
from asp_dist.pruning import Budget, Pruner, Ramp


def build_budgets(config: Config) -> list[Budget]:
    """The budgets that the configuration names, the main one first."""
    return [
        Budget(term.cost, term.sparsity, term.density, term.count, term.bound, term.scope)
        for term in config.budget.terms()
    ]


def build_ramp(config: Config, total_steps: int) -> Ramp:
    """The target's course over a run of `total_steps` optimizer steps; the mask is always frozen before its end."""
    pruning = config.pruning
    return Ramp(
        shape=pruning.ramp,
        start=pruning.ramp_start if pruning.ramp != "constant" else 0.0,
        end=pruning.ramp_end if pruning.ramp != "constant" else 0.0,
        freeze_at=pruning.freeze_at,
        total_steps=total_steps,
    )


def build_pruner(
    config: Config, model: nn.Module, optimizer: torch.optim.Optimizer, *, total_steps: int, input_size: Any
) -> Pruner | None:
    """The run's pruner, hooked to `optimizer`; None if pruning is off.

    Args:
        config: the run.
        model: the network, placed on its device.
        optimizer: its optimizer.
        total_steps: length of the run in optimizer steps.
        input_size: shape of one image, (channels, height, width).

    Raises:
        UserError: the network and the budget do not go together.
    """
    pruning = config.pruning
    if not pruning.enabled:
        return None
    try:
        return Pruner(
            model,
            optimizer,
            build_budgets(config),
            control=pruning.control,
            sparsity_weight=pruning.sparsity_weight,
            initial_threshold=pruning.initial_threshold,
            threshold_lr=pruning.threshold_lr,
            operator=pruning.operator,
            min_weights=pruning.min_weights,
            include=pruning.include,
            exclude=pruning.exclude,
            prune_first=pruning.prune_first,
            prune_last=pruning.prune_last,
            ramp=build_ramp(config, total_steps),
            density=pruning.density,
            multiplier=pruning.multiplier,
            allocation=pruning.allocation,
            allocation_rate=pruning.allocation_rate,
            min_density=pruning.min_density,
            gradient_scale=pruning.gradient_scale,
            input_shape=tuple(input_size),
            agreement_every=pruning.agreement_every,
        )
    except ValueError as error:
        raise UserError(f"model {config.model.name!r}: {error}") from error

"""Names of the metrics and of the summary's keys that a pruner gives; `asp_dist.tracking.schema` has all others."""

from __future__ import annotations

from typing import Final, TypedDict

TARGET_SPARSITY: Final = "sparsity/target"
PREDICTED_SPARSITY: Final = "sparsity/predicted"
MEASURED_SPARSITY: Final = "sparsity/measured"
TOTAL_SPARSITY: Final = "sparsity/all"
COST_SPARSITY: Final = "sparsity/cost"
SPARSITY_LOSS: Final = "sparsity/loss"
BYTES: Final = "cost/bytes"
MACS_DENSITY: Final = "cost/macs_density"
ALLOCATION_AT_BOUNDS: Final = "sparsity/at_bounds"  # share of the layers
THRESHOLD_LR: Final = "train/threshold_lr"


class LayerRow(TypedDict, total=False):
    """One matrix of weights at one moment, in plain JSON types: a row of ``layers.json`` and of every table of layers.

    Attributes:
        name: the layer's name.
        type: its module's class.
        shape: shape of its weights.
        weights: number of its weights.
        macs: multiply-adds of one sample when dense; None: not traced.
        threshold: r, in units of σ; None for a layer that stays dense, as are the next two.
        sigma: standard deviation of the dense weights.
        predicted_sparsity: erf(r/√2), in [0, 1].
        measured_sparsity: counted share of zeros, in [0, 1].
        pruned: whether it is pruned.
        reason: why it stays dense; empty if it is pruned.
        dense_top1: top-1 accuracy with this layer's dense weights put back; only where that was measured, as are the next two.
        dense_gain: how much that is above the pruned network's.
        extra_pruned_top1: top-1 with more of this layer's weights removed.
    """

    name: str
    type: str
    shape: list[int]
    weights: int
    macs: float | None
    threshold: float | None
    sigma: float | None
    predicted_sparsity: float | None
    measured_sparsity: float
    pruned: bool
    reason: str
    dense_top1: float
    dense_gain: float
    extra_pruned_top1: float


class PruningSummary(TypedDict):
    """The network's totals at one moment, in plain JSON types.

    Attributes:
        sparsity: share of zeros among the prunable weights.
        sparsity_all: share of pruned weights among all parameters.
        target_sparsity: what the first budget asks for, as a share of its cost.
        budget_cost: the first budget's cost.
        budget_sparsity: the share of that cost that is saved.
        nonzero_weights: prunable weights that are left.
        prunable_weights: all prunable weights.
        total_weights: all parameters.
        pruned_layers: number of layers that are pruned.
        macs: multiply-adds of one sample that are left in the whole network; None: not traced.
        dense_macs: the same for the dense network.
        bytes: size of the whole network's sparse file.
        skipped_steps: optimizer steps that a gradient scaler skipped.
        frozen: whether the mask is frozen.
    """

    sparsity: float
    sparsity_all: float
    target_sparsity: float
    budget_cost: str
    budget_sparsity: float
    nonzero_weights: int
    prunable_weights: int
    total_weights: int
    pruned_layers: int
    macs: float | None
    dense_macs: float | None
    bytes: float
    skipped_steps: int
    frozen: bool

"""The pruner: a companion of the optimizer that keeps a model's own parameters pruned to a budget while it trains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from asp_dist.pruning import operators
from asp_dist.pruning.budget import Budget, check_floors, network_costs
from asp_dist.pruning.control import Control, LossControl, Observation
from asp_dist.pruning.density import NEARBY, DensityModel, LayerCounts, means_are_chance, weight_threshold
from asp_dist.pruning.layers import check_trained, find_weights, unwrapped
from asp_dist.pruning.macs import macs_per_weight
from asp_dist.pruning.operators import Operator
from asp_dist.pruning.schedule import Ramp
from asp_dist.pruning.shards import LayerShard, RankReducer
from asp_dist.pruning.state import PrunerState
from asp_dist.pruning.track import Allocation, TrackControl

ControlName = Literal["loss", "track"]


class Pruner(PrunerState):
    """Prunes `model` to `budget` while `optimizer` trains it; nothing else in the training loop changes.

    Implements "Weight Pruning via Adaptive Sparsity Loss" (arXiv 2006.02768). The parameters of the model are the pruned
    weights at all times; the dense weights are kept here and handed to the optimizer for its step, through its own step
    hooks. Per layer, with w the dense weights, σ their standard deviation, r the threshold and b = clamp(r, 0, 5)·σ + 1e-6,
    the pruned weights are w where |w| > b, else 0; the dense weights receive the gradient of the pruned ones (straight-
    through), and the task's gradient on r is −(σ/b)·Σ_{|w| <= b} g·w.

    Every rank of `process_group` builds its own; one packed all-reduce per optimizer step keeps them the same.

    Args:
        model: the network, on its device and in its final type, wrapped by DDP or `fully_shard` before or after (DDP) or
            before (FSDP2).
        optimizer: any torch optimizer over the model's parameters, stepped without a closure.
        budget: one budget or several that hold together.
        control: ``loss``, the adaptive sparsity loss, or ``track``, which holds the scheduled budget at every step.
        sparsity_weight: λ of ``loss``.
        initial_threshold: r at the start, in units of σ; None: where the density model predicts the schedule's first target.
        threshold_lr: learning rate of the thresholds (``loss``); None: 0.01 × the optimizer's current learning rate for a
            constant target, derived from the ramp otherwise.
        operator: ``hard`` (published), ``soft`` or ``power``.
        min_weights: layers with fewer weights stay dense.
        include: globs on layer names; empty: all.
        exclude: globs on layer names that stay dense.
        prune_first: False: the first layer stays dense; see `find_weights`.
        prune_last: False: the last layer stays dense.
        ramp: the target's course over the run, and when the mask is frozen; None: constant, never frozen by itself.
        density: ``gaussian`` (published) or ``measured``: the estimate corrected by counts (``loss``; ``track`` always is).
        multiplier: see `LossControl`.
        allocation: where the allocation starts (``track``).
        allocation_rate: how fast the allocation learns (``track``); 0 keeps the starting one.
        min_density: floor on each layer's density, in [0, 1]; a layer keeps at least one weight.
        center: subtract each layer's mean from its dense weights after every step; None: as published in ``loss``, if the
            layers' means are what chance gives to fresh weights. Those of a trained network belong to what it has learned:
            without them a ResNet-20 falls to chance at once.
        gradient_scale: factor θ in [0, 1] on the gradients of pruned weights (arXiv 2310.02448).
        power: p of the ``power`` operator.
        threshold_momentum: momentum of the thresholds (``loss``).
        input_shape: shape of one input sample, such as (3, 224, 224): counts multiply-adds; None: they are not known.
        agreement_every: steps between checks that all ranks agree; 0: never.
        process_group: the ranks; None: the default group, or one process.

    Raises:
        ValueError: no layer can be pruned; `optimizer` does not train a layer that would be; the budget cannot be met; an
            argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        budget: Budget | Sequence[Budget],
        *,
        control: ControlName = "loss",
        sparsity_weight: float = 10.0,
        initial_threshold: float | None = None,
        threshold_lr: float | None = None,
        operator: Operator = "hard",
        min_weights: int = 1000,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        prune_first: bool = True,
        prune_last: bool = True,
        ramp: Ramp | None = None,
        density: Literal["gaussian", "measured"] = "gaussian",
        multiplier: bool = False,
        allocation: Allocation = "magnitude",
        allocation_rate: float = 0.003,
        min_density: float = 0.001,
        center: bool | None = None,
        gradient_scale: float = 1.0,
        power: float = 3.0,
        threshold_momentum: float = 0.9,
        input_shape: Sequence[int] | None = None,
        agreement_every: int = 100,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if control not in ("loss", "track"):
            raise ValueError(f"control {control!r} is neither 'loss' nor 'track'")
        self.model = model = unwrapped(model)
        self.optimizer = optimizer
        self.operator = operator
        self.center = False if center is None else center
        self.gradient_scale = gradient_scale
        self.agreement_every = agreement_every
        self.ramp = ramp or Ramp()
        self.sparsity_weight = sparsity_weight
        self._prune = operators.build_operator(operator, power)
        self.weights = find_weights(
            model,
            min_weights=min_weights,
            include=include,
            exclude=exclude,
            prune_first=prune_first,
            prune_last=prune_last,
        )
        self._take_layers(model, budget, min_weights, input_shape, min_density, process_group)
        model_of_density = DensityModel(self.numel, corrected=density == "measured" or control == "track")
        if control == "loss":
            self.control: Control = LossControl(
                self.limits,
                model_of_density,
                self.ramp,
                weight=sparsity_weight,
                initial_threshold=initial_threshold,
                lr=threshold_lr,
                momentum=threshold_momentum,
                multiplier=multiplier,
            )
        else:
            self.control = TrackControl(
                self.limits,
                model_of_density,
                self.ramp,
                allocation=allocation,
                shapes=[tuple(info.parameter.shape) for info in self.pruned_weights],
                floors=self.floors / self.numel,
                rate=allocation_rate,
            )
        self._start(center_fresh=control == "loss" and center is None)
        if not getattr(type(optimizer).step, "hooked", False):
            optimizer._patch_step_function()  # A wrapper that skips Optimizer.__init__ (timm's Lookahead) runs no hooks else.
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _take_layers(
        self,
        model: nn.Module,
        budget: Budget | Sequence[Budget],
        min_weights: int,
        input_shape: Sequence[int] | None,
        min_density: float,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.pruned_weights = [info for info in self.weights if not info.reason]
        if not self.pruned_weights:
            raise ValueError(
                f"no layer of {type(model).__name__} can be pruned: it has {len(self.weights)} matrices of weights, and each "
                f"is excluded or has fewer than min_weights = {min_weights} weights"
            )
        check_trained(self.pruned_weights, self.optimizer)
        self._macs = macs_per_weight(model, self.weights, input_shape) if input_shape is not None else None
        world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self.shards = [LayerShard(info, world_size) for info in self.pruned_weights]
        self.device = self.shards[0].dense.device
        self.reducer = RankReducer(self.shards, group, self.device)
        self.numel = torch.tensor([float(info.numel) for info in self.pruned_weights], dtype=torch.float64)
        self.costs = network_costs(model, self.weights, self._macs)
        budgets = [budget] if isinstance(budget, Budget) else list(budget)
        self.limits = [one.resolve(self.costs) for one in budgets]
        self.floors = (self.numel * min_density).ceil().clamp(min=1.0)
        check_floors(self.limits, self.floors, self.costs.names)

    def _start(self, *, center_fresh: bool) -> None:
        """Prune the model's weights for the first forward pass; `center_fresh` centers them if no layer has been trained."""
        self.steps = 0
        self._step_frame: FrameType | None = None
        self.frozen = False
        self.skipped = 0
        self._count_from = 0
        count = len(self.shards)
        # Kept weights; where the density model wants more, weights near the threshold, and the largest one of each shard.
        slots = max(shard.shards for shard in self.shards)
        rows = 2 + slots if self.control.model.corrected else 1
        self._local_counts = torch.zeros(rows, count, dtype=torch.float64, device=self.device)
        self._fresh = torch.ones(count, dtype=torch.bool)
        self._products = torch.zeros(count, dtype=torch.float64, device=self.device)
        self.measured = torch.ones(count, dtype=torch.float64)
        means, self.sigmas, *_ = self._statistics()
        self.thresholds = self.control.start(self.sigmas)
        if center_fresh:
            self.center = means_are_chance(means, self.sigmas, self.numel)
        self._write_pruned(means)
        self._local_counts = self._count_layers()
        self._observe_counts(torch.stack(self.reducer.reduce(*self._local_counts)).cpu())

    # The optimizer's step.

    # An optimizer's class that calls ``super().step()`` runs all hooks again inside of its step. Only the outermost call is the
    # step; it is known again by the frame that it runs in.

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        caller = sys._getframe(1)
        if self._step_frame is None:
            self._hand_over(optimizer, args, kwargs)
            self._step_frame = caller
        elif not _is_running(self._step_frame, caller):
            raise RuntimeError(
                f"the optimizer's step after step {self.steps} raised an error, and left the dense weights half updated: "
                "load the last checkpoint, into a new Pruner"
            )

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if sys._getframe(1) is self._step_frame:
            self._step_frame = None
            self._take_back(optimizer)

    @torch.no_grad()
    def _hand_over(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Take the thresholds' gradients from the final gradients, and hand the dense weights to the optimizer."""
        if kwargs.get("closure") is not None or any(callable(arg) for arg in args[1:]):
            raise ValueError(
                "optimizer.step(closure) runs the network inside the step, with dense weights: step without one"
            )
        if self.frozen:
            return
        scale = getattr(optimizer, "grad_scale", None)  # Fused optimizers unscale the gradients inside their step.
        thresholds = weight_threshold(self.thresholds, self.sigmas).tolist()
        products = []
        for shard in self.shards:
            shard.check_storage()
        for shard, threshold in zip(self.shards, thresholds):
            gradient = shard.flat_gradient()
            if gradient is None:
                products.append(torch.zeros((), dtype=torch.float64, device=self.device))
            else:
                pruned = shard.flat_pruned()
                product = operators.pruned_dot(gradient, shard.flat_dense(), pruned, threshold, self.operator)
                products.append(product)
                operators.scale_pruned_gradient_(shard.gradient(), shard.pruned, self.gradient_scale)
            shard.hand_over_dense()
        self._products = torch.stack(products).double()
        if scale is not None:
            self._products = self._products / scale.double().to(self.device)

    @torch.no_grad()
    def _take_back(self, optimizer: Optimizer) -> None:
        """Move the thresholds, take the layers' statistics and write the pruned weights."""
        found_inf = getattr(optimizer, "found_inf", None)
        skip = found_inf is not None and float(found_inf) > 0  # A fused optimizer was called, and skipped its update.
        self.skipped += skip
        if self.frozen:
            self._apply_frozen_masks()
            if not skip:
                self._advance()
            return
        for shard in self.shards:
            shard.take_back_dense()
        means, sigmas, products, counts = self._statistics()
        if skip:
            return
        # A gradient that is not a number ruins the weights; thresholds and the other layers must outlive it.
        means = torch.nan_to_num(means, nan=0.0, posinf=0.0, neginf=0.0)
        sigmas = torch.where(torch.isfinite(sigmas), sigmas, self.sigmas)
        self._observe_counts(counts)
        seen = Observation(products, self.sigmas, sigmas, self._learning_rate(), self.steps, self._base_rate())
        self.thresholds = self.control.move(self.thresholds, seen)
        self.sigmas = sigmas
        self._write_pruned(means)
        self._count_some()
        self._advance()

    def _advance(self) -> None:
        self.steps += 1
        freeze_step = self.ramp.freeze_step()
        if not self.frozen and freeze_step is not None and self.steps >= freeze_step:
            self.finalize()
        if self.agreement_every and self.steps % self.agreement_every == 0:
            self.check_agreement()

    def _learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _base_rate(self) -> float:
        """What the optimizer's schedule says of the rate after a warm-up; 0 without a schedule."""
        group = self.optimizer.param_groups[0]
        return max(float(group.get(name, 0.0)) for name in ("initial_lr", "max_lr"))

    def _statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means and standard deviations of the dense weights, the reduced products, each [L], and what was counted; on the CPU.

        This is the step's one all-reduce, and on a GPU its one copy to the host.
        """
        sums = [operators.moments(shard.flat_dense()) for shard in self.shards]
        first = torch.stack([total for total, _ in sums]).double()
        second = torch.stack([squares for _, squares in sums]).double()
        columns = (self._products, first, second, *self._local_counts)
        reduced = torch.stack(self.reducer.reduce(*columns)).cpu()
        products, total, squares = reduced[:3]
        mean = total / self.numel
        variance = (squares - self.numel * mean.square()) / (self.numel - 1.0).clamp(min=1.0)
        return mean, variance.clamp_min(0.0).sqrt(), products, reduced[3:]

    def _write_pruned(self, means: Tensor | None) -> None:
        """Write the pruned weights; subtract the means, [L], from the dense ones before, if they are given and it is asked."""
        thresholds = weight_threshold(self.thresholds, self.sigmas).tolist()
        for index, (shard, threshold) in enumerate(zip(self.shards, thresholds)):
            mean = float(means[index]) if self.center and means is not None else 0.0
            operators.write_pruned(self._prune, shard.flat_dense(), mean, threshold, shard.flat_pruned())

    def _count_layer(self, shard: LayerShard, threshold: float) -> Tensor:
        """This rank's column of `_local_counts` for one layer."""
        column = torch.zeros_like(self._local_counts[:, 0])
        column[0] = torch.count_nonzero(shard.pruned)
        if self.control.model.corrected:
            column[1] = operators.count_above(shard.flat_dense(), NEARBY * threshold)
            column[2 + shard.shard] = operators.largest(shard.flat_dense())
        return column

    # Counting. A count takes a pass over the weights, so each step counts some layers only, in turn, and they are reduced
    # with the next step's all-reduce.

    def _count_some(self) -> None:
        quota = max(2_000_000.0, float(self.numel.sum()) / 8)
        thresholds = weight_threshold(self.thresholds, self.sigmas).tolist()
        self._fresh.zero_()
        while quota > 0 and not bool(self._fresh[self._count_from]):
            index = self._count_from
            self._fresh[index] = True
            self._local_counts[:, index] = self._count_layer(self.shards[index], thresholds[index])
            quota -= float(self.numel[index])
            self._count_from = (index + 1) % len(self.shards)

    def _count_layers(self) -> Tensor:
        """`_local_counts` of all layers, counted now."""
        thresholds = weight_threshold(self.thresholds, self.sigmas).tolist()
        return torch.stack([self._count_layer(s, t) for s, t in zip(self.shards, thresholds)], dim=1)

    def _observe_counts(self, counts: Tensor) -> None:
        kept = counts[0].round()
        self.measured = torch.where(self._fresh, kept / self.numel, self.measured)
        if self.control.model.corrected:
            sigmas = self.sigmas.clamp_min(1e-30)
            scaled = weight_threshold(self.thresholds, self.sigmas) / sigmas
            largest = torch.nan_to_num(counts[2:].amax(dim=0) / sigmas, nan=torch.inf)
            self.control.model.observe(scaled, LayerCounts(kept, counts[1].round(), largest), self._fresh)

    def remove(self) -> None:
        """Take the hooks off the optimizer; the model stays as it is."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _is_running(frame: FrameType, innermost: FrameType) -> bool:
    """Whether `frame` is among the frames that `innermost` was called from."""
    current: FrameType | None = innermost
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None

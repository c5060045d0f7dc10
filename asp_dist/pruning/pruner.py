"""The pruner: a companion of the optimizer that keeps a model's own parameters pruned to a budget while it trains."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import profiler
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from asp_dist.pruning import projection
from asp_dist.pruning.budget import check_floors, network_costs, resolve_budget
from asp_dist.pruning.control.controller import Controller, Problem, RampPosition, StepInputs, move, observe
from asp_dist.pruning.density import MAX_THRESHOLD, NEARBY, TINY, DensityModel, weight_threshold
from asp_dist.pruning.kernels.device_control import DeviceControl
from asp_dist.pruning.kernels.device_passes import CARRIED, DevicePasses, fits, works
from asp_dist.pruning.layers import WeightInfo, find_weights, optimizer_groups, unwrapped
from asp_dist.pruning.macs import macs_per_weight
from asp_dist.pruning.options import Budget, Control, Hard, Operator, Pattern, Ramp, Select, SparsityLoss
from asp_dist.pruning.passes import HostPasses, means_are_chance
from asp_dist.pruning.patterns import GroupScale
from asp_dist.pruning.snapshot import Snapshot
from asp_dist.pruning.weights import LayerWeights, RankReducer, checksum, local, swap_in_dense, swap_out_dense

# Ranks that differ by no more have rounded differently: thresholds relative to their size, or to 1 below it; weights in units
# of the last place of their layer's largest one, or as a share of it where the places are few.
ROUNDED_THRESHOLD = 1e-6
ROUNDED_PLACES = 256.0
ROUNDED_SHARE = 0.05


class Pruner:
    """Prunes `model` to `budget` while `optimizer` trains it; nothing else in the training loop changes.

    Implements "Weight Pruning via Adaptive Sparsity Loss" (arXiv 2006.02768). The model's parameters are the pruned weights at
    all times. The dense weights are kept here, and put in place for the optimizer's step by its own step hooks. Per layer,
    with w the dense weights, σ their standard deviation, r the threshold and b = clamp(r, 0, 5)·σ + 1e-6, the pruned weights
    are w where |w| > b, else 0. The dense weights receive the gradient of the pruned ones (straight-through), and the task's
    gradient on r is −(σ/b)·Σ_{|w| <= b} g·w.

    Every rank of `process_group` builds its own. One packed all-reduce per optimizer step keeps them the same.

    Args:
        model: the network, on its device and in its final dtype. DDP may wrap it before or after; `fully_shard` must come
            before.
        optimizer: any torch optimizer over the model's parameters, or several that train different ones; stepped without a
            closure, each once per iteration. The thresholds move when the last one has stepped.
        budget: one budget, or several that must all be met.
        control: what moves the thresholds: `SparsityLoss`, `Track`, or a control of your own.
        ramp: the target over the run, and when the mask is frozen.
        select: which layers are pruned.
        pattern: which weights share a mask; by default none do. Blocks make whole numbers of blocks of the budget, are pruned
            layer by layer on a GPU too, which is slower there, and count as kept or pruned by the norm of their weights: r is
            then the threshold of single weights that keeps as many.
        operator: what the kept weights become: `Hard` (published), `Soft`, `Power`, or an operator of your own.
        min_density: smallest density of each layer, in [0, 1]; a layer keeps at least one weight.
        center: subtract each layer's mean from its dense weights after every step; None: as the control does by default, if
            the layers' means are what chance gives to fresh weights. Those of a trained network belong to what it has
            learned: without them a ResNet-20 falls to chance at once.
        gradient_scale: factor θ in [0, 1] on the gradients of pruned weights (arXiv 2310.02448).
        input_shape: shape of one input sample, such as (3, 224, 224), to count multiply-adds; None: they are not known.
        agreement_every: steps between checks that all ranks agree; 0: never.
        process_group: the ranks; None: the default group, or one process.

    Attributes:
        thresholds: float64 [L], r of each pruned layer, in units of σ; the same on every rank.
        sigmas: float64 [L], σ of each layer's dense weights.
        steps: optimizer steps done.
        skipped: steps that a gradient scaler skipped.
        frozen: whether the mask is frozen.

    Raises:
        ValueError: no layer can be pruned; no optimizer trains a layer that would be; the budget cannot be met; an argument
            is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        budget: Budget | Sequence[Budget],
        *,
        control: Control = SparsityLoss(),
        ramp: Ramp = Ramp(),
        select: Select = Select(),
        pattern: Pattern = Pattern(),
        operator: Operator = Hard(),
        min_density: float = 0.001,
        center: bool | None = None,
        gradient_scale: float = 1.0,
        input_shape: Sequence[int] | None = None,
        agreement_every: int = 100,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_options(control, operator, ramp, min_density=min_density, gradient_scale=gradient_scale)
        self.model = unwrapped(model)
        self.optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
        self.control, self.ramp, self.operator = control, ramp, operator
        self.gradient_scale, self.agreement_every = gradient_scale, agreement_every
        self._center = center

        self.weights = tuple(find_weights(self.model, select))
        self.pruned_weights = tuple(info for info in self.weights if not info.reason)
        if not self.pruned_weights:
            raise ValueError(
                f"no layer of {type(self.model).__name__} can be pruned: it has {len(self.weights)} matrices of weights, and "
                f"each is excluded or has fewer than min_weights = {select.min_weights} weights"
            )
        self._groups = optimizer_groups(self.pruned_weights, self.optimizers)
        macs = None if input_shape is None else macs_per_weight(self.model, self.weights, input_shape)
        self._macs = None if macs is None else tuple(macs)
        self.costs = network_costs(self.model, self.weights, macs)
        budgets = (budget,) if isinstance(budget, Budget) else budget
        self.budgets = tuple(resolve_budget(one, self.costs) for one in budgets)
        self.numel = torch.tensor(self.costs.numel, dtype=torch.float64)
        sizes = block_sizes(self.pruned_weights, pattern)
        self.groups = GroupScale(sizes) if max(sizes) > 1 else None
        blocks = torch.tensor(sizes, dtype=torch.float64)
        self.floors = (self.numel * min_density / blocks).ceil().clamp(min=1.0) * blocks
        check_floors(self.budgets, self.floors, self.costs.names)

        world_size = dist.get_world_size(process_group) if dist.is_initialized() else 1
        places = {id(p): (one._parameters, name) for one in self.model.modules() for name, p in one._parameters.items()}
        self.layers = [
            LayerWeights(info, world_size, places.get(id(info.parameter)), size)
            for info, size in zip(self.pruned_weights, sizes)
        ]
        self.device = self.layers[0].dense.device
        self.reducer = RankReducer(self.layers, process_group, self.device)
        for layer in self.layers:
            # DDP does so with a model's parameters when it wraps it, too late for a pruner that was built before.
            if not layer.sharded:
                self.reducer.broadcast_(layer.flat_dense())

        self.passes: HostPasses | DevicePasses = HostPasses(
            self.layers, self.reducer, operator, nearby=control.density == "measured"
        )
        self.controller = self._build_controller(self.passes.home)
        fusible = vars(type(self.controller)).get("fusible", False)
        fused = fusible and fits(self.layers, operator) and runs_on_device(self.device)
        if self.reducer.all_agree(fused):  # a rank without a compiler would send sums of another form
            self.passes = DevicePasses(self.layers, self.reducer, operator)
            self.controller = self._build_controller(self.passes.home)
        self.problem = self.controller.problem
        self.density_model = self.problem.density_model
        self.steps, self.skipped, self.frozen = 0, 0, False
        self._told_of_rounding = False
        self._gradients_masked = False

        # Prune the weights for the first forward pass; b, in weight units, at which they were written last.
        self._written_at = torch.zeros_like(self.passes.numel)
        with torch.no_grad():
            sums = self.passes.reduce(torch.zeros_like(self.passes.numel))
            fresh = means_are_chance(sums, self.passes.numel)
            self.center = control.centers and fresh if center is None else center
            self.sigmas = sums.sigmas
            self.thresholds = self.controller.start(self.sigmas)
            self._write_pruned(range(len(self.layers)), sums.means)
            self._count_all()
        self._device_control = (
            DeviceControl(self.controller, self.passes, self.thresholds, self.sigmas)
            if isinstance(self.passes, DevicePasses)
            else None
        )
        self._hooks = [StepHooks(one, self._before_step, self._after_step) for one in self.optimizers]

    def _build_controller(self, home: torch.device) -> Controller:
        """The controller, with its numbers [L] at `home`."""
        numel, floors = self.numel.to(home), self.floors.to(home)
        groups = self.groups
        near = None if groups is None else (lambda r: groups.of_weights(NEARBY * groups.of_groups(r)))
        model = DensityModel(numel, corrected=self.control.density == "measured", nearby_at=near)
        shapes = tuple(tuple(info.parameter.shape) for info in self.pruned_weights)
        budgets = tuple(budget.to(home) for budget in self.budgets)
        unread = isinstance(getattr(self, "passes", None), DevicePasses)
        return self.control.controller(Problem(budgets, self.ramp, model, shapes, floors / numel, unread, groups))

    # The optimizer's step.

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        """Compute the thresholds' gradients from the final gradients, and put the dense weights in place for the optimizer."""
        mine = self._trained_by(optimizer)
        if self.frozen:
            if not self._gradients_masked:
                self.passes.mask_gradients(mine)
            return
        for index in mine:
            self.layers[index].check_storage()
        # Fused optimizers unscale the gradients inside their step.
        self.passes.take_products(mine, self._written_at, self.gradient_scale, getattr(optimizer, "grad_scale", None))
        swap_in_dense([self.layers[index] for index in mine])

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        """Put the pruned weights back; after the last optimizer's step, move the thresholds first."""
        found_inf = getattr(optimizer, "found_inf", None)
        # A fused optimizer was called, and skipped its update. On the device, the device alone knows.
        skipped = self._device_control is None and found_inf is not None and float(found_inf) > 0
        last = optimizer is self.optimizers[-1]
        mine = self._trained_by(optimizer)
        self.skipped += skipped and last
        if self.frozen:
            self.passes.mask_weights(mine)
            self._gradients_masked = self._gradients_masked and not last
            if last and self._device_control is not None and found_inf is not None:
                self._device_control.skips += found_inf
        else:
            swap_out_dense([self.layers[index] for index in mine])
            if not last:
                self._write_pruned(mine)
            elif self._device_control is not None:
                self._move_on_device(self._device_control, found_inf)
            else:
                self._move(skipped)
        if last and not skipped:
            self._advance()

    def carry(self, numbers: Tensor) -> Tensor | None:
        """Let the next step's all-reduce sum `numbers` over the ranks too, so that a training loop needs none of its own.

        Args:
            numbers: up to 16 on the weights' device, which every rank gives before the optimizer's step.

        Returns:
            Where their sums are after that step and until the next one: float64, on the device. None where the pruner makes no
            such all-reduce: on the CPU, and once the mask is frozen.

        Raises:
            ValueError: more than 16 numbers, on any device.
        """
        if numbers.numel() > CARRIED:
            raise ValueError(
                f"carry has room for {CARRIED} numbers, not for {numbers.numel()}: sum the others by an all-reduce of yours"
            )
        if self.frozen or not isinstance(self.passes, DevicePasses):
            return None
        carried = self.passes.carried[: numbers.numel()]
        return carried.copy_(numbers)

    def _move(self, skipped: bool) -> None:
        """Move the thresholds after an iteration, and write the pruned weights of all layers."""
        sums = self.passes.reduce(self.thresholds)
        if skipped:
            return
        inputs = StepInputs(*self._learning_rates(), self.steps, RampPosition.at(self.ramp, self.steps))
        moved = move(self.controller, sums, self.sigmas, inputs, self.passes.fresh)
        self.thresholds, self.sigmas = moved.thresholds, moved.sigmas
        self._write_pruned(range(len(self.layers)), moved.means)
        self.passes.count_some(self._written_at)

    def _move_on_device(self, control: DeviceControl, found_inf: Tensor | None) -> None:
        """As `_move`, and the host reads nothing; a skipped step counts as one."""
        assert isinstance(self.passes, DevicePasses)
        self.passes.take_sums(self.thresholds)
        control.thresholds, control.sigmas = self.thresholds, self.sigmas
        control.move(*self._learning_rates(), RampPosition.at(self.ramp, self.steps), found_inf)
        self._written_at = control.weight_thresholds
        self.passes.write(range(len(self.layers)), self._written_at, control.means if self.center else None)

    def _collect_skips(self) -> None:
        """Count the steps that were skipped and only the device knows of."""
        if self._device_control is not None:
            self.skipped += int(self._device_control.skips)
            self._device_control.skips.zero_()

    def _advance(self) -> None:
        self.steps += 1
        freeze_step = self.ramp.freeze_step()
        if not self.frozen and freeze_step is not None and self.steps >= freeze_step:
            self.finalize()
        if self.agreement_every and (self.steps == 1 or self.steps % self.agreement_every == 0):
            self.check_agreement()

    def _trained_by(self, optimizer: Optimizer) -> list[int]:
        """Indices of the layers that `optimizer` trains."""
        number = next(i for i, one in enumerate(self.optimizers) if one is optimizer)
        return [index for index, (owner, _) in enumerate(self._groups) if owner == number]

    def _learning_rates(self) -> tuple[Tensor, Tensor]:
        """The current learning rate of each layer, and what its schedule starts from or rises to (0 without one): [L] each."""
        groups = [self.optimizers[owner].param_groups[group] for owner, group in self._groups]
        base = [max(float(group.get(name, 0.0)) for name in ("initial_lr", "max_lr")) for group in groups]
        lr = [float(group["lr"]) for group in groups]
        return torch.tensor(lr, dtype=torch.float64), torch.tensor(base, dtype=torch.float64)

    def _weight_thresholds(self) -> Tensor:
        """b of each layer, in weight units: what |w|, or the norm of a block, is compared with."""
        r = self.thresholds if self.groups is None else self.groups.of_groups(self.thresholds.clamp(0.0, MAX_THRESHOLD))
        return weight_threshold(r, self.sigmas)

    def _write_pruned(self, indices: Sequence[int], means: Tensor | None = None) -> None:
        """Write the pruned weights of some layers; subtract the means [L] from the dense ones first, if they are centered."""
        self._written_at = self._weight_thresholds()
        self.passes.write(indices, self._written_at, means if self.center else None)

    def _count_all(self) -> None:
        """Count all layers at the current thresholds, for the density model; a collective."""
        self.passes.count_all(self._written_at)
        sums = self.passes.reduce(self.thresholds)
        observe(self.controller, sums, self.thresholds, self.sigmas, self.passes.fresh)

    # The mask.

    @torch.no_grad()
    def finalize(self) -> None:
        """Project onto the budget exactly and freeze the mask; the remaining weights train on. Idempotent; a collective.

        Weights are ordered by |w| / b over the network, as the learned thresholds express it; see `projection.keep_counts`.
        Sorting the weights needs memory for up to 1.7 extra copies of them, once, or 3.6 in half precision.
        """
        if self.frozen:
            return
        self._raise_if_apart("weights", self._share_with_ranks())
        magnitudes = projection.SortedMagnitudes(self.layers, self.reducer)
        kept = projection.keep_counts(magnitudes, self._weight_thresholds().cpu(), self.budgets, self.floors)
        projection.freeze_(self.layers, projection.keep_masks(magnitudes, kept))
        self.frozen = True
        self._forget_removed()

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero the removed weights' gradients once the mask is frozen: call it before clipping, so that no norm counts them.

        The optimizer's step does so in any case.
        """
        if self.frozen:
            self.passes.mask_gradients(range(len(self.layers)))
            self._gradients_masked = True

    def _forget_removed(self) -> None:
        """Zero what the optimizers keep of the removed weights, such as their momentum."""
        for layer, (owner, _) in zip(self.layers, self._groups):
            for value in self.optimizers[owner].state.get(layer.parameter, {}).values():
                if isinstance(value, Tensor) and local(value).shape == layer.dense.shape:
                    local(value).masked_fill_(layer.is_removed(), 0)

    @torch.no_grad()
    def regrown_layers(self) -> list[str]:
        """Layers in which removed weights are not zero: something writes them behind the pruner's back. A collective."""
        if not self.frozen:
            return []
        counts = [(layer.pruned.ne(0) & layer.is_removed()).sum() for layer in self.layers]
        (total,) = self.reducer.reduce(torch.stack(counts).double())
        return [name for name, count in zip(self.costs.names, total.tolist()) if count > 0]

    @contextmanager
    def dense(self, names: Sequence[str] | None = None) -> Iterator[None]:
        """Put the dense weights in place, of all layers or of the named ones, while the context lasts.

        After `finalize` the dense weights are the trained ones, with the removed ones as they were when the mask was frozen.
        """
        chosen = [layer for layer in self.layers if names is None or layer.info.name in names]
        dense = {one.info.name: one.pruned + one.dense if self.frozen else one.dense for one in chosen}
        with self.replaced(dense):
            yield

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Put other values into some layers' parameters while the context lasts: this rank's part of each, by layer name."""
        chosen = [layer for layer in self.layers if layer.info.name in values]
        pruned = [layer.pruned.clone() for layer in chosen]
        self._fill(chosen, [values[layer.info.name] for layer in chosen])
        try:
            yield
        finally:
            self._fill(chosen, pruned)

    @torch.no_grad()
    def _fill(self, layers: Sequence[LayerWeights], values: Sequence[Tensor]) -> None:
        """Write other values into the parameters, for the next forward pass to see."""
        for layer, tensor in zip(layers, values):
            layer.pruned.copy_(tensor)
        if any(layer.sharded for layer in layers):
            for module in self.model.modules():
                # After a forward pass without a backward one, the root keeps the whole parameters that it gathered.
                if isinstance(module, FSDPModule):
                    module.reshard()

    @torch.no_grad()
    def apply_masks_(self, other: nn.Module) -> None:
        """Zero every weight that is pruned here in a model of the same architecture, such as an average of the weights."""
        theirs = dict(unwrapped(other).named_parameters())
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for layer in self.layers:
            parameter = theirs[names[id(layer.parameter)]]
            local(parameter.data).masked_fill_(layer.pruned == 0, 0.0)

    # What it says about itself.

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """The state now: layers, metrics, rows and summary, from one count of all weights; a collective.

        Taking one does not affect training.
        """
        lr, _ = self._learning_rates()
        self._collect_skips()
        return Snapshot(
            weights=self.weights,
            macs_per_weight=self._macs,
            costs=self.costs,
            budgets=self.budgets,
            targets=tuple(target.cpu() for target in self.problem.targets(self.steps)),
            thresholds=self.thresholds.to("cpu", copy=True),
            sigmas=self.sigmas.to("cpu", copy=True),
            kept=self.passes.kept(),
            further=self.controller.metrics(self.thresholds, lr.to(self.passes.home), self.steps),
            skipped=self.skipped,
            frozen=self.frozen,
        )

    @torch.no_grad()
    def check_agreement(self) -> None:
        """Compare thresholds, and checksums of replicated weights, over the ranks; a collective.

        What differs by rounding, as it does between processors of different kinds, becomes the first rank's, and a warning
        says so once.

        Raises:
            RuntimeError: ranks differ by more than that; names the layer that differs most.
        """
        # Checksums are integers below 2^53, exact in float64.
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = [none if layer.sharded else checksum(self._trained(layer)).double() for layer in self.layers]
        mine = torch.stack([self.thresholds.to(self.device), torch.stack(sums)])
        of_thresholds, of_sums = self.reducer.max_minus_min(mine).cpu()
        if not bool((of_thresholds != 0).any() or (of_sums != 0).any()):
            return
        self._raise_if_apart("thresholds", of_thresholds / (ROUNDED_THRESHOLD * self.thresholds.abs().clamp_min(1.0)).cpu())
        self._raise_if_apart("weights", self._share_with_ranks())
        if not self._told_of_rounding:
            self._told_of_rounding = True
            warnings.warn(
                f"ranks round differently, on processors of different kinds perhaps: after step {self.steps} weights differ "
                "in the last places. All take the first rank's now, and whenever it is seen again",
                stacklevel=2,
            )

    def _trained(self, layer: LayerWeights) -> Tensor:
        """The weights that the optimizer steps, flat: the dense ones, or once the mask is frozen the pruned ones."""
        return layer.flat_pruned() if self.frozen else layer.flat_dense()

    def _raise_if_apart(self, what: str, excess: Tensor) -> None:
        """Raise `RuntimeError` if ranks differ by more than rounding: `excess` [L] is above 1 there."""
        if bool((excess > 1.0).any()):
            name = self.costs.names[int(excess.argmax())]
            raise RuntimeError(f"ranks disagree: layer {name!r} has different {what} after step {self.steps}")

    def _share_with_ranks(self) -> Tensor:
        """Give every rank the first one's thresholds and trained weights of replicated layers; a collective.

        Returns:
            By how much they differed, as a multiple of what rounding explains: float64 [L].
        """
        excess = torch.zeros_like(self.numel)
        if self.reducer.world_size == 1:
            return excess
        shared = self.thresholds.to(self.device, copy=True)
        self.reducer.broadcast_(shared)
        self.thresholds = shared.to(self.passes.home)
        for index, layer in enumerate(self.layers):
            if layer.sharded:
                continue
            trained = self._trained(layer)
            mine = trained.clone()
            self.reducer.broadcast_(trained)
            rounding = min(ROUNDED_PLACES * torch.finfo(trained.dtype).eps, ROUNDED_SHARE) * trained.abs().max().double()
            excess[index] = ((mine - trained).abs().max().double() / rounding.clamp_min(TINY)).nan_to_num(0.0)
        if not self.frozen:
            self._write_pruned(range(len(self.layers)))
        return self.reducer.max_minus_min(excess.to(self.device)).cpu()

    # Saving and restoring.

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the model's own state: plain types, and tensors of whole layers.

        Independent of the world size and of sharding; a collective under FSDP2.
        """
        self._collect_skips()
        return {
            "steps": self.steps,
            "frozen": self.frozen,
            "skipped": self.skipped,
            "center": self.center,
            "thresholds": self.thresholds.to("cpu", copy=True),
            "sigmas": self.sigmas.to("cpu", copy=True),
            "passes": self.passes.state_dict(),
            "density_model": self.density_model.state_dict(),
            "controller": self.controller.state_dict(),
            "kept_zeros": {layer.info.name: self._kept_zeros(layer) for layer in self.layers if self.frozen},
            "dense": {layer.info.name: layer.gather(layer.dense).detach().clone() for layer in self.layers},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. Once frozen: build the Pruner, load the model's own state, then call this.

        Raises:
            ValueError: the state is of other layers, or the model's weights are not those that the frozen mask leaves.
        """
        self._load_dense(state)
        self.steps, self.frozen, self.skipped = state["steps"], state["frozen"], state["skipped"]
        if self._center is None:
            self.center = state["center"]
        home = self.passes.home
        self.thresholds, self.sigmas = (state[name].to(home, copy=True) for name in ("thresholds", "sigmas"))
        self.density_model.load_state_dict(state["density_model"])
        self.controller.load_state_dict(state["controller"])
        if not self.frozen:
            self._write_pruned(range(len(self.layers)))
        if self.frozen:  # judged by collectives, so that all ranks find the same
            zeros = state.get("kept_zeros", {})
            changed = [layer.info.name for layer in self.layers if self._kept_zeros(layer) != zeros.get(layer.info.name, 0)]
            wrong = [*self.regrown_layers(), *changed]
            if wrong:
                raise ValueError(
                    f"layer {wrong[0]!r}: the model's weights are not those of the frozen mask. Building a Pruner "
                    "prunes the model: load the model's state after that, and before the pruner's"
                )
        self.passes.load_state_dict(state["passes"], self._weight_thresholds(), frozen=self.frozen)

    @torch.no_grad()
    def start_from(self, state: dict[str, Any]) -> None:
        """Begin with the dense weights, the thresholds and the allocation of another Pruner's `state_dict`, at its own step.

        Build the Pruner, load the model's state of the same moment, then call this; a collective. The mask is not frozen,
        whether that one's was or not. The other Pruner had the same kind of control and as many budgets.

        Raises:
            ValueError: the state is of other layers.
        """
        self._load_dense(state)
        if state["frozen"]:  # the kept weights are the model's; the dense ones are zero there
            for layer in self.layers:
                layer.dense.add_(layer.pruned)
        if self._center is None:
            self.center = state["center"]
        self.density_model.load_state_dict(state["density_model"])
        self.controller.load_state_dict(state["controller"])
        self.controller.begin()
        self.thresholds = state["thresholds"].to(self.passes.home, copy=True)
        self.sigmas = self.passes.reduce(self.thresholds).sigmas
        self._write_pruned(range(len(self.layers)))
        self._count_all()

    def _load_dense(self, state: dict[str, Any]) -> None:
        if list(state["dense"]) != list(self.costs.names):
            different = sorted(set(state["dense"]) ^ set(self.costs.names)) or ["(another order)"]
            raise ValueError(f"the pruner's state is of other layers; first difference: {different[0]!r}")
        for layer in self.layers:
            layer.scatter_(state["dense"][layer.info.name].to(self.device), layer.dense)

    @staticmethod
    def _kept_zeros(layer: LayerWeights) -> int:
        """Kept weights that training made exactly zero; a collective where the layer is sharded."""
        count = (layer.pruned.eq(0) & ~layer.is_removed()).sum()
        if layer.shard_group is not None:
            dist.all_reduce(count, group=layer.shard_group)
        return int(count)

    def remove(self) -> None:
        """Detach from the optimizer; the model stays as it is."""
        for hooks in self._hooks:
            hooks.remove()


def block_sizes(weights: Sequence[WeightInfo], pattern: Pattern) -> list[int]:
    """Output channels that share a mask in each layer; a warning names the layers that the pattern does not fit."""
    meant = [pattern.block if pattern.means(info.name) else 1 for info in weights]
    fits = [info.parameter.shape[0] % size == 0 for info, size in zip(weights, meant)]
    left = [info.name for info, fit in zip(weights, fits) if not fit]
    if left:
        warnings.warn(
            f"pattern.block = {pattern.block} does not divide the output channels of {', '.join(left)}: each weight has a mask "
            "of its own there",
            stacklevel=3,
        )
    return [size if fit else 1 for size, fit in zip(meant, fits)]


def _check_options(control: Control, operator: Operator, ramp: Ramp, *, min_density: float, gradient_scale: float) -> None:
    for name, value, kind in (("control", control, Control), ("operator", operator, Operator), ("ramp", ramp, Ramp)):
        if not isinstance(value, kind):
            example = {"control": "Track()", "operator": "Power()", "ramp": "Ramp()"}[name]
            raise ValueError(f"{name} = {value!r} is not of type {kind.__name__}: give an object such as {example}")
    for name, fraction in (("min_density", min_density), ("gradient_scale", gradient_scale)):
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"{name} = {fraction} is outside [0, 1]")
    if ramp.needs_total_steps and ramp.total_steps is None:
        raise ValueError(f"{ramp} needs total_steps, the length of the run in optimizer steps")


def runs_on_device(device: torch.device) -> bool:
    """Whether the kernels are to be used for weights on `device`."""
    return device.type == "cuda" and works(device)


Callback = Callable[[Optimizer], None]
PRUNING = "asp_dist: pruning"  # the engine's name in a profiler's trace


def annotated(name: str) -> AbstractContextManager[Any]:
    """A block that a profiler which runs sees under that name; without one it costs nothing."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else nullcontext()


class StepHooks:
    """Attaches two callbacks to the step of one optimizer.

    An optimizer's class that calls ``super().step()`` runs all hooks again inside of its step. Only the outermost call is
    the step; it is recognized by the frame that it runs in.

    Args:
        optimizer: any torch optimizer; stepped without a closure.
        before: called before each step.
        after: called after each step that returned.
    """

    def __init__(self, optimizer: Optimizer, before: Callback, after: Callback) -> None:
        self.optimizer, self.before, self.after = optimizer, before, after
        self._frame: FrameType | None = None
        if not getattr(type(optimizer).step, "hooked", False):
            # A wrapper that skips Optimizer.__init__ (timm's Lookahead) would otherwise run no hooks.
            optimizer._patch_step_function()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Detach from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        caller = sys._getframe(1)
        if self._frame is None:
            if kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:]):
                raise ValueError(
                    "optimizer.step(closure) runs the network inside the step, with dense weights: step without one"
                )
            with annotated(PRUNING):
                self.before(optimizer)
            self._frame = caller
        elif not _is_running(self._frame, caller):
            raise RuntimeError(
                f"the last step of {type(optimizer).__name__} raised an error, and left the dense weights half updated: load "
                "the last checkpoint, into a new Pruner"
            )

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if sys._getframe(1) is self._frame:
            self._frame = None
            with annotated(PRUNING):
                self.after(optimizer)


def _is_running(frame: FrameType, innermost: FrameType) -> bool:
    """Whether `frame` is among the frames that `innermost` was called from."""
    current: FrameType | None = innermost
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None

"""The move of all thresholds as one program on the device, of the same mathematics as on the CPU."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from asp_dist.pruning.control.controller import Controller, RampPosition, StepInputs, move
from asp_dist.pruning.density import weight_threshold
from asp_dist.pruning.kernels import fused, ops
from asp_dist.pruning.kernels.device_passes import DevicePasses
from asp_dist.pruning.kernels.tiles import to_device

# The program and its plain form may differ by so much, relatively: what the functions that they call differ by.
AGREEMENT = 1e-6

# By their handles: an operator of torch takes no objects. A pruner that is gone takes its own along.
_programs: WeakValueDictionary[int, DeviceControl] = WeakValueDictionary()
_handles = itertools.count()


class DeviceControl:
    """Moves the thresholds by one launch; neither numbers nor decisions reach the host.

    Args:
        controller: a controller that is `fusible`, with its tensors on the device.
        passes: the sums that it starts from.
        thresholds: float64 [L], r at the start, in units of σ.
        sigmas: float64 [L], σ at the start.

    Attributes:
        means: float64 [L], the means of the dense weights; zeros after a step that was skipped.
        weight_thresholds: float64 [L], b in weight units.
        skips: how many steps the optimizer has skipped, one number.
    """

    def __init__(self, controller: Controller, passes: DevicePasses, thresholds: Tensor, sigmas: Tensor) -> None:
        self.controller, self.passes = controller, passes
        self.thresholds, self.sigmas = thresholds.clone(), sigmas.clone()
        self.means = torch.zeros_like(thresholds)
        self.skips = torch.zeros_like(thresholds[0])
        self.weight_thresholds = weight_threshold(thresholds, sigmas)
        self._kernel: Any = None
        self._constants: list[Tensor] = []
        self._plain = not ops.runs_kernels(passes.home)
        self._zero = torch.zeros((), device=passes.home)
        self._handle = next(_handles)
        _programs[self._handle] = self

    def move(self, lr: Tensor, base_lr: Tensor, position: RampPosition, skip: Tensor | None) -> None:
        """One move by the sums in `DevicePasses.packed`.

        Args:
            lr: learning rate of each layer, [L] on the CPU.
            base_lr: see `StepStats`.
            position: where the step stands on the ramp.
            skip: above 0 where the optimizer has skipped its step, and nothing may change; None: it has not.
        """
        numbers = [one.double().expand_as(lr) for one in (position.share, position.next_share, position.arrived)]
        told = to_device(torch.stack([lr, base_lr, *numbers]), self.passes.home)
        inputs = [self.passes.packed, told, self._zero if skip is None else skip, self.skips, *self._changing()]
        run_program(self._handle, inputs, [self.weight_thresholds, self.means, self.skips, *self._changing()])

    def _changing(self) -> list[Tensor]:
        """Everything that a move changes, flat."""
        model = self.controller.problem.density_model
        learned = [getattr(model, name) for name in model.STATE] if model.corrected else []
        own: list[Tensor] = []
        for name in self.controller.state:
            value = getattr(self.controller, name)
            own += value if isinstance(value, list) else [value]
        return [self.thresholds, self.sigmas, *learned, *own]

    def _set_changing(self, values: Sequence[Tensor]) -> None:
        rest = list(values)
        self.thresholds, self.sigmas = rest.pop(0), rest.pop(0)
        model = self.controller.problem.density_model
        for name in model.STATE if model.corrected else ():
            setattr(model, name, rest.pop(0))
        for name in self.controller.state:
            value = getattr(self.controller, name)
            setattr(self.controller, name, [rest.pop(0) for _ in value] if isinstance(value, list) else rest.pop(0))

    def compute(self, packed: Tensor, told: Tensor, skip: Tensor, skips: Tensor, *changing: Tensor) -> list[Tensor]:
        """b, the means, and the new values of `skips` and `changing`; nothing else is changed."""
        before = self._changing()
        try:
            self._set_changing(changing)
            lr, base_lr, share, next_share, arrived = told[0], told[1], told[2].amax(), told[3].amax(), told[4].amax()
            position = RampPosition(share, next_share, arrived > 0.5)
            sums = self.passes.unpack(packed)
            moved = move(self.controller, sums, self.sigmas, StepInputs(lr, base_lr, -1, position), self.passes.fresh)
            self.thresholds, self.sigmas = moved.thresholds, moved.sigmas
            go = skip <= 0
            after = [torch.where(go, new, old) for new, old in zip(self._changing(), changing)]
            means = torch.where(go, moved.means, torch.zeros_like(moved.means))
            return [weight_threshold(after[0], after[1]), means, torch.where(go, skips, skips + 1.0), *after]
        finally:
            self._set_changing(before)

    def launch(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Run the program: by the kernel, which is made and tried at the first time, or as torch's operations."""
        if self._kernel is None and not self._plain:
            self._make(inputs)
        if self._plain:
            torch._foreach_copy_(list(outputs), self.compute(*inputs))
        else:
            self._run(inputs, outputs)

    def _run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        layers = self.thresholds.numel()
        block = max(1 << (layers - 1).bit_length(), 32)
        self._kernel[(1,)](*inputs, *self._constants, *outputs, L=layers, BLOCK=block, num_warps=min(max(block // 32, 1), 8))

    def _make(self, inputs: Sequence[Tensor]) -> None:
        """Write the kernel, and compare it with torch's operations on these inputs."""
        try:
            wanted = self.compute(*inputs)
            source, self._constants = fused.source_of(fused.record(self.compute, inputs), self.thresholds.numel())
            self._kernel = fused.load(source)
            outputs = [torch.empty_like(one) for one in wanted]
            self._run(inputs, outputs)
            pairs = zip(outputs, wanted)
            problem = "" if all(torch.allclose(a, b, AGREEMENT, 1e-9, equal_nan=True) for a, b in pairs) else "other thresholds"
        except Exception as error:  # whatever a driver or a compiler may raise here must not end a run
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self._plain = True
            warnings.warn(
                f"the kernel of {type(self.controller).__name__} does not work on {self.passes.home} ({problem}): its "
                "operations run one by one, which is slower",
                stacklevel=2,
            )


@torch.library.custom_op("asp_dist::run_program", mutates_args=("outputs",))
def run_program(handle: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """One move of the thresholds by the `DeviceControl` with this handle."""
    with ops.on(outputs[0].device):
        _programs[handle].launch(inputs, outputs)


run_program.register_fake(lambda handle, inputs, outputs: None)

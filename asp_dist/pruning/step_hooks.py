"""The pruner's place in an optimizer's step: one callback before it and one after it, however the step is called."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch.optim import Optimizer

Callback = Callable[[Optimizer], None]


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
            self.after(optimizer)


def _is_running(frame: FrameType, innermost: FrameType) -> bool:
    """Whether `frame` is among the frames that `innermost` was called from."""
    current: FrameType | None = innermost
    while current is not None and current is not frame:
        current = current.f_back
    return current is not None

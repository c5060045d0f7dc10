"""The manager of a run's checkpoints: copies the state, writes it in the background, keeps the last and the best."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from asp_dist.checkpoint.format import (
    CheckpointError,
    Manifest,
    read_checkpoint,
    read_manifest,
    split_state,
    write_checkpoint,
)
from asp_dist.checkpoint.storage import Store, step_of
from asp_dist.errors import UserError
from asp_dist.files import retry
from asp_dist.tracking.schema import WARNING

# How long training waits for the previous checkpoint, which a storage may hang over, before it leaves one out.
BUSY_WAIT_S = 60.0


@dataclass(frozen=True)
class Event:
    """Something the run should log: `kind` is ``checkpoint`` or ``warning``."""

    kind: str
    message: str


@dataclass(frozen=True)
class Found:
    """A sound checkpoint: its name, the place where it lies, its manifest and state."""

    name: str
    place: Store
    manifest: Manifest
    state: dict[str, Any]


class Staging:
    """Copies of tensors on the CPU, in buffers that are used again.

    From a GPU the copy is queued after the training step's own kernels, into pinned memory; `wait` ends it. From the CPU
    it is a plain copy. Fresh buffers would cost twice that in page faults.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def copy(self, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """Copies of all `parts`; complete once `wait` returned."""
        copies: dict[str, dict[str, torch.Tensor]] = {}
        for part, tensors in parts.items():
            copies[part] = {name: self._copy(part, name, tensor) for name, tensor in tensors.items()}
        if self._copied is not None:
            self._copied.record()
        return copies

    def wait(self) -> None:
        """Block until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, part: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get((part, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[part, name] = buffer
        if tensor.is_cuda and self._copied is None:
            self._copied = torch.cuda.Event()
        return buffer.copy_(tensor, non_blocking=True)


class CheckpointManager:
    """Saves and finds the checkpoints of one run. On ranks other than 0 it only reads.

    Args:
        store: where the checkpoints lie.
        run: identity of the run; checkpoints of others are not used.
        keep: how many of the latest to keep, besides the best.
        waits: seconds before each retry of a failed write; training continues meanwhile.
        saved: called in the background after each checkpoint, and tried again like a write.
        written: called in the background with the step of each checkpoint.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        keep: int,
        *,
        waits: tuple[float, ...] = (),
        saved: Callable[[], None] | None = None,
        written: Callable[[int], None] | None = None,
    ) -> None:
        self.store = store
        self.run = run
        self.keep = keep
        self.waits = waits
        self.saved = saved
        self.written = written
        self._writing = 0
        self._hangs = False
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._events: list[Event] = []
        self._saved_at = time.monotonic()

    def seconds_since_save(self) -> float:
        """Seconds since the last save, or since the start."""
        return time.monotonic() - self._saved_at

    def busy(self) -> bool:
        """Whether a checkpoint is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, manifest: Manifest, state: dict[str, Any]) -> None:
        """Copy `state` and write it in the background, after the previous checkpoint.

        Where that one hangs for more than `BUSY_WAIT_S` seconds, this one is left out, with a warning.
        """
        if not self.wait(0.0 if self._hangs else BUSY_WAIT_S):
            if not self._hangs:
                minutes = self.seconds_since_save() / 60
                text = f"the checkpoint of step {self._writing} is still being written after {minutes:.0f} min"
                self._events.append(Event(WARNING, f"{text}: others wait for it"))
            self._hangs = True
            return
        self._hangs = False
        self._saved_at, self._writing = time.monotonic(), manifest.step
        plain, parts = split_state(state)
        copies = self._staging.copy(parts)
        self._thread = threading.Thread(target=self._write, args=(manifest, plain, copies), name="checkpoint")
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until nothing is being written, `timeout_s` seconds at most; returns whether nothing is."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def events(self) -> list[Event]:
        """What happened since the last call: checkpoints written, or failed with the reason."""
        if not self._events:
            return []
        taken, self._events = self._events, []
        return taken

    def latest(self, elsewhere: Sequence[Store] = ()) -> Found | None:
        """The newest sound checkpoint of this run; None if there is none.

        Those that are torn, altered or of another run, and all that are newer than the one found, are set aside: a run that
        goes on from an earlier step would meet them again. Each becomes a warning event.

        Args:
            elsewhere: further places where the run has had its checkpoints.

        Raises:
            UserError: there are checkpoints, but none can be used: starting anew in silence would lose the run.
            OSError: a place or a checkpoint cannot be read now; nothing was changed.
        """
        places = [self.store, *elsewhere]
        listed = [(step_of(name), -index, name) for index, place in enumerate(places) for name in self._names(place)]
        problems: list[tuple[Store, str, str]] = []
        for _, index, name in sorted(listed, reverse=True):
            place = places[-index]
            try:
                manifest, state = self.load(name, place)
            except CheckpointError as error:
                problems.append((place, name, str(error)))
                continue
            for other, bad, message in problems:
                self._events.append(Event(WARNING, f"{message}; kept as {other.set_aside(bad)}"))
            return Found(name, place, manifest, state)
        if problems:
            raise UserError(
                f"no checkpoint of this run can be used: {'; '.join(message for _, _, message in problems)}. Restore one, "
                "or give a new run another name (--name)"
            )
        return None

    def best(self) -> Found | None:
        """The checkpoint of the best validation, as far as it is in the manager's own store and sound; None: there is none.

        Raises:
            OSError: it cannot be read now.
        """
        for name in reversed(self._names(self.store)):
            try:
                if read_manifest(self.store, name).best:
                    return Found(name, self.store, *self.load(name))
            except CheckpointError as error:
                self._events.append(Event(WARNING, f"{error}; it is not the best then"))
        return None

    def load(self, name: str, place: Store | None = None) -> tuple[Manifest, dict[str, Any]]:
        """The checkpoint of that name in `place`, or in the manager's own store.

        Raises:
            CheckpointError: it is torn, altered, or of another run.
            OSError: it cannot be read now.
        """
        store = place or self.store
        try:
            manifest, state = read_checkpoint(store, name)
        except OSError as error:
            raise OSError(
                f"{store.where(name)} cannot be read now ({error}); nothing was changed: start again once the storage answers, "
                "or move that checkpoint away to resume from the previous one"
            ) from error
        if manifest.run != self.run:
            raise CheckpointError(f"{store.where(name)} belongs to another run ({manifest.run})")
        return manifest, state

    def _names(self, place: Store) -> list[str]:
        try:
            return place.names()
        except OSError as error:
            raise OSError(
                f"{place.where('')}, where this run has had checkpoints, cannot be listed now ({error}): start again once it "
                "answers"
            ) from error

    def _write(self, manifest: Manifest, plain: Any, copies: dict[str, dict[str, torch.Tensor]]) -> None:
        try:
            self._staging.wait()
            name = retry(
                lambda: write_checkpoint(self.store, manifest, plain, copies),
                self.waits,
                f"saving step {manifest.step}",
            )
            self._events.append(Event("checkpoint", f"saved {self.store.where(name)}"))
            if self.written is not None:
                self.written(manifest.step)
            self._forget_old(name)
            if self.saved is not None:
                retry(self.saved, self.waits, "copying the record")
        except Exception as error:  # training continues; the run's log says what is wrong
            self._events.append(Event(WARNING, f"the checkpoint of step {manifest.step} failed: {error}; {self._kept()}"))

    def _kept(self) -> str:
        try:
            return f"earlier ones kept: {', '.join(self.store.names()[-self.keep :]) or 'none'}"
        except OSError:
            return "the store does not say which earlier ones it has"

    def _forget_old(self, written: str) -> None:
        """Remove all but the last `keep` checkpoints up to the one just written, and the best."""
        names = [name for name in self.store.names() if step_of(name) <= step_of(written)]
        best: str | None = None
        for name in names:
            try:
                if read_manifest(self.store, name).best:
                    best = name
            except (CheckpointError, OSError):
                continue
        for name in names[: -self.keep]:
            if name != best:
                self.store.remove(name)

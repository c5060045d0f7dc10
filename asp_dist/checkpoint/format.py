"""Checkpoints: complete, verified, and written while training continues.

A checkpoint is a folder ``step-XXXXXXXX``: one safetensors file per part of the state (``model.safetensors`` has the
plain timm names), ``state.json`` for everything that is not a tensor, and ``manifest.json`` with the step, the world
size, the configuration, the versions, and each file's size and SHA-256. The manifest carries its own hash. A checkpoint
that does not fit its manifest is named in a warning, and the one before it is used.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import platform
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as parse_safetensors

from asp_dist import __version__
from asp_dist.checkpoint.storage import MANIFEST, Store, checkpoint_name
from asp_dist.files import close_durably
from asp_dist.weight_files import write_safetensors

FORMAT = 1
STATE = "state.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; the message names the checkpoint and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about itself.

    Args:
        run: identity of the run that wrote it.
        step: optimizer steps done.
        world_size: number of ranks.
        config: the configuration, as plain types.
        versions: versions of Python, torch and the others that the state depends on.
        metrics: the latest validation's results.
        best: whether this was the best validation at the budget.
        files: file name -> [bytes, SHA-256]; filled in by `write_checkpoint`.
        time: when it was written, in seconds since 1970.
        format: version of the layout.
    """

    run: str
    step: int
    world_size: int
    config: dict[str, Any]
    versions: dict[str, str]
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    best: bool = False
    files: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    time: float = 0.0
    format: int = FORMAT


def write_checkpoint(store: Store, manifest: Manifest, plain: Any, parts: dict[str, dict[str, torch.Tensor]]) -> str:
    """Write one checkpoint and commit it.

    Args:
        store: where to.
        manifest: its description; `files` and `time` are filled in here.
        plain: the state without its tensors, as `flatten_state` returned it.
        parts: part's name -> its tensors, on the CPU.

    Returns:
        The checkpoint's name.

    Raises:
        CheckpointError: the model contains a value that is not finite.
        OSError: the disk is full, or the store does not answer. Nothing is left of the attempt.
    """
    bad = [name for name, t in parts.get("model", {}).items() if t.is_floating_point() and not _all_finite(t)]
    name = checkpoint_name(manifest.step)
    if bad:
        raise CheckpointError(f"not saving {name}: non-finite values in {', '.join(bad[:3])}")
    files: dict[str, list[Any]] = {}
    store.begin(name)
    try:
        for part, tensors in parts.items():
            stream = store.write(name, f"{part}.safetensors")
            try:
                files[f"{part}.safetensors"] = list(write_safetensors(stream, tensors))
            finally:
                close_durably(stream)
        text = json.dumps(plain, separators=(",", ":")).encode()
        files[STATE] = [len(text), hashlib.sha256(text).hexdigest()]
        _write(store, name, STATE, text)
        complete = dataclasses.asdict(dataclasses.replace(manifest, files=files, time=time.time()))
        _write(store, name, MANIFEST, json.dumps({"sha256": _digest(complete), **complete}, indent=1).encode())
        store.commit(name)
    except BaseException:
        store.abort(name)
        raise
    return name


def read_manifest(store: Store, name: str) -> Manifest:
    """The manifest of a checkpoint, its own hash checked.

    Raises:
        CheckpointError: it is missing, torn, altered, or of another format.
        OSError: it cannot be read now; its contents may be sound.
    """
    try:
        tree = json.loads(store.read(name, MANIFEST))
        digest = tree.pop("sha256")
        manifest = Manifest(**tree)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{store.where(name)}: {MANIFEST} is missing or unreadable ({error})") from error
    if digest != _digest(tree):
        raise CheckpointError(f"{store.where(name)}: hash mismatch in {MANIFEST}: the file was modified")
    if manifest.format != FORMAT:
        raise CheckpointError(f"{store.where(name)}: format {manifest.format} where {FORMAT} is expected")
    return manifest


def read_checkpoint(store: Store, name: str) -> tuple[Manifest, dict[str, Any]]:
    """A checkpoint's manifest and state, every file checked against the manifest's hashes.

    Raises:
        CheckpointError: a file is missing, cut short, or altered; the message names it.
        OSError: a file cannot be read now; its contents may be sound.
    """
    manifest = read_manifest(store, name)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    plain: dict[str, Any] = {}
    for file, (size, digest) in manifest.files.items():
        place = f"{store.where(name)}/{file}"
        try:
            data = store.read(name, file)
        except FileNotFoundError as error:
            raise CheckpointError(f"{place} is missing ({error})") from error
        if len(data) != size:
            raise CheckpointError(
                f"{place} has {len(data)} bytes where {size} were written; the file is truncated or has grown"
            )
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{place} does not fit its hash; its bytes were altered")
        if file == STATE:
            plain = json.loads(data)
        else:
            tensors[file.removesuffix(".safetensors")] = parse_safetensors(data)
    state = {part: unflatten_state(tree, tensors.get(part, {})) for part, tree in plain.items()}
    return manifest, state


def split_state(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    """`state` as JSON types, and the tensors of each of its parts; parts without tensors get no file."""
    plain: dict[str, Any] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for part, tree in state.items():
        tensors: dict[str, torch.Tensor] = {}
        plain[part] = flatten_state(tree, tensors)
        if tensors:
            parts[part] = tensors
    return plain, parts


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is finite throughout; the sum, thirty times as fast to take, settles nearly every case."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _write(store: Store, name: str, file: str, data: bytes) -> None:
    stream = store.write(name, file)
    try:
        stream.write(data)
    finally:
        close_durably(stream)


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


PLAIN = (str, int, float, bool, type(None))


def flatten_state(tree: Any, tensors: dict[str, torch.Tensor], prefix: str = "") -> Any:
    """`tree` as JSON types, its tensors moved into `tensors` under dotted names.

    Raises:
        TypeError: a leaf is neither a tensor nor a plain type.
    """
    if isinstance(tree, torch.Tensor):
        name = prefix or "tensor"
        tensors[name] = tree.detach()
        last = tree.dim() == 4 and not tree.is_contiguous() and tree.is_contiguous(memory_format=torch.channels_last)
        return {"__tensor__": name, "channels_last": True} if last else {"__tensor__": name}
    if isinstance(tree, dict):
        items = [[key, flatten_state(value, tensors, f"{prefix}.{key}".strip("."))] for key, value in tree.items()]
        if all(isinstance(key, str) for key in tree):
            return dict(items)
        return {"__items__": items}
    if isinstance(tree, list | tuple):
        values = [flatten_state(value, tensors, f"{prefix}.{i}".strip(".")) for i, value in enumerate(tree)]
        return {"__tuple__": values} if isinstance(tree, tuple) else values
    if isinstance(tree, torch.dtype):
        return {"__dtype__": str(tree).removeprefix("torch.")}
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, PLAIN):
        return tree
    raise TypeError(f"{prefix or 'state'} is a {type(tree).__name__}: a checkpoint contains only tensors and plain types")


def unflatten_state(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree that `flatten_state` took apart."""
    if isinstance(plain, list):
        return [unflatten_state(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if "__tensor__" in plain:
        tensor = tensors[plain["__tensor__"]]
        # Kept: a momentum buffer in another order than its weight would be slower and could round differently.
        return tensor.contiguous(memory_format=torch.channels_last) if plain.get("channels_last") else tensor
    if "__tuple__" in plain:
        return tuple(unflatten_state(value, tensors) for value in plain["__tuple__"])
    if "__dtype__" in plain:
        return getattr(torch, plain["__dtype__"])
    if "__items__" in plain:
        return {key: unflatten_state(value, tensors) for key, value in plain["__items__"]}
    return {key: unflatten_state(value, tensors) for key, value in plain.items()}


def capture_rng(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators on this rank, as JSON types."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, _encode(np.asarray(keys).tobytes()), int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state().numpy().tobytes()),
    }
    if device.type == "cuda":
        state["cuda"] = _encode(torch.cuda.get_rng_state(device).numpy().tobytes())
    return state


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what `capture_rng` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.frombuffer(base64.b64decode(keys), np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]), device)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def versions() -> dict[str, str]:
    """Versions of what a run's state depends on."""
    import timm

    return {
        "asp_dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }

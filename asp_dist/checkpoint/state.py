"""A run's state as a tree of plain types and tensors: what a checkpoint holds, and how it comes back.

Trees are nested dictionaries, lists and tuples with tensors, numbers, strings, booleans and None as leaves.
`flatten_state` takes the tensors out, so that they go into safetensors files and the rest into JSON: loading
never unpickles.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

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
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, PLAIN):
        return tree
    raise TypeError(f"{prefix or 'state'} is a {type(tree).__name__}: a checkpoint holds tensors and plain types alone")


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

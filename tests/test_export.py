"""What leaves the system: the sparse file and ONNX hold the same weights as the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from asp_dist.export.onnx_file import export_onnx
from asp_dist.export.sparse_file import load_sparse, pack_bits, save_sparse, unpack_bits
from asp_dist.pruning import Budget, Pruner


def test_bits_are_packed_highest_first_and_padded_with_zeros() -> None:
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1, 1, 1], dtype=torch.bool)
    assert pack_bits(mask).tolist() == [0b10000001, 0b11000000]
    assert torch.equal(unpack_bits(pack_bits(mask), 10), mask)


def test_a_sparse_file_gives_the_same_tensors_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 5, 3) * (torch.rand(7, 5, 3) > 0.8)
    tensors = {"conv.weight": weight, "conv.bias": torch.randn(7), "steps": torch.tensor(3)}
    file = tmp_path / "sparse.safetensors"
    save_sparse(tensors, ["conv.weight"], file)
    stored = load_file(file)
    assert set(stored) == {"conv.weight.bitmap", "conv.weight.values", "conv.bias", "steps"}
    assert stored["conv.weight.values"].numel() == int(torch.count_nonzero(weight))
    loaded = load_sparse(file)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="sparse_shapes"):
        load_sparse(file)


def test_a_bytes_budget_is_the_size_of_the_sparse_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, optimizer, Budget.bytes(count=8_000, bound="at_most"))
    pruner.finalize()
    file = tmp_path / "sparse.safetensors"
    tensors = dict(model.state_dict())
    save_sparse(tensors, [f"{layer.name}.weight" for layer in pruner.layers], file)
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    payload = file.stat().st_size - header
    assert payload == pruner.summary()["bytes"]
    assert 8_000 - 4 < payload <= 8_000  # one more float32 would not fit


def test_onnx_computes_what_the_model_computes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    file = tmp_path / "model.onnx"
    export_onnx(model, (3, 8, 8), file)
    images = torch.randn(5, 3, 8, 8)
    (logits,) = ReferenceEvaluator(onnx.load(str(file))).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)

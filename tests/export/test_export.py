"""What leaves the system: the sparse file and ONNX hold the same weights as the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import digits_config
from torch import nn

from asp_dist.checkpoint.record import run_dir
from asp_dist.cli import main
from asp_dist.data import prepare_digits
from asp_dist.export.onnx_file import export_onnx
from asp_dist.pruning import Budget, Pruner
from asp_dist.training.trainer import train
from asp_dist.training.world import World
from asp_dist.weight_files import load_sparse, pack_bits, save_sparse, unpack_bits


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
    save_sparse(tensors, [f"{layer.name}.weight" for layer in pruner.snapshot().layers], file)
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    payload = file.stat().st_size - header
    assert payload == pruner.snapshot().summary()["bytes"]
    assert 8_000 - 4 < payload <= 8_000  # one more float32 would not fit


def test_onnx_computes_what_the_model_computes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    file = tmp_path / "model.onnx"
    export_onnx(model, (3, 8, 8), file)
    images = torch.randn(5, 3, 8, 8)
    (logits,) = ReferenceEvaluator(onnx.load(str(file))).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on the digits, whose images are gone."""
    folder = tmp_path_factory.mktemp("finished")
    root = Path(prepare_digits(folder / "digits"))
    config = digits_config(folder, root, schedule__epochs=1, training__max_steps=3, training__ema_decay=None)
    train(config, World())
    root.rename(folder / "gone")
    return run_dir(config)


def logits_shape(file: Path) -> tuple[int, ...]:
    """The shape of what the ONNX model in `file` computes from a batch of three."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(file))
    onnx.checker.check_model(model)
    images = torch.randn(3, 3, 8, 8)
    (logits,) = ReferenceEvaluator(model).run(None, {"images": images.numpy()})
    return tuple(logits.shape)


def test_onnx_of_a_run_whose_data_is_gone(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    assert json.loads((finished / "summary.json").read_text())["num_classes"] == 10
    file = tmp_path / "model.onnx"
    assert main(["export", str(finished), "--format", "onnx", "--output", str(file)]) == 0
    assert logits_shape(file) == (3, 10)


def older(finished: Path, folder: Path, *, metadata: bool) -> Path:
    """A copy of a run as it was before the summary had the number of classes; without the model's `metadata` as well."""
    folder.mkdir()
    (folder / "config.yaml").write_text((finished / "config.yaml").read_text())
    summary = json.loads((finished / "summary.json").read_text())
    summary.pop("num_classes", None)
    (folder / "summary.json").write_text(json.dumps(summary))
    with safe_open(finished / "model.safetensors", framework="pt") as file:
        text = file.metadata() if metadata else None
    save_file(load_file(finished / "model.safetensors"), folder / "model.safetensors", text)
    return folder


def test_onnx_of_an_older_run_takes_the_classes_of_the_model_file(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    folder = older(finished, tmp_path / "old", metadata=True)
    assert main(["export", str(folder), "--format", "onnx"]) == 0
    assert logits_shape(folder / "model.onnx") == (3, 10)


def test_onnx_without_a_number_of_classes_is_refused_with_the_remedy(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    folder = older(finished, tmp_path / "old", metadata=False)
    assert main(["export", str(folder), "--format", "onnx"]) == 2
    message = capsys.readouterr().err
    assert str(folder / "summary.json") in message and 'add "num_classes": N' in message
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "num_classes": 10}))
    assert main(["export", str(folder), "--format", "onnx"]) == 0  # the remedy works


@pytest.mark.parametrize("form", ["sparse", "onnx"])
def test_a_damaged_model_file_is_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    folder = older(finished, tmp_path / "old", metadata=True)
    (folder / "model.safetensors").write_bytes(b"nothing")
    assert main(["export", str(folder), "--format", form]) == 2
    assert "model.safetensors" in capsys.readouterr().err

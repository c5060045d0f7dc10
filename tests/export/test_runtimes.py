"""Exported files in the programs that run them: the same outputs as torch's, smaller files, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from small_runs import digits_config
from torch import nn

from asp_dist.bench import deploy
from asp_dist.bench.deploy import bench_deploy, dense_twin, verdict
from asp_dist.checkpoint.record import run_dir
from asp_dist.cli import main
from asp_dist.config import Config, DataConfig, ModelConfig, to_dict
from asp_dist.data import prepare_digits
from asp_dist.errors import UserError
from asp_dist.export import onnx_file
from asp_dist.export.export_run import FILES, Format, export_run
from asp_dist.export.mnn_file import CALL, block_parameters, convert_to_mnn
from asp_dist.export.onnx_file import export_onnx, make_sparse
from asp_dist.export.runtimes import MNN_RUNTIME, ONNX_RUNTIME, OPENVINO, RUNTIMES, Runtime
from asp_dist.pruning import Budget, Pattern, Pruner
from asp_dist.report import write_report
from asp_dist.report.comparison import read_summary
from asp_dist.training.trainer import train
from asp_dist.training.world import World
from asp_dist.weight_files import load_sparse, save_safetensors

FAMILIES: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "mobilenetv3_small_050": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "vit_tiny_patch16_224": {"depth": 2},
}
FORMATS: tuple[Format, ...] = ("sparse", "onnx", "onnx-sparse", "mnn")


def zeroed(model: nn.Module, share: float = 0.9) -> nn.Module:
    """`model` with the smallest weights of each matrix at zero, and biases that are not."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                size = parameter.abs()
                parameter.mul_(size > size.flatten().kthvalue(max(1, int(share * size.numel()))).values)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def untrained_run(folder: Path, name: str, **kwargs: Any) -> Path:
    """What a finished run leaves of a network that nobody trained, on images that are not there."""
    config = Config(model=ModelConfig(name=name, kwargs=kwargs), data=DataConfig(root="/nowhere", input_size=64))
    torch.manual_seed(0)
    model = zeroed(timm.create_model(name, num_classes=10, **kwargs, **({"img_size": 64} if name.startswith("vit") else {})))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "summary.json").write_text(json.dumps({"num_classes": 10}))
    save_safetensors(folder / "model.safetensors", dict(model.state_dict()), {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_exported_in_every_format(tmp_path: Path, name: str) -> None:
    """Batches of 1, 2 and 5 random images, as the run's data are gone; a dynamic batch for attention too."""
    folder = untrained_run(tmp_path, name, **FAMILIES[name])
    for form in FORMATS:
        exported = export_run(folder, form)
        assert exported.file == folder / FILES[form] and exported.size == exported.file.stat().st_size
        share = exported.size / exported.dense_size
        assert share == 1.0 if form == "onnx" else share < 0.7  # so small a network is mostly graph
        if form == "sparse":
            stored, whole = load_sparse(exported.file), load_file(folder / "model.safetensors")
            assert all(torch.equal(stored[key], whole[key]) for key in whole)
            continue
        found = exported.agreement
        assert found is not None and found.images == 8 and found.top1 is None
        assert found.note is not None and "/nowhere" in found.note
        assert found.difference <= 1e-4 * max(1.0, found.scale) and found.differing == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ResNet-20 that learned the digits at 90 % sparsity."""
    folder = tmp_path_factory.mktemp("trained")
    root = Path(prepare_digits(folder / "digits"))
    config = digits_config(folder, root, schedule__epochs=4, training__ema_decay=None, budget__sparsity=0.9)
    train(config, World())
    return run_dir(config)


@pytest.mark.parametrize(("form", "most"), [("onnx-sparse", 0.45), ("mnn", 0.4)])
def test_top1_in_the_runtime_is_torchs_to_the_image(trained: Path, tmp_path: Path, form: Format, most: float) -> None:
    exported = export_run(trained, form, tmp_path / "model")
    found = exported.agreement
    assert found is not None and found.note is None and found.images == 359
    assert found.top1 == found.torch_top1 and found.differing == 0 and found.difference < 1e-4
    assert found.top1 == pytest.approx(json.loads((trained / "summary.json").read_text())["top1"])
    assert exported.size <= most * exported.dense_size  # a network this small is a third graph and batch norm
    few = export_run(trained, form, tmp_path / "again", images=11).agreement
    assert few is not None and few.images == 11


def test_mnn_is_told_of_blocks(tmp_path: Path) -> None:
    """With them its file has the blocks' masks, for kernels of their own; the outputs are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    pruner = Pruner(model, torch.optim.SGD(model.parameters()), Budget.parameters(sparsity=0.9), pattern=Pattern(4))
    pruner.finalize()
    export_onnx(model, (3, 8, 8), tmp_path / "model.onnx")
    files = {block: tmp_path / f"{block}.mnn" for block in (1, 4, 8)}
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8), dtype=np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(images)).numpy()
    for block, file in files.items():
        convert_to_mnn(tmp_path / "model.onnx", file, block=block)
        assert np.abs(MNN_RUNTIME.open(file, 1)(images) - logits).max() < 1e-5
        dump = tmp_path / f"{block}.json"
        command = [sys.executable, "-c", CALL, "-f", "MNN", "--modelFile", str(file), "--JsonFile", str(dump)]
        subprocess.run(command, capture_output=True, check=True)
        assert ('"SIMD_OC"' in dump.read_text()) == (block > 1) and ('"RANDOM"' in dump.read_text()) == (block == 1)
    # As google.protobuf would write Pipeline(version="0.0.0", algo=[{PRUNE, {SIMD_OC, {oc_blocks: [4]}}}]).
    assert block_parameters(4) == b"\x0a\x050.0.0\x12\x0a\x08\x01\x1a\x06\x08\x01\x1a\x02\x20\x04"


def test_types_of_weights(trained: Path, tmp_path: Path) -> None:
    full = export_run(trained, "sparse", tmp_path / "full")
    half = export_run(trained, "sparse", tmp_path / "half", weights="float16")
    assert half.size < 0.8 * full.size
    whole, stored = load_file(trained / "model.safetensors"), load_sparse(half.file)
    for name, tensor in whole.items():
        torch.testing.assert_close(stored[name].to(tensor.dtype), tensor, rtol=1e-3, atol=1e-6)
        assert stored[name].dtype == tensor.dtype or tensor.dim() > 1
    sizes = {}
    for weights, furthest in (("float32", 1e-4), ("float16", 0.1), ("int8", 2.0)):
        exported = export_run(trained, "mnn", tmp_path / weights, weights=weights)  # type: ignore[arg-type]
        sizes[weights] = exported.size
        assert exported.agreement is not None and exported.agreement.difference < furthest
        assert exported.agreement.top1 is not None and exported.agreement.torch_top1 is not None
        assert abs(exported.agreement.top1 - exported.agreement.torch_top1) < 0.02
    assert sizes["int8"] < sizes["float32"] and sizes["int8"] < sizes["float16"]


def test_a_type_that_the_format_has_not_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained), "--format", "onnx", "--weights", "int8"]) == 2
    assert "--weights int8 is not possible with --format onnx: choose float32" in capsys.readouterr().err


def test_the_command_prints_size_difference_and_accuracy(trained: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "model.mnn")
    command = [sys.executable, "-m", "asp_dist", "export", str(trained), "--format", "mnn", "--output", file, "--images", "20"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].startswith(f"{file}  ") and "of the dense network's" in lines[0]
    assert lines[1].startswith("MNN ") and lines[1].endswith("against torch, 20 validation images:")
    assert len(lines) == 4 and "another first class in 0 images" in lines[3]


def test_a_runtime_that_is_missing_is_named(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "version", None)
    exported = export_run(trained, "onnx", tmp_path / "model.onnx")
    assert exported.agreement is None and exported.note is not None and "pip install onnxruntime" in exported.note
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'asp-dist\[mnn\]'"):
        convert_to_mnn(tmp_path / "model.onnx", tmp_path / "model.mnn")


def test_a_file_that_is_no_onnx_is_refused_with_mnns_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"MNN cannot convert .*bad\.onnx: ."):
        convert_to_mnn(tmp_path / "bad.onnx", tmp_path / "bad.mnn")
    assert not (tmp_path / "bad.mnn").exists()


def test_the_converter_reports_to_nobody() -> None:
    """MNN's command imports a module that installs a package and sends each use to a server; its library must not."""
    code = CALL.replace("_tools.mnnconvert(['mnnconvert', *sys.argv[1:]])", "print('\\n'.join(sorted(sys.modules)))")
    assert code != CALL
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "_tools" in modules and not [name for name in modules if name.startswith(("MNN.tools", "aliyun"))]


def test_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens above 1 GiB, with a limit of 1 kB."""
    monkeypatch.setattr(onnx_file, "LARGE", 1000)
    folder = untrained_run(tmp_path, "resnet10t")
    exported = export_run(folder, "onnx")
    assert (folder / "model.onnx.data").stat().st_size > 10 * (folder / "model.onnx").stat().st_size
    assert exported.size == sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert exported.agreement is not None and exported.agreement.difference < 1e-4
    there = export_run(folder, "mnn").agreement
    assert there is not None and there.runtime.startswith("MNN ") and there.difference < 1e-4
    with pytest.raises(UserError, match="do not fit into one file: choose --format onnx"):
        export_run(folder, "onnx-sparse")


def test_sparse_initializers_are_the_weights(tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    torch.manual_seed(0)
    model = zeroed(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 70)), 0.8)
    file, sparse = tmp_path / "model.onnx", tmp_path / "sparse.onnx"
    export_onnx(model, (3, 8, 8), file)
    make_sparse(file, sparse)
    onnx.checker.check_model(str(sparse))
    graph = onnx.load(str(sparse)).graph
    weights = {parameter.shape: parameter for parameter in model.parameters() if parameter.dim() > 1}
    assert len(graph.sparse_initializer) == len(weights)
    for stored in graph.sparse_initializer:
        expected = weights[torch.Size(stored.dims)].detach().numpy()
        found = np.zeros(expected.size, dtype=np.float32)
        found[numpy_helper.to_array(stored.indices)] = numpy_helper.to_array(stored.values)
        assert np.array_equal(found.reshape(expected.shape), expected)
    images = np.random.default_rng(0).standard_normal((3, 3, 8, 8), dtype=np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(images)).numpy()
    assert np.abs(ONNX_RUNTIME.open(sparse, 1)(images) - logits).max() < 1e-5
    for runtime in (ONNX_RUNTIME, OPENVINO):
        assert np.abs(runtime.open(file, 2)(images) - logits).max() < 1e-5


def test_deploy_measures_both_networks_in_every_runtime(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: _refuse())  # a minute for each network
    result = bench_deploy(trained, input_sizes=[8, 16], threads=1, batch_size=2, rounds=4)
    assert result["sparsity"] == pytest.approx(0.9, abs=1e-4) and torch.get_num_threads() >= 1
    names = {f"{runtime.name} {runtime.version}" for runtime in RUNTIMES} | {"torch"}
    for side, at in zip((8, 16), result["sizes"], strict=True):
        assert at["input"] == [3, side, side]
        assert {(row["runtime"], row["network"]) for row in at["rows"]} == {(n, k) for n in names for k in ("dense", "pruned")}
        assert all(0 < row["fastest"] <= row["median"] <= row["slowest"] for row in at["rows"])
        sizes = {row["network"]: row["size"] for row in at["rows"] if row["runtime"].startswith("MNN")}
        assert sizes["pruned"] < 0.4 * sizes["dense"]
        assert at["left_out"] == ["torch.compile, pruned: no compiler", "torch.compile, dense: no compiler"]
    assert json.loads((trained / "deploy.json").read_text()) == result
    page = write_report([trained]).read_text()
    assert result["sizes"][0]["verdict"] in page and "Deployment" in page
    assert read_summary(trained)["deploy_gain"] == result["sizes"][0]["gain"]


def _refuse() -> None:
    raise RuntimeError("no compiler")


def test_the_verdict_compares_the_fastest_of_each() -> None:
    def row(runtime: str, network: str, median: float) -> dict[str, Any]:
        return {"runtime": runtime, "network": network, "median": median}

    rows = [row("A", "dense", 4.0), row("B", "dense", 3.0), row("A", "pruned", 4.0), row("B", "pruned", 1.5)]
    found = verdict(rows, (3, 32, 64))
    assert found["gain"] == 2.0
    assert found["verdict"] == "2.00 × faster at 32×64, in B, than the fastest dense network, in B"
    none = verdict([*rows[:3], row("B", "pruned", 2.95)], (3, 8, 8))
    assert none["verdict"].startswith("no gain at 8×8: 1.02 × the speed of the fastest dense network, in B")


def test_the_dense_twin_has_no_zeros_and_the_same_weights_elsewhere() -> None:
    model = zeroed(nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30)))
    twin = dense_twin(model, ["0.weight"])
    before, after = model.state_dict(), twin.state_dict()
    assert torch.equal(before["1.weight"], after["1.weight"])
    kept = before["0.weight"] != 0
    assert torch.equal(before["0.weight"][kept], after["0.weight"][kept]) and int((after["0.weight"] == 0).sum()) == 0


def test_numbers_that_make_no_sense_are_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--threads", "0"], "--threads = 0 must be at least 1"),
        (["--rounds", "-1"], "--rounds = -1 must be at least 1"),
        (["--input-size", "32", "0"], "must be positive"),
    ):
        assert main(["bench", "deploy", str(trained), *options]) == 2
        assert words in capsys.readouterr().err
    assert main(["bench", "deploy", "/nowhere"]) == 2
    assert deploy.machine() != ""

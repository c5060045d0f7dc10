"""``model.weights``: what fits the network is loaded, the classifier too, and what is not is said."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_runs import digits_config, small_config
from torch import Tensor, nn

from asp_dist.checkpoint.record import run_dir
from asp_dist.config import AugmentConfig, ModelConfig
from asp_dist.data import prepare_digits
from asp_dist.errors import UserError
from asp_dist.models import build_model
from asp_dist.training.trainer import train
from asp_dist.training.world import World
from asp_dist.weight_files import save_sparse


def state_of(name: str, classes: int, **kwargs: Any) -> dict[str, Tensor]:
    """The weights of a network as after training: no tensor is as a fresh network has it."""
    torch.manual_seed(1)
    state: dict[str, Tensor] = timm.create_model(name, num_classes=classes, **kwargs).state_dict()
    return {k: v + torch.rand_like(v) / 8 if v.is_floating_point() else v + 3 for k, v in state.items()}


def build(file: Path, name: str, classes: int, size: int = 32, *, new: bool = False) -> nn.Module:
    return build_model(ModelConfig(name=name, weights=str(file), new_classifier=new), classes, size)


def unequal(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """The tensors of `model` that are not as in `state`."""
    return [key for key, value in model.state_dict().items() if key not in state or not torch.equal(value, state[key])]


def save(state: dict[str, Tensor], folder: Path, form: str) -> Path:
    file = folder / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(state, file)
    elif form == "state dict":
        torch.save(state, file)
    elif form == "under DDP":
        torch.save(OrderedDict((f"module.{key}", value) for key, value in state.items()), file)
    else:
        assert form == "checkpoint of timm's train.py"
        random = {key: torch.zeros_like(value) for key, value in state.items()}
        torch.save({"epoch": 3, "state_dict": random, "state_dict_ema": state, "metric": 0.5}, file)
    return file


@pytest.mark.parametrize("form", ["safetensors", "state dict", "under DDP", "checkpoint of timm's train.py"])
@pytest.mark.parametrize(("name", "classes"), [("test_resnet", 10), ("test_vit", 10), ("cifar_resnet20", 7)])
def test_a_classifier_for_as_many_classes_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, classes: int, form: str
) -> None:
    state = state_of(name, classes, **({"img_size": 32} if name == "test_vit" else {}))
    file = save(state, tmp_path, form)
    with caplog.at_level(logging.INFO, logger="asp_dist"):
        assert unequal(build(file, name, classes), state) == []
    (record,) = [r for r in caplog.records if r.name.startswith("asp_dist")]
    assert record.levelno == logging.INFO
    assert f"{len(state)} of {len(state)} tensors of {name} loaded" in record.getMessage()
    assert str(file) in record.getMessage()


@pytest.mark.parametrize(("rows", "classes"), [(21843, 1000), (1000, 10), (10, 1000)])
def test_a_classifier_for_other_classes_is_left_random_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: int, classes: int
) -> None:
    state = state_of("test_resnet", rows)
    file = save(state, tmp_path, "safetensors")
    with caplog.at_level(logging.INFO, logger="asp_dist"):
        model = build(file, "test_resnet", classes, new=True)
    assert unequal(model, state) == ["fc.weight", "fc.bias"]
    assert model.get_parameter("fc.weight").shape[0] == classes and model.get_parameter("fc.weight").std() > 0
    (record,) = [r for r in caplog.records if r.name.startswith("asp_dist")]
    assert record.levelno == logging.WARNING
    assert f"fc.weight, fc.bias left random: the file has {rows} classes, the data {classes}" in record.getMessage()
    assert f"{len(state) - 2} of {len(state)} tensors" in record.getMessage()


def test_a_random_classifier_on_trained_weights_is_an_error_unless_asked_for(tmp_path: Path) -> None:
    state = state_of("test_resnet", 12)
    with pytest.raises(UserError, match=r"has 12 classes, the data 10 classes: add model.new_classifier = true"):
        build(save(state, tmp_path, "safetensors"), "test_resnet", 10)
    headless = {key: value for key, value in state.items() if not key.startswith("fc.")}
    with pytest.raises(UserError, match=r"has no classifier, the data 10 classes: add model.new_classifier = true"):
        build(save(headless, tmp_path, "safetensors"), "test_resnet", 10)
    assert unequal(build(save(headless, tmp_path, "safetensors"), "test_resnet", 10, new=True), state) == [
        "fc.weight",
        "fc.bias",
    ]
    with pytest.raises(UserError, match=r"weights of resnet18 have 1000 classes, the data 10"):  # before any download
        build_model(ModelConfig(name="resnet18", pretrained=True), 10)


def test_missing_and_unexpected_names_are_listed_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = state_of("test_resnet", 10)
    gone = [key for key in state if key.startswith("layer4.")][:5]
    kept = {key: value for key, value in state.items() if key not in gone}
    file = save({**kept, **{f"extra.{i}": torch.ones(2) for i in range(7)}}, tmp_path, "safetensors")
    with caplog.at_level(logging.INFO, logger="asp_dist"):
        model = build(file, "test_resnet", 10)
    assert set(gone) - {k for k in gone if k.endswith("num_batches_tracked")} <= set(unequal(model, state)) <= set(gone)
    (record,) = [r for r in caplog.records if r.name.startswith("asp_dist")]
    message = record.getMessage()
    weights = [key for key in gone if not key.endswith("num_batches_tracked")]
    assert f"{len(weights)} missing from the file, left random: {', '.join(weights[:3])}" in message
    assert "7 of the file unexpected, not used: extra.0, extra.1, extra.2 and 4 more" in message


def test_files_from_before_batches_were_counted_load_in_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = state_of("test_resnet", 10)
    file = save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, tmp_path, "state dict")
    with caplog.at_level(logging.INFO, logger="asp_dist"):
        assert all(key.endswith("num_batches_tracked") for key in unequal(build(file, "test_resnet", 10), state))
    assert [r.levelno for r in caplog.records if r.name.startswith("asp_dist")] == [logging.INFO]


def test_positions_are_fitted_to_the_run_and_the_classifier_is_kept(tmp_path: Path) -> None:
    state = state_of("test_vit", 10, img_size=64)
    model = build(save(state, tmp_path, "safetensors"), "test_vit", 10, size=32)
    assert unequal(model, state) == ["pos_embed"]
    assert model.get_parameter("pos_embed").shape[1] < state["pos_embed"].shape[1]


@pytest.mark.parametrize(("rows", "different"), [(7, []), (9, ["head.fc.weight", "head.fc.bias"])])
def test_a_classifier_is_known_by_its_name_in_the_original_release_too(tmp_path: Path, rows: int, different: list[str]) -> None:
    state = state_of("test_convnext", rows)
    original = {}
    for key, value in state.items():
        key = re.sub(r"^stages\.(\d)\.blocks\.(\d)", r"stages.\1.\2", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.(\d)", r"downsample_layers.\1.\2", key)
        key = key.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        original[key.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = value
    assert {"norm.weight", "head.weight", "downsample_layers.0.0.weight"} <= original.keys()
    model = build(save(original, tmp_path, "safetensors"), "test_convnext", 7, new=True)
    assert unequal(model, state) == different


def test_a_sparse_file_is_as_good_as_the_model(tmp_path: Path) -> None:
    state = state_of("test_resnet", 10)
    state["conv1.weight" if "conv1.weight" in state else next(iter(state))].flatten()[::2] = 0
    file = tmp_path / "model.sparse.safetensors"
    save_sparse(state, [key for key, value in state.items() if value.dim() == 4], file)
    assert unequal(build(file, "test_resnet", 10), state) == []


def test_a_file_in_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    file = save(state_of("test_resnet", 10), tmp_path, "safetensors")
    with pytest.raises(UserError, match=r"weights\.safetensors.*does not fit model\.name = 'test_vit': it has .* none of"):
        build(file, "test_vit", 10)
    other = save({"fc.weight": torch.zeros(3, 2), "net": torch.zeros(2)}, tmp_path, "state dict")
    with pytest.raises(
        UserError, match=r"weights\.pth.*does not fit model\.name = 'test_resnet': it has fc\.weight, net, and none"
    ):
        build(other, "test_resnet", 10)


def test_a_checkpoint_without_a_known_key_is_refused_by_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "network": state_of("test_convnext", 10)}, file)
    with pytest.raises(UserError, match=r"does not fit model\.name = 'test_convnext': it has epoch, network, and none of"):
        build(file, "test_convnext", 10)


def test_another_network_of_the_same_names_is_refused_with_the_shapes(tmp_path: Path) -> None:
    file = save(state_of("cifar_resnet20", 10), tmp_path, "safetensors")
    with pytest.raises(
        UserError,
        match=r"'cifar_wrn16_8': layer1\.0\.conv1\.weight is \[16, 16, 3, 3\], not \[128, 16, 3, 3\] and \d+ more",
    ):
        build(file, "cifar_wrn16_8", 10)


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["torn.safetensors", "torn.pth", "empty.pth", "code.pth", "list.pth", "model.pth"])
def test_what_is_no_weights_file_is_refused_and_runs_no_code(tmp_path: Path, name: str) -> None:
    whole = io.BytesIO()
    torch.save(state_of("test_resnet", 10), whole)
    file = tmp_path / name
    if name == "code.pth":
        torch.save({"fc.weight": Runs(tmp_path / "made")}, file)
    elif name == "list.pth":
        torch.save([torch.zeros(2)], file)
    elif name == "model.pth":
        torch.save(timm.create_model("test_resnet", num_classes=10), file)
    else:
        file.write_bytes(b"" if name == "empty.pth" else whole.getvalue()[:5000])
    with pytest.raises(UserError, match=rf"model\.weights = '.*{name}' cannot be read"):
        build(file, "test_resnet", 10)
    assert not (tmp_path / "made").exists()


def test_a_storage_that_does_not_answer_is_no_users_mistake_with_an_injected_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(state_of("test_resnet", 10), tmp_path, "state dict")

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises(OSError, match="Stale file handle"):
            build(file, "test_resnet", 10)
    assert unequal(build(file, "test_resnet", 10), state_of("test_resnet", 10)) == []


def test_other_models_load_as_ever_afterwards(tmp_path: Path) -> None:
    """What steps into timm's loading is gone once the network is built, or could not be."""
    state = state_of("test_resnet", 10)
    file = save(state, tmp_path, "safetensors")
    build(file, "test_resnet", 10)
    with pytest.raises(UserError):
        build(file, "test_vit", 10)
    overlay = {"file": str(file)}  # without a number of classes: timm takes the file for ImageNet's
    model = timm.create_model("test_resnet", num_classes=10, pretrained=True, pretrained_cfg_overlay=overlay)
    assert unequal(model, state) == ["fc.weight", "fc.bias"]


def test_a_fine_tuned_resnet18_has_its_accuracy_at_the_first_validation(tmp_path: Path) -> None:
    """Ten classes, learned by one run, in the file that the next one starts from."""
    changes: dict[str, Any] = {
        "training__ema_decay": None,
        "data__augment": AugmentConfig(scale=(0.9, 1.0), hflip=0.0),
        "pruning__enabled": False,
    }
    root = Path(prepare_digits(tmp_path / "digits"))
    first = digits_config(tmp_path, root, "first", model=ModelConfig(name="resnet18"), schedule__epochs=2, **changes)
    learned = train(first, World())["top1"]
    model = ModelConfig(name="resnet18", weights=str(run_dir(first) / "model.safetensors"))
    second = digits_config(tmp_path, root, "second", model=model, optimizer__lr=1e-9, training__max_steps=1, **changes)
    assert learned > 0.5
    assert abs(train(second, World())["top1"] - learned) < 0.03  # one step moves batch norm's statistics


def test_a_run_that_starts_from_another_runs_model_starts_where_that_ended(tmp_path: Path) -> None:
    first = small_config(tmp_path, "first", schedule__epochs=1)
    train(first, World())
    file = run_dir(first) / "model.safetensors"
    second = small_config(
        tmp_path,
        "second",
        model=ModelConfig(name="cifar_resnet20", weights=str(file)),
        optimizer__lr=1e-9,
        pruning__enabled=False,
        training__max_steps=1,
    )
    train(second, World())
    before, after = load_file(file), load_file(run_dir(second) / "model.safetensors")
    for name in ("conv1.weight", "fc.weight", "fc.bias"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)

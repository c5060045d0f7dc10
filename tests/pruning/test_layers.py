"""Which weights are found: by type and identity, with names, reasons and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import CondConv2d, Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from asp_dist.pruning import Select, WeightInfo, find_weights, register_prunable
from asp_dist.pruning.layers import unwrapped


def found(model: nn.Module, min_weights: int = 1) -> dict[str, int]:
    return {info.name: info.numel for info in find_weights(model, Select(min_weights=min_weights))}


class Tied(nn.Module):
    """An embedding-like decoder whose weight is the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 16, bias=False)
        self.middle = nn.Linear(16, 8)
        self.decoder = nn.Linear(8, 16)
        self.decoder.weight = self.encoder.weight


def test_convolutions_and_linear_layers_of_every_kind() -> None:
    model = nn.ModuleDict(
        {
            "conv1d": nn.Conv1d(2, 3, 5),
            "conv2d": nn.Conv2d(4, 6, 3, groups=2),
            "conv3d": nn.Conv3d(1, 2, 2),
            "transposed": nn.ConvTranspose2d(3, 5, 2),
            "same": Conv2dSame(2, 2, 3),
            "linear": nn.Linear(7, 3),
            "bilinear": nn.Bilinear(2, 3, 4),
            "norm": nn.BatchNorm2d(64),
            "embedding": nn.Embedding(100, 16),
        }
    )
    assert found(model) == {
        "conv1d": 30,
        "conv2d": 6 * 2 * 9,
        "conv3d": 16,
        "transposed": 60,
        "same": 36,
        "linear": 21,
        "bilinear": 24,
    }


def test_attention_recurrent_and_conditional_weights() -> None:
    assert found(nn.Sequential(nn.MultiheadAttention(8, 2))) == {"0.in_proj_weight": 192, "0.out_proj": 64}
    narrow = found(nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=6)))
    assert narrow == {"0.q_proj_weight": 64, "0.k_proj_weight": 32, "0.v_proj_weight": 48, "0.out_proj": 64}
    lstm = found(nn.Sequential(nn.LSTM(5, 3, bidirectional=True)))
    assert lstm == {
        "0.weight_ih_l0": 60,
        "0.weight_hh_l0": 36,
        "0.weight_ih_l0_reverse": 60,
        "0.weight_hh_l0_reverse": 36,
    }
    assert found(nn.Sequential(nn.GRUCell(5, 3))) == {"0.weight_ih": 45, "0.weight_hh": 27}
    assert found(nn.Sequential(CondConv2d(4, 6, 3, num_experts=4))) == {"0": 4 * 6 * 4 * 9}


def test_a_bare_layer_has_a_name() -> None:
    assert found(nn.Linear(3, 4)) == {"weight": 12}


def test_tied_weights_count_once() -> None:
    assert found(Tied()) == {"encoder": 128, "middle": 128}


def test_sizes_and_names() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 100), nn.Linear(100, 10), nn.Linear(100, 100))

    def reasons(*, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> list[str]:
        infos: list[WeightInfo] = find_weights(model, Select(min_weights=1000, include=include, exclude=exclude))
        return [info.reason for info in infos]

    small = "fewer than 1000 weights"
    assert reasons() == [small, "", "", ""]
    assert reasons(exclude=("[03]",)) == ["excluded by name", "", "", "excluded by name"]
    assert reasons(include=("[02]",)) == [small, "not included by name", "", "not included by name"]
    with pytest.raises(ValueError, match=r"exclude pattern 'head\*' matches no layer; the layers are 0, 1, 2, 3"):
        reasons(exclude=("head*",))
    with pytest.raises(ValueError, match=r"include pattern '9' matches no layer"):
        reasons(include=("9",))


def test_the_first_and_the_last_layer_are_a_choice() -> None:
    model = nn.Sequential(ScaledStdConv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 10))
    with pytest.raises(ValueError, match="ScaledStdConv2d"):
        find_weights(model, Select(min_weights=1))
    infos = find_weights(model, Select(min_weights=1, first=False))
    assert [info.reason for info in infos] == ["the first layer", "", ""]
    infos = find_weights(model, Select(min_weights=1, first=False, last=False))
    assert [info.reason for info in infos] == ["the first layer", "", "the last layer"]


def test_frozen_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    model[0].weight.requires_grad_(False)
    assert list(found(model)) == ["1"]


@pytest.mark.parametrize("kind", [ScaledStdConv2d, StdConv2d])
def test_standardised_convolutions_are_refused_by_name(kind: type[nn.Module]) -> None:
    """Stored zeros are not effective zeros there, so such a layer is never pruned by accident."""
    torch.manual_seed(0)
    layer = kind(16, 32, 3)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        weight[weight.abs() < weight.abs().median()] = 0.0
    image = torch.randn(1, 16, 9, 9)
    effective: list[Tensor] = []
    original = nn.functional.conv2d

    def record(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
        effective.append(w)
        return original(x, w, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "conv2d", record)
        layer(image)
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
    assert float((effective[0] == 0).float().mean()) < 0.01

    model = nn.Sequential(nn.Conv2d(3, 16, 3), layer)
    with pytest.raises(ValueError, match=rf"1 layers cannot be pruned \(1\): {kind.__name__}: .*standardised.*exclude"):
        find_weights(model, Select(min_weights=1))
    infos = find_weights(model, Select(min_weights=1, exclude=("1",)))
    assert [info.reason for info in infos] == ["", "excluded by name"]


def test_computed_weights_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 9)))
    with pytest.raises(ValueError, match=r"cannot be pruned \(1\).*parametrization"):
        find_weights(model, Select(min_weights=1))
    infos = find_weights(model, Select(min_weights=1, exclude=("1",)))
    assert [(info.name, info.numel, info.reason) for info in infos] == [("0", 64, ""), ("1", 72, "excluded by name")]


class Mixer(nn.Module):
    """A module of a user's own, with a bare matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 7))
        self.scale = nn.Parameter(torch.ones(7))


def test_a_module_of_the_users_own() -> None:
    model = nn.Sequential(Mixer(), nn.Linear(3, 3))
    assert found(model) == {"1": 9}
    register_prunable(Mixer, "mix")
    assert found(model) == {"0.mix": 42, "1": 9}


def test_wrappers_do_not_change_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    assert unwrapped(torch.compile(model)) is model  # type: ignore[arg-type]
    assert unwrapped(model) is model

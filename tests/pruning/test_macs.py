"""Multiply-adds per weight, against counts by hand and torch's own counter."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import timm
import torch
from timm.layers import CondConv2d
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from asp_dist.pruning import Select, find_weights, macs_per_weight


def macs(model: nn.Module, input_shape: Sequence[int]) -> dict[str, float]:
    weights = find_weights(model, Select(min_weights=1))
    return {info.name: m for info, m in zip(weights, macs_per_weight(model, weights, input_shape))}


def test_a_weight_works_once_per_output_position() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),  # 12×12 → 6×6
        nn.Conv2d(8, 8, 3, groups=4),  # → 4×4; the groups change the number of weights, not the uses of each
        nn.ConvTranspose2d(8, 4, 2, stride=2),  # each weight meets the 4×4 input positions
        nn.Flatten(2),
        nn.Linear(64, 5),  # four channels, each mapped as a vector
        nn.Flatten(),
        nn.Linear(20, 2),
    )
    assert macs(model, (3, 12, 12)) == {"0": 36, "1": 16, "2": 16, "4": 4, "6": 1}


class Attention(nn.Module):
    """Self-attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        tokens = self.attention(tokens, tokens, tokens)[0]
        return self.lstm(tokens)[0]


def test_attention_and_recurrence() -> None:
    counted = macs(Attention(), (2, 5, 8))
    names = ["attention.in_proj_weight", "attention.out_proj", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert counted == dict.fromkeys(names, 10.0)


class Shared(nn.Module):
    """One weight used by two layers, one used by its parent, and one not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.inside = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.experts = CondConv2d(2, 2, 3, padding=1, num_experts=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))  # [1, 2, 6, 6]
        x = nn.functional.linear(x, self.inside.weight)
        return self.experts(x, torch.ones(1, 4, device=x.device))


def test_shared_unused_and_conditional_weights() -> None:
    # An expert's weight enters the mixed kernel once, and that kernel is used at 36 positions by all four experts' sum.
    assert macs(Shared(), (2, 6, 6)) == {"first": 24, "inside": 12, "unused": 0, "experts": 1 + 36 / 4}


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_tiny", "beit_base_patch16_224"])
def test_torchs_own_counter(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    weights = find_weights(model, Select(min_weights=1))
    ours = sum(m * info.numel for m, info in zip(macs_per_weight(model, weights, (3, 224, 224)), weights))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    theirs = counter.get_flop_counts()["Global"]
    assert ours == (theirs[torch.ops.aten.convolution] + theirs[torch.ops.aten.addmm]) / 2


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    calls: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(module))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    macs(model, (3, 8, 8))
    assert not calls
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model(torch.randn(1, 3, 8, 8))
    assert calls == [model[0]]


def test_a_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"does not run on an input of shape \(4, 8, 8\)"):
        macs(nn.Sequential(nn.Conv2d(3, 4, 3)), (4, 8, 8))

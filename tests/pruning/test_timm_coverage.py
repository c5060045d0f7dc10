"""Layer discovery over all of timm's families: the share of matrix weights that is found, and what every other one is."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models._registry import _model_to_module
from torch import nn

from asp_dist.pruning import Select, find_weights, macs_per_weight

# Parameters of two dimensions or more that are no matrices of weights, by the last part of their name without its number.
# Each is looked up, added, or scales whole channels or scores; none maps activations as a layer's weights do.
TABLES = {
    "pos_embed": "position embedding, added to the tokens",
    "pos_embed_window": "position embedding, added to the tokens",
    "position_embedding_table": "position embedding, looked up and added",
    "patch_pos": "position embedding of TNT",
    "pixel_pos": "position embedding of TNT",
    "cls_token": "a token",
    "dist_token": "a token",
    "latent": "the query token of an attention pool",
    "relative_position_bias_table": "bias of the attention scores, looked up",
    "attention_biases": "bias of the attention scores",
    "rel_pos_h": "relative position embedding",
    "rel_pos_w": "relative position embedding",
    "height_rel": "relative position embedding",
    "width_rel": "relative position embedding",
    "temperature": "scale of each head's scores",
    "logit_scale": "scale of each head's scores",
    "gamma": "scale of each channel",
    "alpha": "scale of each channel of EfficientViM's residual sums",
    "gain": "scale of each channel of a standardised convolution",
    "w_g": "the attention vector of SwiftFormer: one score per token",
}
# Models that are refused, in whole or in part: their convolutions standardise the weights in forward, where stored zeros
# become nonzero effective weights. What to exclude, and the share of the matrix weights that is left to prune.
REFUSED = {
    "test_nfnet": (
        (
            "stem.*",
            "stages.*",
            "final_conv",
        ),
        0.5,
    ),
    "nf_resnet50": (
        (
            "stem.*",
            "stages.*",
        ),
        0.08,
    ),
    "dm_nfnet_f0": (
        (
            "stem.*",
            "stages.*",
            "final_conv",
        ),
        0.04,
    ),
    "resnetv2_50x1_bit": (
        (
            "stem.*",
            "stages.*",
        ),
        0.08,
    ),
    "vit_tiny_r_s16_p8_224": (("patch_embed.backbone.*",), 0.99),
}
# Kinds of layers that few models have, beside the smallest model of each family.
SPECIAL = [
    "tf_efficientnet_cc_b0_4e",
    "sequencer2d_s",
    "botnet26t_256",
    "lambda_resnet26t",
    "vit_relpos_small_patch16_224",
]


def small(name: str) -> tuple[int, int]:
    hints = ["test_", "atto", "femto", "pico", "nano", "xxs", "xxt", "tiny", "small", "_s"]
    return next((i for i, hint in enumerate(hints) if hint in name), len(hints)), len(name)


def models() -> list[str]:
    """The smallest model, by name, of each file of timm's models, and the special ones."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(_model_to_module[name], []).append(name)
    chosen = [min(names, key=small) for _, names in sorted(families.items())]
    return [name for name in dict.fromkeys(chosen + SPECIAL) if name not in REFUSED]


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def is_table(name: str) -> bool:
    return name.rsplit(".", 1)[-1].rstrip("0123456789").rstrip("_") in TABLES


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.ndim > 1 and not is_table(n)}


def test_there_are_many_families() -> None:
    assert len(models()) >= 80


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # some models' own
@pytest.mark.parametrize("name", models())
def test_every_matrix_is_found(name: str) -> None:
    model = build(name)
    found = {id(info.parameter) for info in find_weights(model, Select(min_weights=1))}
    expected = matrices(model)
    missed = {n: tuple(p.shape) for n, p in expected.items() if id(p) not in found}
    assert missed == {}
    # All matrices are found; what the table explains away is a small part of the parameters.
    whole = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert sum(p.numel() for p in expected.values()) / whole > 0.9


@pytest.mark.parametrize("name", REFUSED)
def test_standardised_models_are_refused_by_name(name: str) -> None:
    model = build(name)
    exclude, share = REFUSED[name]
    with pytest.raises(ValueError, match=r"StdConv2d(Same)?: its weights are standardised in forward"):
        find_weights(model, Select(min_weights=1))
    infos = find_weights(model, Select(min_weights=1, exclude=exclude))
    assert {id(info.parameter) for info in infos} == {id(p) for p in matrices(model).values()}
    left = sum(info.numel for info in infos if not info.reason)
    assert left / sum(info.numel for info in infos) == pytest.approx(share, rel=0.5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in models() if not name.startswith(("sequencer", "deepseek"))])
def test_every_weight_is_traced(name: str) -> None:
    """One forward pass on the meta device at the model's own input size uses every weight that was found."""
    model = build(name)
    weights = find_weights(model, Select(min_weights=1))
    config: Any = model.pretrained_cfg
    size = (config or {}).get("input_size", (3, 224, 224))
    uses = macs_per_weight(model, weights, size)
    assert {info.name: n for info, n in zip(weights, uses) if not n > 0} == {}

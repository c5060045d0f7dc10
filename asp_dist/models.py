"""Networks by name: timm's registry, and the paper's networks that timm lacks, registered in it."""

from __future__ import annotations

import difflib
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from asp_dist.config import ModelConfig
from asp_dist.errors import UserError, check
from asp_dist.pretrained import read_weights, starting_weights

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class PlainBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a parameter-free shortcut (He et al. 2015, section 4.2, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H/stride, W/stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.extra:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(out + shortcut)


class WideBlock(nn.Module):
    """A pre-activation block of a Wide ResNet (Zagoruyko and Komodakis 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H/stride, W/stride]."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


class CifarNet(nn.Module):
    """A residual network for 32×32 images: a 3×3 stem, three stages, global average pooling, one linear layer.

    Args:
        depth: layers in all: 6n + 2 for the plain ResNets, 6n + 4 for the wide ones.
        widths: channels of the stem and of the three stages.
        wide: pre-activation blocks.
        num_classes: outputs.
        in_chans: input channels.
    """

    def __init__(
        self, depth: int, widths: tuple[int, int, int, int], wide: bool, num_classes: int = 10, in_chans: int = 3
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - (4 if wide else 2), 6)
        if rest or blocks < 1:
            raise ValueError(f"depth = {depth} is not 6n + {4 if wide else 2}")
        self.num_classes, self.num_features = num_classes, widths[3]
        block: type[PlainBlock] | type[WideBlock] = WideBlock if wide else PlainBlock
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.Identity() if wide else nn.BatchNorm2d(widths[0])
        stages, inputs = [], widths[0]
        for stage, width in enumerate(widths[1:]):
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            stages.append(nn.Sequential(*(block(inputs if i == 0 else width, width, s) for i, s in enumerate(strides))))
            inputs = width
        self.layer1, self.layer2, self.layer3 = stages
        self.norm = nn.BatchNorm2d(inputs) if wide else nn.Identity()
        self.wide = wide
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """The last layer, as timm's models name it."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] to logits [B, num_classes]."""
        x = self.bn1(self.conv1(x))
        x = x if self.wide else F.relu(x)
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.wide:
            x = F.relu(self.norm(x))
        return self.fc(x.mean(dim=(2, 3)))


class AlexNet(nn.Module):
    """torchvision's AlexNet under timm's conventions.

    Args:
        num_classes: outputs.
        in_chans: input channels; only 3 is known.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.5) -> None:
        super().__init__()
        from torchvision.models import alexnet

        if in_chans != 3:
            raise ValueError(f"AlexNet: in_chans = {in_chans} must be 3")
        net = alexnet(weights=None, num_classes=num_classes, dropout=drop_rate)
        self.num_classes, self.num_features = num_classes, 4096
        self.features, self.avgpool, self.classifier = net.features, net.avgpool, net.classifier

    def get_classifier(self) -> nn.Module:
        """The last layer, as timm's models name it."""
        return self.classifier[6]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer."""
        self.num_classes = num_classes
        self.classifier[6] = nn.Linear(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] to logits [B, num_classes]."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def _config(size: int, mean: tuple[float, ...], std: tuple[float, ...], classifier: str, classes: int) -> dict[str, Any]:
    return {
        "num_classes": classes,
        "input_size": (3, size, size),
        "interpolation": "bilinear",
        "crop_pct": 1.0 if size == 32 else 0.875,
        "mean": mean,
        "std": std,
        "first_conv": "features.0" if classifier.startswith("classifier") else "conv1",
        "classifier": classifier,
    }


# The registry finds a model's defaults here, by its name.
default_cfgs = generate_default_cfgs(
    {
        **{
            f"{name}.untrained": _config(32, CIFAR_MEAN, CIFAR_STD, "fc", 10)
            for name in ("cifar_resnet20", "cifar_resnet32", "cifar_resnet56", "cifar_wrn16_8", "cifar_wrn28_10")
        },
        "alexnet.untrained": _config(224, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "classifier.6", 1000),
    }
)


def _cifar(name: str, pretrained: bool, depth: int, base: int, wide: bool, **kwargs: Any) -> nn.Module:
    widths = (16, base, 2 * base, 4 * base)
    return build_model_with_cfg(CifarNet, name, pretrained, depth=depth, widths=widths, wide=wide, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for 32×32 images (He et al. 2015): 0.27 M parameters."""
    return _cifar("cifar_resnet20", pretrained, 20, 16, False, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for 32×32 images."""
    return _cifar("cifar_resnet32", pretrained, 32, 16, False, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for 32×32 images."""
    return _cifar("cifar_resnet56", pretrained, 56, 16, False, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_wrn16_8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Wide ResNet 16-8 for 32×32 images (Zagoruyko and Komodakis 2016): 11 M parameters."""
    return _cifar("cifar_wrn16_8", pretrained, 16, 128, True, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def cifar_wrn28_10(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Wide ResNet 28-10 for 32×32 images: 36 M parameters."""
    return _cifar("cifar_wrn28_10", pretrained, 28, 160, True, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def alexnet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AlexNet (torchvision's one-tower form)."""
    return build_model_with_cfg(AlexNet, "alexnet", pretrained, **kwargs)


def check_model_name(name: str) -> None:
    """Raise `UserError` with the closest names unless timm's registry has `name`."""
    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    hint = f"; the closest are {', '.join(close)}" if close else ""
    raise UserError(f"model.name = {name!r} is not in timm's registry{hint}")


def build_model(config: ModelConfig, num_classes: int, input_size: int | None = None) -> nn.Module:
    """A network with `num_classes` outputs, in timm's own form.

    Args:
        config: name, starting weights and further arguments.
        num_classes: outputs.
        input_size: image side; models whose parameters depend on it (vision transformers) are built for it.

    Raises:
        UserError: unknown name, a weights file that is unreadable or for another network, arguments that the model does not
            take, or trained weights for other classes without ``new_classifier``.
        OSError: the file system with the weights does not answer.
    """
    check_model_name(config.name)
    kwargs = dict(config.kwargs)
    default = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    if input_size is not None and default is not None and default.fixed_input_size:
        kwargs.setdefault("img_size", input_size)
    loading: AbstractContextManager[None] = nullcontext()
    if config.weights is not None:
        weights = read_weights(config.weights)
        loading = starting_weights(config.weights, config.name, weights, new_classifier=config.new_classifier)
    elif config.pretrained and default is not None:
        check(
            config.new_classifier or default.num_classes == num_classes,
            f"model.pretrained: the weights of {config.name} have {default.num_classes} classes, the data {num_classes}: add "
            "model.new_classifier = true to train a new classifier on them",
        )
    try:
        with loading:
            pretrained = config.pretrained or config.weights is not None
            return timm.create_model(config.name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model {config.name!r} could not be built with {kwargs}: {first_line}") from error

"""Plans for GPUs that are not here: the count of kernels, the published speeds that it is held against, and what is said."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from asp_dist import cli
from asp_dist.config import ClusterConfig, Config, DataConfig, ModelConfig, TrainingConfig
from asp_dist.errors import UserError
from asp_dist.planning.estimate import OtherMachine, estimate_run
from asp_dist.planning.gpus import Shares, find_gpu, read_gpus
from asp_dist.planning.plan_text import print_plan
from asp_dist.planning.roofline import count_step
from asp_dist.planning.step_time import counting_saved
from asp_dist.training.build import advice_for_gpus

# Images per second of training in mixed precision on one GPU, images per batch, side. RTX 3090: timm's
# results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv. A100: NVIDIA DeepLearningExamples, PyTorch ConvNets,
# resnet50v1.5/README.md and efficientnet/README.md, one GPU.
PUBLISHED = [
    ("resnet18", "RTX3090", 3481.78, 512, 224),
    ("resnet50", "RTX3090", 1218.01, 512, 224),
    ("mobilenetv3_large_100", "RTX3090", 2732.43, 512, 224),
    ("efficientnet_b0", "RTX3090", 1751.72, 512, 224),
    ("convnext_tiny", "RTX3090", 819.24, 256, 224),
    ("deit_small_patch16_224", "RTX3090", 1050.70, 384, 224),
    ("resnet50", "A100", 2470.0, 256, 224),
    ("efficientnet_b0", "A100", 2489.0, 256, 224),
    ("efficientnet_b4", "A100", 331.0, 64, 380),
]


@pytest.mark.parametrize(("name", "gpu", "published", "images", "side"), PUBLISHED)
def test_published_speeds_are_met_within_a_factor(name: str, gpu: str, published: float, images: int, side: int) -> None:
    counted = count_step(timm.create_model(name), (side, side), "bfloat16", state=1.0, average=False, pruned=0)
    speed = images / counted.seconds(find_gpu(gpu), images, Shares(), "bfloat16")
    assert 1 / 1.5 < speed / published < 1.5


def test_a_small_networks_kernels_are_counted_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False))
    counted = count_step(model, (2, 2), "float32", state=1.0, average=False, pruned=0)
    products = [kernel for kernel in counted.kernels if kernel.kind == "product"]
    # Forward, and the gradients of the weights and of the inputs, but for the images, whose nobody asks for.
    assert sum(kernel.flops for kernel in products) == 2 * (2 * 240 + 3 * 100)
    forward = products[0]
    assert (forward.flops, forward.bytes, forward.fixed) == (2 * 240, 4 * (12 + 20), 4 * 240)
    gpu = find_gpu("A100")
    one, many = (counted.seconds(gpu, images, Shares(), "float32") for images in (1, 10**9))
    assert one == pytest.approx(8e-6 * (len(counted.kernels) + counted.updates))  # the host's launches
    moved = sum(max(k.flops / (0.65 * 19.5e12), k.bytes / (0.8 * 2039e9)) for k in counted.kernels)
    assert many == pytest.approx(1e9 * moved, rel=1e-6)


def test_attention_is_one_kernel_each_way_and_the_network_stays_as_it_is() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counted = count_step(model, (224, 224), "bfloat16", state=2.0, average=True, pruned=10)
    names = [kernel.name for kernel in counted.kernels]
    assert names.count("attention") == names.count("attention_backward") == 2
    forward = next(kernel for kernel in counted.kernels if kernel.name == "attention")
    assert forward.flops == 4 * 3 * 197 * 64 * 197  # two products of queries, keys and values of three heads
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def recipe(**training: Any) -> Config:
    return Config(
        model=ModelConfig(name="resnet18"),
        data=DataConfig(root="/nowhere/imagenet", batch_size=1024),
        training=TrainingConfig(**{"precision": "bfloat16", **training}),
        cluster=ClusterConfig(num_workers=8),
    )


def test_a_plan_for_gpus_gives_hours_dollars_memory_and_decoding() -> None:
    plan = estimate_run(recipe(), other=OtherMachine(find_gpu("a100"), price=2.5))
    assert plan.step is None and plan.gpu is not None  # nothing was timed on this CPU
    gpu = plan.gpu
    images = plan.schedule["steps"] * 1024
    training = images / (8 * gpu["images_per_second"]) / 3600
    assert training < gpu["hours"] < 1.1 * training  # with a validation per epoch
    assert gpu["dollars"] == pytest.approx(2.5 * 8 * gpu["hours"])
    assert gpu["decoding_cores"] == pytest.approx(8 * gpu["images_per_second"] / 385)
    assert 1e9 < plan.memory["activations"] < 4e9  # 128 images of ResNet-18, half the bytes of float32
    out = io.StringIO()
    print_plan(plan, file=out)
    for part in ("hours on 8 of them", "65% of its peak, 80% of its bandwidth", "dollars", "CPU cores", "NVIDIA A100"):
        assert part in out.getvalue()


def test_twice_the_peaks_take_half_the_time_and_accumulation_the_launches_twice() -> None:
    slow = estimate_run(recipe(), other=OtherMachine(find_gpu("L4"), Shares(0.3, 0.4, 0.06))).gpu
    fast = estimate_run(recipe(), other=OtherMachine(find_gpu("L4"), Shares(0.6, 0.8, 0.12))).gpu
    assert slow is not None and fast is not None
    assert slow["step"]["per_image"] == pytest.approx(2 * fast["step"]["per_image"], rel=1e-6)
    twice = estimate_run(recipe(accumulate=2), other=OtherMachine(find_gpu("L4"), Shares(0.6, 0.8, 0.12))).gpu
    assert twice is not None and twice["step"]["fixed"] > 1.5 * fast["step"]["fixed"]


def test_a_run_for_gpus_is_not_timed_on_a_cpu_and_says_how_to_plan_it() -> None:
    plan = estimate_run(recipe())
    assert plan.step is None and plan.scaling == []
    assert any("--gpu A100" in text for text in plan.assumptions)


def test_what_does_not_fit_the_card_and_what_it_cannot_do_are_warnings() -> None:
    plan = estimate_run(recipe(), other=OtherMachine(find_gpu("T4")))
    assert any("does not compute in bfloat16" in text for text in plan.warnings)
    big = estimate_run(Config(model=ModelConfig(name="resnet50"), data=recipe().data), other=OtherMachine(find_gpu("L4")))
    assert any("do not fit the 24 GB of L4" in text for text in big.warnings)  # 512 images each, in float32


def test_what_would_leave_a_gpu_idle_is_a_warning() -> None:
    def advice(name: str, side: int, workers: int, **training: Any) -> list[str]:
        return advice_for_gpus(recipe(**training), timm.create_model(name), side, workers)

    images = recipe().data.batch_size
    assert advice("resnet50", 224, images // 32, channels_last=True) == []
    (few,) = advice("resnet50", 224, images // 16, channels_last=True)
    assert "each GPU gets 16 images" in few
    slow = advice("resnet50", 224, images // 32, precision="float32")
    assert len(slow) == 2 and "bfloat16" in slow[0] and "channels_last" in slow[1]
    assert advice("resnet50", 32, images // 32, precision="float32") == []  # small images: the arithmetic is not what counts
    assert advice("deit_small_patch16_224", 224, images // 32) == []  # its one convolution gains nothing
    plan = estimate_run(recipe(), other=OtherMachine(find_gpu("A100")))
    assert any("channels_last" in text for text in plan.warnings) == (not recipe().training.channels_last)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_100"])
def test_what_autograd_keeps_is_the_same_on_the_meta_device(name: str) -> None:
    """Views share their storage there too; the CPU's own kernels save a few buffers more, or fewer."""
    model = timm.create_model(name)
    kept = {}
    for device in ("cpu", "meta"):
        model.to(device)
        with counting_saved(model) as total:
            model(torch.zeros(2, 3, 224, 224, device=device)).sum()
        kept[device] = total[0]
    assert kept["meta"] == pytest.approx(kept["cpu"], rel=0.02)


def test_a_layer_that_the_budget_would_empty_is_named() -> None:
    plan = estimate_run(Config(model=ModelConfig(name="resnet50"), data=recipe().data), measure_s=0)
    left = {row["name"]: round(row["weights"] * (1 - row["measured_sparsity"])) for row in plan.layers if row["pruned"]}
    empty = [name for name, count in left.items() if count == 0]
    named = [text for text in plan.warnings if "no weights would be left" in text]
    assert len(named) == bool(empty) and all(name in named[0] for name in empty)


def test_gpus_of_ones_own_can_be_added(tmp_path: Path) -> None:
    file = tmp_path / "gpus.yaml"
    file.write_text("Mine: {memory: 8e9, bandwidth: 100e9, half: 10e12, float32: 5e12, source: measured}\n")
    table = read_gpus(file)
    assert table["Mine"].half == 10e12 and table["Mine"].tf32 is None and len(table) > 8
    assert all(gpu.source and gpu.memory > 1e9 and gpu.half > gpu.float32 for gpu in table.values())
    with pytest.raises(UserError, match=r"--gpu H1000 is not in the table: choose among .*H100"):
        find_gpu("H1000")
    file.write_text("Mine: {memory: 8e9}\n")
    with pytest.raises(UserError, match="is no table of GPUs"):
        read_gpus(file)
    with pytest.raises(UserError, match="No such file"):
        read_gpus(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--price", "2"), "give --gpu"),
        (("--gpu", "A100", "--price", "-1"), "--price -1.0 must be greater than 0"),
        (("--gpu", "A100", "--share", "1.5"), "share of arithmetic = 1.5 is outside (0, 1]"),
        (("--gpu", "Z9"), "choose among"),
    ],
)
def test_mistakes_are_answered(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str) -> None:
    assert cli.main(["plan", "configs/quickstart.yaml", *options]) == 2
    assert words in capsys.readouterr().err

"""`bench data`: the numbers it derives, and a small run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from data_helpers import config

from asp_dist.bench.loader_speed import LoaderTiming, _summary, bench_data, print_bench, repeated
from asp_dist.data import prepare_digits
from asp_dist.data.base import LoaderOptions
from asp_dist.data.images import ImageSpec
from asp_dist.data.info import open_data_set
from asp_dist.errors import UserError


def test_repeated_samples_are_whole_rounds(tmp_path: Path) -> None:
    samples = open_data_set(config(prepare_digits(tmp_path / "d"))).val
    many = repeated(samples, 1000)
    assert len(many) == 3 * 359
    assert many.names[359 + 5] == samples.names[5] and many.labels[718 + 7] == samples.labels[7]
    assert len(repeated(samples, 10)) == 359


def test_the_summary_uses_medians_and_counts_cores(tmp_path: Path) -> None:
    samples = open_data_set(config(prepare_digits(tmp_path / "d"))).val
    rates = {
        "read": 5000.0,
        "decode": 400.0,
        "random-crop decode": 500.0,
        "DALI, training": 300.0,
        "timm, training": 100.0,
        "torchvision, training": 150.0,
        "DALI, validation": 200.0,
        "timm, validation": 100.0,
        "torchvision, validation": 100.0,
    }
    runs = {name: [LoaderTiming(rate * k, 2 / rate / k) for k in (1, 9, 1 / 9)] for name, rate in rates.items()}
    options = LoaderOptions(ImageSpec(), config(tmp_path).augment, torch.device("cpu"), threads=2)
    result = _summary(runs, samples, options, "resnet50", required_rate=1000.0)
    assert result["sources"]["DALI, training"]["share_of_decode"] == pytest.approx(0.6)
    assert result["sources"]["DALI, validation"]["share_of_decode"] == pytest.approx(0.5)
    assert result["ratios"]["DALI / torchvision, training"] == pytest.approx(2.0)
    assert result["ratios"]["DALI / timm, validation"] == pytest.approx(2.0)
    assert result["ratios_cpu"]["DALI / torchvision, training"] == pytest.approx(2.0)
    assert result["sources"]["DALI, training"]["share_of_decode_cpu"] == pytest.approx(0.6)
    assert result["cores_needed"] == 7  # 1,000 images/s x 2/300 processor seconds, rounded up


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = prepare_digits(tmp_path / "d")
    result = bench_data(
        root,
        model="resnet18",
        input_size=16,
        batch_size=359,
        samples=10,
        rounds=1,
        threads=1,
        required_rate=50,
        progress=False,
    )
    assert all(row["images_per_second"] > 0 for row in result["sources"].values()) and len(result["sources"]) == 9
    print_bench(result)
    assert "resnet18 trains 50 images/s" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such model"):
        bench_data(root, model="resnet5")

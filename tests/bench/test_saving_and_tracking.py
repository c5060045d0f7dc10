"""`bench saving` and `bench tracking`: the stretches are real ones, and the figures are consistent."""

from __future__ import annotations

import io

import pytest

from asp_dist.bench.saving_and_tracking import bench_extra, print_extra
from asp_dist.errors import UserError


@pytest.mark.parametrize("what", ["saving", "tracking"])
def test_figures(what: str) -> None:
    result = bench_extra(what, "cifar_resnet20", batch_size=4, input_size=8, steps=10, rounds=2)
    without, with_ = result["seconds"]["without"], result["seconds"]["with"]
    assert len(without) == len(with_) == 2
    assert result["ratios"] == pytest.approx([with_[0] / without[0], with_[1] / without[1]])
    # Weights, dense weights and momentum are 4 bytes each.
    if what == "saving":
        assert result["bytes"] > 3 * 4 * 270_000
    file = io.StringIO()
    print_extra(result, file)
    assert "cifar_resnet20 at 8²" in file.getvalue()


@pytest.mark.parametrize(("what", "steps"), [("saving", 1), ("tracking", 15)])
def test_stretches_that_would_miss_what_is_measured_are_refused(what: str, steps: int) -> None:
    with pytest.raises(UserError, match=f"--steps {steps}"):
        bench_extra(what, "cifar_resnet20", steps=steps)

"""The trainer on two ranks: sharded weights, and bad numbers on one rank alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import on_ranks
from small_runs import StopAt, small_config
from torch import Tensor

from asp_dist.config import BudgetConfig
from asp_dist.training import trainer
from asp_dist.training.hooks import Stopped
from asp_dist.training.trainer import forward_backward, train
from asp_dist.training.world import init_world

pytestmark = pytest.mark.slow


def poisoned(run: Any, images: Tensor, targets: Tensor, *, last: bool) -> Tensor:
    """A NaN on rank 1 alone: in an image before the gradients are exchanged, in a gradient after it."""
    rank = dist.get_rank()
    if run.step == 3 and rank == 1:
        images = images * float("nan")
    loss = forward_backward(run, images, targets, last=last)
    if run.step == 5 and rank == 1:
        run.model.fc.weight.grad[0, 0] = float("nan")
    return loss


def refuse() -> None:
    raise ValueError("no")


def two_ranks(folder: Path) -> dict[str, Any]:
    """What one of two ranks finds."""
    world = init_world("cpu", 60)
    found: dict[str, Any] = {}

    # FSDP2, clipped: stopped and resumed against uninterrupted.
    # Both read channels_last images; weights stay contiguous, which FSDP2 asks for.
    changes = {
        "training__parallel": "fsdp",
        "training__channels_last": True,
        "optimizer__clip_grad": 0.5,
        "schedule__epochs": 2,
    }
    summary = train(small_config(folder, "whole", **changes), world)
    try:
        # Four steps, two in the validation, one more.
        train(small_config(folder, "parts", **changes), world, StopAt(7))
    except Stopped as stopped:
        found["stopped"] = stopped.step
    train(small_config(folder, "parts", **changes), world)
    found["fsdp"] = {k: summary[k] for k in ("sparsity", "nonzero_weights", "world_size", "bad_steps")}

    # Started from that one's state, on to fewer weights.
    sparser = {"budget": BudgetConfig(sparsity=0.95), "resume__from_run": str(folder / "whole")}
    summary = train(small_config(folder, "sparser", **changes, **sparser), world)
    found["sparser"] = {k: summary[k] for k in ("nonzero_weights", "world_size", "bad_steps")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward_backward", poisoned)
        summary = train(small_config(folder, "bad", pruning__agreement_every=1), world)
        found["bad"] = {k: summary[k] for k in ("sparsity", "bad_steps", "steps")}
        # In float16 an overflow of the gradients alone would be the scaler's business; the epoch ends at that step.
        summary = train(small_config(folder, "half", training__precision="float16"), world)
        found["half"] = {k: summary[k] for k in ("bad_steps", "steps")}

    # Another error on rank 0 alone reaches every rank.
    try:
        world.on_main(refuse)
    except ValueError as error:
        found["error"] = str(error)
    world.close()
    return found


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The runs' folder, and what both ranks found."""
    folder = tmp_path_factory.mktemp("two")
    found, same = on_ranks(two_ranks, folder)
    assert found == same
    return folder, found


def test_sharded_weights_resume_bit_for_bit(outcome: tuple[Path, dict[str, Any]]) -> None:
    folder, found = outcome
    assert found["stopped"] == 5
    assert found["fsdp"]["sparsity"] == pytest.approx(0.9, abs=5e-4) and found["fsdp"]["bad_steps"] == 0
    for file in ("model.safetensors", "optimizer.safetensors", "pruner.safetensors"):
        one, two = ((folder / name / "checkpoints" / "step-00000008" / file).read_bytes() for name in ("whole", "parts"))
        assert one == two, file
    assert (folder / "whole" / "model.safetensors").read_bytes() == (folder / "parts" / "model.safetensors").read_bytes()


def test_sharded_weights_start_another_run(outcome: tuple[Path, dict[str, Any]]) -> None:
    assert outcome[1]["sparser"] == {"nonzero_weights": 13_363, "world_size": 2, "bad_steps": 0}


def test_bad_numbers_on_one_rank_are_skipped_by_all(outcome: tuple[Path, dict[str, Any]]) -> None:
    assert outcome[1]["bad"] == {"sparsity": pytest.approx(0.9, abs=5e-4), "bad_steps": 2, "steps": 12}


def test_a_loss_that_overflows_on_one_rank_in_float16_is_skipped_by_all(outcome: tuple[Path, dict[str, Any]]) -> None:
    assert outcome[1]["half"] == {"bad_steps": 1, "steps": 12}


def test_an_error_on_the_first_rank_reaches_all(outcome: tuple[Path, dict[str, Any]]) -> None:
    assert outcome[1]["error"] == "no"

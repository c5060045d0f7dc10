"""The trainer on two ranks: sharded weights, and bad numbers on one rank alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import torchrun

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from small_runs import StopAt, small_config
from asp_dist.training import trainer
from asp_dist.training.hooks import Stopped
from asp_dist.checkpoint.record import run_dir
from asp_dist.training.trainer import train
from asp_dist.training.world import init_world

torch.set_num_threads(1)
folder = Path(sys.argv[1])
world = init_world("cpu", 60)
found = {}

# FSDP2, clipped: stopped and resumed against uninterrupted.
changes = {"training__parallel": "fsdp", "optimizer__clip_grad": 0.5, "schedule__epochs": 2}
summary = train(small_config(folder, "whole", **changes), world)
try:
    train(small_config(folder, "parts", **changes), world, StopAt(7))  # four steps, two in the validation, one more
except Stopped as stopped:
    found["stopped"] = stopped.step
train(small_config(folder, "parts", **changes), world)
found["fsdp"] = {k: summary[k] for k in ("sparsity", "nonzero_weights", "world_size", "bad_steps")}

# A NaN on rank 1 alone: in an image before the gradients are exchanged, in a gradient after it.
original = trainer.forward_backward

def poisoned(run, images, targets, *, last):
    if run.step == 3 and world.rank == 1:
        images = images * float("nan")
    loss = original(run, images, targets, last=last)
    if run.step == 5 and world.rank == 1:
        run.model.fc.weight.grad[0, 0] = float("nan")
    return loss

trainer.forward_backward = poisoned
config = small_config(folder, "bad", pruning__agreement_every=1)
summary = train(config, world)
found["bad"] = {k: summary[k] for k in ("sparsity", "bad_steps", "steps")}
found["all"] = world.gather({"bad": summary["bad_steps"]})

# The same in float16, where an overflow of the gradients alone would be the scaler's business; the epoch ends at that step.
summary = train(small_config(folder, "half", training__precision="float16"), world)
found["half"] = world.gather({k: summary[k] for k in ("bad_steps", "steps")})

# Another error on rank 0 alone reaches every rank.
def refuse():
    raise ValueError("no")

try:
    world.on_main(refuse)
except ValueError as error:
    found["errors"] = world.gather(str(error))
if world.is_main:
    (folder / "found.json").write_text(json.dumps(found))
world.close()
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    done = torchrun(folder / "script.py", str(folder))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return folder, found


@pytest.mark.slow
def test_sharded_weights_resume_bit_for_bit(outcome: tuple[Path, dict[str, Any]]) -> None:
    folder, found = outcome
    assert found["stopped"] == 5
    assert found["fsdp"]["sparsity"] == pytest.approx(0.9, abs=5e-4) and found["fsdp"]["bad_steps"] == 0
    for file in ("model.safetensors", "optimizer.safetensors", "pruner.safetensors"):
        one, two = ((folder / name / "checkpoints" / "step-00000008" / file).read_bytes() for name in ("whole", "parts"))
        assert one == two, file
    assert (folder / "whole" / "model.safetensors").read_bytes() == (folder / "parts" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_bad_numbers_on_one_rank_are_skipped_by_all(outcome: tuple[Path, dict[str, Any]]) -> None:
    _, found = outcome
    assert found["bad"] == {"sparsity": pytest.approx(0.9, abs=5e-4), "bad_steps": 2, "steps": 12}
    assert found["all"] == [{"bad": 2}, {"bad": 2}]


@pytest.mark.slow
def test_a_loss_that_overflows_on_one_rank_in_float16_is_skipped_by_all(outcome: tuple[Path, dict[str, Any]]) -> None:
    assert outcome[1]["half"] == [{"bad_steps": 1, "steps": 12}] * 2


@pytest.mark.slow
def test_an_error_on_the_first_rank_reaches_all(outcome: tuple[Path, dict[str, Any]]) -> None:
    assert outcome[1]["errors"] == ["no", "no"]

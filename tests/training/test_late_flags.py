"""Steps whose flags the host reads one step late, as on a GPU; here on the CPU, which has fused optimizers too."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device_form import on_the_device
from fake_cuda import DEVICE, Launches, as_fake_cuda
from ranks import on_ranks
from small_runs import small_config, with_changes
from test_resume import curve, last_state
from test_training import make_run, poison
from test_training_distributed import poisoned
from torch._subclasses.fake_tensor import DataDependentOutputException

from asp_dist.checkpoint.record import run_dir
from asp_dist.config import Config
from asp_dist.pruning.kernels import device_control
from asp_dist.tracking import read_rows
from asp_dist.training import health, trainer
from asp_dist.training.health import BadNumbers, LateFlags, StepDecision
from asp_dist.training.hooks import Hooks, Stopped
from asp_dist.training.run import Run, build_run
from asp_dist.training.trainer import forward_backward as plain_forward_backward
from asp_dist.training.trainer import train
from asp_dist.training.world import World, init_world


def config_of(folder: Path, **changes: Any) -> Config:
    return with_changes(small_config(folder, optimizer__kwargs={"fused": True}, output__checkpoint_minutes=None), **changes)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Runs are late, and prune in the form of a GPU; gets whether each step was."""
    reads = health.reads_late
    found = []

    def reads_late(run: Run) -> bool:
        found.append(reads(run))
        return found[-1]

    monkeypatch.setattr(trainer, "build_run", late_build)
    monkeypatch.setattr(health, "reads_late", reads_late)
    return found


def skipped(config: Config) -> list[str]:
    rows = read_rows(run_dir(config) / "metrics.jsonl")
    return [str(row["message"]) for row in rows if row.get("event") == "skipped_step"]


def test_reading_late_changes_no_bit(tmp_path: Path, late: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (config_of(tmp_path / name) for name in ("late", "now"))
    train(one, World())
    assert late == [True] * 12
    monkeypatch.setattr(health, "reads_late", lambda run: False)
    train(two, World())
    states = [last_state(run_dir(config)) for config in (one, two)]
    assert all(torch.equal(tensor, states[1]["model"][name]) for name, tensor in states[0]["model"].items())
    assert curve(run_dir(one)) == curve(run_dir(two))


@pytest.mark.parametrize("how", ["image", "gradient"])
def test_a_bad_step_is_skipped_on_the_device(
    tmp_path: Path, late: list[bool], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Found one step later, it is counted, and batch norm is as before it; then the host looks at once for a while."""
    config = config_of(tmp_path)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    original = trainer.update

    def remember(run: Run, loss: torch.Tensor) -> StepDecision:
        decision = original(run, loss)
        seen[run.step] = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        return decision

    monkeypatch.setattr(trainer, "update", remember)
    poison(monkeypatch, {5}, how)
    summary = train(config, World())
    assert late[:7] == [True] * 7 and not any(late[7:])
    for name, tensor in seen[4].items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(seen[5][name], tensor), name
    assert all(bool(tensor.isfinite().all()) for tensor in seen[6].values())
    assert summary["bad_steps"] == 1 and summary["sparsity"] == pytest.approx(0.9, abs=5e-4)
    assert skipped(config) == ["step 6 skipped: its loss or gradients were not finite"]


def test_a_bad_step_is_found_before_a_checkpoint_and_at_the_end(
    tmp_path: Path, late: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    poison(monkeypatch, {3, 11}, "image")  # the last steps of an epoch and of the run
    summary = train(config, World())
    assert len(skipped(config)) == 2 and summary["bad_steps"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in last_state(run_dir(config))["model"].values())


class ByHand(Hooks):
    """The average of the weights over the steps that were not bad, by timm's formula."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad
        self.average: dict[str, torch.Tensor] = {}

    def after_step(self, run: Run) -> None:
        assert run.ema is not None
        if run.step - 1 not in self.bad:
            decay = run.ema.get_decay(run.step)
            for name, weight in run.model.named_parameters():
                before = self.average.get(name, torch.zeros_like(weight))
                self.average[name] = (decay * before + (1.0 - decay) * weight).detach()


@pytest.mark.parametrize("bad", [{5}, {3, 9}])
def test_a_bad_step_never_reaches_the_average(
    tmp_path: Path, late: list[bool], monkeypatch: pytest.MonkeyPatch, bad: set[int]
) -> None:
    """Neither in the middle of an epoch nor at its end; batch norm's statistics would stay bad in there."""
    poison(monkeypatch, bad, "image")
    config, hooks = config_of(tmp_path, training__ema_decay=0.9), ByHand(bad)
    train(config, World(), hooks)
    average = last_state(run_dir(config))["ema"]
    assert any(late) and len(skipped(config)) == len(bad)
    assert all(bool(tensor.isfinite().all()) for tensor in average.values())
    for name, expected in hooks.average.items():
        assert torch.allclose(average[name], expected, atol=1e-6), name


def test_the_average_is_the_same_read_late_or_not(tmp_path: Path, late: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (config_of(tmp_path / name, training__ema_decay=0.9) for name in ("late", "now"))
    train(one, World())
    assert late == [True] * 12
    monkeypatch.setattr(health, "reads_late", lambda run: False)
    train(two, World())
    mine, theirs = (last_state(run_dir(config))["ema"] for config in (one, two))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_too_many_bad_steps_end_the_run(tmp_path: Path, late: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, training__max_bad_steps=3)
    poison(monkeypatch, set(range(5, 100)), "gradient")
    with pytest.raises(BadNumbers, match=r"3 steps in a row.*layer2\.0\.conv1\.weight"):  # by the gradients of the third
        train(config, World())


def test_a_stop_comes_one_step_later_and_resumes_bit_for_bit(
    tmp_path: Path, late: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Hooks):
        run: Run | None = None

        def after_step(self, run: Run) -> None:
            self.run = run

        def stop_requested(self) -> str | None:
            return "SIGTERM" if self.run is not None and self.run.step == 5 else None

    whole, config = config_of(tmp_path / "whole"), config_of(tmp_path / "parts")
    train(whole, World())
    with pytest.raises(Stopped) as stopped:
        train(config, World(), Stop())
    assert stopped.value.step == 7  # asked for before step 6, agreed in it, read in the next
    train(config, World())
    states = [last_state(run_dir(one)) for one in (whole, config)]
    assert all(torch.equal(tensor, states[1]["model"][name]) for name, tensor in states[0]["model"].items())


class CountSums(Hooks):
    """How many all-reduces, but for those of the gradients, each step has made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.of_steps = 0, [0]

    def after_step(self, run: Run) -> None:
        self.of_steps.append(self.calls)


def late_ranks(folder: Path) -> dict[str, Any]:
    """What one of two ranks finds; bad numbers are on rank 1 alone, before the gradients are exchanged."""
    world = init_world("cpu", 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "build_run", late_build)
        patch.setattr(health, "WATCHED_STEPS", 0)
        reduce, hooks = dist.all_reduce, CountSums()

        def counted(*arguments: Any, **options: Any) -> Any:
            hooks.calls += 1
            return reduce(*arguments, **options)

        patch.setattr(dist, "all_reduce", counted)
        quiet = {"pruning__agreement_every": 1000, "training__log_every": 1000}
        train(config_of(folder / "quiet", **quiet), world, hooks)
        patch.setattr(trainer, "forward_backward", poisoned_at(3))
        summary = train(config_of(folder / "bad", pruning__agreement_every=1), world)
    world.close()
    sums = [after - before for before, after in zip(hooks.of_steps, hooks.of_steps[1:])]
    return {"sums": sums, **{name: summary[name] for name in ("sparsity", "bad_steps", "steps")}}


def poisoned_at(step: int) -> Callable[..., torch.Tensor]:
    def forward_backward(run: Run, images: torch.Tensor, targets: torch.Tensor, *, last: bool) -> torch.Tensor:
        if run.step == step and dist.get_rank() == 1:
            images = images * float("nan")
        return plain_forward_backward(run, images, targets, last=last)

    return forward_backward


def apart(folder: Path) -> str:
    """What one of two ranks says where a number goes bad on rank 1 alone after the exchange, by a fault of memory."""
    world = init_world("cpu", 60)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "build_run", late_build)
            patch.setattr(trainer, "forward_backward", poisoned)
            patch.setattr(health, "WATCHED_STEPS", 0)
            train(config_of(folder, pruning__agreement_every=1000), world)
    except RuntimeError as error:
        return str(error)
    finally:
        world.close()
    return ""


def late_build(*arguments: Any) -> Run:
    with on_the_device():
        run = build_run(*arguments)
    run.late = True
    return run


@pytest.mark.slow
def test_ranks_agree_on_a_bad_step_of_one_of_them_with_one_all_reduce_per_step(tmp_path: Path) -> None:
    one, other = on_ranks(late_ranks, tmp_path)
    assert one == other
    assert one["bad_steps"] == 1 and one["steps"] == 12 and one["sparsity"] == pytest.approx(0.9, abs=5e-4)
    # In the middle of each epoch of four steps, the last one's with the mask frozen; others log, validate or compare.
    assert [one["sums"][step] for step in (1, 2, 5, 6, 9, 10)] == [1] * 6


@pytest.mark.slow
def test_ranks_that_skipped_different_steps_end_the_run(tmp_path: Path) -> None:
    said = on_ranks(apart, tmp_path)
    assert said[0] == said[1] and "in step 6 numbers went bad on 1 of 2 ranks" in said[0]


class FakeFlags(LateFlags):
    """Fake tensors have no values to arrive."""

    def __init__(self, step: int, flags: torch.Tensor) -> None:
        self.step = step
        assert flags.device == DEVICE

    def decision(self) -> StepDecision:
        return health.GO_ON


def fused_sgd(*arguments: Any, found_inf: torch.Tensor, **options: Any) -> None:
    """Fake tensors know no fused optimizer; it takes the flag from the device."""
    assert found_inf.device == DEVICE and all(one.device == DEVICE for tensors in arguments for one in tensors)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Any]:
    """A run after its first step, all on a fake CUDA device, with gradients."""
    with on_the_device():
        run = make_run(
            config_of(
                tmp_path, optimizer__clip_grad=1.0, training__ema_decay=0.9, pruning__control="track", pruning__operator="power"
            )
        )
    run.late = True
    trainer.train_step(run, run.loaders.train.start(0))
    run.step = 1
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    mode = as_fake_cuda(run.model, run.optimizer, run.pruner, run.meter, run.buffers, run.ema)
    run.world = dataclasses.replace(run.world, device=DEVICE)
    monkeypatch.setattr(health, "LateFlags", FakeFlags)
    monkeypatch.setattr(device_control, "to_device", lambda values, device: values.to(device))
    monkeypatch.setattr(torch, "_fused_sgd_", fused_sgd)
    return run, mode


def fake_update(run: Run, mode: Any) -> list[str]:
    """What the update of the weights launches."""
    with warnings.catch_warnings(), mode, Launches() as seen:
        warnings.simplefilter("ignore", UserWarning)  # a fake tensor has no address
        run.buffers.keep(run.step)
        trainer.update(run, torch.zeros((), device=DEVICE))
    return seen.names


def test_an_update_reads_nothing_from_the_device(fake: tuple[Run, Any]) -> None:
    """The trainer's decision, clipping, the optimizer and the engine on fake CUDA tensors: a read would raise an error."""
    names = fake_update(*fake)
    print(names)
    assert {"threshold_products", "run_program", "write_layers", "linalg_vector_norm", "_foreach_lerp_"} <= set(names)
    assert names.count("copy_") == 1  # the flags; batch norm's counters go by one launch


def test_a_read_in_the_update_is_found(fake: tuple[Run, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = health.step_flags

    def reads(run: Run, loss: torch.Tensor, norm: torch.Tensor, *, checkpoint_due: bool) -> torch.Tensor:
        return original(run, loss * norm.item(), norm, checkpoint_due=checkpoint_due)

    monkeypatch.setattr(health, "step_flags", reads)
    with pytest.raises(DataDependentOutputException):
        fake_update(*fake)

"""The trainer in one process: what a step does, what stops it, what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from small_runs import StopAt, small_config, with_changes
from torch import Tensor, nn

from asp_dist.checkpoint.record import load_config, run_dir, with_absolute_paths
from asp_dist.config import Config, OptimizerConfig, ScheduleConfig, TrainingConfig
from asp_dist.errors import UserError
from asp_dist.tracking import read_rows
from asp_dist.training import trainer as trainer_module
from asp_dist.training.build import build_optimizer, build_scaler, build_scheduler
from asp_dist.training.evaluation import evaluate_model, evaluate_models, whole_batches
from asp_dist.training.health import BadNumbers
from asp_dist.training.hooks import Hooks, Stopped
from asp_dist.training.preflight import preflight
from asp_dist.training.run import Run, build_average, build_run
from asp_dist.training.trainer import train
from asp_dist.training.validation import validate
from asp_dist.training.world import World


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def rows(config: Config, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run_dir(config) / "metrics.jsonl") if row["kind"] == kind]


def events(config: Config, name: str) -> list[str]:
    return [str(row["message"]) for row in rows(config, "event") if row["event"] == name]


def make_run(config: Config) -> Run:
    from asp_dist.training.checkpointing import build_checkpoint_manager

    return build_run(config, World(), Hooks(), build_checkpoint_manager(config, "x"), "x")


# The parts.


def test_schedule_in_steps_follows_the_epochs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = ScheduleConfig(name="cosine", epochs=10, warmup_epochs=2.5, warmup_lr=0.1)
    scheduler = build_scheduler(config, optimizer, steps_per_epoch=4)
    seen = []
    for step in (0, 5, 10, 40):
        scheduler.step_update(step)
        seen.append(optimizer.param_groups[0]["lr"])
    expected = 0.5 * (1 + torch.cos(torch.tensor(torch.pi / 4)))  # a quarter of the way, after the warm-up
    assert seen == pytest.approx([0.1, 0.55, float(expected), 0.0])


@pytest.mark.parametrize("name", ["step", "multistep", "poly", "tanh", "wsd", "constant"])
def test_schedules_of_timm_can_be_built(name: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = ScheduleConfig(name=name, epochs=4, decay_epochs=(2,))
    build_scheduler(config, optimizer, steps_per_epoch=4).step_update(3)
    assert 0 < optimizer.param_groups[0]["lr"] <= 1.0


@pytest.mark.parametrize("name", ["plateau", "zigzag"])
def test_unknown_schedule(name: str) -> None:
    with pytest.raises(UserError, match=f"schedule.name = '{name}'"):
        build_scheduler(ScheduleConfig(name=name), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 4)


def test_optimizer_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    adam = build_optimizer(OptimizerConfig(name="adamw", lr=0.1, momentum=0.8, weight_decay=0.3), model)
    assert adam.param_groups[0]["betas"] == (0.8, 0.999)
    assert {len(g["params"]): g["weight_decay"] for g in adam.param_groups} == {3: 0.0, 1: 0.3}
    sgd = build_optimizer(OptimizerConfig(momentum=0.7), model)
    assert sgd.param_groups[0]["momentum"] == 0.7 and sgd.param_groups[0]["nesterov"]
    with pytest.raises(UserError, match=r"optimizer\.name = 'sdg'.*sgd"):
        build_optimizer(OptimizerConfig(name="sdg"), model)
    with pytest.raises(UserError, match="Nesterov momentum requires"):
        build_optimizer(OptimizerConfig(momentum=0.0), model)
    with pytest.raises(UserError, match=r"optimizer\.kwargs"):
        build_optimizer(OptimizerConfig(kwargs={"color": 3}), model)


def test_average_and_scaler_are_optional() -> None:
    model = nn.Linear(1, 1)
    assert build_average(TrainingConfig(), model) is None
    assert build_average(TrainingConfig(ema_decay=0.9), model) is not None
    assert build_scaler(TrainingConfig(precision="bfloat16"), torch.device("cpu")) is None
    assert build_scaler(TrainingConfig(precision="float16"), torch.device("cpu")) is not None


# Validation.


class Fixed(nn.Module):
    """Class = the image's first value."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 8).float() * 4 - torch.arange(8.0) / 100


def test_validation_counts_by_hand() -> None:
    images = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    batches = [
        (images[:3], torch.tensor([0, 1, 7])),  # two right; 7 is not among the five best of class 2
        (images[3:], torch.tensor([0])),  # wrong, but among the five best
        (images[:0], torch.tensor([], dtype=torch.int64)),
    ]
    found = evaluate_model(Fixed(), batches, TrainingConfig(), World())
    logits = Fixed()(images)
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 7, 0]))
    assert found == {"val/loss": pytest.approx(float(loss)), "val/top1": 0.5, "val/top5": 0.75, "val/samples": 4}


def test_several_models_are_judged_in_one_reading_of_the_batches() -> None:
    batches = [(torch.rand(4, 3, 2, 2), torch.randint(8, (4,))) for _ in range(3)]
    models = [nn.Sequential(nn.Flatten(), nn.Linear(12, 8)) for _ in range(2)]
    alone = [evaluate_model(model, batches, TrainingConfig(), World()) for model in models]
    assert evaluate_models(models, iter(batches), TrainingConfig(), World()) == alone
    assert alone[0]["val/loss"] != alone[1]["val/loss"]


def test_batches_are_filled_up_to_one_shape() -> None:
    images = torch.rand(5, 3, 2, 2)
    batches = [(images, torch.arange(5)), (images[:2], torch.arange(2)), (images[:0], torch.arange(0))]
    shapes = []
    for (real, _), (filled, targets) in zip(batches, whole_batches(batches)):
        shapes.append((len(filled), len(targets)))
        assert torch.equal(filled[: len(targets)], real) and not filled[len(targets) :].any()
    assert shapes == [(5, 5), (5, 2), (5, 0)]
    assert [len(filled) for filled, _ in whole_batches(batches[:1:-1])] == [1]  # a rank without any images


def test_validation_of_fewer_classes_than_five() -> None:
    batches = [(torch.zeros(2, 3, 1, 1), torch.tensor([0, 1]))]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    assert evaluate_model(model, batches, TrainingConfig(), World())["val/top5"] == 1.0


# Runs.


def test_a_whole_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, training__ema_decay=0.5)
    hooks = StopAt(1000)
    summary = train(config, World(), hooks)
    folder = run_dir(config)
    assert summary["steps"] == 12 and summary["epochs"] == 3 and summary["bad_steps"] == 0
    assert summary["sparsity"] == pytest.approx(0.9, abs=5e-4) and summary["val_samples"] == 30
    assert {"top1", "top5", "target_sparsity", "nonzero_weights", "prunable_weights", "total_weights"} <= summary.keys()
    assert json.loads((folder / "summary.json").read_text())["top1"] == summary["top1"]
    assert [row["step"] for row in rows(config, "train")] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows(config, "eval")] == [4, 8, 12]
    assert "val/ema_top1" in rows(config, "eval")[0]
    assert [report["epoch"] for report in hooks.reports] == [1, 2, 3]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert load_config(folder) == with_absolute_paths(config)
    again = train(config, World())  # finished: nothing is trained again
    assert again["finished"] == summary["finished"]


def test_the_model_stays_the_plain_timm_model(tmp_path: Path) -> None:
    config = small_config(tmp_path, model__name="resnet18", data__input_size=32)
    run = make_run(config)
    plain = timm.create_model("resnet18", num_classes=4)

    def nodes(model: nn.Module) -> int:
        seen, todo = set(), [model(torch.zeros(2, 3, 32, 32)).grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo.extend(parent for parent, _ in node.next_functions)
        return len(seen)

    assert list(run.model.state_dict()) == list(plain.state_dict())
    assert nodes(run.model) == nodes(plain)


def test_accumulation_is_the_whole_batch(tmp_path: Path) -> None:
    """Without batch norm, gradients of four micro-batches add up to that of the whole batch."""
    results = []
    for accumulate in (1, 4):
        config = small_config(tmp_path, f"a{accumulate}", training__accumulate=accumulate, pruning__enabled=False)
        run = make_run(config)
        linear = nn.Linear(3 * 8 * 8, 4)
        model = nn.Sequential(nn.Flatten(), linear).double()
        with torch.no_grad():
            linear.weight.fill_(0.01)
            linear.bias.zero_()
        run.model = run.ddp_model = model
        run.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.scheduler = build_scheduler(config.schedule, run.optimizer, 4)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64)
        targets = torch.arange(16) % 4
        trainer_module.train_step(run, iter(zip(images.chunk(accumulate), targets.chunk(accumulate))))
        results.append(linear.weight.detach().clone())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def test_clipping_bounds_the_gradient(tmp_path: Path) -> None:
    config = small_config(tmp_path, optimizer__clip_grad=1e-3, pruning__enabled=False)
    run = make_run(config)
    norms = []

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm()))

    run.optimizer.register_step_pre_hook(look)
    trainer_module.train_step(run, run.loaders.train.start(0))
    assert norms == pytest.approx([1e-3], rel=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_keeps_the_weights_in_float32(tmp_path: Path, precision: Any) -> None:
    config = small_config(
        tmp_path, training__precision=precision, training__channels_last=True, schedule__epochs=1, data__input_size=32
    )
    summary = train(config, World())
    assert summary["bad_steps"] == 0 and summary["sparsity"] == pytest.approx(0.9, abs=5e-4)


def test_mixup_and_smoothing(tmp_path: Path) -> None:
    from asp_dist.config import AugmentConfig

    config = small_config(
        tmp_path,
        data__augment=AugmentConfig(mixup=0.2, cutmix=1.0),
        training__label_smoothing=0.1,
        schedule__epochs=1,
    )
    train(config, World())
    assert rows(config, "train")[-1]["train/loss"] < 3.0


def test_max_steps_ends_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    config = small_config(tmp_path, training__max_steps=6)
    summary = train(config, World())
    assert summary["steps"] == 6 and summary["epochs"] == 2 and summary["sparsity"] == pytest.approx(0.9, abs=5e-4)
    assert [row["step"] for row in rows(config, "eval")] == [4, 6]


def test_best_counts_at_the_budget_only(tmp_path: Path) -> None:
    config = small_config(tmp_path, schedule__epochs=4)
    config = with_changes(config, pruning__ramp__freeze_at=0.75, output__keep=1)
    summary = train(config, World())
    assert summary["best"]["step"] in (12, 16)  # epochs 1 and 2 end above the budget, however good they are


# Bad numbers.


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int], how: str) -> None:
    """Let the batch of these steps hold a NaN, or its gradient an infinity in one layer."""
    original = trainer_module.forward_backward

    def poisoned(run: Run, images: Tensor, targets: Tensor, *, last: bool) -> Tensor:
        if run.step in steps and how == "image":
            images = images.clone()
            images[0] = float("nan")
        loss = original(run, images, targets, last=last)
        if run.step in steps and how == "gradient":
            run.model.get_parameter("layer2.0.conv1.weight").grad[0] = float("inf")  # type: ignore[index]
        return loss

    monkeypatch.setattr(trainer_module, "forward_backward", poisoned)


@pytest.mark.parametrize("how", ["image", "gradient"])
def test_a_bad_step_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    run = make_run(small_config(tmp_path, training__ema_decay=0.9))
    batches = run.loaders.train.start(0)
    trainer_module.train_step(run, batches)
    run.step = 1
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    assert run.ema is not None and run.pruner is not None
    average = {k: v.clone() for k, v in run.ema.module.state_dict().items()}
    thresholds, done = run.pruner.thresholds.clone(), run.pruner.steps
    poison(monkeypatch, {1}, how)
    orders = trainer_module.train_step(run, batches)
    assert orders.bad and run.bad_steps == 1 and run.skipped == 1 and run.pruner.steps == done
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())  # batch norm's statistics too
    assert all(torch.equal(average[k], v) for k, v in run.ema.module.state_dict().items())
    assert torch.equal(thresholds, run.pruner.thresholds)
    run.step = 2
    assert not trainer_module.train_step(run, batches).bad and run.bad_steps == 0


def test_bad_steps_are_counted_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path)
    poison(monkeypatch, {2, 5, 6}, "image")
    summary = train(config, World())
    assert summary["bad_steps"] == 3 and summary["sparsity"] == pytest.approx(0.9, abs=5e-4)
    assert len(events(config, "skipped_step")) == 3


def test_too_many_bad_steps_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, training__max_bad_steps=3)
    with monkeypatch.context() as patch:
        poison(patch, set(range(5, 100)), "gradient")
        with pytest.raises(BadNumbers, match=r"3 steps in a row.*step 8: .*layer2\.0\.conv1\.weight.*step-00000004"):
            train(config, World())
    assert train(config, World())["steps"] == 12  # from the last good checkpoint, with the cause gone
    assert events(config, "resume") == ["resumed from step-00000004 (4 of 12 steps)"]


def test_float16_overflow_lowers_the_scale_and_is_no_bad_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(small_config(tmp_path, training__precision="float16"))
    batches = run.loaders.train.start(0)
    trainer_module.train_step(run, batches)
    assert run.scaler is not None
    scale = run.scaler.get_scale()
    poison(monkeypatch, {0}, "gradient")
    assert trainer_module.train_step(run, batches).bad
    assert run.scaler.get_scale() == scale / 2 and run.bad_steps == 0 and run.skipped == 0


def test_weights_that_grow_back_behind_a_frozen_mask_end_the_run(tmp_path: Path) -> None:
    run = make_run(small_config(tmp_path))
    assert run.pruner is not None
    run.pruner.finalize()
    validate(run)
    with torch.no_grad():
        run.model.get_parameter("layer1.0.conv1.weight").fill_(0.5)
    with pytest.raises(BadNumbers, match=r"removed weights are not zero in layer1\.0\.conv1"):
        validate(run)


def test_dead_layers_are_told(tmp_path: Path) -> None:
    run = make_run(small_config(tmp_path))
    told: list[str] = []
    run.tracker.alert = lambda title, text: told.append(f"{title}: {text}")  # type: ignore[method-assign]
    with torch.no_grad():
        run.model.get_parameter("layer3.2.conv2.weight").zero_()
    validate(run)
    assert told == ["Dead layers: no weight is left in layer3.2.conv2; raise pruning.min_density"]


# Stopping, and the folder.


def test_stop_saves_and_says_so(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    with pytest.raises(Stopped, match="stopped by preemption after step 3; start the same command again"):
        train(config, World(), StopAt(3, "preemption"))
    assert [p.name for p in (run_dir(config) / "checkpoints").iterdir()] == ["step-00000003"]


def test_another_configuration_is_refused_readably(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    with pytest.raises(Stopped):
        train(config, World(), StopAt(2))
    changed = with_changes(config, optimizer__lr=0.2, training__log_every=1)
    for refuse in (preflight, lambda c: train(c, World())):
        with pytest.raises(UserError, match=r"another configuration:\n  optimizer\.lr: 0\.1 there, 0\.2 here\n"):
            refuse(changed)
    with pytest.raises(UserError, match=r"resume\.enabled is false"):
        preflight(with_changes(config, resume__enabled=False))
    train(with_changes(changed, resume__allow_changes=("optimizer.lr",)), World())
    assert "optimizer.lr 0.1 -> 0.2" in events(config, "resume")[0]
    assert yaml.safe_load((run_dir(config) / "config.yaml").read_text())["optimizer"]["lr"] == 0.2


def test_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run_dir(config).mkdir(parents=True)
    (run_dir(config) / "config.yaml").write_text("name: [")
    with pytest.raises(UserError, match=r"config\.yaml or run\.json cannot be read"):
        preflight(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(small_config(tmp_path / "file"), World())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2.5 MB: a checkpoint of these runs takes 3.3 MB, a model file 1.1 MB."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(tmp_path)], capture_output=True)
    if made.returncode:
        pytest.skip("needs root, to mount a small tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def fill_up(path: Path) -> None:
    """Write to `path` until nothing fits on its disk."""
    number = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        while os.write(number, bytes(1 << 12)):
            pass
    except OSError:
        os.close(number)


def test_a_full_disk_costs_the_checkpoints_and_is_said(small_disk: Path) -> None:
    config = small_config(small_disk)
    assert train(config, World())["steps"] == 12
    assert len([m for m in events(config, "warning") if "No space left on device" in m]) == 3
    assert list((run_dir(config) / "checkpoints").iterdir()) == []
    assert (run_dir(config) / "model.safetensors").stat().st_size > 10**6


def test_a_disk_without_any_room_ends_the_run_cleanly(small_disk: Path) -> None:
    config = small_config(small_disk)
    with pytest.raises(Stopped, match=r"after step 2 \(its checkpoint failed: .*No space left.*\)"):
        train(config, World(), StopAt(2))
    fill_up(small_disk / "other")
    with pytest.raises((OSError, UserError), match="No space left"):
        train(config, World())
    (small_disk / "other").unlink()
    assert train(config, World())["steps"] == 12


# Preflight.


def test_preflight_finds_what_fits(tmp_path: Path) -> None:
    found = preflight(small_config(tmp_path))
    assert (found.steps_per_epoch, found.total_steps, found.world_size, found.resumes) == (4, 12, 1, False)
    assert not run_dir(small_config(tmp_path)).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__name": "resnet81"}, r"'resnet81'.*resnet18"),
        ({"data__batch_size": 65}, r"65 is more than the 64 training images"),
        ({"training__accumulate": 3}, r"does not divide among 1 workers × training\.accumulate = 3"),
        ({"optimizer__name": "adamv"}, r"did you mean adam or "),
        ({"pruning__select__min_weights": 10**9}, r"no layer .* can be pruned"),
        ({"data__backend": "dali", "data__root": "/nonexistent/data"}, r"/nonexistent/data"),
        ({"schedule__name": "plateau"}, r"plateau"),
        ({"schedule__name": "none"}, r"choose constant"),
        ({"optimizer__name": "adahessian"}, r"second derivatives"),
        (
            {"model__name": "resnet18", "data__batch_size": 1, "data__input_size": 32},
            r"resnet18 does not train on 1 image\(s\) of 32×32 at once.*more than 1 value per channel",
        ),
        ({"model__name": "alexnet", "data__input_size": 32}, r"alexnet does not train on 16 image\(s\) of 32×32"),
        ({"model__name": "alexnet", "data__input_size": 64, "data__progressive_sizes": (32, 64)}, r"of 32×32"),
    ],
)
def test_preflight_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        preflight(small_config(tmp_path, **changes))


def test_preflight_counts_ray_workers_and_torchrun_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, cluster__mode="ray", cluster__num_workers=3)
    with pytest.raises(UserError, match="16 does not divide among 3 workers"):
        preflight(config)
    elastic = with_changes(config, cluster__min_workers=2)
    assert preflight(elastic).world_size == 2
    with pytest.raises(
        UserError, match=r"16 does not divide among 7 workers .*nor among any fewer, down to cluster.min_workers = 5"
    ):
        preflight(with_changes(config, cluster__num_workers=7, cluster__min_workers=5))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="16 does not divide among 3 workers"):
        preflight(config)  # some platform's, for whatever it starts
    assert preflight(with_changes(config, cluster__mode="local")).world_size == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert preflight(config).world_size == 2

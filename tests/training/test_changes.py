"""Every field of the configuration, changed when a run resumes: it shows its effect, or is refused with the reason."""

from __future__ import annotations

import dataclasses
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import digits_config, small_config, with_changes
from test_resume import curve, last_state

from asp_dist.checkpoint.record import run_dir
from asp_dist.config import FREE_ON_RESUME, BudgetConfig, Config, flatten, is_among, to_dict
from asp_dist.data import prepare_digits
from asp_dist.errors import UserError
from asp_dist.pruning import Budget, Pattern, Ramp
from asp_dist.tracking import read_rows
from asp_dist.training.hooks import Hooks, Stopped
from asp_dist.training.preflight import preflight
from asp_dist.training.run import Run
from asp_dist.training.trainer import train
from asp_dist.training.world import World

EFFECT = "effect"
# 12 steps, of which the checkpoint has 5: the target is reached after 7, the mask is frozen after 9.
RAMP = Ramp("cubic", 0.25, 0.6, freeze_at=0.75)
BASES: dict[str, dict[str, Any]] = {
    "track": {"pruning__control": "track", "pruning__ramp": RAMP},
    "frozen": {"pruning__control": "track", "pruning__ramp": RAMP},  # its checkpoint has 10 steps
    "centered": {"pruning__control": "track", "pruning__ramp": RAMP, "pruning__center": False},
    "power": {"pruning__control": "track", "pruning__ramp": RAMP, "pruning__operator": "power"},
    "blocks": {"pruning__control": "track", "pruning__ramp": RAMP, "pruning__pattern": Pattern(4)},
    "loss": {"pruning__ramp": RAMP},
    "dense": {"pruning__enabled": False, "pruning__ramp": Ramp(start=0.5, end=0.6, shape="linear")},
    "adamw": {"pruning__enabled": False, "optimizer__name": "adamw", "optimizer__lr": 0.002},
    "undecayed": {"pruning__enabled": False, "optimizer__weight_decay": 0.0},
    "step": {"pruning__enabled": False, "schedule__name": "step", "schedule__decay_epochs": (2.0,)},
    "warmed": {"pruning__enabled": False, "schedule__warmup_epochs": 1.0},
    "mixed": {"pruning__enabled": False, "data__augment__mixup": 1.0, "data__augment__cutmix": 1.0},
    "bce": {"pruning__enabled": False, "training__loss": "bce", "training__label_smoothing": 0.4},
    "decayed": {"pruning__enabled": False, "optimizer__layer_decay": 0.9},
    "averaged": {"pruning__enabled": False, "training__ema_decay": 0.9},
    "clipped": {"pruning__enabled": False, "optimizer__clip_grad": 0.05},
    "stalled": {"pruning__enabled": False, "optimizer__lr": 1e-9, "schedule__epochs": 8},
    "erased": {"pruning__enabled": False, "training__max_steps": 12, "data__augment__erase": 1.0},
    "spread": {
        **{"pruning__enabled": False, "training__max_steps": 12, "data__backend": "torch"},
        "data__augment__policy": "randaugment",
    },
    "digits": {"pruning__enabled": False, "training__max_steps": 12},
    "policy": {"pruning__enabled": False, "training__max_steps": 12, "data__augment__policy": "randaugment"},
}
TABLE: list[tuple[str, Any, str, str]] = [  # field, value, base, effect or the reason of the refusal
    ("model.name", "cifar_resnet32", "dense", "weights of another network"),
    ("model.pretrained", True, "dense", "this one has started"),
    ("model.weights", "weights.pth", "dense", "this one has started"),
    ("model.new_classifier", True, "dense", "this one has started"),
    ("model.kwargs", {"in_chans": 3, "num_classes": 5}, "dense", "multiple values"),
    ("data.root", "renamed", "digits", EFFECT),
    ("data.backend", "torch", "digits", EFFECT),
    ("data.format", "shards", "digits", "shard"),
    ("data.train", "val", "digits", "steps instead of 11"),
    ("data.val", "train", "digits", EFFECT),
    ("data.batch_size", 64, "digits", "steps instead of 11"),
    ("data.batch_size", 129, "digits", EFFECT),
    ("data.input_size", 16, "digits", EFFECT),
    ("data.progressive_sizes", (16,), "digits", EFFECT),
    ("data.synthetic_samples", (128, 30), "dense", "8 steps instead of 4"),
    ("data.synthetic_samples", (64, 40), "dense", EFFECT),
    ("data.synthetic_classes", 5, "dense", "does not fit this run"),
    ("data.select_fraction", 0.2, "digits", "steps instead of 11"),
    ("data.augment.scale", (0.3, 0.5), "digits", EFFECT),
    ("data.augment.ratio", (0.5, 0.6), "digits", EFFECT),
    ("data.augment.hflip", 1.0, "digits", EFFECT),
    ("data.augment.vflip", 1.0, "digits", EFFECT),
    ("data.augment.color_jitter", 0.5, "digits", EFFECT),
    ("data.augment.policy", "trivialaugment", "policy", EFFECT),
    ("data.augment.policy_ops", 4, "policy", EFFECT),
    ("data.augment.policy_prob", 0.5, "policy", EFFECT),
    ("data.augment.policy_increasing", False, "policy", EFFECT),
    ("data.augment.policy_magnitude", 30, "policy", EFFECT),
    ("data.augment.policy_ops", 4, "digits", "they are RandAugment's"),
    ("data.synthetic_classes", 5, "digits", "the data set says so itself"),
    ("data.root", "elsewhere", "dense", "reads and augments no image"),
    ("data.augment.erase", 1.0, "dense", "reads and augments no image"),
    ("data.augment.erase", 1.0, "digits", EFFECT),
    ("data.augment.pad", 2, "digits", EFFECT),
    ("data.augment.erase_mode", "pixel", "erased", EFFECT),
    ("data.augment.erase_count", 4, "erased", EFFECT),
    ("data.augment.erase_mode", "rand", "digits", "data.augment.erase is off"),
    ("data.augment.policy_std", 0.5, "dense", "RandAugment's and AugMix's"),
    ("data.augment.policy_std", 1.0, "spread", EFFECT),
    ("data.augment.repeats", 2, "digits", EFFECT),
    ("data.augment.mixup", 1.0, "digits", EFFECT),
    ("data.augment.cutmix", 1.0, "digits", EFFECT),
    ("data.augment.mixup_prob", 0.0, "mixed", EFFECT),
    ("data.augment.mixup_switch_prob", 0.0, "mixed", EFFECT),
    ("data.augment.mixup_off_epoch", 2, "mixed", EFFECT),
    ("data.augment.mixup_prob", 0.5, "dense", "mixup and cutmix are off"),
    ("optimizer.name", "adamw", "dense", "another optimizer's state"),
    ("optimizer.lr", 0.05, "dense", EFFECT),
    ("optimizer.lr_base_size", 8, "dense", EFFECT),
    ("optimizer.weight_decay", 0.01, "dense", EFFECT),
    ("optimizer.weight_decay", 0.01, "adamw", EFFECT),
    ("optimizer.weight_decay", 0.01, "undecayed", "different number of parameter groups"),
    ("optimizer.momentum", 0.5, "dense", EFFECT),
    ("optimizer.momentum", 0.5, "adamw", EFFECT),
    ("optimizer.layer_decay", 0.5, "decayed", EFFECT),
    ("optimizer.layer_decay", 0.5, "dense", "state does not fit"),
    ("optimizer.kwargs", {"nesterov": False}, "dense", EFFECT),
    ("optimizer.kwargs", {"eps": 0.1}, "adamw", EFFECT),
    ("optimizer.kwargs", {"amsgrad": True}, "adamw", "max_exp_avg_sq"),
    ("optimizer.clip_grad", 0.01, "dense", EFFECT),
    ("optimizer.clip_mode", "agc", "clipped", EFFECT),
    ("optimizer.clip_mode", "value", "clipped", EFFECT),
    ("optimizer.clip_mode", "value", "dense", "optimizer.clip_grad is off"),
    ("schedule.name", "poly", "dense", EFFECT),
    ("schedule.epochs", 4, "dense", EFFECT),
    ("schedule.epochs", 1, "dense", "5 steps are done, and the run would have 4"),
    ("schedule.warmup_epochs", 2.0, "dense", EFFECT),
    ("schedule.warmup_lr", 0.01, "warmed", "changes nothing from step 5 on"),
    ("schedule.min_lr", 0.02, "dense", EFFECT),
    ("schedule.decay_epochs", (2.5,), "step", EFFECT),
    ("schedule.decay_rate", 0.5, "step", EFFECT),
    ("schedule.decay_epochs", (2.5,), "dense", "changes nothing from step 5 on"),
    ("training.seed", 7, "digits", EFFECT),
    ("training.precision", "bfloat16", "dense", EFFECT),
    ("training.precision", "float16", "dense", EFFECT),
    ("training.channels_last", True, "dense", EFFECT),
    ("training.accumulate", 2, "dense", EFFECT),
    ("training.loss", "bce", "dense", EFFECT),
    ("training.bce_threshold", 0.05, "bce", EFFECT),
    ("training.bce_threshold", 0.2, "dense", "it is for training.loss = bce"),
    ("training.label_smoothing", 0.2, "dense", EFFECT),
    ("training.ema_decay", 0.5, "dense", EFFECT),
    ("training.ema_decay", 0.5, "averaged", EFFECT),
    ("training.ema_decay", None, "averaged", EFFECT),
    ("training.ema_warmup", False, "averaged", EFFECT),
    ("training.ema_start", 9, "averaged", EFFECT),
    ("training.ema_start", 9, "dense", "training.ema_decay is off"),
    ("training.grad_checkpointing", True, "dense", "has none .'CifarNet'"),
    ("training.patience", 1, "stalled", EFFECT),
    ("training.sync_batch_norm", True, "dense", "one worker has nothing to synchronize"),
    ("training.parallel", "fsdp", "dense", "in another form"),
    ("training.eval_every", 3, "dense", EFFECT),
    ("training.max_steps", 8, "dense", EFFECT),
    ("training.max_steps", 100, "dense", "changes nothing from step 5 on"),
    ("budget.cost", "macs", "track", EFFECT),
    ("budget.sparsity", 0.5, "track", EFFECT),
    ("budget.sparsity", 0.5, "loss", EFFECT),
    ("budget.density", 0.3, "track", EFFECT),
    ("budget.count", 100_000, "track", EFFECT),
    ("budget.bound", "at_most", "loss", EFFECT),
    ("budget.bound", "at_most", "track", "meets either in the same way"),
    ("budget.sparsity", 0.5, "dense", "pruning.enabled = False"),
    ("pruning.ramp.start", 0.55, "dense", "pruning.enabled = False"),
    ("budget.scope", "layer", "track", "other scope"),
    ("budget.also", (Budget.macs(density=0.5, bound="at_most"),), "track", "another number of budgets"),
    ("budget.sparsity", 0.5, "frozen", "its mask is frozen"),
    ("pruning.enabled", True, "dense", EFFECT),
    ("pruning.enabled", False, "track", "pruned already"),
    ("pruning.enabled", True, "adamw", "the ramp has begun"),
    ("pruning.control", "loss", "track", "another control's state"),
    ("pruning.loss.weight", 1.0, "loss", EFFECT),
    ("pruning.loss.threshold_lr", 0.5, "loss", EFFECT),
    ("pruning.loss.initial_threshold", 2.0, "loss", "this one has started"),
    ("pruning.loss.momentum", 0.1, "loss", EFFECT),
    ("pruning.loss.density", "measured", "loss", EFFECT),
    ("pruning.loss.multiplier", True, "loss", EFFECT),
    ("pruning.track.allocation", "uniform", "track", "this one has started"),
    ("pruning.track.rate", 0.1, "track", EFFECT),
    ("pruning.ramp.shape", "linear", "track", EFFECT),
    ("pruning.ramp.initial", 0.5, "track", EFFECT),
    ("pruning.ramp.start", 0.3, "track", EFFECT),
    ("pruning.ramp.end", 0.7, "track", EFFECT),
    ("pruning.ramp.freeze_at", 0.65, "track", EFFECT),
    ("pruning.ramp.end", 0.7, "frozen", "its mask is frozen"),
    ("pruning.ramp.total_steps", 50, "track", "it follows from the schedule"),
    ("pruning.select.min_weights", 500, "track", "other layers"),
    ("pruning.select.include", ("layer1*",), "track", "other layers"),
    ("pruning.select.exclude", ("layer1*",), "track", "other layers"),
    ("pruning.select.first", False, "track", "other layers"),
    ("pruning.select.last", False, "track", "other layers"),
    ("pruning.pattern.block", 4, "track", EFFECT),
    ("pruning.pattern.include", ("layer1*",), "blocks", EFFECT),
    ("pruning.pattern.exclude", ("layer1*",), "blocks", EFFECT),
    ("pruning.pattern.include", ("layer1*",), "track", "pruning.pattern.block = 1"),
    ("pruning.operator", "soft", "track", EFFECT),
    ("pruning.operator", "soft", "frozen", "its mask is frozen"),
    ("pruning.power.p", 2.0, "power", EFFECT),
    ("pruning.min_density", 0.05, "track", EFFECT),
    ("pruning.center", True, "centered", EFFECT),
    ("pruning.center", None, "centered", "decided when the run started"),
    ("pruning.gradient_scale", 0.5, "track", EFFECT),
]
# A copy of another run.
NOT_HERE = {"name": "another name is another run"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class StopAfter(Hooks):
    """Asks to stop after an optimizer step, and not in the validation before it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.run: Run | None = None

    def after_step(self, run: Run) -> None:
        self.run = run

    def stop_requested(self) -> str | None:
        due = self.run is not None and self.run.step >= self.step - 1 and self.run.model.training
        return "SIGTERM" if due else None


class Bases:
    """Runs that were stopped, each made once, and what becomes of them if nothing is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cache  # noqa: B019 (lives as long as the module's tests)
    def data(self) -> Path:
        """The digits, and beside them the same with the classes called otherwise."""
        root = Path(prepare_digits(self.folder / "digits"))
        for split in ("train", "val"):
            for number, one in enumerate(sorted((root / split).iterdir())):
                shutil.copytree(one, root.parent / "renamed" / split / f"{9 - number}", copy_function=shutil.copy)
        return root

    def config(self, base: str) -> Config:
        changes = {"budget": BudgetConfig(sparsity=0.9), **BASES[base]}
        if base in ("digits", "policy", "erased", "spread"):
            config = digits_config(self.folder / base, self.data())
            return with_changes(config, training__ema_decay=None, data__augment__mixup=0.0, **changes)
        return small_config(self.folder / base, **changes)

    @cache  # noqa: B019
    def stopped(self, base: str) -> Path:
        config = self.config(base)
        with pytest.raises(Stopped):
            train(config, World(), StopAfter(10 if base == "frozen" else 5))
        return run_dir(config)

    @cache  # noqa: B019
    def unchanged(self, base: str) -> Path:
        return self.resumed(base, self.folder / f"{base}-unchanged")

    def resumed(self, base: str, folder: Path, **changes: Any) -> Path:
        """The folder of a copy of the stopped run that went on, with some fields changed."""
        copy = folder / "run"
        shutil.copytree(self.stopped(base), copy)
        allowed = tuple(name.replace("__", ".") for name in changes)
        config = with_changes(self.config(base), output__dir=str(folder), resume__allow_changes=allowed, **changes)
        train(config, World())
        return copy


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def flat_leaves(prefix: str, part: Any) -> list[str]:
    """The dotted names of all fields."""
    names = []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        name = f"{prefix}{field.name}"
        names += flat_leaves(f"{name}.", value) if dataclasses.is_dataclass(value) else [name]
    return names


def test_the_table_has_every_field() -> None:
    known = {name for name, *_ in TABLE} | set(NOT_HERE)
    missing = [name for name in flat_leaves("", Config()) if name not in known and not is_among(name, FREE_ON_RESUME)]
    assert not missing
    assert set(flatten(to_dict(Config()))) >= known  # and no field that there is not


@pytest.mark.parametrize(("field", "value", "base", "expected"), TABLE, ids=[f"{t[0]}-{t[2]}-{t[1]}" for t in TABLE])
def test_a_change_has_an_effect_or_is_refused(
    bases: Bases, tmp_path: Path, field: str, value: Any, base: str, expected: str
) -> None:
    if field == "data.root" and expected == EFFECT:
        value = str(bases.data().parent / value)
    changes = {field.replace(".", "__"): value}
    if field in ("budget.density", "budget.count"):  # in place of the sparsity
        changes = {"budget": BudgetConfig(**{field.removeprefix("budget."): value})}
    if expected != EFFECT:
        before = (bases.stopped(base) / "config.yaml").read_text()
        with pytest.raises(UserError, match=expected):
            bases.resumed(base, tmp_path, **changes)
        assert (tmp_path / "run" / "config.yaml").read_text() == before  # the next start is of the same run
        return
    changed, unchanged = bases.resumed(base, tmp_path, **changes), bases.unchanged(base)
    events = [str(row["message"]) for row in read_rows(changed / "metrics.jsonl") if row["kind"] == "event"]
    assert any(f"{field} " in message for message in events)
    assert differ(last_state(changed), last_state(unchanged)) or curve(changed) != curve(unchanged)
    assert (changed / "summary.json").is_file()


def test_a_name_that_is_no_field_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path, resume__allow_changes=("pruning", "optimizer.weigth_decay"))
    with pytest.raises(UserError, match=r"names 'optimizer.weigth_decay', .* did you mean optimizer.weight_decay\?"):
        preflight(config)


def differ(one: Any, two: Any) -> bool:
    """Whether the models of two states differ."""
    return any(not torch.equal(tensor, two["model"][name]) for name, tensor in one["model"].items())

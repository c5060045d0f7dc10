"""Every optimizer and schedule of timm: it works (exact budget, resumed bit for bit), or is refused by name with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from pruning_helpers import small_network, train_step
from timm.optim import list_optimizers
from torch import nn

from asp_dist.checkpoint.format import capture_rng, restore_rng, split_state, unflatten_state
from asp_dist.config import OptimizerConfig, ScheduleConfig
from asp_dist.errors import UserError
from asp_dist.pruning import Budget, Pruner, Ramp, Select, Track
from asp_dist.training.build import build_optimizer, build_scheduler
from asp_dist.training.run import full_state, load_full_state

pytestmark = pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")

STEPS, PER_EPOCH, HALF = 12, 3, 5
REFUSED = {"adahessian": "second derivatives"}
REFUSED |= {name: "bitsandbytes" for name in list_optimizers() if name.startswith("bnb")}
REFUSED |= {name: "apex" for name in list_optimizers() if name.startswith("fused")}
WORKING = [name for name in [*list_optimizers(), "lookahead_sgd", "lookahead_adamw"] if name not in REFUSED]
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kron compiles its parts, ten seconds each time."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


class Training:
    """A small network, its optimizer, its schedule and its pruner."""

    def __init__(self, optimizer: str, schedule: str = "cosine") -> None:
        self.network = small_network(dtype=torch.float32)
        self.optimizer = build_optimizer(OptimizerConfig(name=optimizer, lr=0.01), self.network)
        plan = ScheduleConfig(name=schedule, epochs=STEPS // PER_EPOCH, warmup_epochs=1, decay_epochs=(2.0,))
        self.scheduler = build_scheduler(plan, self.optimizer, PER_EPOCH)
        self.pruner = Pruner(
            self.network,
            self.optimizer,
            Budget.parameters(sparsity=0.8),
            control=Track(),
            ramp=Ramp("cubic", 0.1, 0.5, freeze_at=0.75, total_steps=STEPS),
            select=Select(min_weights=500),
        )

    def train(self, start: int, end: int) -> None:
        for step in range(start, end):
            self.scheduler.step_update(step)
            train_step(self.network, self.optimizer, step)

    def state(self) -> dict[str, object]:
        """As a checkpoint stores it: JSON, and tensors apart."""
        model, optimizer = full_state(self.network, self.optimizer)
        plain, parts = split_state({"model": model, "optimizer": optimizer, "pruner": self.pruner.state_dict()})
        tensors = {part: {name: tensor.clone() for name, tensor in found.items()} for part, found in parts.items()}
        plain = json.loads(json.dumps(plain))
        return {part: unflatten_state(tree, tensors.get(part, {})) for part, tree in plain.items()}

    def load(self, state: dict[str, object]) -> None:
        load_full_state(self.network, self.optimizer, state["model"], state["optimizer"])  # type: ignore[arg-type]
        self.pruner.load_state_dict(state["pruner"])  # type: ignore[arg-type]


def weights(network: nn.Module) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in network.state_dict().values()]


def check_resumed(optimizer: str, schedule: str) -> None:
    torch.manual_seed(0)
    whole, parts = Training(optimizer, schedule), Training(optimizer, schedule)
    whole.train(0, HALF)
    state, rng = whole.state(), capture_rng(torch.device("cpu"))
    whole.train(HALF, STEPS)
    parts.load(state)
    restore_rng(rng, torch.device("cpu"))
    parts.train(HALF, STEPS)
    assert weights(whole.network) == weights(parts.network)
    summary = whole.pruner.snapshot().summary()
    assert summary["frozen"] and whole.pruner.steps == STEPS
    assert summary["nonzero_weights"] == round(0.2 * summary["prunable_weights"])
    assert all(bool(parameter.isfinite().all()) for parameter in whole.network.parameters())


SLOW = ("kronc", "kronw")  # as kron, but for the weight decay


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in WORKING])
def test_an_optimizer_is_pruned_exactly_and_resumes_bit_for_bit(name: str) -> None:
    check_resumed(name, "cosine")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_followed_and_resumes_bit_for_bit(name: str) -> None:
    check_resumed("sgd", name)


@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_cannot_work_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UserError, match=rf"optimizer.name = '{name}'.*{REFUSED[name]}"):
        build_optimizer(OptimizerConfig(name=name), small_network())


@pytest.mark.parametrize(("name", "remedy"), [("plateau", "choose cosine"), ("none", "choose constant"), ("zigzag", "known: ")])
def test_a_schedule_that_cannot_work_is_refused_with_the_remedy(name: str, remedy: str) -> None:
    optimizer = torch.optim.SGD(small_network().parameters(), lr=0.1)
    with pytest.raises(UserError, match=rf"schedule.name = '{name}'.*{remedy}"):
        build_scheduler(ScheduleConfig(name=name), optimizer, 10)


def test_random_draws_of_an_optimizer_are_the_same_on_every_rank() -> None:
    """Kron draws from torch's generator unless told otherwise, which differs between ranks: their weights would part."""
    first, second = Training("kron"), Training("kron")
    torch.manual_seed(1)
    first.train(0, 2)
    torch.manual_seed(2)
    second.train(0, 2)
    assert weights(first.network) == weights(second.network)


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "configs" / "README.md").read_text()
    section = text.split("## Optimizers and schedules")[1].split("\n## ")[0]
    rows = {
        row.split("|")[1].strip(): set(re.findall(r"`([\w_]+)`", row.split("|")[2]))
        for row in section.splitlines()
        if row.startswith("|") and "`" in row
    }
    assert rows["optimizers that work"] == set(WORKING)
    assert rows["schedules that work"] == set(SCHEDULES)
    assert set().union(*(names for kind, names in rows.items() if kind.startswith("refused"))) == {*REFUSED, "plateau", "none"}

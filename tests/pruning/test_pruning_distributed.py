"""Two processes against one: DDP and FSDP2 give the same thresholds, weights, masks and states (float64, gloo)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device_form import on_the_device
from pruning_helpers import CASES, Recorded, parity_network, published_sgd, small_batch
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from asp_dist.pruning import Budget, Pattern, Power, Pruner, Ramp, Select, SparsityLoss, Track

pytestmark = pytest.mark.slow

WORLD, STEPS, TOLERANCE = 2, 50, 1e-10
RAMP = Ramp("cubic", end=0.5, freeze_at=0.8, total_steps=STEPS)
# What a run is: the network, the budgets and the pruner's options.
RUNS: dict[str, dict[str, Any]] = {
    **{
        f"recorded/{case}": {"budget": budget, "control": SparsityLoss(initial_threshold=0.8, threshold_lr=1e-3)}
        for case, budget in CASES.items()
    },
    "loss": {
        "budget": Budget.parameters(density=0.1),
        "control": SparsityLoss(density="measured", multiplier=True),
        "ramp": RAMP,
    },
    "track": {"budget": Budget.parameters(density=0.1), "control": Track(), "ramp": RAMP},
    "power": {
        "budget": [Budget.parameters(density=0.1), Budget.macs(density=0.08, bound="at_most")],
        "control": Track(),
        "operator": Power(),
        "gradient_scale": 0.5,
        "ramp": RAMP,
        "input_shape": (3, 6, 6),
    },
    "blocks": {
        "budget": [Budget.parameters(density=0.1), Budget.macs(density=0.2, bound="at_most")],
        "control": Track(),
        "operator": Power(),
        "pattern": Pattern(4, exclude=("14",)),
        "ramp": RAMP,
        "input_shape": (3, 6, 6),
    },
    "blocks by the loss": {
        "budget": Budget.parameters(density=0.1),
        "control": SparsityLoss(density="measured", multiplier=True),
        "pattern": Pattern(2, exclude=("6", "14")),
        "ramp": RAMP,
    },
    "ties": {
        "budget": Budget.parameters(density=0.3),
        "control": SparsityLoss(initial_threshold=0.5, threshold_lr=0.0),
    },
}
# The same as on a GPU, with numbers on the device.
ON_DEVICE = "on the device/"
RUNS |= {f"{ON_DEVICE}{name}": RUNS[name] for name in ("recorded/asl_budget_equal", "loss", "power")}
Wrap = Callable[[nn.Module], nn.Module]


def odd_network() -> nn.Sequential:
    """Rows that two ranks cannot share equally: 7, 13, 31 and 1 output channels."""
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 13, 5, padding=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(468, 31), nn.ReLU(), nn.Linear(31, 1), nn.Linear(1, 10)),
    ).double()


def network_of(run: str) -> nn.Sequential:
    run = run.removeprefix(ON_DEVICE)
    if run.startswith("recorded/"):
        return Recorded().network(norms=False)
    if run.startswith("blocks"):
        torch.manual_seed(3)
        return parity_network(norms=False)
    network = odd_network()
    if run == "ties":
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_((parameter * 20).round() / 20)
    return network


class Run:
    """One process's part of a run: the network, wrapped or not, its optimizer and its pruner."""

    def __init__(
        self,
        name: str,
        wrap: Wrap = lambda network: network,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = published_sgd,
    ) -> None:
        self.name = name
        self.network = network_of(name)
        self.model = wrap(self.network)
        self.optimizer = optimizer(self.model)
        options = dict(RUNS[name])
        budget = options.pop("budget")
        with on_the_device() if name.startswith(ON_DEVICE) else nullcontext():
            self.pruner = Pruner(self.model, self.optimizer, budget, agreement_every=10, **options)
        self.recorded = Recorded() if name.removeprefix(ON_DEVICE).startswith("recorded/") else None

    def train(self, start: int, end: int, rank: int = 0, world: int = 1) -> None:
        for step in range(start, end):
            if self.recorded is not None:
                images, labels = self.recorded.inputs[step], self.recorded.labels[step]
            else:
                images, labels = small_batch(step)
            self.optimizer.zero_grad()
            output = self.model(images.chunk(world)[rank])
            nn.functional.cross_entropy(output, labels.chunk(world)[rank]).backward()
            self.optimizer.step()

    def result(self) -> dict[str, Any]:
        """Weights and the pruner's state, whole on every rank."""
        whole = StateDictOptions(full_state_dict=True)
        weights: dict[str, Any] = get_model_state_dict(self.network, options=whole)
        return {
            "weights": {name: tensor.clone() for name, tensor in weights.items()},
            "pruner": self.pruner.state_dict(),
            "summary": self.pruner.snapshot().summary(),
        }


def shard(network: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in network.children():
        if list(module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def work(job: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    dist.init_process_group("gloo")
    try:
        result = job(dist.get_rank(), *arguments)
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()


def on_two_ranks(job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `job` returns on each of two ranks."""
    return on_ranks(work, job, arguments, ranks=WORLD)


def assert_same(one: Any, two: Any, path: str = "") -> None:
    """Nested states equal: tensors to `TOLERANCE`, with zeros in the same places; all else exactly."""
    assert type(one) is type(two), path
    if isinstance(one, Tensor):
        torch.testing.assert_close(two, one, rtol=0, atol=TOLERANCE, msg=path)
        assert torch.equal(one == 0, two == 0), path
    elif isinstance(one, dict):
        assert list(one) == list(two), path
        for key in one:
            assert_same(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(two), path
        for index, pair in enumerate(zip(one, two)):
            assert_same(*pair, f"{path}/{index}")
    elif isinstance(one, float):
        assert two == pytest.approx(one, abs=1e-9), path
    else:
        assert one == two, path


def train_all(rank: int, wrapper: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in RUNS:
        run = Run(name, DistributedDataParallel if wrapper == "ddp" else shard)
        run.train(0, STEPS, rank, WORLD)
        run.pruner.finalize()
        results[name] = run.result()
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """The same runs in one process."""
    results = {}
    for name in RUNS:
        run = Run(name)
        run.train(0, STEPS)
        run.pruner.finalize()
        results[name] = run.result()
    return results


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_equal_one(wrapper: str, alone: dict[str, Any]) -> None:
    for rank_results in on_two_ranks(train_all, wrapper):
        assert_same(alone, rank_results)
    for name, found in alone.items():  # And what they agree on is the exact budget.
        counted = sum(int((found["weights"][f"{layer}.weight"] != 0).sum()) for layer in found["pruner"]["dense"])
        assert found["summary"]["frozen"] is True
        assert found["summary"]["nonzero_weights"] == counted
        if name.removeprefix(ON_DEVICE) not in ("power", "blocks", "recorded/asl_per_layer"):
            density = RUNS[name]["budget"].density
            assert counted == int(density * found["summary"]["prunable_weights"] + 0.5)


def count_reduces(rank: int) -> dict[str, tuple[list[int], int]]:
    """Sizes of all all-reduces of 12 steps, and the pruner's own count; then three steps with a frozen mask."""
    results = {}
    for wrapper in ("ddp", "fsdp2"):
        run = Run("recorded/asl_budget_equal", DistributedDataParallel if wrapper == "ddp" else shard)
        run.pruner.agreement_every = 0
        seen: list[int] = []
        before = run.pruner.reducer.calls
        with pytest.MonkeyPatch.context() as patch:
            original = dist.all_reduce

            def counting(tensor: Tensor, *arguments: Any, seen: list[int] = seen, **options: Any) -> Any:
                seen.append(tensor.numel())
                return original(tensor, *arguments, **options)  # noqa: B023

            patch.setattr(dist, "all_reduce", counting)
            run.train(0, 12, rank, WORLD)
            results[wrapper] = (list(seen), run.pruner.reducer.calls - before)
            run.pruner.finalize()
            frozen = len(seen)
            run.train(12, 15, rank, WORLD)
            assert len(seen) == frozen  # With the mask frozen there is nothing to agree on.
    return results


def test_one_all_reduce_per_step() -> None:
    """Of five numbers for each of the four layers, whatever their size: their sums, a count, and the first rank's threshold."""
    for results in on_two_ranks(count_reduces):
        assert results == {"ddp": ([20] * 12, 12), "fsdp2": ([20] * 12, 12)}


class NestedSGD(torch.optim.SGD):
    """An optimizer of the user's own, on top of torch's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def nested_sgd(model: nn.Module) -> torch.optim.SGD:
    return NestedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def train_nested(rank: int) -> list[int]:
    """Steps that the pruner counts under each wrapper; all else must be as with torch's own optimizer."""
    found = []
    for wrap in (DistributedDataParallel, shard):
        results = []
        for optimizer in (published_sgd, nested_sgd):
            run = Run("track", wrap, optimizer)
            run.train(0, STEPS, rank, WORLD)
            results.append(run.result())
        assert_same(results[0], results[1])
        found.append(run.pruner.steps)
    return found


def test_an_optimizer_that_calls_its_base_class_takes_one_step() -> None:
    assert on_two_ranks(train_nested) == [[STEPS, STEPS]] * 2


def train_unlike_networks(rank: int) -> list[Tensor]:
    """A step of networks that each rank initialized by a seed of its own, and wrapped after the pruner was built."""
    torch.manual_seed(rank)
    network = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 30)).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pruner = Pruner(network, optimizer, Budget.parameters(density=0.2), select=Select(min_weights=100))
    model = DistributedDataParallel(network)
    images = torch.randn(8, 30, generator=torch.Generator().manual_seed(5 + rank), dtype=torch.float64)
    model(images).square().mean().backward()
    optimizer.step()  # ranks are compared after the first step
    return [parameter.detach().clone() for parameter in network.parameters()] + [layer.dense for layer in pruner.layers]


def test_ranks_with_seeds_of_their_own_begin_with_the_same_weights() -> None:
    one, two = on_two_ranks(train_unlike_networks)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def disagree(rank: int) -> dict[str, str]:
    messages = {}
    for what in ("weights", "thresholds", "mask"):
        run = Run("recorded/asl_budget_equal", DistributedDataParallel)
        run.train(0, 3, rank, WORLD)
        run.pruner.check_agreement()
        if what == "mask":
            run.pruner.finalize()
        if rank == 1:
            with torch.no_grad():
                part = run.pruner.layers[2]
                largest = int(part.flat_pruned().abs().argmax())
                if what == "thresholds":
                    run.pruner.thresholds[2] += 1e-12
                elif what == "mask":
                    part.flat_pruned()[largest] = 0.0
                else:
                    part.flat_dense()[largest] *= 1 + 1e-12
        try:
            run.train(3, 10, rank, WORLD)  # The check comes after step 10.
        except RuntimeError as error:
            messages[what] = str(error)
    return messages


def test_ranks_that_differ_stop_with_the_layers_name() -> None:
    for messages in on_two_ranks(disagree):
        assert messages == {
            "weights": "ranks disagree: layer '9' has different weights after step 10",
            "mask": "ranks disagree: layer '9' has different weights after step 10",
        }


def look_at_root(rank: int) -> list[Tensor]:
    """Outputs of passes without a backward one, after which the root keeps its layer whole: pruned, dense, pruned again."""
    torch.manual_seed(4)
    network = nn.Sequential(nn.Linear(20, 60), nn.Linear(60, 10))
    reference = nn.Sequential(nn.Linear(20, 60), nn.Linear(60, 10))
    reference.load_state_dict(network.state_dict())
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(network[0], mesh=mesh)
    fully_shard(network, mesh=mesh)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    pruner = Pruner(network, optimizer, Budget.parameters(density=0.2), center=False, select=Select(min_weights=100))
    images, outputs = torch.randn(4, 20), []
    with torch.no_grad():
        outputs.append(network(images))
        with pruner.dense(["0", "1"]):
            outputs.append(network(images) - reference(images))
        outputs.append(network(images) - outputs[0])
    return outputs


def test_a_layer_of_the_root_is_dense_when_it_is_asked_for() -> None:
    for pruned, dense, again in on_two_ranks(look_at_root):
        assert pruned.abs().max() > 0.1
        assert dense.abs().max() < 1e-6 and again.abs().max() == 0


def replace_parameters(rank: int) -> list[str]:
    messages = []
    for wrap in (None, shard):
        torch.manual_seed(4)
        network = nn.Sequential(nn.Linear(20, 60), nn.Linear(60, 10))
        if wrap is not None:
            wrap(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        Pruner(network, optimizer, Budget.parameters(density=0.2), select=Select(min_weights=100))
        network.load_state_dict({key: tensor.clone() for key, tensor in network.state_dict().items()}, assign=True)
        network(torch.randn(4, 20)).square().mean().backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def test_replaced_parameters_are_noticed_sharded_or_not() -> None:
    for messages in on_two_ranks(replace_parameters):
        assert len(messages) == 2
        assert all("layer '0': its parameter was replaced after the Pruner was built" in message for message in messages)


# Runs and the step at which their state is taken; the last one is past its freeze.
SAVED = [("recorded/asl_per_layer", 20), ("track", 20), ("track", 45)]


def save_half(rank: int) -> list[dict[str, Any]]:
    states = []
    for name, at in SAVED:
        run = Run(name, shard)
        run.train(0, at, rank, WORLD)
        momentum = {}
        for key, parameter in run.network.named_parameters():
            momentum[key] = run.optimizer.state[parameter]["momentum_buffer"].full_tensor()
        states.append({**run.result(), "momentum": momentum})
    return states


def continue_half(rank: int, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for (name, at), state in zip(SAVED, states):
        run = Run(name, shard)
        set_model_state_dict(run.network, state["weights"], options=StateDictOptions(full_state_dict=True))
        run.pruner.load_state_dict(state["pruner"])
        run.train(at, at + 1, rank, WORLD)
        results.append(run.result())
    return results


def resume(name: str, state: dict[str, Any]) -> Run:
    run = Run(name)
    run.network.load_state_dict(state["weights"])
    run.pruner.load_state_dict(state["pruner"])
    return run


def test_a_sharded_state_loads_in_one_process_and_back() -> None:
    states, of_rank_1 = on_two_ranks(save_half)
    assert_same(states, of_rank_1)
    expected, back = [], []
    for (name, at), state in zip(SAVED, states):
        plain = Run(name)
        plain.train(0, at)
        assert_same(plain.result(), {key: state[key] for key in ("weights", "pruner", "summary")}, name)
        one = resume(name, state)
        for key, parameter in one.network.named_parameters():
            one.optimizer.state[parameter]["momentum_buffer"] = state["momentum"][key].clone()
        one.train(at, STEPS)
        plain.train(at, STEPS)
        assert_same(plain.result(), one.result(), name)
        # And back: a state of one process continues on two (one step, with fresh momentum on both sides).
        fresh = resume(name, state)
        back.append(fresh.result())
        fresh.train(at, at + 1)
        expected.append(fresh.result())
    for continued in on_two_ranks(continue_half, back):
        assert_same(expected, continued)


def cut_blocks(rank: int) -> str:
    network = shard(parity_network(norms=False))
    try:
        Pruner(network, published_sgd(network), Budget.parameters(density=0.1), pattern=Pattern(2))
    except ValueError as error:
        return str(error)
    return "nothing"


def test_blocks_that_shards_would_cut_are_refused() -> None:
    for message in on_two_ranks(cut_blocks):
        assert message.startswith("layer '14': 2 shards of 5 output channels cut blocks of 2: choose another block, or exclude")

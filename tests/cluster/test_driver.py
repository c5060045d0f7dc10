"""Running on Ray: resources, launch files, failures, signals; with a small stand-in for the trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import ScalingConfig
from small_runs import small_config, with_changes
from waiting import HANG_S

from asp_dist.checkpoint.folder_lock import hold_folder
from asp_dist.cluster.driver import run
from asp_dist.cluster.failures import ClusterError, describe, would_repeat
from asp_dist.cluster.launch_files import LaunchFiles
from asp_dist.cluster.ray_private import DividingScalingPolicy
from asp_dist.cluster.resources import plan_resources
from asp_dist.cluster.session import _descendants
from asp_dist.cluster.worker import TrainFunction, interface_of
from asp_dist.config import ClusterConfig, Config, DataConfig, OutputConfig, TrainingConfig
from asp_dist.data.bad_files import DataReadError
from asp_dist.errors import UserError
from asp_dist.training.world import group_sizes

pytestmark = [
    # Ray leaves its own log files and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
]


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus, "memory": 1e9}}


def test_cpus_of_a_local_cluster_are_shared_out() -> None:
    needed = plan_resources(Config(cluster=ClusterConfig(num_workers=3)), [node(8)], local=True)
    assert (needed.cpus, needed.gpus, needed.sizes) == (2.0, 0, (3,))
    assert needed.per_worker() == {"CPU": 2.0}


def test_gpus_are_used_where_there_are_some_and_bring_a_cpu() -> None:
    nodes = [node(16, 4), node(16, 4)]
    assert plan_resources(Config(), nodes, local=False).per_worker() == {"CPU": 1.0, "GPU": 1}
    on_cpu = Config(training=TrainingConfig(device="cpu"))
    assert plan_resources(on_cpu, nodes, local=False).per_worker() == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("cluster", "nodes", "words"),
    [
        (ClusterConfig(num_workers=9), [node(4), node(4)], ("9 x 1 CPU", "8 CPU", "room for 8")),
        (ClusterConfig(num_workers=2, gpus_per_worker=1), [node(4, 1)], ("2 x 1 CPU and 1 GPU", "1 GPU", "room for 1")),
        (ClusterConfig(num_workers=2, cpus_per_worker=3), [node(4), node(2)], ("6 CPU", "2 node", "room for 1")),
        (ClusterConfig(num_workers=2), [node(1), node(8, alive=False)], ("1 CPU", "1 node", "room for 1")),
    ],
)
def test_too_small_a_cluster_is_refused_with_numbers(
    cluster: ClusterConfig, nodes: list[dict[str, Any]], words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        plan_resources(Config(cluster=cluster), nodes, local=False)
    assert all(word in str(caught.value) for word in words), caught.value


def test_elastic_group_needs_room_for_its_smallest_size_only() -> None:
    cluster = ClusterConfig(num_workers=4, min_workers=1)
    needed = plan_resources(Config(cluster=cluster), [node(2)], local=False)
    assert needed.sizes == (1, 2, 4)  # three workers cannot share a batch of 64
    assert group_sizes(with_batch(768, num_workers=8, min_workers=4)) == [4, 6, 8]
    assert group_sizes(with_batch(256, num_workers=8, min_workers=5)) == [8]
    with pytest.raises(UserError, match=r"divides among no number of workers from cluster.min_workers = 5 to .* = 7"):
        plan_resources(with_batch(256, num_workers=7, min_workers=5), [node(8)], local=False)


def with_batch(size: int, **cluster: Any) -> Config:
    return Config(data=DataConfig(backend="synthetic", batch_size=size), cluster=ClusterConfig(**cluster))


@pytest.mark.parametrize("offered", range(10))
def test_an_elastic_group_takes_the_most_workers_that_can_share_the_batch(offered: int) -> None:
    scaling = ScalingConfig(num_workers=(2, 8), resources_per_worker={"CPU": 1})
    policy = DividingScalingPolicy(scaling, group_sizes(with_batch(256, num_workers=8, min_workers=2)))
    expected = {0: 0, 1: 0, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 4, 8: 8, 9: 8}
    assert policy._count_possible_workers({"node": {"CPU": float(offered)}}) == expected[offered]


def test_cuda_on_a_cluster_without_gpus_is_refused() -> None:
    with pytest.raises(UserError, match="has 0 GPUs"):
        plan_resources(Config(training=TrainingConfig(device="cuda")), [node(4)], local=False)


def test_control_files_carry_a_stop_and_the_first_fatal_error(tmp_path: Path) -> None:
    files = LaunchFiles.begin(tmp_path / "run")
    assert files.visible() and files.stop_reason() is None and files.fatal() is None
    files.request_stop("SIGTERM")
    files.write_fatal({"message": "first"})
    files.write_fatal({"message": "second"})
    assert files.stop_reason() == "SIGTERM"
    assert files.fatal() == {"message": "first"}
    files.end()
    assert not files.visible()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_killed_drivers_files_are_swept_by_the_next_launch(tmp_path: Path) -> None:
    killed = LaunchFiles.begin(tmp_path)
    current = LaunchFiles.begin(tmp_path)
    assert current.visible() and not killed.visible()


def test_a_second_launch_leaves_the_first_ones_files(tmp_path: Path) -> None:
    first = LaunchFiles.begin(tmp_path)
    with hold_folder(tmp_path):
        LaunchFiles.begin(tmp_path)
        assert first.visible()


def test_the_cause_is_named_rather_than_what_followed_from_it() -> None:
    failures = {
        0: RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:1234"),
        1: MemoryError("cannot allocate 3 GiB"),
    }
    assert describe(failures) == "worker 1: MemoryError: cannot allocate 3 GiB"


def test_faults_that_pass_may_come_again_at_the_same_step() -> None:
    assert would_repeat({0: RuntimeError("shapes do not fit")})
    assert would_repeat({0: RuntimeError("Connection reset by peer"), 1: torch.OutOfMemoryError("CUDA out of memory")})
    passing = [OSError("stale file handle"), TimeoutError("no answer"), DataReadError("cannot be read now")]
    passing += [
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("NCCL error: unhandled system error"),
    ]
    assert not any(would_repeat({0: error}) for error in [*passing, RuntimeError("Connection closed by peer")])


def test_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None


def stand_in(mode: str) -> TrainFunction:
    """A trainer of 12 steps; `mode` says what goes wrong on rank 1 in step 3. A closure, so that Ray sends it whole."""

    def train(config: Config, world: Any, hooks: Any) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        run_dir = Path(config.output.dir) / config.name
        attempts = run_dir / f"attempts-{world.rank}"
        attempt = int(attempts.read_text()) if attempts.exists() else 0
        attempts.write_text(str(attempt + 1))
        for step in range(300 if mode == "deaf" else 12):
            total = torch.tensor(world.rank + 1.0)
            dist.all_reduce(total)
            if world.rank == 0:
                with (run_dir / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": step, "total": float(total)}) + "\n")
            if step == 3 and world.rank == 1:
                if mode == "user":
                    raise UserError("label 12 is outside 0..9")
                if mode == "again":
                    raise RuntimeError("shapes do not fit")
                if mode == "bug":
                    raise AttributeError("no such thing")
                if mode == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.1)
        hooks.report({"top1": 0.5})
        return {
            "world_size": world.world_size,
            "device": str(world.device),
            "threads": torch.get_num_threads(),
            "cwd": os.getcwd(),
            "attempts": attempt + 1,
        }

    return train


def small(tmp_path: Path, **cluster: Any) -> Config:
    return Config(
        data=DataConfig(backend="synthetic"),
        output=OutputConfig(dir=str(tmp_path)),
        training=TrainingConfig(device="cpu"),
        cluster=ClusterConfig(**{"num_workers": 2, "cpus_per_worker": 1, "max_failures": 1} | cluster),
    )


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running Ray cluster, as a user would have."""
    import ray

    script = textwrap.dedent("""
        import ray, sys
        context = ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False,
                           object_store_memory=100 << 20)
        print(context.address_info["gcs_address"], flush=True)
        sys.stdin.read()
    """)
    head = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert head.stdout is not None and head.stdin is not None
    address = head.stdout.readline().decode().strip()
    assert address
    yield address
    if ray.is_initialized():
        ray.shutdown()
    head.stdin.close()
    head.wait(timeout=HANG_S)
    head.stdout.close()


@pytest.mark.slow
def test_two_workers_train_and_the_driver_sees_their_rows(
    tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with Ray's own page on training switched on."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    rows: list[dict[str, Any]] = []
    summary = run(small(tmp_path, address=ray_address), rows.append, train=stand_in("fine"))
    assert summary == {"world_size": 2, "device": "cpu", "threads": 1, "cwd": os.getcwd(), "attempts": 1}
    assert [row["step"] for row in rows] == list(range(12))
    assert {row["total"] for row in rows} == {3.0}
    assert not (tmp_path / "run" / "cluster").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "error", "message", "attempts"),
    [
        ("user", UserError, "^label 12 is outside 0..9$", 1),
        ("bug", ClusterError, "^worker 1 on .*: AttributeError: no such thing", 1),
        ("again", ClusterError, "^worker 1: RuntimeError: shapes do not fit: the same error for the second time at step 3", 2),
        (
            "die",
            ClusterError,
            r"more often than cluster.max_failures = 1 .* worker 1: its process died on node [\d.]+ \(killed, out of memory or",
            2,
        ),
    ],
)
def test_failures_end_the_run_with_one_line(
    tmp_path: Path, ray_address: str, mode: str, error: type[Exception], message: str, attempts: int
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(small(tmp_path, address=ray_address, max_failures=1 if mode == "die" else 5), train=stand_in(mode))
    assert "\n" not in str(caught.value)
    assert int((tmp_path / "run" / "attempts-1").read_text()) == attempts
    assert not (tmp_path / "run" / "cluster").exists()


SHRINKING = """
import sys
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(nodes[-1], allow_graceful=False)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.mark.slow
def test_four_workers_that_lose_a_node_go_on_with_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three remain, which cannot share a batch of 16."""
    import ray

    # Ray counts the lost node's CPUs for a while, and waits this long for a group that needs them.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")

    config = small_config(
        tmp_path,
        cluster=ClusterConfig(num_workers=4, min_workers=1, cpus_per_worker=1, max_failures=3),
        schedule__epochs=10,
        output__checkpoint_steps=4,
        training__log_every=1,
    )
    command = [sys.executable, "-c", SHRINKING]
    rows: list[dict[str, Any]] = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as nodes:
        assert nodes.stdout is not None and nodes.stdin is not None
        address = nodes.stdout.readline().decode().strip()

        def on_row(row: dict[str, Any]) -> None:
            rows.append(row)
            if row["step"] == 10 and row.get("kind") == "train":
                nodes.stdin.write(b"\n")  # type: ignore[union-attr]
                nodes.stdin.flush()  # type: ignore[union-attr]

        try:
            summary = run(with_changes(config, cluster__address=address), on_row)
        finally:
            if ray.is_initialized():
                ray.shutdown()
            nodes.stdin.close()
    assert (summary["world_size"], summary["steps"]) == (2, 40)
    assert summary["sparsity"] == pytest.approx(0.9, abs=5e-4)
    messages = [row["message"] for row in rows if row.get("kind") == "event"]
    assert any("elastic group of 1, 2, 4 workers" in message for message in messages)
    assert any("2 workers instead of 4" in message for message in messages)


def test_too_many_workers_fail_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    before = _descendants(os.getpid())  # what other tests of this process left
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(UserError, match="asks for 640 x 1 CPU"):
        run(small(tmp_path, address="local", num_workers=640), train=stand_in("fine"))
    assert _descendants(os.getpid()).items() <= before.items()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_no_cluster_at_the_address(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127.0.0.1:1 .*refused"):
        run(small(tmp_path, address="127.0.0.1:1"), train=stand_in("fine"))


@pytest.mark.slow
def test_local_cluster_leaves_no_process_after_a_second_interrupt(tmp_path: Path) -> None:
    def on_row(row: dict[str, Any]) -> None:
        if row.get("step") in (1, 30):  # 3 s apart: Python sees two signals at once as one
            os.kill(os.getpid(), signal.SIGINT)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before, handlers = _descendants(os.getpid()), [signal.getsignal(number) for number in numbers]
    with pytest.raises(KeyboardInterrupt):
        run(small(tmp_path, address="local", cpus_per_worker=0.5), on_row, train=stand_in("deaf"))
    assert [signal.getsignal(number) for number in numbers] == handlers
    assert _descendants(os.getpid()).items() <= before.items()

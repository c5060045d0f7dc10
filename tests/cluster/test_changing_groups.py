"""Groups of workers that are stopped, resized, preempted or fail now and then, on real Ray clusters of several nodes."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig
from small_runs import small_config, with_changes

from asp_dist import files
from asp_dist.cluster.driver import run
from asp_dist.cluster.worker import TrainFunction
from asp_dist.config import ClusterConfig, Config
from asp_dist.tracking import read_rows
from asp_dist.training.hooks import Stopped

pytestmark = [
    pytest.mark.slow,
    # Ray leaves its own log files and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
]

# A cluster of a head without CPUs and some nodes of one; each line of the input adds a node.
NODES = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
for _ in range(int(sys.argv[1])):
    cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.add_node(num_cpus=1)
cluster.shutdown()
"""


@contextmanager
def nodes(count: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a cluster of `count` nodes of one CPU, and what adds another one."""
    command = [sys.executable, "-c", NODES, str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdin is not None
        line = process.stdin

        def add() -> None:
            line.write(b"\n")
            line.flush()

        try:
            yield process.stdout.readline().decode().strip(), add
        finally:
            if ray.is_initialized():
                ray.shutdown()
            line.close()


def long_config(tmp_path: Path, address: str, **cluster: Any) -> Config:
    """A run that ends by being stopped; no checkpoint is due on the way."""
    return small_config(
        tmp_path,
        cluster=ClusterConfig(address=address, cpus_per_worker=1, max_failures=0, **cluster),
        schedule__epochs=100000,
        training__log_every=1,
        training__eval_every=100000,
        output__checkpoint_epochs=100000,
    )


def trained_steps(tmp_path: Path) -> list[int]:
    return [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]


def test_a_group_saves_before_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is trained twice, though no checkpoint was due."""
    often = functools.partial(ScalingConfig, elastic_resize_monitor_interval_s=2)
    monkeypatch.setattr("asp_dist.cluster.driver.ScalingConfig", often)
    messages: list[str] = []
    with nodes(1) as (address, add):

        def on_row(row: dict[str, Any]) -> None:
            if row.get("kind") == "train" and row["step"] == 10:
                add()
            if row.get("kind") == "event":
                messages.append(row["message"])
                if "2 workers instead of 1" in row["message"]:
                    os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            run(long_config(tmp_path, address, num_workers=2, min_workers=1), on_row)
    steps = trained_steps(tmp_path)
    assert steps == list(range(1, len(steps) + 1))
    assert any("2 workers instead of 1" in message for message in messages)


def test_an_announced_preemption_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node is drained as launch/kuberay does it, and another one comes; the run may not fail once."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    saved: list[int] = []
    with nodes(2) as (address, add):

        def drain() -> None:
            """Drain a node that has a worker: all of its CPUs are taken."""
            import ray._private.state

            free = ray._private.state.available_resources_per_node()
            alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            taken = [node["NodeID"] for node in alive if not free.get(node["NodeID"], {}).get("CPU")]
            command = ["ray", "drain-node", "--address", address, "--node-id", taken[0], "--deadline-remaining-seconds", "60"]
            command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
            subprocess.run(command, check=True)
            add()

        def on_row(row: dict[str, Any]) -> None:
            if row.get("kind") == "event" and row["message"].startswith("preemption: saved at step"):
                saved.append(row["step"])
            if row.get("kind") == "train" and row["step"] == (saved[-1] if saved else 0) + 10:
                if not saved:
                    threading.Thread(target=drain).start()
                else:
                    os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Stopped, match="stopped by SIGTERM"):
            run(long_config(tmp_path, address, num_workers=2), on_row)
    assert len(saved) == 1
    steps = trained_steps(tmp_path)
    assert steps == list(range(1, len(steps) + 1))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with nodes(2) as (address, _):
        yield address


def test_a_stop_reaches_the_workers_through_ray(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a storage that does not show the driver's file, by a patch in the driver."""
    write, names = files.write_text, []

    def lost(path: Path, text: str, **more: Any) -> None:
        names.append(path.name)
        if path.name != "stop":
            write(path, text, **more)

    monkeypatch.setattr("asp_dist.cluster.launch_files.write_text", lost)

    def on_row(row: dict[str, Any]) -> None:
        if row.get("kind") == "train" and row["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        run(long_config(tmp_path, address, num_workers=2), on_row)
    assert "stop" in names
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == trained_steps(tmp_path)[-1]


def failing() -> TrainFunction:
    """A stand-in for the trainer that fails twice, each time after a checkpoint further on."""

    def train(config: Config, world: Any, hooks: Any) -> dict[str, Any]:
        attempts = Path(config.output.dir) / config.name / f"attempts-{world.rank}"
        attempt = int(attempts.read_text()) if attempts.exists() else 0
        attempts.write_text(str(attempt + 1))
        if world.is_main:
            hooks.saved(10 * attempt + 10)
        world.gather(0)
        if attempt < 2:
            raise OSError("the storage is away")
        return {"attempts": attempt + 1}

    return train


def test_failures_count_since_the_last_progress(tmp_path: Path, address: str) -> None:
    """One may happen; `test_failures_end_the_run_with_one_line` has two without progress."""
    config = with_changes(long_config(tmp_path, address, num_workers=2), cluster__max_failures=1)
    assert run(config, train=failing()) == {"attempts": 3}

"""Jobs on a real Ray cluster: a head and a worker node with token authentication, by launch/local_cluster.sh."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import environment_of, processes
from ray.job_submission import JobStatus
from waiting import HANG_S, wait_until

from asp_dist.cluster import jobs, ray_private, user_keys
from asp_dist.config import Config, DataConfig, ModelConfig, ResumeConfig, from_dict
from asp_dist.errors import EXIT_STOPPED, UserError

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def tiny(folder: Path, **changes: Any) -> Config:
    """A run of a few steps on random images."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": "test_resnet"},
        "data": {"backend": "synthetic", "batch_size": 16, "input_size": 32, "synthetic_samples": [64, 16]},
        "schedule": {"epochs": 2},
        "training": {"device": "cpu", "log_every": 1},
        "cluster": {"num_workers": 1},
        "tracking": {"wandb": "disabled"},
        "output": {"dir": str(folder)},
    }
    return replace(from_dict(fields), **changes)


def test_a_jobs_paths_start_from_the_root_on_the_cluster() -> None:
    start = ResumeConfig(from_run="runs/dense")
    config = Config(model=ModelConfig(weights="w.pth"), data=DataConfig(root="../digits"), resume=start)
    there = jobs.on_cluster(replace(config, cluster=replace(config.cluster, address="10.0.0.1:6379")), "/mnt/data")
    assert (there.model.weights, there.data.root, there.output.dir) == (
        "/mnt/data/w.pth",
        "/mnt/digits",
        "/mnt/data/runs",
    )
    assert there.resume.from_run == "/mnt/data/runs/dense"
    assert there.cluster.address is None


def test_the_package_holds_the_source_and_the_configuration() -> None:
    with jobs._package(Config(name="here")) as folder:
        assert (folder / "asp_dist" / "cli.py").is_file()
        assert not list(folder.rglob("__pycache__"))
        assert "name: here" in (folder / "job.yaml").read_text()
        assert KEY not in (folder / "job.yaml").read_text()
    assert not folder.exists()


@pytest.mark.parametrize("address", [None, "127.0.0.1:6379", "ray://head:10001"])
def test_an_address_that_is_no_job_server_is_refused(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(UserError, match="http://HEAD:8265"):
        jobs.Cluster(address).connect()


def test_a_dead_job_server_is_said_so() -> None:
    with pytest.raises(UserError, match=r"no Ray job server answers at http://127.0.0.1:1"):
        jobs.Cluster("http://127.0.0.1:1").connect()


def drivers_of(cluster_folder: Path) -> list[str]:
    """The jobs that train on this cluster."""
    marked = f"ASP_DIST_CLUSTER={cluster_folder}".encode()
    return [t for number, _, t in processes() if "asp_dist train job.yaml" in t and marked in environment_of(number)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[jobs.Cluster, Path]]:
    """The cluster's job server, and the folder with its logs. The token is the tests' own (conftest)."""
    state = Path(tempfile.mkdtemp(prefix="asp-", dir="/tmp"))
    port = free_port()
    environment = os.environ | {
        "STATE": str(state / "c"),
        "HEAD_PORT": str(free_port()),
        "DASHBOARD_PORT": str(port),
        "CPUS_PER_NODE": "2",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    script = ROOT / "launch" / "local_cluster.sh"
    subprocess.run([script, "start", "1"], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=HANG_S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        yield jobs.Cluster(f"http://127.0.0.1:{port}"), state / "c"
    subprocess.run([script, "stop"], env=environment, check=True, timeout=HANG_S)
    marked = f"ASP_DIST_CLUSTER={state / 'c'}".encode()
    left = [title for number, _, title in processes() if marked in environment_of(number) or str(state) in title]
    shutil.rmtree(state, ignore_errors=True)
    assert left == []


def local_cluster(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "launch" / "local_cluster.sh", command],
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def test_processes_of_others_outlive_a_local_cluster() -> None:
    """A server of another's on the head's port, as Redis calls itself, and a tunnel to such a port."""
    with (
        tempfile.TemporaryDirectory(prefix="asp-", dir="/tmp") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        port = str(server.getsockname()[1])
        settings = {"STATE": f"{folder}/c", "HEAD_PORT": port, "DASHBOARD_PORT": str(free_port())}
        titles = [f"redis-server 127.0.0.1:{port}", f"ssh -L 1{port}:127.0.0.1:{port} db", f"tail {folder}/c/ray/log"]
        others = [subprocess.Popen(["bash", "-c", 'exec -a "$0" sleep 600', title]) for title in titles]
        try:
            refused = local_cluster("start", **settings)
            assert refused.returncode == 2
            assert refused.stderr == f"error: port {port} is in use by another program: set HEAD_PORT to a free port\n"
            stopped = local_cluster("stop", **settings)
            assert (stopped.returncode, stopped.stderr) == (0, "")
            assert [other.poll() for other in others] == [None] * 3
        finally:
            for other in others:
                other.kill()
                other.wait()


def test_a_local_cluster_with_too_long_a_path_is_refused() -> None:
    refused = local_cluster("start", STATE="/tmp/" + "x" * 60, HEAD_PORT=str(free_port()))
    assert refused.returncode == 2 and "is 65 characters long: give a path of at most 39" in refused.stderr


@pytest.mark.slow
def test_a_job_runs_to_its_end_and_its_log_is_followed(head: tuple[jobs.Cluster, Path], tmp_path: Path) -> None:
    cluster, state = head
    out = io.StringIO()
    assert jobs.submit(tiny(tmp_path), cluster, out=out) == 0, out.getvalue()
    assert (tmp_path / "tiny" / "model.safetensors").is_file()
    assert "top-1" in out.getvalue()
    assert KEY not in out.getvalue()
    logs = [path for path in state.rglob("*") if path.is_file() and not path.is_symlink()]
    assert logs
    assert [str(path) for path in logs if KEY.encode() in path.read_bytes()] == []
    assert KEY not in str(cluster.connect().list_jobs())


def test_keys_are_taken_out_of_the_heads_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {}

    class Client:
        def _do_request(self, verb: str, path: str, data: bytes) -> Any:
            memory["gcs://" + path.removeprefix("/api/packages/gcs/")] = data
            return SimpleNamespace(raise_for_status=lambda: None)

    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for name in [name for name in os.environ if user_keys.is_key(name) and name != "WANDB_API_KEY"]:
        monkeypatch.delenv(name)
    place = user_keys.put(Client())
    assert KEY not in str(place)
    monkeypatch.setattr(ray_private, "_internal_kv_get", memory.get)
    monkeypatch.setattr(ray_private, "_internal_kv_del", memory.pop)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv(*next(iter(place.items())))
    user_keys.take()
    assert user_keys.from_environment() == {"WANDB_API_KEY": KEY}
    assert (memory, os.environ.get(user_keys.PLACE)) == ({}, None)


@pytest.mark.slow
def test_a_failing_job_gives_its_exit_code_and_its_message(head: tuple[jobs.Cluster, Path], tmp_path: Path) -> None:
    out = io.StringIO()
    config = tiny(tmp_path, model=ModelConfig(name="resnet19"))
    assert jobs.submit(config, head[0], out=out) == 2
    assert "resnet18" in out.getvalue()


@pytest.mark.slow
def test_a_stopped_job_leaves_a_checkpoint_and_no_process(head: tuple[jobs.Cluster, Path], tmp_path: Path) -> None:
    cluster, cluster_folder = head
    config = tiny(tmp_path)
    config = replace(config, name="long", schedule=replace(config.schedule, epochs=10_000))
    out = io.StringIO()
    assert jobs.submit(config, cluster, wait=False, out=out) == 0
    job = out.getvalue().split()[1]
    wait_until((tmp_path / "long" / "metrics.jsonl").exists, "the first row")
    assert jobs.status(job, cluster, out) == 0
    assert "RUNNING" in out.getvalue()
    assert drivers_of(cluster_folder)
    assert jobs.stop(job, cluster, out) == 0
    assert jobs.status(job, cluster, out) == EXIT_STOPPED
    assert list((tmp_path / "long" / "checkpoints").glob("step-*"))
    left = [t for t in threading.enumerate() if t.name == "ray-train"]
    assert left == []
    wait_until(lambda: not drivers_of(cluster_folder), "the end of the job's processes, which Ray does not wait for")


@pytest.mark.slow
def test_an_unknown_job_is_said_so(head: tuple[jobs.Cluster, Path]) -> None:
    with pytest.raises(UserError, match="knows no job nobody"):
        jobs.stop("nobody", head[0])


def test_a_short_break_of_the_connection_does_not_lose_the_job_with_a_mocked_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when `kubectl port-forward` is started again; it may fail at the question for the state too."""
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    answers: list[Any] = [
        *(ConnectionError("refused"), ConnectionError("refused"), JobStatus.RUNNING),
        *(ConnectionError("refused"), JobStatus.RUNNING, JobStatus.SUCCEEDED),
    ]

    class Client:
        def get_job_status(self, job: str) -> JobStatus:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            assert isinstance(answer, JobStatus)
            return answer

        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            yield "one\n"
            raise RuntimeError("the connection broke")

        def get_job_logs(self, job: str) -> str:
            return "one\ntwo\n"

    out = io.StringIO()
    jobs.follow(Client(), "job", out)
    assert out.getvalue() == "one\ntwo\n" and answers == []
    answers.extend([ConnectionError("refused")] * jobs.ATTEMPTS)
    with pytest.raises(UserError, match="job job may still run: asp-dist submit --status job"):
        jobs.follow(Client(), "job", out)


def test_a_job_waits_for_a_cluster_that_has_just_started_with_a_mocked_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_S", 0.0)
    answers: list[Exception | None] = [RuntimeError("status code 500: No available agent to submit job"), None]

    def submit_job(**job: Any) -> None:
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    jobs._submit_with_retries(SimpleNamespace(submit_job=submit_job), submission_id="x")
    assert answers == []
    answers.append(RuntimeError("status code 500: no such entrypoint"))
    with pytest.raises(RuntimeError, match="no such entrypoint"):
        jobs._submit_with_retries(SimpleNamespace(submit_job=submit_job), submission_id="x")

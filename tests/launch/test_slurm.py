"""The SLURM script under a real controller and two node daemons on this machine; needs Debian's slurm packages and root."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from waiting import HANG_S

ROOT = Path(__file__).parents[2]
TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

pytestmark = pytest.mark.slow


def missing() -> str | None:
    if os.getuid() != 0:
        return "needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if absent:
        return f"needs {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    return None if (ROOT / ".venv" / "bin" / "asp-dist").exists() else "needs ./launch/env.sh to have made .venv"


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def slurm() -> Iterator[tuple[Path, dict[str, str]]]:
    """A SLURM cluster of two nodes of two CPUs each; its folder, and the environment of its users."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="asp-slurm-", dir="/tmp"))
    (folder / "munge").mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge" / "key").chmod(0o600)
    host = socket.gethostname().split(".")[0]
    controller, first, second = free_ports(3)
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES State=UP
""")
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
    }
    environment = {k: v for k, v in environment.items() if not k.startswith(("RAY_", "OMP_"))}
    munge = [
        f"--{name}={folder}/munge/{path}"
        for name, path in (
            ("key-file", "key"),
            ("socket", "socket"),
            ("pid-file", "pid"),
            ("log-file", "log"),
            ("seed-file", "seed"),
        )
    ]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (
            ["munged", "--foreground", "--force", *munge],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "n1"],
            ["slurmd", "-D", "-N", "n2"],
        ):
            daemons.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(1)
        for _ in range(60):
            nodes = subprocess.run(["sinfo", "-h", "-o", "%D %t"], env=environment, capture_output=True, text=True)
            if nodes.stdout.split() == ["2", "idle"]:
                break
            time.sleep(1)
        else:
            pytest.skip(f"slurm does not come up here: {nodes.stdout} {nodes.stderr}")
        yield folder, environment
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            daemon.wait(timeout=HANG_S)
        shutil.rmtree(folder, ignore_errors=True)


def test_the_batch_script_runs_a_training_on_two_nodes(slurm: tuple[Path, dict[str, str]]) -> None:
    folder, environment = slurm
    config = folder / "tiny.yaml"
    config.write_text(f"""
name: tiny
model: {{name: test_resnet}}
data: {{backend: synthetic, batch_size: 16, input_size: 32, synthetic_samples: [64, 16]}}
schedule: {{epochs: 1}}
training: {{device: cpu}}
tracking: {{wandb: disabled}}
output: {{dir: {folder}/runs}}
""")
    log = folder / "job.log"
    command = ["sbatch", "--wait", "--nodes=2", "--cpus-per-task=2", "--time=10", "-o", str(log)]
    done = subprocess.run(
        [*command, "launch/slurm.sh", str(config)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()
    assert '"world_size": 2' in (folder / "runs" / "tiny" / "summary.json").read_text()
    workers = [(folder / "runs" / "tiny" / "logs" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert [f"rank {rank} of 2 on cpu with 2 threads" in text for rank, text in enumerate(workers)] == [True, True]
    job = done.stdout.split()[-1]
    assert not Path(f"/tmp/asp-dist-{job}").exists()
    assert not (ROOT / "runs" / f"slurm-{job}" / "token").exists()
    assert subprocess.run(["pgrep", "-f", f"/tmp/asp-dist-{job}/"], capture_output=True).stdout == b""
    shutil.rmtree(ROOT / "runs" / f"slurm-{job}")

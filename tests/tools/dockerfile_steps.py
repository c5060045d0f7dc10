"""Runs a Dockerfile's steps, in order, in a clean Debian root instead of Docker's base image.

    sudo debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm ROOT
    sudo .venv/bin/python tests/tools/dockerfile_steps.py docker/Dockerfile ROOT [COMMAND ... | --ray-updater]

FROM is taken as done by debootstrap: Debian bookworm with its own Python 3.11 instead of python:3.11-slim-bookworm's. COPY,
ENV, WORKDIR, USER and RUN do what Docker does; LABEL, HEALTHCHECK and CMD are skipped. COMMAND is run in the end as the
image's user would run it; --ray-updater runs what `ray up` needs in a node's container, in the shell that it uses. /dev,
/proc, /sys, the resolver and the trusted certificates come from the host. Stops at the first step that fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

PASSED_ON = ("PIP_CERT", "PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT")
SKIPPED = ("FROM", "LABEL", "HEALTHCHECK", "CMD")
UPDATER = (
    "set -e; for tool in ray asp-dist python rsync ssh; do command -v $tool; done",
    'test "$(command -v python)" = /app/.venv/bin/python',
    "ray --version && asp-dist --version",
    "python -c 'import ray.autoscaler._private.aws.node_provider, ray.autoscaler._private.gcp.node_provider'",
    "python -c 'import ray.autoscaler._private.monitor, asp_dist.cluster.driver, asp_dist.cluster.worker'",
    'test "$(env -u OMP_NUM_THREADS printenv OMP_NUM_THREADS)" = ""',
    "touch ~/ray_bootstrap_config.yaml && rsync --version | head -n 1",
)


def instructions(text: str) -> list[tuple[str, str]]:
    """The Dockerfile's instructions: (name, arguments), continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.strip().split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, " ".join(rest)) for name, *rest in found]


class Image:
    """The root that the steps change, and what they have set."""

    def __init__(self, root: Path, context: Path) -> None:
        self.root, self.context = root, context
        self.environment = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8"}
        self.environment |= {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
        self.folder, self.user, self.shell = "/", "0", ["/bin/sh", "-c"]

    def step(self, name: str, rest: str) -> None:
        """Do one instruction. Raises CalledProcessError if a command fails."""
        if name in SKIPPED:
            return
        if name == "SHELL":
            self.shell = json.loads(rest)
        elif name == "ENV":
            for word in shlex.split(rest):
                key, _, value = word.partition("=")
                self.environment[key] = re.sub(r"\$(\w+)", lambda m: self.environment.get(m[1], ""), value)
        elif name == "WORKDIR":
            self.folder = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            self.user = rest
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                self.copy(source, target)
        elif name == "RUN":
            self.run([*self.shell, rest])
        else:
            raise ValueError(f"instruction {name} is not known here")

    def copy(self, source: str, target: str) -> None:
        """COPY: a folder's contents, or a file, from the build context."""
        here, there = self.context / source, self.root / self.folder.lstrip("/") / target
        if here.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(here, there, dirs_exist_ok=True, ignore=ignore)
        elif target.endswith("/"):
            there.mkdir(parents=True, exist_ok=True)
            shutil.copy2(here, there / here.name)
        else:
            shutil.copy2(here, there)

    def run(self, command: list[str]) -> None:
        """Run a command in the root, as the user and in the folder that were set."""
        variables = [f"{k}={v}" for k, v in self.environment.items()]
        inner = ["env", "-i", *variables, "sh", "-c", f'cd {shlex.quote(self.folder)} && exec "$@"', "sh", *command]
        subprocess.run(["chroot", f"--userspec={self.user}:{self.user}", self.root, *inner], check=True)


def main(dockerfile: Path, root: Path, command: list[str]) -> None:
    """Run all steps of `dockerfile` in `root`, then `command`."""
    image = Image(root, dockerfile.resolve().parents[1])
    mounts = [root / name for name in ("dev", "proc", "sys", "dev/shm")]
    (root / "usr/local/bin/python").unlink(missing_ok=True)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    shutil.copy2("/etc/resolv.conf", root / "etc/resolv.conf")
    shutil.copy2("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs/ca-certificates.crt")
    try:
        for mount in mounts:
            mount.mkdir(exist_ok=True)
            subprocess.run(["mount", "--bind", f"/{mount.relative_to(root)}", mount], check=True)
        steps = instructions(dockerfile.read_text())
        for number, (name, rest) in enumerate(steps, 1):
            print(f"[{number}/{len(steps)}] {name} {rest[:100]}", flush=True)
            image.step(name, rest)
        if command == ["--ray-updater"]:
            from ray.autoscaler._private.command_runner import _with_interactive

            for line in UPDATER:
                print(f"[ray up] {line}", flush=True)
                image.run(["sh", "-c", " ".join(_with_interactive(line))])
        elif command:
            print(f"[command] {' '.join(command)}", flush=True)
            image.run(command)
    finally:
        for mount in reversed(mounts):
            subprocess.run(["umount", "--lazy", mount], check=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).resolve(), sys.argv[3:])

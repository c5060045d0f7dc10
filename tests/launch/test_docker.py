"""The image and compose files, as far as they can be checked without a Docker daemon."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dockerfile_steps import SKIPPED, instructions

import asp_dist

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_the_linter(path: Path) -> None:
    done = subprocess.run([BIN / "hadolint", "--no-color", path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_run_without_root_and_have_a_health_check(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^FROM python:3\.11\.\d+-slim-bookworm$", text, re.MULTILINE)
    assert "--constraint launch/constraints.txt" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1000"]
    assert "HEALTHCHECK" in text and "LABEL org.opencontainers.image.title" in text


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_not_ignored(path: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (.*) \S+$", path.read_text(), re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert source in kept or source.split("/")[0] in kept, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_bring_what_ray_up_needs_in_a_container(path: Path) -> None:
    """`tests/tools/dockerfile_steps.py FILE ROOT --ray-updater` runs it."""
    text = path.read_text()
    installed = re.search(r"--no-install-recommends([^&]*)", text)
    assert installed is not None and {"rsync", "openssh-client", "procps", "wget"} <= set(installed[1].split())
    assert "/etc/profile.d/" in text and "['optional-dependencies']['cloud']" in text


def test_the_gpu_image_brings_the_libraries_of_infiniband() -> None:
    assert {"libibverbs1", "librdmacm1", "ibverbs-providers"} <= set((DOCKER / "Dockerfile").read_text().split())


def test_a_login_shell_finds_the_packages_commands(tmp_path: Path) -> None:
    """The image's own lines for /etc/profile.d, read as Debian's /etc/profile does, after it has set PATH anew."""
    (line,) = re.findall(r'echo "(PATH=.*)" > /etc/profile.d', (DOCKER / "Dockerfile").read_text())
    script = "PATH=/usr/local/bin:/usr/bin:/bin\n" + line.replace("\\$", "$") + '\necho "$PATH"'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "/app/.venv/bin:/usr/local/bin:/usr/bin:/bin\n"


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_fit_their_schema(name: str) -> None:
    done = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DOCKER / name],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_has_a_head_two_workers_and_an_optional_wandb() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"head", "worker", "wandb"}
    assert services["worker"]["deploy"]["replicas"] == 2
    assert services["wandb"]["profiles"] == ["wandb"]
    assert services["head"]["volumes"] == services["worker"]["volumes"]
    for name in ("head", "wandb"):
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])


def test_compose_gives_the_gpus_to_one_worker() -> None:
    both = [yaml.safe_load((DOCKER / name).read_text())["services"] for name in ("compose.yaml", "compose.gpu.yaml")]
    head, worker = ({**both[0][name], **both[1][name]} for name in ("head", "worker"))
    assert "deploy" not in head
    assert worker["deploy"]["replicas"] == 1
    (devices,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert devices["capabilities"] == ["gpu"]
    assert head["image"] == worker["image"] == f"asp-dist:{asp_dist.__version__}"
    assert both[0]["head"]["image"] == f"asp-dist:{asp_dist.__version__}-cpu"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_step_can_be_run_outside_of_docker(path: Path) -> None:
    steps = instructions(path.read_text())
    assert [name for name, _ in steps].count("RUN") == 4
    assert {name for name, _ in steps} <= {*SKIPPED, "SHELL", "RUN", "WORKDIR", "COPY", "USER", "ENV"}
    assert all("\\\n" not in rest and rest for _, rest in steps)

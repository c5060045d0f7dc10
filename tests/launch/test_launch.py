"""The launch files: scripts pass shellcheck, manifests their published schemas, Ray's validator takes the cluster files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from waiting import HANG_S

import asp_dist

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"]
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    done = subprocess.run([BIN / "shellcheck", "-x", "--severity=style", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run_and_say_what_they_do(script: Path) -> None:
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")


@pytest.mark.parametrize("path", sorted(LAUNCH.rglob("*.yaml")), ids=lambda path: path.name)
def test_each_manifest_says_what_to_change(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "To change:" in header
    assert path.relative_to(LAUNCH).as_posix() in (LAUNCH / "README.md").read_text()


def test_every_script_has_a_section() -> None:
    text = (LAUNCH / "README.md").read_text()
    assert [path.name for path in SCRIPTS if path.parent == LAUNCH and path.name not in text] == []


def crds() -> Path:
    for place in (os.environ.get("KUBERAY_CRDS"), ROOT.parent / "shared" / "schemas" / "kuberay"):
        if place and Path(place).is_dir():
            return Path(place)
    pytest.skip("needs KubeRay's CRDs: a folder named by KUBERAY_CRDS")


def strict(schema: Any) -> Any:
    """The CRD's schema as JSON schema; the API server would drop unknown fields in silence, here they are errors."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items() if key != "format"}
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {name: strict(part) for name, part in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


def schema_of(kind: str) -> dict[str, Any]:
    crd = yaml.safe_load((crds() / f"ray.io_{kind.lower()}s.yaml").read_text())
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema: dict[str, Any] = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_manifests_fit_the_operators_schema(name: str) -> None:
    manifest = yaml.safe_load((LAUNCH / "kuberay" / name).read_text())
    schema = schema_of(manifest["kind"])
    errors = sorted(jsonschema.Draft202012Validator(schema).iter_errors(manifest), key=str)
    assert [f"{e.json_path}: {e.message}" for e in errors] == []
    manifest["spec"]["no_such_field"] = 1
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(manifest))


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_workers_have_gpus_shared_memory_storage_and_the_secret(name: str) -> None:
    manifest = yaml.safe_load((LAUNCH / "kuberay" / name).read_text())
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    pod = spec["workerGroupSpecs"][0]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claim = volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"]
    assert claim == yaml.safe_load((LAUNCH / "kuberay" / "storage.yaml").read_text())["metadata"]["name"]
    (secret,) = [v["valueFrom"]["secretKeyRef"] for v in container["env"] if v["name"] == "WANDB_API_KEY"]
    assert secret["optional"] is True


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_cluster_files_pass_rays_validator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load((LAUNCH / "ray" / name).read_text())
    validate_config(fillout_defaults(config))
    workers = {k: v for k, v in config["available_node_types"].items() if k != config["head_node_type"]}
    assert sum(node["min_workers"] for node in workers.values()) == config["max_workers"]
    config["no_such_field"] = 1
    with pytest.raises(Exception, match="no_such_field"):
        validate_config(config)


def test_ray_up_starts_the_named_image_on_a_mocked_aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own steps from the file to a started machine; without an image it takes one of 2023, whose driver is too old."""
    from moto import mock_aws
    from ray.autoscaler._private.aws import config as ray_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray stores the key of the machines there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setattr("ray.autoscaler._private.aws.config.time.sleep", lambda seconds: None)
    config = prepare_config(yaml.safe_load((LAUNCH / "ray" / "aws.yaml").read_text()))
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        cluster = ray_aws.bootstrap_aws(config)
        provider = AWSNodeProvider(cluster["provider"], cluster["cluster_name"])
        for name, node in cluster["available_node_types"].items():
            assert "base-oss-nvidia-driver-gpu-ubuntu" in node["node_config"]["ImageId"], name
            tags = {"ray-node-type": "worker", "ray-launch-config": "1", "ray-user-node-type": name}
            (started,) = provider.create_node(node["node_config"], tags, 1).values()
            assert started.instance_type == node["node_config"]["InstanceType"]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_up_installs_nothing_in_the_container(name: str) -> None:
    from ray.autoscaler._private.util import fillout_defaults

    config = fillout_defaults(yaml.safe_load((LAUNCH / "ray" / name).read_text()))
    assert [config[f"{which}setup_commands"] for which in ("", "head_", "worker_")] == [[], [], []]
    assert config["docker"]["image"].endswith(f"/asp-dist:{asp_dist.__version__}")
    starts = [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]]
    assert all(line.startswith("env -u OMP_NUM_THREADS ") for line in starts)  # Ray's launcher sets it to 1


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
@pytest.mark.parametrize(("driver", "status"), [("580.65.06", 0), ("570.172.08", 1), (None, 0)])
def test_ray_up_refuses_a_driver_that_is_too_old(name: str, driver: str | None, status: int, tmp_path: Path) -> None:
    """With a stand-in for nvidia-smi, which answers as on a machine with this driver, or without a GPU."""
    check = yaml.safe_load((LAUNCH / "ray" / name).read_text())["initialization_commands"][-1]
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\n[ $1 = -L ] || echo {driver}\n" if driver else "#!/bin/sh\nexit 9\n")
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", check], env={"PATH": path}, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.startswith(f"error: driver {driver}, but CUDA 13 needs 580") == bool(status)


def test_google_machines_have_a_disk_type_that_they_take_and_a_new_driver() -> None:
    config = yaml.safe_load((LAUNCH / "ray" / "gcp.yaml").read_text())
    for node in config["available_node_types"].values():
        (disk,) = node["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"].endswith("/pd-balanced")  # G2 machines take no pd-standard
        assert int(disk["initializeParams"]["sourceImage"].rpartition("-nvidia-")[2]) >= 580


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_pods_find_a_loaded_image_and_mount_a_large_volume_at_once(name: str) -> None:
    manifest = yaml.safe_load((LAUNCH / "kuberay" / name).read_text())
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    for pod in pods:
        (container,) = pod["containers"]
        assert container["image"] == f"asp-dist:{asp_dist.__version__}"  # "latest" would be pulled each time
        assert container["imagePullPolicy"] == "IfNotPresent"
        assert pod["securityContext"] == {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"}
    assert pods[1]["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert yaml.safe_load((LAUNCH / "kuberay" / "storage.yaml").read_text())["spec"]["storageClassName"]


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_pod_that_ends_drains_its_node_and_waits_for_the_workers(name: str, tmp_path: Path) -> None:
    """The hook's own command, with a stand-in for `ray`, beside a process that is called like a training worker."""
    manifest = yaml.safe_load((LAUNCH / "kuberay" / name).read_text())
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    (container,) = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    seen = tmp_path / "seen"
    (tmp_path / "ray").write_text(f'#!/bin/sh\necho "$@" >{seen}\n')
    (tmp_path / "ray").chmod(0o755)
    title = f"ray::{tmp_path.name}RayTrainWorker"
    # Other tests' workers are none of this pod's.
    command = [part.replace("[r]ay::.*RayTrainWorker", f"[r]ay::{tmp_path.name}RayTrainWorker") for part in command]
    worker = subprocess.Popen(["bash", "-c", 'exec -a "$0" sleep 600', title])
    hook = subprocess.Popen(command, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, stdout=subprocess.DEVNULL)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            hook.wait(timeout=3)
        worker.kill()
        worker.wait()
        assert hook.wait(timeout=HANG_S) == 0
    finally:
        worker.kill()
        hook.kill()
    assert seen.read_text().startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION")


def test_torchrun_gives_a_stop_as_long_as_the_other_ways() -> None:
    assert "--shutdown-timeout 300" in (LAUNCH / "torchrun.sh").read_text()


def test_manifests_and_constraints_name_one_version_of_ray() -> None:
    pinned = re.search(r"^ray==(.*)$", (LAUNCH / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    for path in (LAUNCH / "kuberay").glob("ray*.yaml"):
        assert set(re.findall(r'rayVersion: "(.*)"', path.read_text())) == {pinned[1]}


def test_constraints_are_exact_pins_of_all_that_the_package_needs() -> None:
    import tomllib

    lines = [x for x in (LAUNCH / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^ =]+", line) for line in lines)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    names = {re.split(r"[\[<>=~! ]", text)[0].lower().replace("_", "-") for text in wanted}
    assert names - pinned == set()


def env_shell(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -e; source {LAUNCH}/env.sh; {script}"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )


def test_environment_is_made_anew_only_when_its_sources_change(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "constraints.txt").write_text("a==1\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "asp-dist").touch(mode=0o755)
    assert env_shell(tmp_path, 'env_is_current "$(env_fingerprint)" ""').returncode == 1
    env_shell(tmp_path, 'printf "%s\\n%s\\n" "$(env_fingerprint)" test,export >.venv/.asp-dist')
    for extras, current in (("", 0), ("test", 0), ("export,test", 0), ("dashboard", 1), ("test,dashboard", 1)):
        assert env_shell(tmp_path, f'env_is_current "$(env_fingerprint)" "{extras}"').returncode == current, extras
    (tmp_path / "launch" / "constraints.txt").write_text("a==2\n")
    assert env_shell(tmp_path, 'env_is_current "$(env_fingerprint)" ""').returncode == 1


def test_no_python_is_said_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "constraints.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    done = env_shell(tmp_path, "find_python() { :; }; make_env")
    assert done.returncode != 0
    assert done.stderr.startswith("error: no Python 3.11 or newer")
    assert "PYTHON=" in done.stderr

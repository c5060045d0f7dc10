"""Keys and passwords reach the workers that need them, and nothing and nobody else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ray.train

from asp_dist import cli
from asp_dist.cluster import ray_private, user_keys
from asp_dist.cluster.launch_files import LaunchFiles
from asp_dist.cluster.worker import Job, train_loop_per_worker
from asp_dist.config import Config, DataConfig, OutputConfig
from asp_dist.errors import UserError

SECRET = "SECRETSECRET"


@pytest.mark.parametrize(
    "address",
    [
        f"s3://AKIAKEY:{SECRET}@bucket/runs",
        f"s3://{SECRET}@bucket/runs",
        f"s3://bucket/runs?access_key=AKIA&secret_key={SECRET}",
        f"s3://bucket/runs?region=eu&session_token={SECRET}",
        f"abfs://box@account.dfs.core.windows.net/x?sig={SECRET}",
        f"sftp://me:{SECRET}@host/x",
        f"https://{SECRET}@host/x",
    ],
)
@pytest.mark.parametrize("field", ["output.storage", "data.root"])
def test_an_address_with_credentials_is_refused_without_showing_them(
    address: str, field: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    section, name = field.split(".")
    file = tmp_path / "run.yaml"
    file.write_text(f"{section}: {{{name}: '{address}'}}\noutput: {{dir: {tmp_path}}}\n" if section == "data" else "")
    arguments = [str(file)] if section == "data" else [f"--{field}", address, "--output.dir", str(tmp_path)]
    assert cli.main(["train", *arguments]) == 2
    out = capfd.readouterr()
    assert SECRET not in out.out + out.err and "AKIA" not in out.out + out.err
    assert out.err.startswith(f"error: {field}: the {address.split(':')[0]}:// address contains")
    assert "AWS_ACCESS_KEY_ID" in out.err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/runs?endpoint_override=127.0.0.1:9000&scheme=http&region=eu&allow_bucket_creation=true",
        "gs://anonymous@bucket/runs",
        "abfs://box@account.dfs.core.windows.net/runs",
        "hdfs://me@host:8020/runs?replication=1",
        "memory://runs",
    ],
)
def test_an_address_without_credentials_is_taken(address: str) -> None:
    assert OutputConfig(storage=address).storage == address
    assert DataConfig(root=address).root == address


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    known = {*user_keys.WITH_WANDB, "WANDB_CONFIG_DIR", user_keys.PLACE}
    for name in [name for name in os.environ if name in known or user_keys.is_key(name)]:
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_wandbs_server_and_mode_go_with_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without its server's address, a private server's key would be offered to the public one."""
    monkeypatch.chdir(tmp_path)
    given = {
        "WANDB_API_KEY": SECRET,
        "WANDB_BASE_URL": "http://mine:8080",
        "WANDB_MODE": "offline",
        "WANDB_ENTITY": "us",
    }
    environment(monkeypatch, WANDB_CONFIG_DIR=str(tmp_path), **given)
    assert user_keys.from_environment() == given
    environment(monkeypatch, WANDB_CONFIG_DIR=str(tmp_path), WANDB_API_KEY=SECRET)
    assert user_keys.from_environment() == {"WANDB_API_KEY": SECRET}
    (tmp_path / "settings").write_text("[default]\nbase_url = http://mine:8080\n")  # as `wandb login --host` writes it
    assert user_keys.from_environment() == {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": "http://mine:8080"}
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = http://nearer:8080\n")
    assert user_keys.from_environment()["WANDB_BASE_URL"] == "http://nearer:8080"
    (tmp_path / "settings").write_text("no settings")
    assert "WANDB_API_KEY" in user_keys.from_environment()


def test_keys_of_clouds_go_unseen_and_settings_in_the_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = {
        "AWS_ACCESS_KEY_ID": "AKIA",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": "http://here:9000",
        "AZURE_STORAGE_KEY": SECRET,
        "GOOGLE_APPLICATION_CREDENTIALS": "/keys/file.json",
    }
    plain = {"NCCL_DEBUG": "INFO", "FI_PROVIDER": "efa", "UCX_TLS": "rc", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    of_the_machine = {"AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "/v2/x", "TORCH_HOME": "/home/me", "AWS_CA_BUNDLE": "/etc/x"}
    monkeypatch.chdir(tmp_path)
    environment(monkeypatch, WANDB_CONFIG_DIR=str(tmp_path), **keys, **plain, **of_the_machine)
    assert user_keys.from_environment() == keys
    assert {name: value for name, value in user_keys.settings().items() if name in (plain | of_the_machine | keys)} == plain


def test_a_submitted_job_finds_the_server_with_the_key_with_a_mocked_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Head:
        memory: dict[str, bytes] = {}  # noqa: RUF012

        def _do_request(self, verb: str, path: str, data: bytes) -> Any:
            self.memory["gcs://" + path.removeprefix("/api/packages/gcs/")] = data
            return self

        def raise_for_status(self) -> None: ...

    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings").write_text("[default]\nbase_url = http://mine:8080\n")
    environment(monkeypatch, WANDB_CONFIG_DIR=str(tmp_path), WANDB_API_KEY=SECRET, WANDB_MODE="offline")
    place = user_keys.put(Head())
    assert SECRET not in str(place)
    environment(monkeypatch, **place)
    monkeypatch.setattr(ray_private, "_internal_kv_get", Head.memory.get)
    monkeypatch.setattr(ray_private, "_internal_kv_del", Head.memory.pop)
    user_keys.take()
    assert user_keys.from_environment() == {
        "WANDB_API_KEY": SECRET,
        "WANDB_MODE": "offline",
        "WANDB_BASE_URL": "http://mine:8080",
    }


def test_a_worker_sets_what_it_is_given_with_a_mocked_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Context:
        def get_world_rank(self) -> int:
            return 0

        get_local_rank = get_world_rank

        def get_world_size(self) -> int:
            return 1

    import os

    environment(monkeypatch, WANDB_API_KEY=SECRET, WANDB_BASE_URL="http://mine:8080", WANDB_MODE="disabled")
    given = user_keys.from_environment()
    environment(monkeypatch)
    monkeypatch.setattr(ray.train, "get_context", Context)
    monkeypatch.setattr("asp_dist.cluster.worker.get_device", lambda: None)
    seen: dict[str, str | None] = {}

    def train(config: Config, world: Any, hooks: Any) -> dict[str, Any]:
        seen.update({name: os.environ.get(name) for name in given})
        return {}

    with monkeypatch.context() as patch:
        for name in given:
            patch.setenv(name, "")  # restored at the end
        train_loop_per_worker({"job": Job(Config(), LaunchFiles.begin(tmp_path), train, given)})
    assert seen == given


def test_a_name_without_a_scheme_is_no_address() -> None:
    with pytest.raises(UserError, match="not a URL"):
        OutputConfig(storage="bucket/x")

"""Checkpoints in an object store: a real S3 server on loopback, also while it fails."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem
from small_runs import StopAt, small_config
from test_checkpoint import keep, manifest, save, state

from asp_dist.checkpoint.folder_lock import FolderBusy, hold_lease, place_of
from asp_dist.checkpoint.format import read_checkpoint
from asp_dist.checkpoint.manager import CheckpointManager
from asp_dist.checkpoint.record import run_dir
from asp_dist.checkpoint.remote_storage import RemoteStore, StoredLease
from asp_dist.config import Config, OutputConfig
from asp_dist.errors import UserError
from asp_dist.object_store import open_storage
from asp_dist.tracking import read_rows
from asp_dist.tracking.tracker import RunTracker
from asp_dist.training import checkpointing
from asp_dist.training.hooks import Hooks, Stopped
from asp_dist.training.trainer import train
from asp_dist.training.world import World


@dataclass
class Proxy:
    """Passes connections on to `target`; while `down`, it closes them at once."""

    target: int
    down: bool = False
    refused: int = 0
    listener: socket.socket = field(default_factory=lambda: socket.create_server(("127.0.0.1", 0)))

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.down:
                self.refused += 1
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self.target))
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self.pump, args=(one, other), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                if self.down:
                    break
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    folder = tmp_path_factory.mktemp("s3")
    with open(folder / "log", "w") as log:
        command = [sys.executable, "-W", "ignore", "-c", "from moto.server import main; main()"]
        server = subprocess.Popen([*command, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    proxy = Proxy(port)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        threading.Thread(target=proxy.serve, daemon=True).start()
        yield proxy
    finally:
        proxy.listener.close()
        server.terminate()
        server.wait()


@pytest.fixture
def address(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    proxy.down = False
    options = f"scheme=http&endpoint_override=127.0.0.1:{proxy.port}&region=us-east-1&allow_bucket_creation=true"
    url = f"s3://bucket-{os.getpid()}/{tmp_path.name.replace('_', '-')}?{options}"
    system, path = open_storage(url)
    system.create_dir(path, recursive=True)
    return url


@pytest.fixture
def impatient(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that tries once, where the usual one tries for six seconds, each time that it is asked."""

    def open_once(address: str) -> tuple[S3FileSystem, str]:
        bucket = address.removeprefix("s3://").partition("?")[0]
        once = AwsStandardS3RetryStrategy(max_attempts=1)
        place = f"127.0.0.1:{proxy.port}"
        return S3FileSystem(scheme="http", endpoint_override=place, region="us-east-1", retry_strategy=once), bucket

    for module in (checkpointing, sys.modules[__name__]):
        monkeypatch.setattr(module, "open_storage", open_once)


def remote(address: str) -> RemoteStore:
    system, path = open_storage(address)
    return RemoteStore(address, system, f"{path}/checkpoints", waits=(0.05, 0.1))


def stored(config: Config, address: str) -> Config:
    """`config` with the object store."""
    return dataclasses.replace(config, output=OutputConfig(dir=config.output.dir, storage=address))


@pytest.mark.parametrize("url", ["ftp-like://host/x", "s4://bucket"])
def test_unknown_addresses(url: str) -> None:
    with pytest.raises(UserError, match=r"output\.storage"):
        open_storage(url)
    with pytest.raises(UserError, match="not a URL"):
        OutputConfig(storage="bucket/x")


def test_any_fsspec_file_system_will_do() -> None:
    system, path = open_storage("memory://runs")
    store = RemoteStore("memory://runs", system, path, waits=())
    save(store, 3)  # type: ignore[arg-type]
    assert store.names() == ["step-00000003"]
    assert read_checkpoint(store, "step-00000003")[1]["optimizer"]["state"][1] == {"step": 3}
    store.remove("step-00000003")
    assert store.names() == []


@pytest.mark.slow
def test_s3_holds_the_last_and_the_best(address: str) -> None:
    manager = CheckpointManager(remote(address), "mine", keep=2)
    for step in range(1, 6):
        keep(manager, step, best=step == 2)
    manager.wait()
    assert manager.store.names() == ["step-00000002", "step-00000004", "step-00000005"]
    latest = manager.latest()
    assert latest is not None and torch.equal(latest.state["model"]["fc.weight"], torch.full((3, 5), 5.0))
    # One that is damaged is set aside, with all its files.
    system, path = manager.store.system, manager.store.path  # type: ignore[attr-defined]
    with system.open_output_stream(f"{path}/step-00000005/model.safetensors") as stream:
        stream.write(b"rotten")
    latest = manager.latest()
    assert latest is not None and latest.name == "step-00000004"
    assert manager.store.names() == ["step-00000002", "step-00000004"]
    with system.open_input_stream(f"{path}/bad-step-00000005/model.safetensors") as stream:
        assert bytes(stream.read()) == b"rotten"
    keep(manager, 5)
    manager.wait()
    assert manager.store.names() == ["step-00000002", "step-00000004", "step-00000005"]
    # One without its manifest is none, and goes.
    stream = manager.store.write("step-00000009", "model.safetensors")
    stream.write(b"half")
    stream.close()
    assert "step-00000009" not in manager.store.names()
    manager.store.clean()
    assert "step-00000009" not in remote(address)._folders()


@pytest.mark.slow
def test_s3_that_fails_for_a_while(address: str, proxy: Proxy) -> None:
    manager = CheckpointManager(remote(address), "mine", keep=3, waits=(0.5, 1.0, 2.0, 4.0, 8.0))
    keep(manager, 1)
    manager.wait()
    proxy.down = True
    threading.Timer(3.0, lambda: setattr(proxy, "down", False)).start()
    start = time.monotonic()
    keep(manager, 2)
    assert time.monotonic() - start < 1.0, "the training waited for the store"
    manager.wait()
    assert proxy.refused > 0 and manager.store.names() == ["step-00000001", "step-00000002"]
    assert [event.kind for event in manager.events()] == ["checkpoint", "checkpoint"]


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_s3_that_stays_away_costs_the_checkpoint_not_the_run(address: str, proxy: Proxy) -> None:
    manager = CheckpointManager(remote(address), "mine", keep=3, waits=(0.1,))
    proxy.down = True
    manager.save(manifest(1), state())
    manager.wait()
    (event,) = manager.events()
    assert event.kind == "warning" and "the checkpoint of step 1 failed" in event.message
    proxy.down = False
    keep(manager, 2)
    manager.wait()
    assert manager.store.names() == ["step-00000002"]


@pytest.mark.slow
def test_a_run_goes_on_from_s3_where_its_folder_is_gone(address: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = small_config(tmp_path / "a")
    parts = stored(small_config(tmp_path / "b"), address)
    train(whole, World())
    with pytest.raises(Stopped):
        train(parts, World(), StopAt(6))
    assert not (run_dir(parts) / "checkpoints").exists()
    shutil.rmtree(tmp_path / "b")  # the machine is gone
    train(parts, World())
    assert (run_dir(parts) / "model.safetensors").read_bytes() == (run_dir(whole) / "model.safetensors").read_bytes()
    steps = [r["step"] for r in read_rows(run_dir(parts) / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == [2, 4, 6, 8, 10, 12]
    system, path = open_storage(address)
    with system.open_input_stream(f"{path}/run/model.safetensors") as stream:
        assert bytes(stream.read()) == (run_dir(whole) / "model.safetensors").read_bytes()


def rows_of(config: Config, kind: str = "train") -> list[int]:
    return [row["step"] for row in read_rows(run_dir(config) / "metrics.jsonl") if row["kind"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["added", "dropped", "moved"])
def test_a_run_goes_on_where_its_storage_changes(change: str, address: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole, local = small_config(tmp_path / "a"), small_config(tmp_path / "b")
    other = stored(local, address.replace("/test-", "/moved-test-"))
    first, second = {
        "added": (local, stored(local, address)),
        "dropped": (stored(local, address), local),
        "moved": (stored(local, address), other),
    }[change]
    train(whole, World())
    with pytest.raises(Stopped):
        train(first, World(), StopAt(6))
    with pytest.raises(Stopped):
        train(second, World(), StopAt(2))  # it saves in the new place at once
    train(second, World())
    assert (run_dir(second) / "model.safetensors").read_bytes() == (run_dir(whole) / "model.safetensors").read_bytes()
    assert rows_of(second) == [2, 4, 6, 8, 10, 12]
    messages = [row["message"] for row in read_rows(run_dir(second) / "metrics.jsonl") if row.get("event") == "resume"]
    assert len(messages) == 2 and "of 12 steps" in messages[0]


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_an_old_place_that_does_not_answer_is_no_reason_to_start_over(address: str, proxy: Proxy, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    local = small_config(tmp_path)
    with pytest.raises(Stopped):
        train(stored(local, address), World(), StopAt(6))
    before = rows_of(local)
    proxy.down = True
    with pytest.raises(OSError, match="where this run has had checkpoints, cannot be listed now"):
        train(local, World())
    assert rows_of(local) == before and before
    proxy.down = False
    shutil.rmtree(run_dir(local) / "checkpoints", ignore_errors=True)
    system, path = open_storage(address)
    system.delete_dir(f"{path}/run/checkpoints")
    with pytest.raises(UserError, match=r"has the record of a run .* but no checkpoint is left in"):
        train(local, World())
    assert rows_of(local) == before


@pytest.mark.slow
def test_a_machine_with_an_old_folder_takes_the_longer_record(address: str, tmp_path: Path) -> None:
    """The run begins here, moves to another machine, and comes back."""
    torch.set_num_threads(1)
    here, there = (stored(small_config(tmp_path / name), address) for name in ("here", "there"))
    with pytest.raises(Stopped):
        train(here, World(), StopAt(5))
    with pytest.raises(Stopped):
        train(there, World(), StopAt(6))  # two of them in the validation
    assert rows_of(there)[-1] > rows_of(here)[-1]
    train(here, World())
    assert rows_of(here) == [2, 4, 6, 8, 10, 12]
    system, path = open_storage(address)
    with system.open_input_stream(f"{path}/run/metrics.jsonl") as stream:
        steps = [json.loads(line)["step"] for line in bytes(stream.read()).splitlines()]
    assert set(rows_of(here)) <= set(steps)
    assert (run_dir(here) / "metrics.jsonl.stale").is_file()


@pytest.mark.slow
def test_results_that_the_store_lacks_are_copied_at_the_next_start(address: str, tmp_path: Path) -> None:
    """The machine was lost after the run had ended, before its results were copied."""
    config = stored(small_config(tmp_path), address)
    summary = train(config, World())
    system, path = open_storage(address)
    for name in ("summary.json", "model.safetensors"):
        system.delete_file(f"{path}/run/{name}")
    assert train(config, World()) == summary
    for name in ("summary.json", "model.safetensors"):
        with system.open_input_stream(f"{path}/run/{name}") as stream:
            assert stream.read() == (run_dir(config) / name).read_bytes()


@pytest.mark.slow
def test_results_are_copied_before_wandb_takes_its_time(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stored(small_config(tmp_path), address)
    system, path = open_storage(address)
    seen: list[bool] = []
    finish = RunTracker.finish

    def late(tracker: RunTracker, *arguments: Any, **options: Any) -> None:
        seen.append(system.get_file_info(f"{path}/run/summary.json").is_file)
        finish(tracker, *arguments, **options)

    monkeypatch.setattr(RunTracker, "finish", late)
    train(config, World())
    assert seen[0]


def test_another_run_of_the_same_name_in_the_store_is_refused(address: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    mine, theirs = small_config(tmp_path / "mine"), small_config(tmp_path / "theirs")
    with pytest.raises(Stopped):
        train(stored(theirs, address), World(), StopAt(3))
    with pytest.raises(Stopped):
        train(mine, World(), StopAt(3))
    with pytest.raises(UserError, match="has another run called 'run'"):
        train(stored(mine, address), World())


def test_two_machines_do_not_write_to_one_run(address: str, tmp_path: Path) -> None:
    """Each with a folder of its own. A dead one's lease is taken after a silence, or at once from the same folder."""
    system, path = open_storage(address)
    times: dict[str, Any] = {"beat_s": 0.2, "silence_s": 2.0}
    mine, theirs = (StoredLease("s3://runs/run", system, f"{path}/run") for _ in range(2))
    with hold_lease(mine, 0.0, place="here", **times):
        began = time.monotonic()
        busy = pytest.raises(FolderBusy, match=rf"still writes to s3://runs/run: process {os.getpid()} on \S+, since 20")
        with busy, hold_lease(theirs, 0.0, place="there", **times):
            pass
        assert time.monotonic() - began > 2.0
        left = mine.read()
    assert mine.read() == ""
    for place, silence in (("here", 0.0), ("there", 2.0)):
        mine.write(left)  # as a killed machine leaves it
        began = time.monotonic()
        with hold_lease(theirs, 0.0, place=place, **times):
            assert time.monotonic() - began > silence
    assert place_of(tmp_path) == place_of(tmp_path)


def test_a_run_holds_its_place_in_the_store_while_it_trains(address: str, tmp_path: Path) -> None:
    config = stored(small_config(tmp_path, training__max_steps=2), address)
    system, path = open_storage(address)
    seen: list[bool] = []

    class Look(Hooks):
        def after_step(self, run: Any) -> None:
            seen.append(system.get_file_info(f"{path}/run/.lease").is_file)

    train(config, World(), Look())
    assert seen == [True, True]
    assert not system.get_file_info(f"{path}/run/.lease").is_file


def test_a_library_that_raises_errors_of_its_own_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As botocore and Google's client do; here fsspec's memory with a patched call."""
    from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

    class ClientError(Exception):
        pass

    attempts: list[str] = []
    info = MemoryFileSystem.info

    def fails_once(system: Any, path: str, **more: Any) -> Any:
        attempts.append(path)
        if len(attempts) == 1:
            raise ClientError("SlowDown")
        return info(system, path, **more)

    system, path = open_storage("memory://asked-again")
    store = RemoteStore("memory://asked-again", system, f"{path}/checkpoints", waits=(0.05,))
    save(store, 1)  # type: ignore[arg-type]
    monkeypatch.setattr(MemoryFileSystem, "info", fails_once)
    with pytest.raises(OSError, match="ClientError: SlowDown"):
        system.get_file_info(path)
    attempts.clear()
    assert store.names() == ["step-00000001"]
    assert len(attempts) > 1

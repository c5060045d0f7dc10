"""Runs as jobs of a Ray cluster, through Ray's job API over HTTP: the machine that submits needs no part in it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

import asp_dist
from asp_dist.cluster import user_keys
from asp_dist.config import Config, to_dict
from asp_dist.errors import EXIT_FAILURE, EXIT_STOPPED, UserError, check

POLL_S = 1.0
START_WAIT_S = 60.0
ATTEMPTS = 6


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A Ray cluster's job server.

    Args:
        address: ``http://HEAD:8265``; None: ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS``.
        verify: False accepts any TLS certificate; a path names the certificates to trust.
    """

    address: str | None = None
    verify: bool | str = True

    def connect(self) -> JobSubmissionClient:
        """A client; it sends Ray's token if ``RAY_AUTH_MODE=token`` is set.

        Raises:
            UserError: no job server answers, or it refuses the token.
        """
        address = self.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
        check(
            address.startswith(("http://", "https://")),
            f"--address = {address or None} is not a job server: give the dashboard's address, http://HEAD:8265",
        )
        try:
            return JobSubmissionClient(address, verify=self.verify)
        except (OSError, RuntimeError, RayError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise UserError(
                f"no Ray job server answers at {address}: {lines[0] if lines else type(error).__name__} (is the "
                "cluster up and the port open? With token authentication, set RAY_AUTH_MODE=token and the token)"
            ) from error


def submit(
    config: Config,
    cluster: Cluster,
    *,
    root: str | os.PathLike[str] | None = None,
    wait: bool = True,
    out: TextIO | None = None,
) -> int:
    """Submit a training run as a job.

    The job gets this package's source and the configuration; the cluster's machines bring the packages that it needs.

    Args:
        config: the run.
        cluster: where to.
        root: folder on the cluster that the configuration's relative paths start from; None: this working directory,
            which suits a cluster that mounts it.
        wait: follow the job's log to its end; else return once the job is submitted.
        out: where the log goes; None: standard output.

    Returns:
        The job's exit code: 0, or what `asp-dist train` failed with; 75 if it was stopped. 0 without `wait`.

    Raises:
        UserError: no job server answers.
    """
    out = out or sys.stdout
    client = cluster.connect()
    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env").setLevel(logging.WARNING)
    job = f"{config.name}-{uuid.uuid4().hex[:8]}"
    wandb = {name: os.environ[name] for name in user_keys.WITH_WANDB if name in os.environ}
    variables = user_keys.settings() | wandb | user_keys.put(client)
    with _package(on_cluster(config, root or Path.cwd())) as folder:
        _submit_with_retries(
            client,
            entrypoint="python -m asp_dist train job.yaml",
            submission_id=job,
            runtime_env={"working_dir": str(folder), "env_vars": variables},
            metadata={"run": config.name},
        )
    ask = "asp-dist submit" + (f" --address {cluster.address}" if cluster.address else "")
    print(f"job {job} submitted; status: {ask} --status {job}; stop: {ask} --stop {job}", file=out)
    if not wait:
        return 0
    follow(client, job, out)
    return exit_code(client, job, out)


def _submit_with_retries(client: JobSubmissionClient, **job: Any) -> None:
    """Submit; wait for a cluster that has just started, whose server answers before a node can take a job."""
    deadline = time.monotonic() + START_WAIT_S
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def status(job: str, cluster: Cluster, out: TextIO | None = None) -> int:
    """Print a job's status. Returns 0 while it runs and when it succeeded, else its exit code."""
    out = out or sys.stdout
    client = cluster.connect()
    state = _status(client, job)
    print(f"{job}: {state}", file=out)
    return exit_code(client, job, out) if state.is_terminal() else 0


def stop(job: str, cluster: Cluster, out: TextIO | None = None, *, timeout_s: float = 300.0) -> int:
    """Stop a job and wait until it has ended; its run resumes from its latest checkpoint when submitted again.

    Raises:
        UserError: there is no such job.
        TimeoutError: it still runs after `timeout_s` seconds.
    """
    out = out or sys.stdout
    client = cluster.connect()
    if not _status(client, job).is_terminal():
        client.stop_job(job)
    deadline = time.monotonic() + timeout_s
    while not _status(client, job).is_terminal():
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job} still runs {timeout_s:g} s after it was asked to stop")
        time.sleep(POLL_S)
    print(f"{job}: {_status(client, job)}", file=out)
    return 0


def follow(client: JobSubmissionClient, job: str, out: TextIO) -> None:
    """Print a job's log as it grows, until the job ends; over a connection that breaks, too."""
    printed = 0

    async def tail() -> None:
        nonlocal printed
        seen = 0
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, printed - seen) :]
            seen += len(text)
            printed += len(fresh)
            out.write(fresh)
            out.flush()

    failures = 0
    while True:
        try:
            if _status(client, job).is_terminal():
                out.write(client.get_job_logs(job)[printed:])
                return
            failures = 0
            asyncio.run(tail())
        except (OSError, RuntimeError) as error:
            failures += 1
            if failures == ATTEMPTS:
                raise UserError(
                    f"lost the connection to the cluster; job {job} may still run: asp-dist submit --status {job} ({error})"
                ) from error
        time.sleep(POLL_S * 2**failures)


def exit_code(client: JobSubmissionClient, job: str, out: TextIO) -> int:
    """An ended job's exit code; why it failed is printed, unless its log said so."""
    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        print(f"job {job} was stopped; submitted again, it resumes from its latest checkpoint", file=out)
        return EXIT_STOPPED
    if info.driver_exit_code is None or info.driver_exit_code < 0:
        print(f"job {job} failed: {(info.message or 'no reason was given').strip()}", file=out)
        return EXIT_FAILURE
    return int(info.driver_exit_code) or EXIT_FAILURE


def on_cluster(config: Config, root: str | os.PathLike[str]) -> Config:
    """`config` as the job needs it: paths from the folder `root` there, and the cluster that the job runs on."""

    def on_nodes(path: str) -> str:
        return path if "://" in path else os.path.normpath(Path(root) / path)

    weights, start = config.model.weights, config.resume.from_run
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, weights=weights and on_nodes(weights)),
        data=dataclasses.replace(config.data, root=on_nodes(config.data.root)),
        output=dataclasses.replace(config.output, dir=on_nodes(config.output.dir)),
        cluster=dataclasses.replace(config.cluster, address=None),
        resume=dataclasses.replace(config.resume, from_run=start and on_nodes(start)),
    )


@contextmanager
def _package(config: Config) -> Iterator[Path]:
    """A folder with what the job needs: this package and the configuration."""
    source = Path(asp_dist.__file__).parent
    with tempfile.TemporaryDirectory(prefix="asp-dist-job-") as name:
        folder = Path(name)
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "job.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
        yield folder


def _status(client: JobSubmissionClient, job: str) -> JobStatus:
    try:
        return client.get_job_status(job)
    except RuntimeError as error:
        if "does not exist" in str(error) or "not found" in str(error).lower():
            raise UserError(f"the cluster knows no job {job}") from error
        raise

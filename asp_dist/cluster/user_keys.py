"""What of the user's environment reaches the workers: settings in the open, keys without being written to disk.

Ray writes a job's environment variables to its logs and shows them in its job API. So a key is put into the memory of the
cluster's head under a random name, and only the name goes along; the job takes the key out, once, and hands it to its
workers as an argument.
"""

from __future__ import annotations

import json
import os
import uuid
from typing import TYPE_CHECKING

from asp_dist.tracking.wandb.login import configured_server

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

KEYS = ("WANDB_API_KEY", "HF_TOKEN")
# Beginnings of the names by which clouds' libraries are let in, but for what describes the machine itself.
CLOUD_KEYS = ("AWS_", "AZURE_STORAGE_", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT")
OF_THE_MACHINE = (
    *("AWS_CONTAINER_", "AWS_EXECUTION_ENV", "AWS_LAMBDA_", "AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "TORCH_HOME"),
)
# What goes with wandb's key: offered to another server than its own, it would be given away.
WITH_WANDB = ("WANDB_BASE_URL", "WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT")
# Beginnings of the names of the communication libraries' settings, and others.
SETTINGS = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "FI_", "UCX_", "HF_HUB_OFFLINE")
PLACE = "ASP_DIST_KEYS"  # the environment variable that names the place


def is_key(name: str) -> bool:
    """Whether the environment variable of that name may hold a key."""
    return name in KEYS or (name.startswith(CLOUD_KEYS) and not name.startswith(OF_THE_MACHINE))


def settings() -> dict[str, str]:
    """The settings in this process's environment that workers take over; none of them is a secret."""
    return {k: v for k, v in os.environ.items() if k.startswith(SETTINGS) and not k.startswith(OF_THE_MACHINE)}


def from_environment() -> dict[str, str]:
    """The keys in this process's environment, and where and how wandb tracks, by the environment or its settings files."""
    found = {name: value for name, value in os.environ.items() if value and (is_key(name) or name in WITH_WANDB)}
    address = configured_server()
    return found if address is None else {"WANDB_BASE_URL": address, **found}


def put(client: JobSubmissionClient) -> dict[str, str]:
    """Put this process's keys into the head's memory; returns the environment variable that lets a job `take` them."""
    keys = from_environment()
    if not any(is_key(name) for name in keys):
        return {}
    name = f"asp-dist-{uuid.uuid4().hex}.zip"  # the ending by which Ray knows a package
    from asp_dist.cluster.ray_private import put_in_head_memory  # with torch and Ray Train

    put_in_head_memory(client, name, json.dumps(keys).encode())
    return {PLACE: f"gcs://{name}"}


def take() -> None:
    """In a job, connected to Ray: take the keys out of the head's memory, into this process's environment."""
    place = os.environ.pop(PLACE, None)
    if place is None:
        return
    from asp_dist.cluster.ray_private import take_from_head_memory

    stored = take_from_head_memory(place)
    if stored is not None:
        os.environ.update({name: value for name, value in json.loads(stored).items() if is_key(name) or name in WITH_WANDB})

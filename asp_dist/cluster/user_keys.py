"""Passes the user's keys to the workers without writing them to disk.

Ray writes a job's environment variables to its logs and shows them in its job API. So a key is put into the memory of the
cluster's head under a random name, and only the name goes along; the job takes the key out, once, and hands it to its
workers as an argument.
"""

from __future__ import annotations

import json
import os
import uuid
from typing import TYPE_CHECKING

from asp_dist.cluster.ray_private import put_in_head_memory, take_from_head_memory
from asp_dist.tracking.wandb.login import configured_server

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

KEYS = ("WANDB_API_KEY", "HF_TOKEN")
# What goes with wandb's key: offered to another server than its own, it would be given away.
WITH_WANDB = ("WANDB_BASE_URL", "WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT")
PLACE = "ASP_DIST_KEYS"  # the environment variable that names the place


def from_environment() -> dict[str, str]:
    """The keys in this process's environment, and where and how wandb tracks, by the environment or its settings files."""
    found = {name: os.environ[name] for name in (*KEYS, *WITH_WANDB) if os.environ.get(name)}
    address = configured_server()
    return found if address is None else {"WANDB_BASE_URL": address, **found}


def put(client: JobSubmissionClient) -> dict[str, str]:
    """Put this process's keys into the head's memory; returns the environment variable that lets a job `take` them."""
    keys = from_environment()
    if not any(name in keys for name in KEYS):
        return {}
    name = f"asp-dist-{uuid.uuid4().hex}.zip"  # the ending by which Ray knows a package
    put_in_head_memory(client, name, json.dumps(keys).encode())
    return {PLACE: f"gcs://{name}"}


def take() -> None:
    """In a job, connected to Ray: take the keys out of the head's memory, into this process's environment."""
    place = os.environ.pop(PLACE, None)
    if place is None:
        return
    stored = take_from_head_memory(place)
    if stored is not None:
        os.environ.update({name: value for name, value in json.loads(stored).items() if name in (*KEYS, *WITH_WANDB)})

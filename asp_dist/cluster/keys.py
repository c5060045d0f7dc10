"""The user's keys on their way to the workers, without a stop on any disk.

Ray writes a job's environment variables to its logs and shows them in its job API. So a key is put into the memory of the
cluster's head under a random name, and only the name goes along; the job takes the key out, once, and hands it to its
workers as an argument.
"""

from __future__ import annotations

import json
import os
import uuid

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get
from ray.job_submission import JobSubmissionClient

from asp_dist.tracking.wandb_mode import configured_server

KEYS = ("WANDB_API_KEY", "HF_TOKEN")
# What goes with wandb's key: offered to another server than its own, it would be given away.
WITH_WANDB = ("WANDB_BASE_URL", "WANDB_MODE", "WANDB_ENTITY", "WANDB_PROJECT")
PLACE = "ASP_DIST_KEYS"  # the environment variable that names the place


def here() -> dict[str, str]:
    """The keys in this process's environment, and where and how wandb tracks, by the environment or its settings files."""
    found = {name: os.environ[name] for name in (*KEYS, *WITH_WANDB) if os.environ.get(name)}
    address = configured_server()
    return found if address is None else {"WANDB_BASE_URL": address, **found}


def deposit(client: JobSubmissionClient) -> dict[str, str]:
    """Put this process's keys into the head's memory; returns the environment variable that lets a job `collect` them."""
    keys = here()
    if not any(name in keys for name in KEYS):
        return {}
    name = f"asp-dist-{uuid.uuid4().hex}.zip"  # the ending by which Ray knows a package
    answer = client._do_request("PUT", f"/api/packages/gcs/{name}", data=json.dumps(keys).encode())
    answer.raise_for_status()
    return {PLACE: f"gcs://{name}"}


def collect() -> None:
    """In a job, connected to Ray: take the keys out of the head's memory, into this process's environment."""
    place = os.environ.pop(PLACE, None)
    if place is None:
        return
    stored = _internal_kv_get(place)
    if stored is not None:
        _internal_kv_del(place)
        os.environ.update({name: value for name, value in json.loads(stored).items() if name in (*KEYS, *WITH_WANDB)})

"""Decides, within a time limit and before wandb starts, whether a run can be tracked online."""

from __future__ import annotations

import base64
import json
import netrc
import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from asp_dist.config import TrackingConfig, UserError

PROBE = json.dumps({"query": "query { viewer { id } }"}).encode()


@dataclass(frozen=True)
class Mode:
    """How wandb runs: ``online``, ``offline`` or ``disabled``, and why where that was not asked for."""

    name: str
    reason: str = ""


def api_key(base_url: str) -> str | None:
    """The user's key: ``WANDB_API_KEY``, else the netrc entry of the server's host."""
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        file = Path(path).expanduser() if path else None
        if file is None or not file.exists():
            continue
        try:
            entry = netrc.netrc(str(file)).authenticators(urlsplit(base_url).hostname or "")
        except (netrc.NetrcParseError, OSError):
            continue
        if entry and entry[2]:
            return entry[2]
    return None


def _ask(base_url: str, key: str, timeout: float) -> str:
    """Empty if the server knows the key, else what is wrong."""
    token = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {token}"}
    request = urllib.request.Request(f"{base_url}/graphql", data=PROBE, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            viewer = (json.load(answer).get("data") or {}).get("viewer")
        return "" if viewer else f"the wandb server {base_url} does not know the API key"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return f"the wandb server {base_url} refused the API key"
        return f"the wandb server {base_url} answered with HTTP {error.code}"
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        return f"the wandb server {base_url} cannot be reached ({cause})"


def probe(base_url: str, key: str, timeout: float) -> str:
    """Ask the server, for `timeout` seconds at most even if name resolution hangs; empty if online tracking works."""
    answer = [f"the wandb server {base_url} did not answer within {timeout:g} s"]

    def ask() -> None:
        answer[0] = _ask(base_url, key, timeout)

    thread = threading.Thread(target=ask, name="wandb-probe", daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0]


def resolve(config: TrackingConfig, base_url: str, *, was_offline: bool = False) -> Mode:
    """The mode for this start.

    Args:
        config: ``wandb = auto`` tries the server; the other values are taken as they are.
        base_url: the wandb server.
        was_offline: the run already has offline files; it stays offline so that one sync uploads all, in order.

    Raises:
        UserError: ``wandb = online`` and the server is not usable.
    """
    wanted: str = config.wandb
    if wanted == "auto" and os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        wanted = os.environ["WANDB_MODE"]
    if wanted in ("offline", "disabled"):
        return Mode(wanted)
    if wanted == "auto" and was_offline:
        return Mode("offline", "it began offline")
    key = api_key(base_url)
    problem = probe(base_url, key, config.timeout_s) if key else "there is no API key (run `wandb login`)"
    if not problem:
        return Mode("online")
    if wanted == "online":
        raise UserError(f"tracking.wandb = online, but {problem}; tracking.wandb = auto goes offline instead")
    return Mode("offline", problem)

"""Decides, within a time limit and before wandb starts, whether a run can be tracked online."""

from __future__ import annotations

import base64
import configparser
import json
import netrc
import os
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from asp_dist.config import TrackingConfig
from asp_dist.errors import UserError

# wandb's own cloud goes by both names; a login for one is good for the other.
CLOUD = ("api.forge.coreweave.com", "api.wandb.ai")
PROBE = json.dumps({"query": "query { viewer { id } }"}).encode()


@dataclass(frozen=True)
class Mode:
    """How wandb runs: ``online``, ``offline`` or ``disabled``, and why where that was not asked for."""

    name: str
    reason: str = ""


def api_key(base_url: str) -> str | None:
    """The user's key, found where wandb finds it: ``WANDB_API_KEY``, the netrc entry of the server, wandb's settings."""
    if os.environ.get("WANDB_API_KEY"):
        return os.environ["WANDB_API_KEY"]
    place = urlsplit(base_url).netloc
    hosts = (place, *CLOUD) if place in CLOUD else (place,)
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    if path.exists():
        try:
            file = netrc.netrc(str(path))
        except (netrc.NetrcParseError, OSError):
            return None
        for entry in map(file.authenticators, hosts):
            if entry and entry[2]:
                return entry[2]
    import wandb

    return wandb.setup().settings.api_key


def configured_server() -> str | None:
    """The server that wandb's settings files name (``wandb login --host`` writes one), None if they name none."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read([Path(folder).expanduser() / "settings", Path("wandb") / "settings"])
    except (configparser.Error, UnicodeDecodeError):
        return None  # wandb treats a broken file as an empty one
    return settings.get("default", "base_url", fallback=None)


def _ask(base_url: str, key: str | None, timeout: float) -> str:
    """Empty if the server answers, and knows the key if one is given; else what is wrong."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}"
    try:
        request = urllib.request.Request(f"{base_url}/graphql", data=PROBE, headers=headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            viewer = (json.load(answer).get("data") or {}).get("viewer")
        return "" if viewer or key is None else f"the wandb server {base_url} does not know the API key"
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            return "" if key is None else f"the wandb server {base_url} refused the API key"
        return f"the wandb server {base_url} answered with HTTP {error.code}"
    except Exception as error:  # whatever the network or a foreign server may answer
        return f"the wandb server {base_url} cannot be reached ({getattr(error, 'reason', error)})"


def probe(base_url: str, key: str | None, timeout: float) -> str:
    """Ask the server, for `timeout` seconds at most even if name resolution hangs; empty if online tracking works."""
    answer = [f"the wandb server {base_url} did not answer within {timeout:g} s"]

    def ask() -> None:
        answer[0] = _ask(base_url, key, timeout + 5)  # the join below ends the wait, always with the same words

    thread = threading.Thread(target=ask, name="wandb-probe", daemon=True)
    thread.start()
    thread.join(timeout)
    return answer[0]


def usable(base_url: str, timeout: float) -> str:
    """Empty if runs can be tracked on that server, else what is wrong; takes `timeout` seconds at most."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return probe(base_url, None, timeout)
    key = api_key(base_url)
    return probe(base_url, key, timeout) if key else "there is no API key (run `wandb login`)"


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
    problem = usable(base_url, config.timeout_s)
    if not problem:
        return Mode("online")
    if wanted == "online":
        raise UserError(f"tracking.wandb = online, but {problem}; tracking.wandb = auto goes offline instead")
    return Mode("offline", problem)

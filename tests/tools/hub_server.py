"""A stand-in for the Hugging Face hub on loopback: makes repositories, takes commits, and gives their files back."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flask import Flask, Response, request
from werkzeug.serving import make_server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000  # bytes from which a file goes the way of large ones


@dataclass
class Hub:
    """What the server was sent: the files of each repository, by name, and whether it is private."""

    address: str
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    refuses: bool = False


def _app(hub: Hub) -> Flask:
    app = Flask("hub")

    @app.before_request
    def look() -> Response | None:
        hub.tokens.add(request.headers.get("authorization"))
        return Response('{"error": "no such token"}', 401, mimetype="application/json") if hub.refuses else None

    @app.post("/api/repos/create")
    def create() -> dict[str, Any]:
        asked = request.get_json()
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        hub.files.setdefault(name, {})
        hub.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
        return {"url": f"{hub.address}/{name}", "name": name, "id": name}

    @app.post("/api/validate-yaml")
    def validate() -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    @app.post("/api/models/<owner>/<name>/preupload/<revision>")
    def preupload(owner: str, name: str, revision: str) -> dict[str, Any]:
        modes = [(file["path"], "lfs" if file["size"] > LARGE else "regular") for file in request.get_json()["files"]]
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}

    @app.post("/<owner>/<name>.git/info/lfs/objects/batch")
    def batch(owner: str, name: str) -> dict[str, Any]:
        objects = request.get_json()["objects"]
        links = [{**one, "actions": {"upload": {"href": f"{hub.address}/large/{one['oid']}"}}} for one in objects]
        return {"transfer": "basic", "objects": links}

    @app.put("/large/<oid>")
    def put(oid: str) -> str:
        hub.large[oid] = request.get_data()
        return ""

    @app.post("/api/models/<owner>/<name>/commit/<revision>")
    def commit(owner: str, name: str, revision: str) -> dict[str, Any]:
        files = hub.files[f"{owner}/{name}"]
        for line in request.get_data(as_text=True).splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                files[row["value"]["path"]] = hub.large[row["value"]["oid"]]
        return {
            "success": True,
            "commitOid": COMMIT,
            "commitUrl": f"{hub.address}/{owner}/{name}/commit/{COMMIT}",
            "hookOutput": "",
        }

    @app.get("/api/models/<owner>/<name>")
    @app.get("/api/models/<owner>/<name>/revision/<revision>")
    def info(owner: str, name: str, revision: str = "main") -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in hub.files[f"{owner}/{name}"]]
        return {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0, "private": False}

    @app.get("/<owner>/<name>/resolve/<revision>/<path:path>")
    def resolve(owner: str, name: str, revision: str, path: str) -> Response:
        data = hub.files.get(f"{owner}/{name}", {}).get(path)
        if data is None:
            return Response("", 404, {"X-Error-Code": "EntryNotFound"})
        return Response(data, 200, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    return app


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that lives while the context lasts."""
    hub = Hub("")
    server = make_server("127.0.0.1", 0, _app(hub), threaded=True)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()

"""An S3 server on loopback, moto's in a process of its own, that lists its requests and answers some of them with 503."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waiting import wait_until

BUCKET = "images"


@dataclass
class S3Server:
    """A running server.

    Args:
        port: on 127.0.0.1.
        folder: of the list of its requests.
    """

    port: int
    folder: Path

    def address(self, path: str) -> str:
        """An address in it, with the options that pyarrow needs."""
        options = f"scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1&allow_bucket_creation=true"
        return f"s3://{BUCKET}/{path}?{options}"

    def requests(self) -> list[str]:
        """``METHOD PATH STATUS`` of each so far."""
        return (self.folder / "requests").read_text().splitlines()

    def images_read(self) -> list[str]:
        """Paths of the images that were read, in order; each request of them once, failed ones left out."""
        asked = [line.split() for line in self.requests()]
        return [path for method, path, status in asked if method == "GET" and status[0] == "2" and path.endswith(".png")]

    def fail(self, every: int) -> None:
        """Answer every n-th request of an image with 503; 0: none."""
        (self.folder / "fail").write_text(str(every))


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run a server; the environment must have ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``, any."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    (folder / "requests").touch()
    with open(folder / "log", "w") as log:
        command = [sys.executable, "-W", "ignore", __file__, str(port), str(folder)]
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        )
    try:
        wait_until(lambda: _answers(port) or process.poll() is not None, "the S3 server")
        yield S3Server(port, folder)
    finally:
        process.terminate()
        process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def main(port: int, folder: Path) -> None:
    """Serve until the end of the process."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    app = DomainDispatcherApplication(create_backend_app)
    count = itertools.count(1)
    lines = (folder / "requests").open("a", buffering=1)

    def serve(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        fail = folder / "fail"
        every = int(fail.read_text() or 0) if fail.exists() else 0
        if every and method == "GET" and path.endswith(".png") and next(count) % every == 0:
            lines.write(f"{method} {path} 503\n")
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]

        def started(status: str, *rest: Any) -> Any:
            lines.write(f"{method} {path} {status.split()[0]}\n")
            return start(status, *rest)

        return app(environ, started)

    run_simple("127.0.0.1", port, serve, threaded=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

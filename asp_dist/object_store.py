"""Object stores by their addresses: S3, Google's, HDFS through pyarrow, and anything that fsspec supports."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from asp_dist.errors import UserError

T = TypeVar("T")


def open_storage(address: str, field: str = "output.storage") -> tuple[Any, str]:
    """The pyarrow file system of an address such as ``s3://bucket/path`` and the path in it.

    Credentials and endpoints come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...) or the address
    (``s3://bucket/path?endpoint_override=http://host:9000``).

    Args:
        address: the address.
        field: of the configuration, for messages.

    Raises:
        UserError: nothing installed knows such an address.
    """
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(address)
    except (ValueError, OSError) as error:
        try:
            import fsspec  # type: ignore[import-untyped]

            other, path = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as other_error:
            raise UserError(f"{field} = {address!r} cannot be used: {error}; {other_error}") from error
        system = fs.PyFileSystem(_handler(other))
    return system, str(path).rstrip("/")


def _handler(system: Any) -> Any:
    """pyarrow's handler of an fsspec file system, whose libraries' own errors become OSError, which is tried again."""
    from pyarrow import fs

    class Handler(fs.FSSpecHandler):
        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            return found if name.startswith("_") or not callable(found) else _with_os_errors(found)

    return Handler(system)


def _with_os_errors(work: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(work)
    def call(*arguments: Any, **options: Any) -> T:
        try:
            return work(*arguments, **options)
        except (OSError, NotImplementedError):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    return call

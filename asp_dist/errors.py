"""The errors of this package, with their exit codes, and the checks that raise them."""

from __future__ import annotations

import errno
import re
from urllib.parse import parse_qsl, urlsplit

# Of ``asp-dist``; see `asp_dist.cli.main`.
EXIT_FAILURE, EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130


class UserError(ValueError):
    """A mistake of the user's, or of the machine's set-up: the message names the value, the place and the remedy."""


# Errors of the file system that a retry would meet again.
_LASTING = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def may_pass(error: OSError) -> bool:
    """Whether a retry may succeed (storage that does not answer), as opposed to a fault that the user must fix."""
    return error.errno not in _LASTING


def check(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def missing_data(root: str) -> UserError:
    """The error of a data set that is not there; names the command that writes it, as far as its folder tells which it is."""
    if "://" in root:
        return UserError(
            f"data.root = {root}: nothing is there. `asp-dist prepare DATASET --target {root}` writes a data set there; the "
            "endpoint and the keys are those of the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_PROFILE, ...)"
        )
    for data_set in ("imagenet", "cifar100", "cifar10"):
        if data_set in root.lower():
            source = {"imagenet": "the official archives"}.get(data_set, "torchvision's files")
            how = f"`asp-dist prepare {data_set} --source DIR --target {root}` writes it from DIR, with {source}"
            break
    else:
        how = "`asp-dist prepare digits` writes a small data set, and any folder with train/CLASS/* and val/CLASS/* will do"
    return UserError(f"data.root = {root}: there is no such folder. {how}")


# Names of options that carry credentials in the addresses that pyarrow and fsspec know.
_SECRET = re.compile(r"secret|token|passw|credential|private|signature|access_?key|^(sig|key)$", re.IGNORECASE)


def check_address(name: str, address: str | None) -> None:
    """Raise `UserError`, without showing them, if an address contains credentials: addresses are written to files and wandb."""
    if address is None or "://" not in address:
        return
    parts = urlsplit(address)
    user, at, _ = parts.netloc.rpartition("@")
    # A container of Azure, a name without a password and Google's word for no login are not secrets.
    known = user == "anonymous" or (":" not in user and parts.scheme not in ("s3", "gs", "gcs", "http", "https"))
    options = [option for option, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(option)]
    if (at and not known) or options:
        what = f"the option {options[0]}" if options else "a user's name or password"
        raise UserError(
            f"{name}: the {parts.scheme}:// address contains {what}, which would reach the run's files and wandb: leave it out "
            "and set the environment instead (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; "
            "GOOGLE_APPLICATION_CREDENTIALS; AZURE_STORAGE_KEY)"
        )


def check_fraction(name: str, value: float | None, *, upper_open: bool = False) -> None:
    """Raise `UserError` unless `value` is None or lies in [0, 1], or [0, 1) with `upper_open`."""
    if value is None:
        return
    inside = 0.0 <= value < 1.0 if upper_open else 0.0 <= value <= 1.0
    interval = "[0, 1)" if upper_open else "[0, 1]"
    check(inside, f"{name} = {value} is outside {interval}: give a fraction, such as 0.9 for 90 %")


def check_positive(name: str, value: float | None) -> None:
    """Raise `UserError` unless `value` is None or greater than 0."""
    check(value is None or value > 0, f"{name} = {value} must be greater than 0")

"""Why a batch failed: a bad file, storage that does not answer, or the device; and what follows from it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from asp_dist.config import UserError, may_pass
from asp_dist.data.samples import Samples


class DataError(UserError):
    """A file that does not decode, or is not there: the message names it, its shard and the rank. A restart would repeat it."""


class DataReadError(RuntimeError):
    """Images that cannot be read now, or a pipeline that failed though every file decodes: a restart may well succeed."""


# How CUDA's errors read, whatever passes them on. They say nothing about any file.
_CUDA = re.compile(r"\bCUDA (error|runtime|driver|allocation)|\bcudaError|\bCUDA_ERROR|\bNVML\b")


def diagnose(encoded: bytes) -> str | None:
    """Why PIL does not decode `encoded`, or None if it does."""
    from PIL import Image, UnidentifiedImageError

    if not encoded:
        return "empty file"
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
    except UnidentifiedImageError:
        return "no image format that is known"
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for broken files
        return f"{error}"
    return None


def dali_diagnose(encoded: bytes) -> str | None:
    """DALI's own complaint about one image, or None."""
    from nvidia.dali.experimental import dynamic

    try:
        decoded = dynamic.decoders.image(dynamic.as_tensor(np.frombuffer(encoded, dtype=np.uint8)))
        _ = decoded.shape
    except RuntimeError as error:
        return f"DALI does not decode it ({str(error).splitlines()[0]})"
    return None


@dataclass(frozen=True)
class Suspects:
    """What was found among the samples of a batch that failed, each with the reason.

    Attributes:
        bad: samples that twice did not decode, or are not there.
        unread: samples that could not be read this time.
    """

    bad: tuple[tuple[int, str], ...] = ()
    unread: tuple[tuple[int, str], ...] = ()


def examine(samples: Samples, indices: Iterable[int], look: Callable[[bytes], str | None] = diagnose) -> Suspects:
    """Read the samples `indices`, and let `look` say what is wrong with each; what it complains of is read once more."""

    def reason(index: int) -> tuple[bool, str] | None:
        """(whether it is the file's fault, what is wrong); None if nothing is."""
        for attempt in (1, 2):
            try:
                complaint = look(samples.read(index))
            except OSError as error:
                text = error.strerror or str(error)
                if may_pass(error) or attempt == 2:
                    return not may_pass(error), text
            else:
                if complaint is None or attempt == 2:
                    return None if complaint is None else (True, complaint)
        return None

    wanted = list(indices)
    with ThreadPoolExecutor(4) as pool:
        found = [(index, *answer) for index, answer in zip(wanted, pool.map(reason, wanted)) if answer is not None]
    return Suspects(
        bad=tuple((index, text) for index, own, text in found if own),
        unread=tuple((index, text) for index, own, text in found if not own),
    )


def _culprits(message: str, samples: Samples, indices: list[int]) -> Suspects:
    """The files that DALI's message names, if they are at fault, else the first found among the batches under way."""
    named = [i for i in indices if samples.shard is None and samples.names[i] in message]
    found = examine(samples, named)
    chunks = [indices[i : i + 64] for i in range(0, len(indices), 64)]
    for look in (diagnose, dali_diagnose):
        for chunk in chunks:
            if found.bad or found.unread:
                return found
            found = examine(samples, chunk, look)
    return found


def pipeline_error(error: Exception, samples: Samples, indices: Iterable[int], *, where: str) -> Exception:
    """The error to raise when a batch failed: looks through `indices` for the files that are at fault.

    Args:
        error: what the pipeline raised.
        indices: samples of the batches that were under way.
        where: rank, epoch and step, for the message.

    Returns:
        A `DataError` if a file twice did not decode, or is not there; `error` itself if the device failed; else a
        `DataReadError`.
    """
    if _CUDA.search(str(error)):
        return error
    found = _culprits(str(error), samples, list(dict.fromkeys(int(i) for i in indices)))
    listed = found.bad or found.unread
    files = "; ".join(f"{samples.place(index)}: {reason}" for index, reason in listed[:5])
    files += f" (and {len(listed) - 5} more)" if len(listed) > 5 else ""
    if found.bad:
        return DataError(
            f"{where}: cannot decode {files}. Run `asp-dist verify {samples.root} --manifest FILE` to list every bad file "
            "and write a manifest without them, or replace the file, then start the same command again"
        )
    again = "the run restarts from its last checkpoint, as often as cluster.max_failures allows"
    if found.unread:
        return DataReadError(f"{where}: cannot read {files} now; {again}")
    first = next((line for line in str(error).splitlines() if "rror" not in line and line.strip()), str(error))
    return DataReadError(f"{where}: the data pipeline failed, but every file of the batch decodes: {first}; {again}")

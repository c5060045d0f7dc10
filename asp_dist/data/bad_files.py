"""Why a batch failed: a bad file, storage that does not answer, or the device; and what follows from it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from asp_dist.data.samples import Samples
from asp_dist.errors import UserError, may_pass


class DataError(UserError):
    """A file that does not decode, or is not there: the message names it, its shard and the rank. A restart would repeat it."""


class DataReadError(RuntimeError):
    """Images that cannot be read now, or a pipeline that failed though every file decodes: a restart may well succeed."""


Look = Callable[[bytes], str | None]  # what is wrong with an encoded image, or None

# How errors of CUDA and its drivers read, whoever passes them on. They are never a file's fault.
_DEVICE = re.compile(
    r"\bCUDA (error|runtime|driver|allocation|out of memory)|\bcudaError|\bCUDA_ERROR|\bnvml error", re.IGNORECASE
)
# How DALI says that the machine has no memory left.
_MEMORY = re.compile(r"bad_alloc|can(no|')t allocate|failed to allocate|out of memory", re.IGNORECASE)
AGAIN = (
    "another attempt may succeed: on Ray, the workers restart from the last checkpoint, up to cluster.max_failures times; "
    "elsewhere, start the same command again"
)


def diagnose(encoded: bytes, *, strict: bool = False) -> str | None:
    """Why PIL does not decode `encoded`, or None if it does.

    Args:
        encoded: an image file.
        strict: count what PIL alone refuses too: an image above its limit of pixels, or that does not become RGB.

    Raises:
        MemoryError: there was no memory left, which is not the file's fault.
    """
    from PIL import Image, UnidentifiedImageError

    if not encoded:
        return "empty file"
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            if strict:
                image.convert("RGB")
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        return f"{error}" if strict else None
    except UnidentifiedImageError:
        return "unrecognized image format"
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and more for broken files
        return f"{error}"
    return None


def dali_diagnose(encoded: bytes) -> str | None:
    """DALI's own complaint about one image, or None.

    Raises:
        RuntimeError: the device or the memory failed, which is not the file's fault.
    """
    from nvidia.dali.experimental import dynamic

    try:
        decoded = dynamic.decoders.image(dynamic.as_tensor(np.frombuffer(encoded, dtype=np.uint8)))
        _ = decoded.shape
    except RuntimeError as error:
        if _DEVICE.search(str(error)) or _MEMORY.search(str(error)):
            raise
        return f"DALI does not decode it ({_cause(error)})"
    return None


def _cause(error: Exception) -> str:
    """The line of the error's text that says why; DALI puts the operator and where it was defined before it."""
    lines = [line.strip() for line in str(error).rpartition("encountered:")[2].splitlines()]
    return next((line for line in lines if line and not line.endswith(":")), type(error).__name__)


@dataclass(frozen=True)
class Suspects:
    """What was found among the samples of a batch that failed, each with the reason.

    Attributes:
        bad: samples that twice did not decode, or are not there.
        unread: samples that could not be read this time.
    """

    bad: tuple[tuple[int, str], ...] = ()
    unread: tuple[tuple[int, str], ...] = ()


def examine(samples: Samples, indices: Iterable[int], look: Look = diagnose) -> Suspects:
    """Read the samples `indices`, and let `look` say what is wrong with each; what it complains of is read once more.

    Every time from storage: the system's cache would hand out the same damaged bytes twice.
    """

    def reason(index: int) -> tuple[bool, str] | None:
        """(whether it is the file's fault, what is wrong); None if nothing is."""
        for attempt in (1, 2):
            try:
                complaint = look(samples.read(index, fresh=True))
            except OSError as error:
                if may_pass(error) or attempt == 2:
                    return not may_pass(error), error.strerror or _cause(error)
            except (MemoryError, RuntimeError) as error:
                return False, _cause(error)
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


def _culprits(message: str, samples: Samples, indices: list[int], looks: Sequence[Look]) -> Suspects:
    """The files that DALI's message names, if they are at fault, else the first found among the batches under way."""
    named = [i for i in indices if samples.shard is None and samples.names[i] in message]
    found = examine(samples, named, looks[0])
    chunks = [indices[i : i + 64] for i in range(0, len(indices), 64)]
    for look in looks:
        for chunk in chunks:
            if found.bad or found.unread:
                return found
            found = examine(samples, chunk, look)
    return found


def pipeline_error(
    error: Exception,
    samples: Samples,
    indices: Iterable[int],
    *,
    where: str,
    looks: Sequence[Look] = (diagnose, dali_diagnose),
) -> Exception:
    """The error to raise when a batch failed: looks through `indices` for the files that are at fault.

    Args:
        error: what the pipeline raised.
        indices: samples of the batches that were under way.
        where: rank, epoch and step, for the message.
        looks: what judges the files, one after the other.

    Returns:
        A `DataError` if a file twice did not decode, or is not there; `error` itself if the device failed; else a
        `DataReadError`.
    """
    if _DEVICE.search(str(error)):
        return error
    asked = list(dict.fromkeys(int(i) for i in indices))
    found = _culprits(str(error), samples, asked, looks)
    listed = found.bad or found.unread
    files = "; ".join(f"{samples.place(index)}: {reason}" for index, reason in listed[:5])
    files += f" (and {len(listed) - 5} more)" if len(listed) > 5 else ""
    if found.bad:
        return DataError(
            f"{where}: cannot decode {files}. Run `asp-dist verify {samples.root} --manifest FILE` to list every bad file "
            "and write a manifest without them, or replace the file, then start the same command again"
        )
    if found.unread:
        return DataReadError(f"{where}: cannot read {files}; {AGAIN}")
    looked_at = f"{samples.place(asked[0])} reads" if len(asked) == 1 else "every file of the batch reads"
    return DataReadError(f"{where}: {_cause(error)}; but {looked_at} and decodes now; {AGAIN}")


def without_traceback(error: DataError | DataReadError) -> DataError | DataReadError:
    """The error of a worker process of torch's as it was raised there: torch puts its traceback into the message."""
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return type(error)(str(error).rpartition(name)[2].strip())

"""Errors of single files: which one it was, why, and how to go on."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from asp_dist.config import UserError
from asp_dist.data.samples import Samples


class DataError(UserError):
    """A file that does not read or decode: the message names it, its shard and the rank. Retrying is no use."""


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


def find_bad(
    samples: Samples, indices: Iterable[int], look: Callable[[bytes], str | None] = diagnose
) -> list[tuple[int, str]]:
    """The samples among `indices` that do not read, or that `look` complains about: (index, reason)."""

    def reason(index: int) -> str | None:
        try:
            return look(samples.read(index))
        except OSError as error:
            return error.strerror or str(error)

    wanted = list(indices)
    with ThreadPoolExecutor(4) as pool:
        return [(index, found) for index, found in zip(wanted, pool.map(reason, wanted)) if found is not None]


def _culprits(message: str, samples: Samples, indices: list[int]) -> list[tuple[int, str]]:
    """The bad files: those that DALI's message names, else the first found among the batches under way."""
    named = [i for i in indices if samples.shard is None and samples.names[i] in message]
    bad = find_bad(samples, named)
    chunks = [indices[i : i + 64] for i in range(0, len(indices), 64)]
    for look in (diagnose, dali_diagnose):
        for chunk in chunks:
            bad = bad or find_bad(samples, chunk, look)
    return bad


def decode_error(error: Exception, samples: Samples, indices: Iterable[int], *, where: str) -> DataError:
    """The error to raise when a batch failed: looks through `indices` for the files that do not decode.

    Args:
        error: what the pipeline raised.
        indices: samples of the batches that were under way.
        where: rank, epoch and step, for the message.
    """
    bad = _culprits(str(error), samples, list(dict.fromkeys(int(i) for i in indices)))
    if not bad:
        first = next((line for line in str(error).splitlines() if "rror" not in line and line.strip()), str(error))
        return DataError(f"{where}: the data pipeline failed, and every file of the batch decodes by itself: {first}")
    files = "; ".join(f"{samples.place(index)}: {reason}" for index, reason in bad[:5])
    more = f" (and {len(bad) - 5} more)" if len(bad) > 5 else ""
    return DataError(
        f"{where}: cannot decode {files}{more}. Run `asp-dist verify {samples.root} --manifest FILE` to list every bad "
        "file and write a manifest without them, or replace the file, then start the same command again"
    )

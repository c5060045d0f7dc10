"""The table of GPUs, and what share of their published figures a training reaches; a mistake is answered without torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from asp_dist.errors import UserError, check

TABLE = Path(__file__).with_name("gpus.yaml")


@dataclass(frozen=True)
class Gpu:
    """A GPU's published figures.

    Args:
        name: of the table.
        memory: bytes.
        bandwidth: of its memory, bytes per second.
        half: peak of dense matrix products in bfloat16 or float16 with float32 sums, FLOP/s.
        tf32: the same for float32 numbers rounded to TensorFloat-32, which cuDNN's convolutions use; None: it has none.
        float32: peak in float32, FLOP/s.
        bfloat16: whether it computes in bfloat16.
        source: where the figures are from.
    """

    name: str
    memory: float
    bandwidth: float
    half: float
    float32: float
    source: str
    tf32: float | None = None
    bfloat16: bool = True


@dataclass(frozen=True)
class Shares:
    """What share of the peaks is reached; set from published throughput, see configs/README.md.

    Args:
        arithmetic: of matrix products and convolutions.
        memory: of everything else.
        grouped: of the bandwidth, of convolutions with groups, depthwise ones above all.
    """

    arithmetic: float = 0.65
    memory: float = 0.8
    grouped: float = 0.12

    def __post_init__(self) -> None:
        for name in ("arithmetic", "memory", "grouped"):
            value = getattr(self, name)
            check(0 < value <= 1, f"share of {name} = {value} is outside (0, 1]")


def find_gpu(name: str, file: Path | None = None) -> Gpu:
    """The GPU of that name in the table, in upper or lower case; see `read_gpus`.

    Raises:
        UserError: there is none; names those that there are.
    """
    table = read_gpus(file)
    wanted = name.replace(" ", "").lower()
    found = next((gpu for known, gpu in table.items() if known.replace(" ", "").lower() == wanted), None)
    if found is None:
        raise UserError(
            f"--gpu {name} is not in the table: choose among {', '.join(table)}, or add it with --gpu-table FILE.yaml"
        )
    return found


def read_gpus(file: Path | None = None) -> dict[str, Gpu]:
    """The table of GPUs, by name; with `file`, a YAML file of the same form, its entries too.

    Raises:
        UserError: the file is not there, or has another form.
    """
    found = {}
    for path in (TABLE, *([] if file is None else [file])):
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
            found.update({name: Gpu(name=name, **{k: _number(v) for k, v in values.items()}) for name, values in tree.items()})
        except OSError as error:
            raise UserError(f"--gpu-table {path}: {error.strerror}") from error
        except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
            fields = ", ".join(f.name for f in dataclasses.fields(Gpu) if f.name != "name")
            raise UserError(f"--gpu-table {path} is no table of GPUs ({error}): give NAME: {{{fields}}}") from error
    return found


def _number(value: Any) -> Any:
    """YAML reads 3e12 as a text."""
    return value if isinstance(value, bool | None) or not str(value)[:1].isdigit() else float(value)

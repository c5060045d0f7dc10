"""``asp-dist prepare`` and ``verify``: data sets before training."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from asp_dist.config import UserError


def add_prepare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", type=str, help="digits.")
    parser.add_argument("--target", type=str | None, default=None, help="folder to write; default: data/DATASET.")


def prepare(dataset: str, *, target: str | None = None) -> int:
    """Write a data set in the form that training reads."""
    from asp_dist.data import prepare_digits

    if dataset != "digits":
        raise UserError(f"dataset {dataset!r} is unknown: it is one of digits")
    print(f"digits: {prepare_digits(target or 'data/digits')}")
    return 0

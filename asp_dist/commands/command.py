"""What a command of ``asp-dist`` consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jsonargparse import ArgumentParser


def no_arguments(parser: ArgumentParser) -> None:
    """For a command without options of its own."""


@dataclass(frozen=True)
class Command:
    """One ``asp-dist`` command, or a group of them.

    Attributes:
        help: one line on what it does.
        examples: command lines, each with what it does.
        add_arguments: adds its own options to a parser.
        run: called with the parsed options, and with the configuration first if it is configured; returns the exit code.
            None for a group.
        configured: its first argument is a configuration, whose fields are options too.
        swept: it takes ``--set FIELD=V1,V2``, and is called with a list of configurations and the `name` of the one they vary.
        group: the commands below it, by name.
    """

    help: str
    add_arguments: Callable[[ArgumentParser], None] = no_arguments
    run: Callable[..., int] | None = None
    configured: bool = False
    swept: bool = False
    group: dict[str, Command] = field(default_factory=dict)
    examples: tuple[tuple[str, str], ...] = ()

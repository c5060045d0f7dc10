"""The ``asp-dist`` command: reads the command line and the configuration, and calls what does the work."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import traceback
import typing
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from asp_dist import __version__
from asp_dist.commands import COMMANDS
from asp_dist.commands.command import Command
from asp_dist.commands.sweep import name_of, variants
from asp_dist.config import Config, from_dict
from asp_dist.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USER, UserError
from asp_dist.help_texts import AsWritten, examples, meant, short_help


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``asp-dist`` and return its exit code.

    0: done. 1: failed. 2: a mistake in the input or the set-up. 75: stopped after saving a checkpoint; the same command
    resumes. 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("ASP_DIST_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = _describe(error)
        folder = os.environ.get("ASP_DIST_RANKS")
        if folder is not None:
            return _tell_ranks(Path(folder), code, message, alike=code == EXIT_STOPPED or hasattr(error, "on_every_rank"))
        print(message, file=sys.stderr)
        return code


def _tell_ranks(folder: Path, code: int, message: str, *, alike: bool) -> int:
    """Print an error once for all ranks of this machine, and return the exit code of this one, for launch/torchrun.sh.

    torchrun starts all ranks anew after one that ends with a code. Where all of them end in the same way, and starting anew
    would end so again, they succeed as far as torchrun is concerned; the script finds the code in `folder`.
    """
    with suppress(FileExistsError), (folder / f"{zlib.crc32(message.encode()):08x}").open("x"):
        print(message, file=sys.stderr)
    if code not in (EXIT_USER, EXIT_STOPPED):
        return code
    (folder / "code").write_text(str(code))
    return 0 if alike else code


def _describe(error: Exception) -> tuple[int, str]:
    """Exit code and the one message of an error."""
    if type(error).__name__ == "Stopped":
        return EXIT_STOPPED, str(error)
    if isinstance(error, ArgumentError):
        return EXIT_USER, f"error: {_readable(str(error))}{meant(str(error), field_names())}"
    if isinstance(error, UserError):
        return EXIT_USER, f"error: {error}"
    if isinstance(error, FileNotFoundError | PermissionError) and error.filename:
        return EXIT_USER, f"error: {error.strerror}: {error.filename}"
    return EXIT_FAILURE, f"error: {type(error).__name__}: {error} (--debug shows where)"


def _readable(message: str) -> str:
    """jsonargparse's words on a value of the wrong type, as one line with the field, the value and what fits."""
    key = re.search(r'key "([\w.]+)"', message)
    value = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    if not key or not value:
        return message
    kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.(Literal\[.*?\])|(\S+?)\.)", message)
    words = {"NoneType": "null", "tuple": "a list, such as '[one, two]'"}
    found = (next(filter(None, kind)) for kind in kinds)
    length = re.search(r"Expected a tuple with (\d+) elements", message)
    lists = [f"a list of {length[1]}"] if length else []
    wanted = " or ".join(dict.fromkeys([*lists, *(words.get(word, word) for word in found)]))
    return f"{key[1]} = {value[1].strip()} is not valid" + (f": expected {wanted}" if wanted else "")


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return EXIT_USER
    arguments = spelled(arguments, parser)
    command = COMMANDS.get(arguments[0])
    if command is not None and command.configured:
        if {"--help", "-h"} & set(arguments):
            print(short_help(arguments[0], command))
            return 0
        arguments = ["--help" if argument == "--help-all" else argument for argument in _with_config_option(arguments)]
        check_fields(arguments)
    parsed = parser.parse_args(arguments)
    command, options = COMMANDS[parsed.command], parsed[parsed.command]
    if command.group:
        command, options = command.group[options.command], options[options.command]
    assert command.run is not None
    if command.configured:
        try:
            config = to_config(parsed)
        except UserError as error:
            error.on_every_rank = True  # type: ignore[attr-defined]
            raise
        if command.swept:
            own = _own(options)
            points = _variants(parser, arguments, config, sets=[text for texts in own.pop("set") or [] for text in texts])
            return command.run(points, name=config.name, **own)
        return command.run(config, **_own(options))
    return command.run(**_plain(options))


def _variants(parser: ArgumentParser, arguments: Sequence[str], config: Config, *, sets: Sequence[str]) -> list[Config]:
    """The configurations of a sweep: the one on the command line with each combination of the values that ``--set`` gives."""
    if not sets:
        raise UserError("a sweep needs values: --set FIELD=V1,V2, such as --set budget.sparsity=0.8,0.9")
    names = field_names()
    known = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    points = []
    for settings in variants(sets, known):
        words = [*arguments, *(f"--{field}={value}" for field, value in settings.items())]
        point = to_config(parser.parse_args(words))
        group = point.tracking.group or f"{config.name}-sweep"
        tracking = dataclasses.replace(point.tracking, group=group)
        points.append(dataclasses.replace(point, name=name_of(config.name, settings), tracking=tracking))
    return points


def spelled(arguments: Sequence[str], parser: ArgumentParser) -> list[str]:
    """The arguments with the parser's own spelling of each option: hyphens and underscores are both accepted."""
    options = {name.replace("-", "_"): name for name in _option_names(parser)}
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = options.get(name.replace("-", "_"), name)
        result.append(name + equals + value)
    return result


def _option_names(parser: Any) -> set[str]:
    names = set(parser._option_string_actions)
    for action in parser._actions:
        for below in (getattr(action, "choices", None) or {}) if hasattr(action, "add_subcommand") else ():
            names |= _option_names(action._name_parser_map[below])
    return names


def _with_config_option(arguments: list[str]) -> list[str]:
    """``train FILE ...`` as ``train --config FILE ...``."""
    if len(arguments) > 1 and not arguments[1].startswith("-"):
        return [arguments[0], "--config", *arguments[1:]]
    return arguments


def to_config(parsed: Namespace) -> Config:
    """The run's configuration out of the parsed arguments.

    Raises:
        UserError: a value is out of its range.
    """
    options = parsed[parsed.command]
    tree = {field.name: _as_tree(options[field.name]) for field in dataclasses.fields(Config)}
    return typing.cast("Config", from_dict(tree))


def _as_tree(value: Any) -> Any:
    """Parsed values as nested dictionaries and lists."""
    if isinstance(value, Namespace):
        return {name: _as_tree(item) for name, item in vars(value).items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list | tuple):
        return [_as_tree(item) for item in value]
    return value


def _own(options: Namespace) -> dict[str, Any]:
    """The options of a configured command that are not fields of the configuration."""
    fields = {field.name for field in dataclasses.fields(Config)} | {"config", "print_config"}
    return {name: value for name, value in _plain(options).items() if name not in fields}


def _plain(options: Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if not name.startswith("__")}


def field_names(cls: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all fields of the configuration, groups included."""
    names = []
    hints = typing.get_type_hints(cls)
    for name in (field.name for field in dataclasses.fields(cls)):
        kind = hints[name]
        names.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            names.extend(field_names(typing.cast("type", kind), f"{prefix}{name}."))
    return names


def check_fields(arguments: Sequence[str]) -> None:
    """Raise `UserError`, naming the nearest field, for an unknown field in the file or among the options."""
    known = field_names()
    for position, argument in enumerate(arguments):
        previous = arguments[position - 1] if position else ""
        if argument.startswith("--config=") or previous == "--config":
            _check_file(Path(argument.removeprefix("--config=")), known)
        elif argument.startswith("--") and "." in argument.split("=")[0]:
            name = argument[2:].split("=")[0].rstrip("+")
            if name not in known and ".kwargs." not in name:
                raise UserError(f"unknown option --{name}{_nearest(name, known, '--')}")


def _check_file(path: Path, known: list[str]) -> None:
    if not path.is_file():
        near = sorted(p.as_posix() for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise UserError(f"configuration {path} does not exist{hint}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"configuration {path} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise UserError(f"configuration {path} has no fields")
    _check_tree(tree, "", known, path)


def _check_tree(tree: dict[str, Any], prefix: str, known: list[str], path: Path) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name not in known:
            raise UserError(f"{path}: unknown field {name}{_nearest(name, known)}")
        if isinstance(value, dict) and not name.endswith("kwargs"):
            _check_tree(value, f"{name}.", known, path)


def _nearest(name: str, known: list[str], dashes: str = "") -> str:
    """The field that was probably meant: one of that name a level below, or the one spelled most alike."""
    group, _, last = name.rpartition(".")
    below = [field for field in known if field.startswith(f"{group}.") and field.endswith(f".{last}")]
    if below:
        owner: Any = Config
        for part in below[0].split(".")[:-1]:
            owner = typing.get_type_hints(owner)[part]
        return f"; did you mean {dashes}{below[0]}, an option of {owner.__name__}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def build_parser() -> ArgumentParser:
    """The whole command line."""
    parser = ArgumentParser(
        prog="asp-dist",
        description="Prune timm models while they train, on a Ray cluster, to a budget you choose.",
        epilog="--debug shows a traceback with any error.",
        version=__version__,
        exit_on_error=False,
        formatter_class=AsWritten,
    )
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: ArgumentParser, commands: dict[str, Command]) -> None:
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, command in commands.items():
        sub = ArgumentParser(description=command.help, epilog=examples(command), exit_on_error=False, formatter_class=AsWritten)
        if command.configured:
            sub.add_argument("--config", action="config", help="YAML file; may be given as the first argument.")
            sub.add_class_arguments(Config, nested_key=None, fail_untyped=True)
        command.add_arguments(sub)
        subcommands.add_subcommand(name, sub, help=command.help)
        if command.group:
            _add_commands(sub, command.group)

"""What ``--help`` shows of a command that takes a configuration, and which field an unknown option stands for."""

from __future__ import annotations

import argparse
import re
import typing
from collections.abc import Sequence

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from asp_dist.commands.command import Command
from asp_dist.config import Config

# Fields that most command lines change.
USUAL = (
    *("name", "model.name", "data.root", "data.batch_size", "optimizer.lr", "schedule.epochs", "budget.sparsity"),
    *("cluster.num_workers", "training.precision", "training.seed", "output.dir", "tracking.project"),
)
# What people call fields that have another name here.
ALIASES = {
    "data.batch_size": ("b", "bs", "batch"),
    "data.root": ("data_dir", "data_path", "dataset"),
    "data.input_size": ("image_size", "img_size", "resolution"),
    "optimizer.lr": ("learning_rate",),
    "optimizer.weight_decay": ("wd",),
    "optimizer.name": ("opt", "optim"),
    "model.name": ("arch", "network"),
    "model.weights": ("checkpoint", "initial_checkpoint"),
    "training.precision": ("amp", "dtype", "fp16", "bf16"),
    "budget.sparsity": ("prune", "density", "target_sparsity"),
    "cluster.num_workers": ("gpus", "workers", "nproc", "nproc_per_node", "nodes", "num_gpus"),
    "output.dir": ("output", "out", "output_dir", "save_dir"),
    "tracking.project": ("wandb_project", "log_wandb"),
}


class AsWritten(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of examples as they are."""


def examples(command: Command) -> str | None:
    """A command's examples, one a line, in columns."""
    if not command.examples:
        return None
    width = max(len(line) for line, _ in command.examples)
    return "examples:\n" + "\n".join(f"  asp-dist {line:<{width}}  {what}" for line, what in command.examples)


def short_help(name: str, command: Command) -> str:
    """Its own options, the groups of the configuration's fields, and examples."""
    groups = [(group, kind.__doc__ or "") for group, kind in typing.get_type_hints(Config).items() if kind is not str]
    fields = [f"  {group:<10} {text.partition(chr(10))[0]}" for group, text in groups]
    usual = [f"  --{' --'.join(USUAL[first : first + 4])}" for first in range(0, len(USUAL), 4)]
    parts = [
        "\n".join(["groups of fields, each given as --GROUP.FIELD VALUE:", *fields]),
        "\n".join(["changed most often:", *usual]),
        examples(command) or "",
    ]
    parser = ArgumentParser(
        prog=f"asp-dist {name}",
        usage=f"asp-dist {name} CONFIG.yaml [--GROUP.FIELD VALUE ...] [options]",
        description=command.help,
        epilog="\n\n".join(parts),
        formatter_class=AsWritten,
        add_help=False,
    )
    command.add_arguments(parser)
    parser.add_argument("--print_config", action="store_true", help="show the configuration with all its values.")
    parser.add_argument("--help-all", action="store_true", help="list every field, with its meaning and default.")
    return str(parser.format_help())


def meant(message: str, known: Sequence[str]) -> str:
    """The field among `known` that an unrecognized option stands for, in words; empty if it is none."""
    found = re.search(r"unrecognized arguments: --([\w-]+)", message)
    if found is None:
        return ""
    name = found[1].replace("-", "_")
    fields = [field for field, others in ALIASES.items() if name in others]
    fields = fields or [field for field in known if field.rpartition(".")[2] == name]
    usual = [field for field in fields if field in USUAL] or fields[:3]
    return f"; did you mean --{' or --'.join(usual)}?" if usual else ""

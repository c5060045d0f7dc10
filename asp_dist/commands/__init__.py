"""What each ``asp-dist`` command does: a thin layer between the command line and the packages that do the work.

Heavy packages are imported where they are used, so that ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jsonargparse import ArgumentParser

from asp_dist.commands import bench, data, plan, runs, train


@dataclass(frozen=True)
class Command:
    """One ``asp-dist`` command.

    Attributes:
        help: one line on what it does.
        add_arguments: adds its own options to a parser.
        run: called with the parsed options, and with the configuration first if it is configured; returns the exit code.
        configured: its first argument is a configuration, whose fields are options too.
    """

    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[..., int]
    configured: bool = False


COMMANDS: dict[str, Command] = {
    "train": Command("Train and prune a model as a configuration says.", train.add_train_arguments, train.train, True),
    "plan": Command("Say what a run will prune, need and take.", plan.add_plan_arguments, plan.plan, True),
    "submit": Command("Submit a run to a Ray cluster as a job.", plan.add_submit_arguments, plan.submit, True),
    "evaluate": Command("Measure a run's model again, from its file.", runs.add_evaluate_arguments, runs.evaluate),
    "export": Command("Write a run's model as a sparse file or ONNX.", runs.add_export_arguments, runs.export),
    "report": Command("Write one self-contained HTML report of runs.", runs.add_report_arguments, runs.report),
    "compare": Command("Print the results of several runs.", runs.add_compare_arguments, runs.compare),
    "dashboard": Command("Create a project's wandb dashboard.", runs.add_dashboard_arguments, runs.dashboard),
    "prepare": Command("Write a data set in the form that training reads.", data.add_prepare_arguments, data.prepare),
    "verify": Command("Find a data set's bad files.", data.add_verify_arguments, data.verify),
    "bench": Command("Measure the engine's overhead, or the loaders.", bench.add_bench_arguments, bench.bench),
}

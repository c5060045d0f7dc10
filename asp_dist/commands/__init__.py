"""What each ``asp-dist`` command does: a thin layer between the command line and the packages that do the work.

Heavy packages are imported where they are used, so that ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

from asp_dist.commands import (
    bench,
    compare,
    dashboard,
    evaluate,
    export,
    plan,
    prepare,
    rehearse,
    report,
    submit,
    train,
    verify,
)
from asp_dist.commands.command import Command

COMMANDS: dict[str, Command] = {
    "train": Command("Train and prune a model.", train.add_arguments, train.run, configured=True),
    "plan": Command("Estimate what a run will prune and what it will cost.", plan.add_arguments, plan.run, configured=True),
    "rehearse": Command(
        "Run a recipe's whole schedule in a few hundred small steps.", rehearse.add_arguments, rehearse.run, configured=True
    ),
    "submit": Command("Submit a run to a Ray cluster as a job.", submit.add_arguments, submit.run, configured=True),
    "evaluate": Command("Re-evaluate a run's saved model.", evaluate.add_arguments, evaluate.run),
    "export": Command("Write a run's model as a sparse file or ONNX.", export.add_arguments, export.run),
    "report": Command("Write a self-contained HTML report of one or more runs.", report.add_arguments, report.run),
    "compare": Command("Print the results of several runs side by side.", compare.add_arguments, compare.run),
    "dashboard": Command("Create a project's wandb dashboard.", dashboard.add_arguments, dashboard.run),
    "prepare": Command("Write a data set in the form that training reads.", prepare.add_arguments, prepare.run),
    "verify": Command("Find corrupt files in a data set.", verify.add_arguments, verify.run),
    "bench": Command("Measure what pruning, loading, saving and tracking cost.", group=bench.GROUP),
}

"""What each ``asp-dist`` command does: a thin layer between the command line and the packages that do the work.

Heavy packages are imported where they are used, so that ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

from asp_dist.commands import (
    bench,
    dashboard,
    evaluate,
    export,
    plan,
    prepare,
    recipes,
    rehearse,
    results,
    submit,
    sweep,
    train,
    verify,
)
from asp_dist.commands.command import Command

RESNET = "configs/imagenet_resnet50.yaml"
RUN = "runs/imagenet_resnet50"

COMMANDS: dict[str, Command] = {
    "train": Command(
        "Train and prune a model.",
        train.add_arguments,
        train.run,
        configured=True,
        examples=(
            ("train configs/quickstart.yaml", "the main job, in small"),
            (f"train {RESNET} --name r95 --budget.sparsity 0.95", "another budget, under a name of its own"),
            (f"train {RESNET} --dry-run", "three steps, end to end"),
            ("train configs/quickstart.yaml", "again: goes on where it was stopped"),
        ),
    ),
    "plan": Command(
        "Estimate what a run will prune and what it will cost.",
        plan.add_arguments,
        plan.run,
        configured=True,
        examples=(
            (f"plan {RESNET} --gpu A100 --price 2.5", "hours and dollars on GPUs that need not be here"),
            ("plan configs/quickstart.yaml", "with a step timed on this machine"),
        ),
    ),
    "rehearse": Command(
        "Run a recipe's whole schedule in a few hundred small steps.",
        rehearse.add_arguments,
        rehearse.run,
        configured=True,
        examples=((f"rehearse {RESNET}", "minutes; exit code 1 if something would go wrong"),),
    ),
    "submit": Command(
        "Submit a run to a Ray cluster as a job.",
        submit.add_arguments,
        submit.run,
        configured=True,
        examples=(
            (f"submit {RESNET} --address http://HEAD:8265 --root /data --cluster.num_workers 8", "and follow its log"),
            ("submit --address http://HEAD:8265 --stop JOB", "after a checkpoint"),
        ),
    ),
    "sweep": Command(
        "Train and prune with several values of some fields, a run for each combination.",
        sweep.add_arguments,
        sweep.run,
        configured=True,
        swept=True,
        examples=(
            ("sweep configs/quickstart.yaml --set budget.sparsity=0.8,0.9,0.95 training.seed=1,2,3", "nine runs, one report"),
            (
                f"sweep {RESNET} --cluster.address auto --concurrent 2 --set budget.sparsity=0.8,0.9",
                "two at a time, on a cluster",
            ),
        ),
    ),
    "recipes": Command("List the recipes.", recipes.add_arguments, recipes.run, examples=(("recipes", "each with one line"),)),
    "evaluate": Command(
        "Evaluate a run, a checkpoint, a weights file or a network of timm's, on any data set.",
        evaluate.add_arguments,
        evaluate.run,
        examples=(
            (f"evaluate {RUN}", "on the data set that it was trained with"),
            (f"evaluate {RUN} --average", "the average of its weights, out of its last checkpoint"),
            ("evaluate resnet50.tv_in1k --data.root data/imagenet", "timm's own weights; classes are matched by name"),
        ),
    ),
    "push": Command(
        "Write a run as a repository of the Hugging Face hub, and send it there.",
        export.add_push_arguments,
        export.push,
        examples=((f"push {RUN} --repo USER/NAME --dry-run", "writes the folder only"),),
    ),
    "export": Command(
        "Write a run's model for other runtimes, and compare it with torch there.",
        export.add_arguments,
        export.run,
        examples=((f"export {RUN} --format sparse", "bitmaps and values"), (f"export {RUN} --format onnx", "for runtimes")),
    ),
    "report": Command(
        "Write a self-contained HTML report of one or more runs.",
        results.add_report_arguments,
        results.report,
        examples=(("report runs/*", "all runs on one page"),),
    ),
    "compare": Command(
        "Print the results of several runs side by side.",
        results.add_compare_arguments,
        results.compare,
        examples=(("compare runs/*", "a row each"),),
    ),
    "dashboard": Command(
        "Create a project's wandb dashboard.",
        dashboard.add_arguments,
        dashboard.run,
        examples=(("dashboard --project asp-dist", "once per project"),),
    ),
    "prepare": Command(
        "Write a data set in the form that training reads.",
        prepare.add_arguments,
        prepare.run,
        examples=(
            ("prepare digits", "a small data set that comes with the package"),
            ("prepare imagenet --source DIR", "from the official archives in DIR; goes on where it was interrupted"),
            ("prepare manifest --source DIR", "of class folders, so that a start does not walk them"),
        ),
    ),
    "verify": Command(
        "Find corrupt files in a data set.",
        verify.add_arguments,
        verify.run,
        examples=(("verify data/imagenet --manifest data/clean", "and leave them out"),),
    ),
    "bench": Command(
        "Measure what pruning, loading, saving and tracking cost, and what a pruned network gains.",
        group=bench.GROUP,
        examples=(
            ("bench overhead --model resnet50", "of pruning, against dense training"),
            ("bench deploy runs/quickstart", "a pruned network and its dense twin, in each runtime"),
        ),
    ),
}

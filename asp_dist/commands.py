"""What each ``asp-dist`` command does: a thin layer between the command line and the packages that do the work.

Heavy packages are imported where they are used, so that ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser

from asp_dist.config import Config, UserError

if TYPE_CHECKING:
    from asp_dist.tracking import Console

AddArguments = Callable[[ArgumentParser], None]


def _style(quiet: bool, as_json: bool) -> Any:
    return "quiet" if quiet else "json" if as_json else "auto"


def _display_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="show no progress.")
    parser.add_argument(
        "--json", action="store_true", help="print each row of metrics, and the summary, as JSON lines."
    )


def _train_arguments(parser: ArgumentParser) -> None:
    _display_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="three steps of everything, in a run of its own.")


def train(config: Config, *, quiet: bool = False, json: bool = False, dry_run: bool = False) -> int:
    """Train and prune, on Ray or in this process, and print the results."""
    from asp_dist.training import preflight
    from asp_dist.training.world import started_by_torchrun

    if dry_run:
        config = as_dry_run(config)
    checked = preflight(config)
    local = config.cluster.mode == "local" or started_by_torchrun()
    if int(os.environ.get("RANK", "0")) > 0:
        quiet, json = True, False
    from asp_dist.tracking import Console

    with Console(config, checked.total_steps, style=_style(quiet, json)) as console:
        summary = _train_here(config, console) if local else _train_on_ray(config, console)
    if int(os.environ.get("RANK", "0")) == 0:
        _show_results(config, summary, quiet=quiet, as_json=json)
    return 0


def as_dry_run(config: Config) -> Config:
    """The same run, three optimizer steps long, with a checkpoint and an evaluation, under a name of its own."""
    import dataclasses

    return dataclasses.replace(
        config,
        name=f"{config.name}-dry-run",
        training=dataclasses.replace(config.training, max_steps=3, log_every=1),
        output=dataclasses.replace(config.output, checkpoint_steps=2),
        tracking=dataclasses.replace(config.tracking, wandb="disabled"),
    )


def _train_on_ray(config: Config, console: Console) -> dict[str, Any]:
    from asp_dist.cluster import run

    return run(config, on_row=console.update)


def _train_here(config: Config, console: Console) -> dict[str, Any]:
    from asp_dist.training import SignalHooks, init_world, run_dir, train

    world = init_world(config.training.device, config.cluster.timeout_s)
    try:
        with SignalHooks() as hooks, _following(run_dir(config) / "metrics.jsonl", console):
            return train(config, world, hooks)
    finally:
        world.close()


@contextmanager
def _following(path: Path, console: Console) -> Iterator[None]:
    """Show the rows of a metrics file while they come."""
    from asp_dist.tracking import Tail

    tail, done = Tail(path, from_end=True), threading.Event()

    def follow() -> None:
        while not done.wait(0.3):
            for row in tail.read():
                console.update(row)

    thread = threading.Thread(target=follow, name="console", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for row in tail.read():
            console.update(row)


def _show_results(config: Config, summary: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    import json

    from asp_dist.tracking import print_results, read_layers
    from asp_dist.training import run_dir

    folder = run_dir(config)
    if as_json:
        print(json.dumps({"kind": "summary", **summary}))
    elif not quiet:
        print_results(summary, read_layers(folder), folder, next_command=f"asp-dist evaluate {folder}")


def _run_dir_argument(parser: ArgumentParser) -> None:
    parser.add_argument("run_dir", type=str, help="folder of a finished run, such as runs/quickstart.")


def _evaluate_arguments(parser: ArgumentParser) -> None:
    _run_dir_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON.")


def evaluate(run_dir: str, *, json: bool = False) -> int:
    """Accuracy and sparsity of a run's ``model.safetensors``, measured again from the file."""
    import json as json_

    from asp_dist.training import evaluate as evaluate_run

    result = evaluate_run(Path(run_dir))
    if json:
        print(json_.dumps(result))
    else:
        print(f"top-1     {result['top1']:.2%}\ntop-5     {result['top5']:.2%}")
        print(f"sparsity  {result['sparsity']:.4%}  ({result['nonzero_weights']:,} nonzero prunable weights)")
    return 0


def _export_arguments(parser: ArgumentParser) -> None:
    _run_dir_argument(parser)
    parser.add_argument("--format", type=Literal["sparse", "onnx"], default="sparse", help="form of the file.")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: in the run's folder.")


def export(run_dir: str, *, format: Any = "sparse", output: str | None = None) -> int:
    """Write a run's model for another program."""
    from asp_dist.export.run import export_run

    path = export_run(Path(run_dir), format, Path(output) if output else None)
    print(f"{path}  ({path.stat().st_size:,} bytes)")
    return 0


def _prepare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", type=str, help="digits.")
    parser.add_argument("--target", type=str | None, default=None, help="folder to write; default: data/DATASET.")


def prepare(dataset: str, *, target: str | None = None) -> int:
    """Write a data set in the form that training reads."""
    from asp_dist.data import prepare_digits

    if dataset != "digits":
        raise UserError(f"dataset {dataset!r} is unknown: it is one of digits")
    print(f"digits: {prepare_digits(target or 'data/digits')}")
    return 0


def _report_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_dirs", type=str, nargs="+", help="folders of runs; several are shown side by side.")
    parser.add_argument("--output", type=str | None, default=None, help="file to write; default: report.html there.")


def report(run_dirs: list[str], *, output: str | None = None) -> int:
    """Write the report of one run, or of several side by side."""
    from asp_dist.tracking.report import write_report

    print(write_report(run_dirs, output))
    return 0


def _compare_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run_dirs", type=str, nargs="+", help="folders of finished runs.")
    parser.add_argument("--json", action="store_true", help="print the summaries as JSON lines.")


def compare(run_dirs: list[str], *, json: bool = False) -> int:
    """Print the results of several runs side by side."""
    from asp_dist.tracking.compare import print_comparison

    print_comparison([Path(run_dir) for run_dir in run_dirs], as_json=json)
    return 0


def _dashboard_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--project", type=str, default="asp-dist", help="wandb project.")
    parser.add_argument("--entity", type=str | None, default=None, help="wandb user or team.")
    parser.add_argument(
        "--output", type=str | None, default=None, help="write the definitions here, and ask no server."
    )


def dashboard(*, project: str, entity: str | None = None, output: str | None = None) -> int:
    """Create the wandb workspace and report of a project."""
    from asp_dist.tracking.dashboard import create_dashboard

    for address in create_dashboard(project, entity, out=output):
        print(address)
    return 0


def _submit_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--address", type=str | None, default=None, help="http://HEAD:8265; default: RAY_ADDRESS.")
    parser.add_argument("--root", type=str | None, default=None, help="folder on the cluster that paths start from.")
    parser.add_argument("--no-wait", action="store_true", help="return once the job is submitted.")
    parser.add_argument("--status", type=str | None, default=None, metavar="JOB", help="show how a job stands.")
    parser.add_argument("--stop", type=str | None, default=None, metavar="JOB", help="stop a job behind a checkpoint.")
    parser.add_argument("--tls", type=str | None, default=None, help="certificates to trust for https, or 'off'.")


def submit(
    config: Config,
    *,
    address: str | None = None,
    root: str | None = None,
    no_wait: bool = False,
    status: str | None = None,
    stop: str | None = None,
    tls: str | None = None,
) -> int:
    """Submit a training run to a Ray cluster as a job, or ask after one."""
    from asp_dist.cluster import jobs

    cluster = jobs.Cluster(address, verify=tls is None or (False if tls == "off" else tls))
    if status is not None:
        return jobs.status(status, cluster)
    if stop is not None:
        return jobs.stop(stop, cluster)
    return jobs.submit(config, cluster, root=root, wait=not no_wait)


# Command -> (help, its arguments). The functions of the same names are called with the parsed arguments.
PARSERS: dict[str, tuple[str, AddArguments]] = {
    "train": ("Train and prune a model as a configuration says.", _train_arguments),
    "evaluate": ("Measure a run's model again, from its file.", _evaluate_arguments),
    "export": ("Write a run's model as a sparse file or ONNX.", _export_arguments),
    "report": ("Write one self-contained HTML report of runs.", _report_arguments),
    "compare": ("Print the results of several runs side by side.", _compare_arguments),
    "dashboard": ("Create the wandb workspace and report of a project.", _dashboard_arguments),
    "prepare": ("Write a data set in the form that training reads.", _prepare_arguments),
    "submit": ("Submit a training run to a Ray cluster as a job.", _submit_arguments),
}

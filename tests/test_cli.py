"""The command line: fields and their overrides, and the one clear message that answers a mistake."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from readme_commands import commands, reason

from asp_dist import __version__, cli, quick_checks
from asp_dist.commands import COMMANDS
from asp_dist.commands.train import command_here
from asp_dist.config import Config, config_hash, differences, to_dict
from asp_dist.pruning import Budget

ROOT = Path(__file__).parents[1]
CONFIG = "configs/quickstart.yaml"


def parse(*arguments: str) -> Config:
    """The configuration that ``asp-dist train`` would run."""
    parser = cli.build_parser()
    words = cli._with_config_option(["train", *arguments])
    cli.check_fields(words)
    return cli.to_config(parser.parse_args(words))


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must fail as a user's mistake."""
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err


def test_a_file_and_dotted_overrides_make_a_configuration() -> None:
    config = parse(CONFIG, "--budget.sparsity", "0.95", "--data.augment.scale", "[0.5, 0.9]", "--cluster.num_workers=1")
    assert config.name == "quickstart" and config.model.name == "resnet18"
    assert config.budget.sparsity == 0.95
    assert config.data.augment.scale == (0.5, 0.9) and config.data.augment.hflip == 0.0
    assert config.cluster.num_workers == 1


def test_every_default_survives_a_round_trip_through_yaml(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(Config())))
    assert parse(str(file)) == Config()


def test_several_budgets_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    also = [{"cost": "macs", "density": 0.15, "bound": "at_most"}]
    file.write_text(yaml.safe_dump({"budget": {"density": 0.1, "also": also}}))
    first, second = parse(str(file)).budget.all()
    assert first == Budget("parameters", density=0.1)
    assert second == Budget("macs", density=0.15, bound="at_most")


def test_dictionaries_of_arguments_can_be_given() -> None:
    assert parse(CONFIG, "--optimizer.kwargs", "{nesterov: false}").optimizer.kwargs == {"nesterov": False}


def test_print_config_is_a_configuration_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", CONFIG, "--budget.sparsity", "0.8", "--print_config"])
    assert ended.value.code == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    file = tmp_path / "printed.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in tree.items() if k in to_dict(Config())}))
    assert parse(str(file)).budget.sparsity == 0.8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("configs/nowhere.yaml",), ("configs/nowhere.yaml", "does not exist", "configs/quickstart.yaml")),
        ((CONFIG, "--budget.sparsty", "0.5"), ("--budget.sparsty", "did you mean --budget.sparsity?")),
        ((CONFIG, "--budget.sparsity", "1.0"), ("budget.sparsity = 1.0", "[0, 1)", "0.9 for 90 %")),
        ((CONFIG, "--budget.sparsity", "-0.1"), ("budget.sparsity = -0.1", "[0, 1)")),
        ((CONFIG, "--budget.sparsity", "most"), ("budget.sparsity = most", "float")),
        ((CONFIG, "--data.batch_size", "many"), ("data.batch_size = many", "int")),
        ((CONFIG, "--resume.allow_changes", "optimizer.lr"), ("resume.allow_changes = optimizer.lr", "a list")),
        ((CONFIG, "--data.synthetic_samples", "[1]"), ("data.synthetic_samples = [1]", "a list of 2")),
        ((CONFIG, "--data.dali.preallocate", "[5980]"), ("data.dali.preallocate = [5980]", "a list of 2 or null")),
        ((CONFIG, "--data.dali.preallocate", "[a,b]"), ("data.dali.preallocate = ['a', 'b']", "int or null")),
        ((CONFIG, "--pruning.control", "magic"), ("pruning.control = magic", "loss", "track")),
        ((CONFIG, "--pruning.ramp.end", "0.9"), ("pruning.ramp.end = 0.9", "freeze_at = 0.65")),
        (
            (CONFIG, "--pruning.control", "track"),
            ("pruning.loss.density = measured", "SparsityLoss", "pruning.control = track"),
        ),
        ((CONFIG, "--name", ".."), ("name = '..'", "plain folder name")),
        ((CONFIG, "--cluster.min_workers", "3"), ("cluster.min_workers = 3", "num_workers = 2")),
        ((CONFIG, "--budget.count", "5"), ("budget: give exactly one", "sparsity and count")),
    ],
)
def test_a_wrong_value_names_the_field_the_value_and_the_remedy(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    message = refusal(capsys, "train", *arguments)
    assert all(word in message for word in words), message
    assert len(message.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  nam: resnet18\n", ("unknown field model.nam", "did you mean model.name?")),
        ("schedul:\n  epochs: 3\n", ("unknown field schedul", "did you mean schedule?")),
        (
            "pruning:\n  control: track\n  multiplier: true\n",
            ("unknown field pruning.multiplier", "pruning.loss.multiplier", "SparsityLoss"),
        ),
        ("model: [", ("not valid YAML",)),
        ("just words", ("has no fields",)),
    ],
)
def test_a_wrong_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    message = refusal(capsys, "train", str(file))
    assert all(word in message for word in words), message


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert "train" in refusal(capsys, "trian")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "asp-dist" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", list(COMMANDS))
def test_each_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    if COMMANDS[command].configured:
        assert cli.main([command, "--help"]) == 0
    else:
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
    assert command in capsys.readouterr().out


def test_a_resumed_run_may_change_where_it_runs_but_not_what_it_computes() -> None:
    config = Config()
    moved = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, num_workers=4))
    assert differences(to_dict(config), to_dict(moved)) == {}
    assert config_hash(config) == config_hash(moved)
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=0.2))
    assert differences(to_dict(config), to_dict(other)) == {"optimizer.lr": (0.1, 0.2)}
    of_an_older_version = to_dict(config)
    del of_an_older_version["model"]["new_classifier"]
    assert differences(of_an_older_version, to_dict(other)) == {"optimizer.lr": (0.1, 0.2)}
    assert config_hash(config) != config_hash(other)


@pytest.mark.parametrize("option", ["--data.batch-size", "--data.batch_size"])
def test_hyphens_and_underscores_are_both_accepted(option: str) -> None:
    parser = cli.build_parser()
    arguments = cli.spelled(["train", "--config", CONFIG, option, "128", "--dry_run"], parser)
    assert arguments == ["train", "--config", CONFIG, "--data.batch_size", "128", "--dry-run"]
    assert cli.to_config(parser.parse_args(arguments)).data.batch_size == 128


def test_the_benches_are_a_group_with_options_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps 3" in refusal(capsys, "bench", "data", "data/digits", "--steps", "3")
    assert "bench.data.data" in refusal(capsys, "bench", "data")
    assert "{overhead,data,deploy,saving,tracking}" in refusal(capsys, "bench")


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("--lr", "--optimizer.lr"),
        ("--epochs", "--schedule.epochs"),
        ("--batch-size", "--data.batch_size"),
        ("--sparsity", "--budget.sparsity"),
        ("--gpus", "--cluster.num_workers"),
        ("--seed", "--training.seed"),
        ("--weight_decay", "--optimizer.weight_decay"),
    ],
)
def test_a_common_slip_is_told_the_field_that_it_means(capsys: pytest.CaptureFixture[str], option: str, field: str) -> None:
    assert refusal(capsys, "train", CONFIG, option, "1").endswith(f"did you mean {field}?\n")


@pytest.mark.parametrize("command", [name for name, command in COMMANDS.items() if command.configured])
def test_the_help_of_a_configured_command_is_short_and_its_whole_is_at_hand(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert cli.main([command, "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 60 and "--budget.sparsity" in short and f"asp-dist {command} " in short
    with pytest.raises(SystemExit):
        cli.main([command, "--help-all"])
    whole = capsys.readouterr().out
    assert [name for name in cli.field_names() if "." in name and f"--{name}" not in whole] == []


def test_every_command_shows_examples_that_it_understands(tmp_path: Path) -> None:
    parser = cli.build_parser()
    for name, command in COMMANDS.items():
        assert command.examples, name
        for line, what in command.examples:
            arguments = cli.spelled(line.split(), parser)
            parser.parse_args(cli._with_config_option(arguments) if command.configured else arguments)
            assert what


def test_recipes_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert [line.split()[0] for line in out.splitlines()[: len(files)]] == [file.stem for file in files]
    assert "there are no recipes" in refusal(capsys, "recipes", "--folder", str(tmp_path))


def test_names_read_from_timms_source_are_those_that_it_registers() -> None:
    """Refusing a name by its source is right as long as this holds."""
    import timm
    from timm.optim import list_optimizers

    import asp_dist.models

    assert asp_dist.models is not None
    assert quick_checks.model_names() == set(timm.list_models(include_tags=False))
    assert set(list_optimizers()) <= quick_checks.optimizer_names()


MISTAKES = {
    "model": ("--model.name", "resnet19"),
    "optimizer": ("--optimizer.name", "sdg"),
    "data": ("--data.root", "/nowhere/imagenet"),
    "weights": ("--model.weights", "/nowhere/model.safetensors"),
    "value": ("--optimizer.lr", "-1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_before_torch_and_timm_are_imported(tmp_path: Path, mistake: str) -> None:
    """They would take seconds. The right data set's command is named."""
    (tmp_path / "digits").mkdir()
    words = ["train", CONFIG, "--data.root", str(tmp_path / "digits"), *MISTAKES[mistake]]
    code = f"import sys\nfrom asp_dist.cli import main\ncode = main({words})\n"
    code += "print({'torch', 'timm'} & set(sys.modules))\nsys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "set()\n"), done.stderr
    assert done.stderr.startswith("error: ") and MISTAKES[mistake][1] in done.stderr
    if mistake == "data":
        assert "`asp-dist prepare imagenet --source DIR --target /nowhere/imagenet`" in done.stderr


def test_the_next_command_can_be_pasted_where_the_environment_is_not_active(monkeypatch: pytest.MonkeyPatch) -> None:
    bin_folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(bin_folder))
    assert command_here() == "asp-dist"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(bin_folder.parents[1])
    assert command_here() == f"{bin_folder.parent.name}/bin/asp-dist"


def test_readmes_commands_are_understood() -> None:
    """Run for real by tests/tools/readme_commands.py; here each is read as far as its options."""
    found = [line for line in commands((ROOT / "README.md").read_text()) if line.startswith("asp-dist ")]
    assert len(found) > 12
    parser = cli.build_parser()
    for line in found:
        words = shlex.split(line)[1:]
        assert words[0] in COMMANDS, line
        words = cli.spelled(words, parser)
        if COMMANDS[words[0]].configured:
            words = cli._with_config_option(words)
            cli.check_fields(words)
        parser.parse_args(words)
    assert sum(reason(line) is None for line in found) > 8

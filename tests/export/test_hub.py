"""``asp-dist push``: what is in the repository, and a stand-in for the Hugging Face hub on loopback that takes and gives it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import hub_server
from safetensors.torch import load_file
from small_runs import digits_config

from asp_dist.checkpoint.record import run_dir
from asp_dist.cli import main
from asp_dist.config import from_dict
from asp_dist.data import prepare_digits
from asp_dist.report import write_report
from asp_dist.runs.finished import load_model
from asp_dist.training.trainer import train
from asp_dist.training.world import World

FILES = {"README.md", "config.json", "layers.json", "model.safetensors", "recipe.yaml", "report.html", "summary.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of timm's smallest ResNet, with its report."""
    folder = tmp_path_factory.mktemp("finished")
    root = Path(prepare_digits(folder / "digits"))
    config = digits_config(folder, root, model__name="test_resnet", data__input_size=32, training__max_steps=3)
    train(config, World())
    write_report([run_dir(config)])
    return run_dir(config)


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_the_folder_has_what_timm_reads_the_results_and_the_recipe(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    command = ["push", str(finished), "--repo", "someone/small-resnet", "--dry-run", "--output", str(folder)]
    assert main(command) == 0
    assert {file.name for file in folder.iterdir()} == FILES
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    config = from_dict(yaml.safe_load((finished / "config.yaml").read_text()))
    assert torch.equal(logits_of(model), logits_of(load_model(config, finished / "model.safetensors", 10)))
    assert model.pretrained_cfg["input_size"] == (3, 32, 32) and list(model.pretrained_cfg["label_names"]) == list("0123456789")
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "timm" and "pruning" in front["tags"]
    summary = yaml.safe_load((finished / "summary.json").read_text())
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == pytest.approx(summary["top1"], abs=1e-4)
    assert f"{summary['nonzero_weights']:,} of {summary['prunable_weights']:,} prunable ones" in card
    assert 'timm.create_model("hf-hub:someone/small-resnet", pretrained=True)' in card
    recipe = from_dict(yaml.safe_load((folder / "recipe.yaml").read_text()))
    assert (recipe.model, recipe.budget, recipe.pruning) == (config.model, config.budget, config.pruning)
    assert str(finished.parent) not in card + (folder / "recipe.yaml").read_text()  # no folders of this machine
    assert main(command) == 2  # it is not empty now


def pushed(finished: Path, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    """What the command prints where the hub is at `address`, which huggingface_hub reads when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "asp_dist", "push", str(finished), "--repo", "someone/small-resnet", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_hub_on_loopback_takes_the_repository_and_gives_it_back(finished: Path, tmp_path: Path) -> None:
    with hub_server() as hub:
        result = pushed(finished, hub.address, "--private")
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == f"{hub.address}/someone/small-resnet"
        files = hub.files["someone/small-resnet"]
        assert set(files) >= FILES and hub.private == {"someone/small-resnet": True}
        assert all(files[name] == (finished / "hub" / name).read_bytes() for name in FILES)
        assert "Bearer hf_secret" in hub.tokens <= {"Bearer hf_secret", None}  # a harmless question comes without
        code = (
            "import sys, timm, safetensors.torch as s\n"
            "s.save_file(timm.create_model('hf-hub:someone/small-resnet', pretrained=True).state_dict(), sys.argv[1])"
        )
        environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], env=environment, check=True, timeout=300)
        again, before = load_file(tmp_path / "again"), load_file(finished / "model.safetensors")
        assert all(torch.equal(again[name], before[name]) for name in before)
        assert pushed(finished, hub.address).returncode == 0  # once more, over the first
        hub.refuses = True
        refused = pushed(finished, hub.address)
        assert refused.returncode == 2 and "someone/small-resnet cannot be sent to the hub" in refused.stderr
        assert "hf_secret" not in refused.stderr + refused.stdout


def test_names_and_runs_that_cannot_be_pushed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(finished), "--repo", "nameless", "--dry-run"]) == 2
    assert "--repo nameless must be of the form user/name" in capsys.readouterr().err
    assert main(["push", str(tmp_path), "--repo", "a/b", "--dry-run"]) == 2
    assert "config.yaml" in capsys.readouterr().err

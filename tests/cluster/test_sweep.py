"""Sweeps: which runs they make, and that a killed one goes on; real processes, Ray Tune and Ray Train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import processes
from small_runs import small_config, with_changes
from waiting import HANG_S, wait_until

from asp_dist import cli
from asp_dist.cluster.resources import check_room
from asp_dist.commands.sweep import name_of, split, variants
from asp_dist.config import ClusterConfig, Config, to_dict
from asp_dist.errors import UserError
from asp_dist.tracking.rows import read_rows

KNOWN = ("budget.sparsity", "training.seed", "data.augment.scale", "model.name", "pruning.loss.weight", "pruning.track.weight")


def test_every_combination_is_a_run_with_a_name_of_its_own() -> None:
    found = variants(["budget.sparsity=0.8,0.9", "training.seed=1,2,3"], KNOWN)
    assert len(found) == 6
    assert found[4] == {"budget.sparsity": "0.9", "training.seed": "2"}
    names = [name_of("run", settings) for settings in found]
    assert names[4] == "run-sparsity=0.9-seed=2" and len(set(names)) == 6
    assert split("[0.2, 1],[0.5, 1]") == ["[0.2, 1]", "[0.5, 1]"]
    assert (
        name_of("run", {"model.name": "hf_hub:timm/x", "data.augment.scale": "[0.5, 1]"})
        == "run-name=hf_hub_timm_x-scale=_0.5_1_"
    )
    same = {"pruning.loss.weight": "1", "pruning.track.weight": "2"}
    assert name_of("run", same) == "run-pruning.loss.weight=1-pruning.track.weight=2"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "a sweep needs values"),
        (("--set", "budget.sparsety=0.8"), "there is no field budget.sparsety"),
        (("--set", "budget=0.8"), "there is no field budget"),
        (("--set", "budget.sparsity"), "write FIELD=V1,V2"),
        (("--set", "training.seed=1,x"), "training.seed = x is not valid"),
        (("--set", "budget.sparsity=0.8,1.5"), "sparsity = 1.5"),
        (("--set", "budget.sparsity=0.8,0.8"), "gives two runs the name"),
        (("--set", "training.seed=1", "training.seed=2"), "gives training.seed twice"),
        (("--set", "name=a,b"), "cannot change name"),
        (("--set", "cluster.num_workers=1,2"), "cannot change cluster.num_workers"),
        (("--set", "training.seed=1", "--concurrent", "0"), "--concurrent 0 must be at least 1"),
        (("--set", "training.seed=1", "--cluster.mode", "local"), "a sweep runs on Ray"),
        (("--set", "training.seed=1,2", "--concurrent", "2", "--cluster.cpus_per_worker", "999"), "cluster.cpus_per_worker"),
    ],
)
def test_mistakes_are_answered_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    config = with_changes(small_config(tmp_path), cluster__mode="ray", cluster__num_workers=1)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    assert cli.main(["sweep", str(file), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run-sweep" / "points").exists()


def test_runs_at_a_time_share_the_machine_out_or_are_refused() -> None:
    def node(cpus: float) -> dict[str, object]:
        return {"Alive": True, "Resources": {"CPU": cpus, "GPU": 0.0}}

    runs = [Config(cluster=ClusterConfig(num_workers=2))] * 3
    assert check_room(runs, [node(16)], 2, local=True).cpus == 4
    assert check_room(runs, [node(16)], 9, local=True).cpus == 2  # there are but three
    assert check_room(runs, [node(16)], 2, local=False).cpus == 1
    with pytest.raises(UserError, match=r"--concurrent 3 runs of 2 workers need room for 6, .* room for 4 of 1 CPU"):
        check_room(runs, [node(4)], 3, local=True)


def sweep(file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "asp_dist", "sweep", str(file), "--set", "training.seed=1,2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    config = with_changes(
        small_config(tmp_path, "tiny"),
        cluster__mode="ray",
        cluster__num_workers=1,
        data__synthetic_samples=(3200, 32),  # 200 steps in each of three epochs
        output__checkpoint_steps=50,
        training__log_every=10,
    )
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    names = [f"tiny-seed={seed}" for seed in (1, 2)]

    killed = sweep(file)
    checkpoints = tmp_path / names[1] / "checkpoints"
    wait_until(lambda: list(checkpoints.glob("step-*")) or killed.poll() is not None, "the second run's first checkpoint")
    killed.kill()
    killed.communicate(timeout=HANG_S)
    first = json.loads((tmp_path / names[0] / "summary.json").read_text())
    wait_until(lambda: not [t for _, _, t in processes() if str(tmp_path) in t], "the killed sweep's runs to end")
    assert not (tmp_path / names[1] / "summary.json").exists()

    done = sweep(file)
    said = done.communicate(timeout=HANG_S)[0]
    assert done.returncode == 0, said
    assert "2 runs, 1 of them finished before" in said
    summaries = {name: json.loads((tmp_path / name / "summary.json").read_text()) for name in names}
    assert summaries[names[0]] == first, "a finished run is left alone"
    for name, summary in summaries.items():
        assert summary["steps"] == 600 and summary["sparsity"] == pytest.approx(0.9, abs=0.01)
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in rows if row.get("kind") == "train"] == list(range(10, 601, 10)), "every row, once"
        assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["tracking"]["group"] == "tiny-sweep"
    assert [row.get("event") for row in read_rows(tmp_path / names[1] / "metrics.jsonl")].count("resume") == 1
    assert any(line.split()[:2] == [names[0], "2"] or line.split()[:2] == [names[1], "2"] for line in said.splitlines())
    page = (tmp_path / "tiny-sweep" / "report.html").read_text()
    assert all(name in page for name in names)

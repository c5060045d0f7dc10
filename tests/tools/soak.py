"""A run that is killed again and again, at random, and has to end right all the same.

    python tests/tools/soak.py [--kills 20] [--workers 2 4] [--minutes 30] [--seed 0] [--folder DIR]

Kills workers, Ray Train's controller and the driver itself with SIGKILL, and now and then stops the run with SIGTERM, at random
moments behind its first step. A driver that has ended is started again by the same command, but for the number of workers, any
between the given two, and for where checkpoints go: to an object store at some starts, to the run's folder at others. Twice the
newest checkpoint is damaged before. At the end there must be the right number of epochs and images, one row for each step,
exactly the budget, no process or file left over, and, with one number of workers (`--workers 2 2`), the weights of a run that
nobody disturbed, bit for bit. Prints what it did and the verdict as JSON; exits with 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from processes import below, processes
from safetensors.torch import load_file

EPOCHS, SAMPLES, BATCH = 60, 384, 48
DAMAGES = 2

CONFIG: dict[str, Any] = {
    "name": "soak",
    "model": {"name": "test_resnet"},
    "data": {
        "backend": "synthetic",
        "batch_size": BATCH,
        "input_size": 32,
        "synthetic_samples": [SAMPLES, 64],
    },
    "schedule": {"epochs": EPOCHS},
    "training": {"device": "cpu", "log_every": 1},
    "cluster": {"num_workers": 2, "cpus_per_worker": 0.5, "max_failures": -1},
    "tracking": {"wandb": "disabled"},
    "output": {"checkpoint_steps": 3},
}


def last_step(run_dir: Path) -> int:
    """The step of the newest row; 0 before there is one."""
    try:
        return int(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


class Soak:
    """One run, its driver, and who may be killed."""

    def __init__(self, folder: Path, seed: int, workers: tuple[int, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.random, self.workers = folder, random.Random(seed), workers
        self.config = folder / "soak.yaml"
        self.config.write_text(yaml.safe_dump({**CONFIG, "output": {**CONFIG["output"], "dir": str(folder)}}))
        self.run_dir = folder / "soak"
        self.damaged = self.starts = 0
        self.done: list[str] = []
        self.log = (folder / "driver.log").open("a")
        self.seen: set[int] = set()
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the run, or start it again."""
        if self.damaged < DAMAGES and self.starts % 2:
            self.damage()
        count = self.random.randint(*self.workers)
        words = ["--cluster.num_workers", str(count)]
        if self.starts % 4 in (1, 2):
            words += ["--output.storage", f"file://{self.folder}/store"]
        self.starts += 1
        self.note(f"start {self.starts}: {' '.join(words)}")
        return subprocess.Popen(
            [sys.executable, "-m", "asp_dist", "train", str(self.config), *words], stdout=self.log, stderr=self.log
        )

    def damage(self) -> None:
        """Overwrite some bytes of the newest checkpoint's weights, wherever it lies."""
        places = (self.run_dir / "checkpoints", self.folder / "store" / "soak" / "checkpoints")
        found = sorted((p for place in places for p in place.glob("step-*/model.safetensors")), key=lambda p: p.parent.name)
        if len({path.parent.name for path in found}) < 2:
            return  # there is none to fall back to
        self.damaged += 1
        self.note(f"damaged {found[-1].parent.name}")
        with found[-1].open("r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(b"damaged!")

    def note(self, text: str) -> None:
        """Print what was done, at once."""
        print(text, flush=True)

    def kill(self) -> None:
        """Kill somebody; nothing happens if nobody is there yet."""
        titles = below(self.driver.pid)
        self.seen |= set(titles)
        victims = [("worker", n) for n, title in titles.items() if "RayTrainWorker" in title]
        if not victims:
            return
        victims += [("controller", n) for n, title in titles.items() if "TrainController" in title]
        victims += [("driver", self.driver.pid)]
        kind, number = self.random.choice(victims)
        how = signal.SIGTERM if kind == "driver" and self.random.random() < 0.5 else signal.SIGKILL
        try:
            os.kill(number, how)
        except ProcessLookupError:
            return
        self.done.append(f"{kind} {how.name} at step {last_step(self.run_dir)}")
        self.note(self.done[-1])
        if kind == "driver":
            self.driver.wait(timeout=120)

    def restart_if_ended(self) -> None:
        """Start the driver again, as its user would, after a kill or a stop; not after success or a failure of its own."""
        code = self.driver.poll()
        if code in (-signal.SIGKILL, 75):
            self.driver = self.start()
        elif code not in (None, 0):
            raise SystemExit(f"the driver ended with {code}; see {self.folder / 'driver.log'}")

    def verdict(self) -> list[str]:
        """What is wrong at the end."""
        summary = json.loads((self.run_dir / "summary.json").read_text())
        rows = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if row["kind"] == "train"]
        per_epoch = SAMPLES // BATCH
        wrong = []
        if steps != list(range(1, EPOCHS * per_epoch + 1)):
            wrong.append(f"the rows' steps are not 1 to {EPOCHS * per_epoch}, each once: {len(steps)} rows")
        if (summary["epochs"], summary["steps"]) != (EPOCHS, EPOCHS * per_epoch):
            wrong.append(f"{summary['epochs']} epochs, {summary['steps']} steps")
        if abs(summary["sparsity"] - summary["target_sparsity"]) > 5e-4:
            wrong.append(f"sparsity {summary['sparsity']}")
        time.sleep(10)  # a killed driver's processes end within seconds
        alive = [n for n, _, title in processes() if n in self.seen and "ray" in title]
        if alive:
            wrong.append(f"processes left: {alive}")
        if self.damaged < DAMAGES:
            wrong.append(f"{self.damaged} checkpoints were damaged, not {DAMAGES}")
        state = max((p for p in self.folder.glob("**/step-*/state.json")), key=lambda p: p.parent.name)
        images = json.loads(state.read_text())["ranks"][0]["meter"]["total_images"]
        if images != EPOCHS * SAMPLES:
            wrong.append(f"{images} images were counted, not {EPOCHS * SAMPLES}")
        left = [p.name for p in self.run_dir.iterdir() if p.name == "cluster" or p.name.startswith(".")]
        left += [p.name for p in (self.run_dir / "checkpoints").iterdir() if "step-" not in p.name or p.name.startswith(".")]
        left = [name for name in left if name not in (".lock", ".place")]
        if self.workers[0] == self.workers[1] and not self.is_undisturbed():
            wrong.append("the weights are not those of a run that nobody disturbed")
        if left:
            wrong.append(f"files left: {left}")
        return wrong

    def is_undisturbed(self) -> bool:
        """Whether another run of this configuration ends at the same bits, without any kill."""
        folder = self.folder / "undisturbed"
        words = ["--cluster.num_workers", str(self.workers[0]), "--output.dir", str(folder)]
        command = [sys.executable, "-m", "asp_dist", "train", str(self.config), *words]
        subprocess.run(command, stdout=self.log, stderr=self.log, check=True)
        ours, theirs = (load_file(path / "soak" / "model.safetensors") for path in (self.folder, folder))
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs=2, default=(2, 4), metavar=("LEAST", "MOST"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    soak = Soak(options.folder or Path(tempfile.mkdtemp(prefix="asp-soak-")), options.seed, tuple(options.workers))
    deadline = time.monotonic() + 60 * options.minutes
    before = -1
    while soak.driver.poll() != 0 and time.monotonic() < deadline:
        soak.restart_if_ended()
        step = last_step(soak.run_dir)
        if len(soak.done) < options.kills and step > 0 and step != before:
            before = step
            time.sleep(soak.random.uniform(0, 3))
            soak.kill()
        time.sleep(0.2)
    if soak.driver.poll() != 0:
        soak.driver.terminate()
        wrong = [f"not at its end after {options.minutes} minutes, at step {last_step(soak.run_dir)}"]
    else:
        wrong = soak.verdict()
    print(json.dumps({"kills": len(soak.done), "folder": str(soak.folder), "wrong": wrong}))
    return 1 if wrong or len(soak.done) < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())

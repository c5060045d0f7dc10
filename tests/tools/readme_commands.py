"""Runs the commands of README in their order, as a new user would paste them into one shell, and says what became of each.

    python tests/tools/readme_commands.py [--list]

Those that need what this machine has not are listed with the reason. Ends with 1 if a command failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"    (?:\./launch/|asp-dist |source |python |torchrun |wandb )")
COMMENT = re.compile(r"\s{2,}#.*$")
# What a command needs, by a word in it.
NEEDS = {
    "prepare imagenet": "ImageNet's archives",
    "imagenet": "ImageNet",
    "HEAD:8265": "a Ray cluster; tests/cluster/test_jobs.py submits to a local one",
    "s3://": "an object store; tests/data/test_remote.py has one on loopback",
    "resnet18.safetensors": "a file of trained weights of one's own; tests/test_pretrained.py makes one",
    "./launch/test.sh": "the tests' own time; CI runs it",
}
# Of ImageNet, these run without it.
WITHOUT_DATA = re.compile(r"asp-dist (plan|rehearse) ")
# The same command with fewer epochs, where it would take a quarter of an hour.
SHORTER = {"asp-dist sweep": "--schedule.epochs 2 --schedule.warmup_epochs 0.5"}


def commands(readme: str) -> list[str]:
    """The commands of its code blocks, without their comments; those on several lines as one."""
    found: list[str] = []
    goes_on = False
    for line in readme.splitlines():
        if goes_on or COMMAND.match(line):
            text = COMMENT.sub("", line).strip()
            goes_on_next = text.endswith("\\")
            text = text.removesuffix("\\").strip()
            found[-1:] = [f"{found[-1]} {text}"] if goes_on else [*found[-1:], text]
            goes_on = goes_on_next
    return found


def reason(command: str) -> str | None:
    """Why a command is not run here; None: it is."""
    if WITHOUT_DATA.match(command):
        return None
    return next((what for word, what in NEEDS.items() if word in command), None)


def main() -> int:
    """Run them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="run nothing")
    options = parser.parse_args()
    failed, setup = 0, ""
    for command in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        why = reason(command)
        if why is not None or options.list:
            print(f"{'needs ' + why if why else 'runs':<60} {command}", flush=True)
            continue
        if command.startswith("source "):
            setup += f"{command} && "
        more = next((f" {text}" for begin, text in SHORTER.items() if command.startswith(begin)), "")
        began = time.monotonic()
        done = subprocess.run(["bash", "-c", f"{setup}{command}{more}"], cwd=ROOT, capture_output=True, text=True)
        outcome = f"rc {done.returncode}, {time.monotonic() - began:.0f} s"
        print(f"{outcome:<60} {command}{more}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stdout[-2000:] + done.stderr[-2000:], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

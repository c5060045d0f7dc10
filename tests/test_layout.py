"""Which part of the package may import what: the method torch alone, Ray and wandb in one place each."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import asp_dist

PACKAGE = Path(asp_dist.__file__).parent


def imports(folder: Path) -> dict[str, set[str]]:
    """What each file below `folder` imports, anywhere in it: the first two parts of the module's name."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        names: list[str] = []
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: a relative import"
                names.append(node.module or "")
        found[str(file.relative_to(PACKAGE))] = {".".join(name.split(".")[:2]) for name in names}
    return found


def importers(package: str) -> set[str]:
    """The files of the package that import `package`."""
    return {file for file, names in imports(PACKAGE).items() if package in {name.split(".")[0] for name in names}}


def test_the_method_imports_torch_alone() -> None:
    parts = imports(PACKAGE / "pruning")
    assert len(parts) > 10
    for file, names in parts.items():
        foreign = {name for name in names if name.split(".")[0] not in {*sys.stdlib_module_names, "torch"}}
        assert foreign <= {"asp_dist.pruning"}, file


def test_ray_and_wandb_stay_in_one_place_each() -> None:
    for package, home in (("ray", "cluster/"), ("wandb", "tracking/"), ("nvidia", "data/")):
        files = importers(package)
        assert files and all(file.startswith(home) for file in files), (package, files)


def test_what_runs_beside_the_workers_loads_no_model_library() -> None:
    """Ray's controller unpickles the driver's functions: it would take seconds more for timm, on every start and restart."""
    heavy = ["timm", "torchvision", "wandb"]
    script = f"import sys, asp_dist.cluster.driver; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout

"""How the package is laid out: which room may import which, where Ray and wandb are used, and that each name occurs once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from waiting import HANG_S

import asp_dist
from asp_dist.pruning import names as pruning_names
from asp_dist.tracking import schema

PACKAGE = Path(asp_dist.__file__).parent
# Each line may import from the lines below it, and from its own rooms; never from a room beside it, nor from one above.
ORDER = [
    {"__main__"},
    {"cli"},
    {"help_texts"},
    {"commands"},
    {"quick_checks"},
    {"cluster"},
    {"bench", "planning"},
    {"export", "report"},
    {"runs"},
    {"training"},
    {"checkpoint"},
    {"tracking"},
    {"data"},
    {"models"},
    {"pretrained"},
    {"weight_files"},
    {"config"},
    {"pruning"},
    {"object_store"},
    {"errors", "files"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
MOST_FILES = 15


def trees() -> Iterator[tuple[Path, ast.Module]]:
    """(path within the package, syntax tree) of every file but the package's own ``__init__.py``."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if file != PACKAGE / "__init__.py":
            yield file.relative_to(PACKAGE), ast.parse(file.read_text())


def imported(tree: ast.Module) -> set[str]:
    """The modules that a file imports, anywhere in it; ``from package import name`` gives ``package.name``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def importers(package: str) -> set[str]:
    """The files of the package that import `package`."""
    return {str(path) for path, tree in trees() if package in {name.split(".")[0] for name in imported(tree)}}


def test_every_room_is_in_the_order() -> None:
    assert {room_of(path) for path, _ in trees()} == set(RANK)


def test_imports_go_down_the_order() -> None:
    wrong = []
    for path, tree in trees():
        here = room_of(path)
        for name in imported(tree):
            parts = name.split(".")
            if parts[0] != "asp_dist" or parts[1:] in ([], ["__version__"]) or parts[1] == here:
                continue
            if parts[1] not in RANK or RANK[parts[1]] <= RANK[here]:
                wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_the_method_imports_torch_alone() -> None:
    parts = {path: imported(tree) for path, tree in trees() if room_of(path) == "pruning"}
    assert len(parts) > 10
    for path, names in parts.items():
        own = {"torch", "triton"} if "kernels" in path.parts else {"torch"}  # Triton comes with torch's build for CUDA
        foreign = {name for name in names if name.split(".")[0] not in {*sys.stdlib_module_names, *own}}
        assert all(name.startswith("asp_dist.pruning.") for name in foreign), path


def test_ray_wandb_and_dali_are_used_in_one_place_each() -> None:
    homes = {"ray": "cluster/", "wandb": "tracking/wandb/", "nvidia": "data/dali/"}
    # A decoder that is asked about a file, and the bare pipeline that the loaders are compared with.
    elsewhere = {"nvidia": {"data/bad_files.py", "bench/loader_sources.py"}}
    for package, home in homes.items():
        files = importers(package)
        assert any(file.startswith(home) for file in files), package
        assert {file for file in files if not file.startswith(home)} == elsewhere.get(package, set()), package


def test_private_names_of_ray_are_used_in_one_file() -> None:
    private = {
        str(path)
        for path, tree in trees()
        for name in imported(tree)
        if name.startswith("ray.") and any(part.startswith("_") for part in name.split("."))
    }
    assert private == {"cluster/ray_private.py"}


def test_no_module_and_no_public_class_occurs_twice() -> None:
    modules, classes = defaultdict(list), defaultdict(list)
    for path, tree in trees():
        if path.name not in ("__init__.py", "__main__.py"):
            modules[path.stem].append(str(path))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].append(str(path))
    twice = {name: places for names in (modules, classes) for name, places in names.items() if len(places) > 1}
    assert twice == {}


def test_no_folder_has_too_many_files() -> None:
    counts: dict[str, int] = defaultdict(int)
    for path, _ in trees():
        counts[str(path.parent)] += 1
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_a_class_of_the_method_has_one_base_at_most() -> None:
    plain = {"object", "Protocol", "ABC", "Generic"}
    chains = {
        node.name: [ast.unparse(base) for base in node.bases]
        for path, tree in trees()
        if room_of(path) == "pruning"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and len({ast.unparse(base) for base in node.bases} - plain) > 1
    }
    assert chains == {}


def test_what_runs_beside_the_workers_loads_no_model_library() -> None:
    """Ray's controller unpickles the driver's functions: it would take seconds more for timm, on every start and restart."""
    heavy = ["timm", "torchvision", "wandb"]
    script = f"import sys, asp_dist.cluster.driver; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert done.stdout.strip() == "[]", done.stdout


def test_no_training_step_loads_the_report() -> None:
    script = "import sys, asp_dist.training.trainer; print([m for m in sys.modules if m.startswith('asp_dist.report')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert done.stdout.strip() == "[]", done.stdout


def test_metric_and_file_names_are_written_in_the_schema_alone() -> None:
    names = {
        value
        for name, value in {**vars(schema), **vars(pruning_names)}.items()
        if name.isupper() and ("/" in value or "." in value)
    }
    assert len(names) > 25
    written = {
        f"{path}:{node.lineno} {node.value!r}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert {place for place in written if "schema.py" not in place and "pruning/names.py" not in place} == set()

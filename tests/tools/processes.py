"""The machine's processes, from /proc."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def processes() -> Iterator[tuple[int, int, str]]:
    """(number, parent, title) of each live process; one that has ended and waits for its parent is left out."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue  # it ended meanwhile
        if fields[0] != "Z":
            yield int(path.name), int(fields[1]), title


def below(root: int) -> dict[int, str]:
    """The live processes below `root`: number -> title."""
    table = {number: (parent, title) for number, parent, title in processes()}
    found: dict[int, str] = {}
    parents = {root}
    while parents:
        parents = {n for n, (parent, _) in table.items() if parent in parents and n not in found}
        found.update({n: table[n][1] for n in parents})
    return found


def environment_of(number: int) -> list[bytes]:
    """The variables that a process was started with, as ``NAME=value``; none if it has ended."""
    try:
        return Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
    except OSError:
        return []

"""The live screen of a finished run, as it was in the middle of it, as an SVG file: .github/terminal.svg.

Command: python tests/tools/terminal_picture.py RUN_DIR .github/terminal.svg
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console as RichConsole

from asp_dist.checkpoint.record import load_config
from asp_dist.tracking import Console
from asp_dist.tracking.rows import read_rows


def main(run_dir: Path, picture: Path) -> None:
    rows = read_rows(run_dir / "metrics.jsonl")
    total = max(int(row["step"]) for row in rows)
    paper = RichConsole(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console = Console(load_config(run_dir), total, style="live", file=io.StringIO(), layers=12, folder=run_dir)
    with console:
        for row in rows:
            if row["step"] <= 0.8 * total:
                console.update(row)
        paper.print(console.screen())
    text = paper.export_svg(title=f"asp-dist train configs/{run_dir.name}.yaml --layers 12")
    picture.write_text(text.replace(f"{Path.cwd()}/", ""), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

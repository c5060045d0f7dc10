"""What a running job shows in a terminal: a live screen; elsewhere a few plain lines, JSON rows, or nothing."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asp_dist.config import Config
from asp_dist.pruning.names import LayerRow
from asp_dist.tracking.layer_rows import is_pruned, read_layers
from asp_dist.tracking.rows import kind_of
from asp_dist.tracking.schema import (
    EVAL,
    EVENT,
    IMAGES_PER_SECOND,
    MEASURED_SPARSITY,
    TARGET_SPARSITY,
    TRAIN,
    TRAIN_LOSS,
    VAL_TOP1,
)

Style = Literal["auto", "live", "plain", "json", "quiet"]

PLAIN_EVERY_S = 60.0
NOTES = 4  # events shown on the live screen
BAR = 24  # characters of a layer's bar
WARNINGS = ("warning", "failure", "skipped_step", "tracking")


class Console:
    """Shows a run from its rows (those of ``metrics.jsonl``), in any process.

    Args:
        config: the run's configuration.
        total_steps: optimizer steps of the whole run; None until known.
        style: ``auto`` is ``live`` in a terminal and ``plain`` elsewhere; ``json`` prints each row on one line of the
            standard output; ``quiet`` prints nothing.
        file: where to write instead of the standard error (``live``, ``plain``) or output (``json``).
        layers: show so many layers on the live screen, those with the most weights; 0: none.
        folder: the run's folder, where the layers' latest numbers are read.
    """

    def __init__(
        self,
        config: Config,
        total_steps: int | None = None,
        *,
        style: Style = "auto",
        file: IO[str] | None = None,
        layers: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.config = config
        self.total_steps = total_steps
        self._out = file or (sys.stdout if style == "json" else sys.stderr)
        self._rich = RichConsole(file=self._out, highlight=False, soft_wrap=style != "live")
        self.style = style if style != "auto" else ("live" if self._rich.is_terminal else "plain")
        self._values: dict[str, Any] = {}
        self._notes: list[str] = []
        self._first: tuple[int, float] | None = None
        self._printed = 0.0
        self._live: Live | None = None
        self._layers, self._folder = layers, folder
        self._layer_rows: list[LayerRow] = []

    def update(self, row: dict[str, Any]) -> None:
        """Show a row. Rows of all kinds are welcome; unknown keys are ignored."""
        if self.style == "quiet":
            return
        if self.style == "json":
            print(json.dumps(row), file=self._out, flush=True)
            return
        kind = kind_of(row)
        self._values.update({key: value for key, value in row.items() if value is not None})
        if self._first is None and kind == TRAIN:
            self._first = (int(row["step"]), float(row.get("time", time.time())))
        if kind == EVENT:
            self._note(row)
        if self.style == "live" and self._layers and self._folder:
            self._layer_rows = [one for one in read_layers(self._folder) if is_pruned(one)]
        if self.style == "live":
            self._draw()
        elif kind == EVAL or (kind == TRAIN and time.monotonic() - self._printed >= PLAIN_EVERY_S):
            self._printed = time.monotonic()
            self._rich.print(self._line())

    def _note(self, row: dict[str, Any]) -> None:
        """Remember an event for the screen; print warnings, and a resumption, as lines."""
        event, message = str(row.get("event")), str(row.get("message", ""))
        self._notes = [*self._notes, f"step {row.get('step', '?')}  {event}: {message}"][-NOTES:]
        if event == "resume":
            self._first = None
        if self.style == "plain" and event in (*WARNINGS, "resume"):
            self._rich.print(message or event, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was; the last state stays readable above."""
        if self._live:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def time_left(self) -> float | None:
        """Seconds until the last step at the pace so far, evaluations included; None while unknown."""
        step, now = self._values.get("step"), self._values.get("time")
        if self._first is None or not self.total_steps or step is None or now is None or step <= self._first[0]:
            return None
        pace = (now - self._first[1]) / (step - self._first[0])
        return max(0.0, pace * (self.total_steps - step))

    def _line(self) -> str:
        """One plain line of the state."""
        return "  ".join(f"{name} {value}" for name, value in self._shown().items() if value != "-")

    def _shown(self) -> dict[str, str]:
        """Name and printed value of everything on the screen, in order."""
        v = self._values
        epochs, total = self.config.schedule.epochs, self.total_steps
        target = v.get(TARGET_SPARSITY)
        measured = _percent(v.get(MEASURED_SPARSITY), 2)
        left = self.time_left()
        return {
            "epoch": f"{v['epoch']:.1f}/{epochs}" if "epoch" in v else "-",
            "step": f"{v['step']}/{total}" if "step" in v and total else str(v.get("step", "-")),
            "loss": f"{v[TRAIN_LOSS]:.4f}" if TRAIN_LOSS in v else "-",
            "top-1": _percent(v.get(VAL_TOP1), 2),
            "sparsity": f"{measured} of {_percent(target, 2)}" if target is not None else measured,
            "images/s": f"{v[IMAGES_PER_SECOND]:,.0f}" if IMAGES_PER_SECOND in v else "-",
            "left": duration(left) if left is not None else "-",
        }

    def _draw(self) -> None:
        """Refresh the live screen."""
        if self._live is None:
            self._live = Live(self.screen(), console=self._rich, refresh_per_second=4, transient=False)
            self._live.start()
        self._live.update(self.screen())

    def screen(self) -> Group:
        """The live screen as it is now."""
        table = Table.grid(padding=(0, 3))
        shown = self._shown()
        table.add_row(*(Text(name, style="dim") for name in shown))
        table.add_row(*(Text(value, style="bold") for value in shown.values()))
        done, total = self._values.get("step", 0), self.total_steps
        bar = ProgressBar(total=total or 1, completed=min(done, total) if total else 0, width=min(72, self._rich.width))
        line = Padding(bar, 0)  # a bar alone does not end its line
        title = Text.assemble((self.config.name, "bold cyan"), f"  {self.config.model.name}")
        notes = (Text(note, style="dim", overflow="ellipsis") for note in self._notes)
        return Group(title, line, table, *self._layer_table(), *notes)

    def _layer_table(self) -> list[Table]:
        """The largest layers, in the network's order: what is left of each, as a bar and a number."""
        if not self._layer_rows:
            return []
        least = sorted((row["weights"] for row in self._layer_rows), reverse=True)[: self._layers][-1]
        largest = [row for row in self._layer_rows if row["weights"] >= least][: self._layers]
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("layer", "weights", "left", "sparsity", "threshold"):
            table.add_column(name, justify="left" if name in ("layer", "left") else "right", no_wrap=True)
        for row in largest:
            sparsity = row["measured_sparsity"]
            left = "" if sparsity is None else ProgressBar(total=1.0, completed=1.0 - sparsity, width=BAR)
            threshold = "-" if row["threshold"] is None else f"{row['threshold']:.3f}"
            table.add_row(Text(row["name"]), f"{row['weights']:,}", left, _percent(sparsity, 2), threshold)
        return [table]


def _percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s`` or ``12 s``."""
    whole = int(seconds + 0.5)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"

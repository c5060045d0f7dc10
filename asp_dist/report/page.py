"""The report's one HTML page: figures, tables and plotly itself, with nothing to load."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from asp_dist.tracking.heat_map import Figure

STYLE = """
:root { --ink: #111827; --soft: #6b7280; --line: #e5e7eb; --back: #f9fafb; --card: #ffffff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 18px; margin: 34px 0 10px; }
.sub { color: var(--soft); margin: 0 0 18px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 16px; min-width: 128px; }
.tile b { display: block; font-size: 22px; font-weight: 600; } .tile span { color: var(--soft); font-size: 13px; }
.grid { margin-top: 16px; display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 16px; }
figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0; padding: 12px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption b { display: block; } figcaption { color: var(--soft); font-size: 13px; }
figcaption b { color: var(--ink); font-size: 15px; }
.scroll { overflow: auto; max-height: 520px; margin-top: 16px; }
.scroll { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); } th:first-child, td:first-child { text-align: left; }
th.text, td.text { text-align: left; white-space: normal; }
details { margin: 10px 0; } summary { cursor: pointer; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px; overflow: auto; }
pre { font-size: 12px; }
select { font: inherit; margin: 6px 0; max-width: 100%; }
@media (max-width: 600px) { .grid { grid-template-columns: 1fr; } }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const base = {font: {family: "system-ui, sans-serif", size: 12, color: "#111827"}, paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)", margin: {l: 64, r: 16, t: 12, b: 48}, height: 340,
  legend: {orientation: "h", y: 1.02, yanchor: "bottom"}, hoverlabel: {font: {size: 12}}};
const axis = {gridcolor: "#e5e7eb", zerolinecolor: "#d1d5db", automargin: true};
function layoutOf(figure) {
  const layout = Object.assign({}, base, figure.layout);
  for (const key of Object.keys(layout)) if (/^[xy]axis/.test(key)) layout[key] = Object.assign({}, axis, layout[key]);
  return layout;
}
const config = {responsive: true, displayModeBar: false};
for (const [id, figure] of Object.entries(figures)) {
  Plotly.newPlot(id, figure.data, layoutOf(figure), config);
  if (figure.choices) {
    const select = document.createElement("select");
    select.setAttribute("aria-label", "layer");
    for (const choice of figure.choices) select.add(new Option(choice.name));
    select.onchange = () => figure.choices[select.selectedIndex].y.forEach((y, i) => Plotly.restyle(id, {y: [y]}, [i]));
    document.getElementById(id).before(select);
  }
}
"""


@dataclass
class Page:
    """A page that grows from top to bottom; `render` gives its HTML."""

    title: str
    subtitle: str = ""
    figures: dict[str, Figure] = field(default_factory=dict)
    _parts: list[str] = field(default_factory=list)

    def tiles(self, values: Sequence[tuple[str, str]]) -> None:
        """Key figures: (value, what it is)."""
        cells = "".join(f'<div class="tile"><b>{text(v)}</b><span>{text(name)}</span></div>' for v, name in values)
        self._parts.append(f'<div class="tiles">{cells}</div>')

    def section(self, title: str) -> None:
        """A heading."""
        self._parts.append(f"<h2>{text(title)}</h2>")

    def plots(self, plots: Sequence[tuple[str, str, Figure | None]], *, wide: bool = False) -> None:
        """Pictures in a grid, each (title, how to read it, figure); those without a figure are left out."""
        cells = []
        for title, caption, figure in plots:
            if figure is not None:
                name = f"figure{len(self.figures) + 1}"
                self.figures[name] = figure
                heading = f"<figcaption><b>{text(title)}</b>{text(caption)}</figcaption>"
                cells.append(f'<figure{" class=wide" if wide else ""}>{heading}<div id="{name}"></div></figure>')
        self._parts.append(f'<div class="grid">{"".join(cells)}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], text_columns: Sequence[int] = ()) -> None:
        """A table; `text_columns` are set to the left and may wrap."""
        head = "".join(f"<th{' class=text' if i in text_columns else ''}>{text(h)}</th>" for i, h in enumerate(header))
        body = []
        for row in rows:
            kinds = ['class="text"' if i in text_columns else "" for i in range(len(row))]
            body.append("<tr>" + "".join(f"<td {k}>{text(v)}</td>" for v, k in zip(row, kinds)) + "</tr>")
        self._parts.append(f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>')

    def folded(self, title: str, body: str) -> None:
        """Preformatted text that opens on a click."""
        self._parts.append(f"<details><summary>{text(title)}</summary><pre>{text(body)}</pre></details>")

    def note(self, body: str) -> None:
        """A paragraph."""
        self._parts.append(f'<p class="sub">{text(body)}</p>')

    def render(self) -> str:
        """The whole page. It contains plotly's own script, about 4.8 MB."""
        from plotly.offline import get_plotlyjs

        data = json.dumps(self.figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        return "".join(
            (
                '<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{text(self.title)}</title><style>{STYLE}</style></head><body><main>",
                f'<h1>{text(self.title)}</h1><p class="sub">{text(self.subtitle)}</p>',
                *self._parts,
                f'</main><script id="figures" type="application/json">{data}</script>',
                f"<script>{get_plotlyjs()}</script><script>{SCRIPT}</script></body></html>",
            )
        )


def text(value: Any) -> str:
    """`value` as HTML text."""
    return html.escape("" if value is None else str(value))

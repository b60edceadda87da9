"""A report: one HTML file that needs nothing else, to read or print; PNG and JSON beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from envs.offline.files import write_json, write_whole

Plot = Callable[[Axes], None]
WIDTH_IN, HEIGHT_IN, DPI = 8.0, 2.6, 110
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; margin: 0 auto;
  max-width: 62rem; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
.verdict { font-size: 1.1rem; border-left: 4px solid #1f6feb; padding: .5rem 1rem;
  background: #f2f6fc; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #d7dee6; text-align: left;
  vertical-align: top; }
th { border-bottom: 2px solid #8a97a5; } .n { text-align: right; }
td.n { white-space: nowrap; }
figure { margin: .5rem 0; overflow-x: auto; } figure img { width: 100%; height: auto; }
@media screen { figure img { min-width: 36rem; } figcaption { position: sticky; left: 0; } }
figcaption, .note { color: #4a5866; font-size: .85rem; }
pre { background: #f4f6f8; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .8rem; }
@page { size: A4; margin: 14mm; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } h2 { break-after: avoid; }
  figure, tr, .verdict { break-inside: avoid; }
  thead { display: table-header-group; } td { overflow-wrap: anywhere; }
  td.n, th { overflow-wrap: normal; } td:first-child { min-width: 8em; } }
"""


@dataclass(frozen=True, slots=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    number_from: int = 1  # first column of numbers
    number_to: int = 99  # one after the last


@dataclass(frozen=True, slots=True)
class Plotted:
    """A picture with what a reader who cannot see it is told."""

    caption: str
    plot: Plot


@dataclass(frozen=True, slots=True)
class Section:
    heading: str
    lines: tuple[str, ...] = ()
    table: Table | None = None
    plots: tuple[Plotted, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    title: str
    verdict: str
    sections: tuple[Section, ...]
    command: str
    versions: str

    @property
    def plots(self) -> tuple[Plotted, ...]:
        return tuple(plot for section in self.sections for plot in section.plots)


def draw(plots: Sequence[Plot]) -> bytes:
    """One under another, as PNG."""
    figure = Figure((WIDTH_IN, HEIGHT_IN * len(plots)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, plot in enumerate(plots, start=1):
        plot(figure.add_subplot(len(plots), 1, number))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def _table(table: Table) -> str:
    is_number = range(table.number_from, table.number_to)

    def cell(column: int, text: str) -> str:
        return f"<td{' class=n' if column in is_number else ''}>{escape(text)}</td>"

    head = "".join(
        f"<th{' class=n' if i in is_number else ''}>{escape(name)}</th>"
        for i, name in enumerate(table.header)
    )
    rows = "".join(
        f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>" for row in table.rows
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f"<div class=scroll><table>{body}</table></div>"


def _figure(plotted: Plotted) -> str:
    data = base64.b64encode(draw([plotted.plot])).decode()
    caption = escape(plotted.caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(line)}</p>" for line in section.lines]
    if section.table is not None:
        parts.append(_table(section.table))
    parts += [_figure(plotted) for plotted in section.plots]
    return f"<section>{''.join(parts)}</section>"


def render(page: Page) -> str:
    """The HTML, complete."""
    sections = "\n".join(_section(section) for section in page.sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f'<link rel="icon" href="data:,"><title>{escape(page.title)}</title>'
        f"<style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(page.title)}</h1>\n<p class=verdict>{escape(page.verdict)}</p>\n{sections}\n"
        f"<section><h2>How it was made</h2><pre>{escape(page.command)}</pre>"
        f"<p class=note>{escape(page.versions)}</p></section>\n</body></html>\n"
    )


def write_report(path: Path, page: Page, told: Mapping[str, Any]) -> None:
    """FILE.html, and FILE.png and FILE.json beside it. Raises InvalidRequestError."""
    html, picture = render(page), draw([p.plot for p in page.plots])
    write_json(path.with_suffix(".json"), dict(told))
    write_whole(path.with_suffix(".png"), picture)
    write_whole(path, html)

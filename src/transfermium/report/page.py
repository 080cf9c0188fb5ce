"""One self-contained page: text, tables and figures in a file that needs no network.

It runs no script, but where structures are shown: there the viewer and nothing else.
"""

from __future__ import annotations

import io
import json
import platform
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import ase
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from .. import __version__
from ..model import write_whole
from ..run import plain
from .figures import styled
from .structures import Column, need_viewer, scripts, view

PAPERS = (  # idea, authors and journal, doi
    (
        "denoising, and forces and stresses as derivatives",
        "S. Jia et al., Derivative-based pre-training of graph neural networks for materials property predictions, "
        "Digital Discovery (2024)",
        "10.1039/d3dd00214d",
    ),
    (
        "transfer between density functionals",
        "N. Hoffmann et al., Transfer learning on large datasets for the accurate prediction of material properties, "
        "Digital Discovery (2023)",
        "10.1039/d3dd00030c",
    ),
    (
        "masked atoms",
        "Z. Zhang et al., Masked pretraining strategy for neural potentials, AIP Advances 14 (2024)",
        "10.1063/5.0202647",
    ),
)


class Page:
    """A page that grows from top to bottom; every text is shown as it is, never as HTML.

    Example:
        page = Page("A study", "made today")
        page.verdict("It helps.").figure(figure, "Error against labels.").write(Path("report.html"))
    """

    def __init__(self, title: str, subtitle: str = ""):
        self.title = title
        self.subtitle = subtitle
        self._parts: list[str] = []
        self._numbers: str | None = None
        self._figures = 0
        self._views = 0

    def heading(self, text: str) -> Page:
        return self._add(f"<h2>{escape(text)}</h2>")

    def text(self, paragraph: str) -> Page:
        return self._add(f"<p>{escape(paragraph)}</p>")

    def verdict(self, text: str) -> Page:
        """The result in one sentence, highlighted."""
        return self._add(f'<p class="verdict">{escape(text)}</p>')

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str, notes: str | Sequence[str] | None = None) -> Page:
        """Rows of named cells; columns of numbers are right-aligned, floats shown with four digits.

        Columns are all names that occur, in that order; those without any content are left out. Of a table without
        rows only the notes are shown.
        """
        names = dict.fromkeys(name for row in rows for name in row)
        columns = [name for name in names if any(_shown(row.get(name)) for row in rows)]
        cells = [[_shown(row.get(name)) for name in columns] for row in rows]
        kinds = [_kind([row[i] for row in cells]) for i in range(len(columns))]
        head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
        body = "\n".join(
            "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
            for row in cells
        )
        if rows:
            size = "scroll long" if len(rows) > 14 else "scroll"
            self._add(
                f'<p class="caption">{escape(caption)}</p>\n'
                f'<div class="{size}" tabindex="0"><table aria-label="{escape(caption)}">\n'
                f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
            )
        for note in [notes] if isinstance(notes, str) else notes or []:
            self._add(f'<p class="note">{escape(note)}</p>')
        return self

    def figure(self, fig: Figure, caption: str) -> Page:
        """A matplotlib figure as inline SVG; `fig` is emptied. Figures that follow each other share a line."""
        self._figures += 1
        drawing, width = _svg(fig, f"f{self._figures}-", caption)
        fig.clear()
        least = min(0.8 * width, 420)  # CSS pixels; a narrower window scrolls the figure
        return self._add(
            f'<figure style="flex-basis: {width:.0f}px; max-width: {1.25 * width:.0f}px">\n'
            f'<div class="card"><div style="min-width: {least:.0f}px">{drawing}</div></div>\n'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def structures(
        self,
        structures: Sequence[ase.Atoms],
        columns: Mapping[str, Column],
        caption: str,
        *,
        x: str,
        y: str,
        colour: str | None = None,
        parity: bool = False,
    ) -> Page:
        """Structures beside a plot of `y` against `x`; a click on a point shows its structure.

        The first one makes the page 1.3 MB larger, and needs the package chemiscope. Without any structure that has `x`
        and `y`, nothing is shown.

        Args:
            columns: name to one value for each structure; all can be chosen as axes and are listed for the structure.
            colour: the column that colours the points, `y` by default.
            parity: whether `x` and `y` are the same quantity: equal axes, and a line where both are equal.

        Raises:
            InputError: for a column that is missing or too short, and where chemiscope is not installed.
        """
        need_viewer()
        part = view(f"v{self._views + 1}", structures, columns, caption, x, y, colour or y, parity)
        if not part:
            return self
        self._views += 1
        return self._add(part)

    def details(self, summary: str, content_text: str) -> Page:
        """Text in lines, folded away until it is asked for."""
        return self._add(f"<details><summary>{escape(summary)}</summary><pre>{escape(content_text)}</pre></details>")

    def numbers(self, obj: Any) -> Page:
        """The numbers behind the page, as JSON: embedded, and beside the page. What is not finite becomes null."""
        self._numbers = json.dumps(plain(obj), ensure_ascii=False, indent=1, allow_nan=False)
        return self

    def write(self, path: str | Path) -> Path:
        """Write the page, and its numbers beside it as `.json`; each at once or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._numbers is not None:
            write_whole(path.with_suffix(".json"), (self._numbers + "\n").encode())
        write_whole(path, self._html(path.with_suffix(".json").name).encode())
        return path

    def _add(self, part: str) -> Page:
        self._parts.append(part)
        return self

    def _html(self, beside: str) -> str:
        embedded = link = ""
        if self._numbers is not None:
            data = self._numbers.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")
            embedded = f'<script type="application/json" id="numbers">{data}</script>\n'
            link = (
                f'<p class="note">The numbers behind this page are embedded in it as JSON, '
                f'and stand beside it in <a href="{escape(beside)}">{escape(beside)}</a>.</p>\n'
            )
        script, policy = scripts() if self._views else ("", "")
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>\n' if self.subtitle else ""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            # The browser itself refuses requests, and scripts that are not ours, whatever a file smuggled in.
            '<meta http-equiv="Content-Security-Policy" '
            f"content=\"default-src 'none'; {policy}style-src 'unsafe-inline'; img-src data:; base-uri 'none'\">\n"
            f'<link rel="icon" href="data:,">\n<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n'
            f'<body>\n<header>\n<p class="brand">transfermium</p>\n<h1>{escape(self.title)}</h1>\n{subtitle}</header>\n'
            f"<main>\n{self._body()}\n</main>\n<footer>\n{_citation()}{link}{_versions()}</footer>\n{embedded}{script}"
            "</body>\n</html>\n"
        )

    def _body(self) -> str:
        """All parts in order, figures that follow each other in one group."""
        lines: list[str] = []
        inside = False
        for part in self._parts:
            if part.startswith("<figure") != inside:
                lines.append("</div>" if inside else '<div class="figures">')
                inside = not inside
            lines.append(part)
        return "\n".join([*lines, "</div>"] if inside else lines)


def _svg(fig: Figure, prefix: str, title: str) -> tuple[str, float]:
    """The figure as an SVG element whose ids start with `prefix`, and its width in CSS pixels."""
    file = io.StringIO()
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has more fonts
        fig.savefig(file, format="svg", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # `style` would reach beyond this figure
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({name: _renamed(name, value, prefix) for name, value in attributes.items()})
    width = float(root.attrib["viewBox"].split()[2]) * 96 / 72
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"role": "img", "aria-label": title})
    return ET.tostring(root, encoding="unicode"), width


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _renamed(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return prefix + value
    if name == "href" and value.startswith("#"):
        return f"#{prefix}{value[1:]}"
    if name == "style":
        value = value.replace("'DejaVu Sans'", FONTS)
    return value.replace("url(#", f"url(#{prefix}")


def _shown(value: Any) -> str:
    """A cell as text."""
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return str(value)


def _kind(cells: Sequence[str]) -> str:
    """The class attribute of a column: numbers, short words or long texts."""
    filled = [cell for cell in cells if cell]
    if filled and all(re.fullmatch(r"[-+−]?[\d,]*\.?\d+(e[-+]?\d+)?( ?%)?", cell) for cell in filled):
        return ' class="number"'
    return ' class="short"' if all(len(cell) < 26 for cell in filled) else ""


def _citation() -> str:
    papers = "\n".join(
        f'<li>{escape(idea)}: {escape(paper)}, <a href="https://doi.org/{doi}">doi:{doi}</a></li>'
        for idea, paper, doi in PAPERS
    )
    return (
        f"<h2>How to cite</h2>\n<p>The transfermium developers, <cite>transfermium</cite>, version {__version__}; "
        f"and the paper whose idea you used:</p>\n<ul>\n{papers}\n</ul>\n"
    )


def _versions() -> str:
    versions = {
        "transfermium": __version__,
        "torch": torch.__version__,
        "ase": ase.__version__,
        "numpy": np.__version__,
        "matplotlib": matplotlib.__version__,
        "Python": platform.python_version(),
    }
    listed = " · ".join(f"{name} {version}" for name, version in versions.items())
    return f'<p class="note">Page made with {escape(listed)}.</p>\n'


FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans'"

STYLE = """
:root { --ink: #1c2128; --soft: #59636e; --line: #d5dae0; --paper: #fff; --tint: #f4f6f8; --accent: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa5b1; --line: #363d46; --paper: #14181d; --tint: #1d232a; --accent: #7cb8f5; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 3rem; max-width: 68rem; overflow-wrap: break-word;
  color: var(--ink); background: var(--paper); font: 1rem/1.55 FONTS, sans-serif;
}
header { border-bottom: 1px solid var(--line); margin-bottom: 1.5rem; padding-bottom: .75rem; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.1rem); font-weight: 650; line-height: 1.2; margin: .2rem 0 .4rem; }
h2 { font-size: 1.2rem; font-weight: 650; line-height: 1.3; margin: 2.4rem 0 .6rem; break-after: avoid; }
p, li { max-width: 46rem; }
p { margin: .6rem 0; }
ul { padding-left: 1.2rem; }
a { color: var(--accent); }
.brand { color: var(--accent); font-size: .8rem; font-weight: 650; letter-spacing: .08em; margin: 0; }
.subtitle, .note, .caption, figcaption { color: var(--soft); }
.subtitle { margin: 0; }
.note { font-size: .875rem; margin: .35rem 0; }
.verdict {
  max-width: none; margin: 1.25rem 0; padding: .9rem 1.1rem; font-size: 1.1rem;
  background: var(--tint); border-left: 4px solid var(--accent); border-radius: 0 6px 6px 0;
}
.scroll { overflow-x: auto; margin: 0 0 .6rem; }
.long { max-height: 30rem; overflow-y: auto; border-bottom: 1px solid var(--line); }
.long thead th { position: sticky; top: 0; background: var(--paper); box-shadow: inset 0 -1px var(--soft); }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
.caption { margin: 1.1rem 0 .3rem; font-size: .92rem; break-after: avoid; }
th, td { padding: .32rem 1.3rem .32rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; max-width: 9rem; border-bottom: 1px solid var(--soft); }
td { border-bottom: 1px solid var(--line); min-width: 2.5rem; max-width: 24rem; }
th, .number, .short { overflow-wrap: normal; }
.number { text-align: right; }
td.number, td.short { white-space: nowrap; }
.figures { display: flex; flex-wrap: wrap; gap: 1.25rem; margin: 1.25rem 0; }
figure { margin: 0; flex: 1 1 20rem; min-width: min(100%, 16rem); break-inside: avoid; }
figcaption { font-size: .875rem; margin-top: .45rem; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem; overflow-x: auto; }
.card svg { display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; }
.viewer {
  display: flex; flex-wrap: wrap; gap: .5rem; margin: 1.1rem 0 .45rem; position: relative; overflow: visible;
  color: #1c2128; color-scheme: light; line-height: 1.4;
}
.viewer .map, .viewer .side { flex: 1 1 20rem; height: 27rem; min-width: 0; position: relative; }
.viewer .side { display: flex; flex-direction: column; }
.viewer .structure { flex: 1; min-height: 0; position: relative; }
.viewer .waiting { position: absolute; inset: 1rem; color: #59636e; }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
details + :not(details) { border-top: 1px solid var(--line); padding-top: .5rem; }
summary { cursor: pointer; font-weight: 600; }
pre {
  overflow-x: auto; max-height: 30rem; padding: .8rem 1rem; border-radius: 6px; background: var(--tint);
  font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
footer { border-top: 1px solid var(--line); margin-top: 2.5rem; font-size: .92rem; }
footer h2 { font-size: 1rem; margin-top: 1.2rem; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --tint: #f4f6f8; --accent: #0b5cad; }
  body { font-size: 10pt; max-width: none; padding: 0; }
  .scroll, .long, pre { overflow: visible; max-height: none; white-space: normal; }
  pre { white-space: pre-wrap; }
  .long thead th { position: static; box-shadow: none; }
  tr, .viewer { break-inside: avoid; }
}
""".replace("FONTS", FONTS)

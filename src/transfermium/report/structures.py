"""Structures beside a plot of their numbers, where a click on a point shows its structure: chemiscope, inlined."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import ase
import numpy as np

from ..card import MOST_ATOMS, MOST_STRUCTURES, some_of
from ..errors import InputError
from ..evaluate import PRINTED

SCRIPT = "sphinx/static/chemiscope.min.js"  # in the package chemiscope: the viewer and all that it needs
DIGITS = 4  # of coordinates in Å
TURN, LEAN = np.radians([25, 75])  # of crystals, which straight along an axis would look flat


class Column(NamedTuple):
    """One value for each structure, a number (NaN where there is none) or a text."""

    values: Sequence[float] | Sequence[str]
    unit: str = ""


def parity_columns(
    quantity: str, label: Sequence[float], prediction: Sequence[float], unit: str = ""
) -> dict[str, Column]:
    """Label, prediction and absolute error of one number per structure, in the units that tables print."""
    shown, factor = PRINTED.get(unit, (unit, 1.0))
    values = [np.asarray(column, float) * factor for column in (label, prediction)]
    values.append(np.abs(values[1] - values[0]))
    named = zip(("label", "prediction", "absolute error"), values, strict=True)
    return {f"{quantity}, {name}": Column(column.tolist(), shown) for name, column in named}


def view(
    name: str,
    structures: Sequence[ase.Atoms],
    columns: Mapping[str, Column],
    caption: str,
    x: str,
    y: str,
    colour: str,
    parity: bool,
) -> str:
    """The HTML of one viewer, without the scripts of the page; `name` is its id.

    Structures without a finite `x` and `y` are left out; of the others at most `MOST_STRUCTURES` are shown, evenly
    chosen, and the caption says so. Without any, the HTML is empty.

    Raises:
        InputError: for a column that is not there or does not have one value for each structure.
    """
    numbers = [title for title, column in columns.items() if not any(isinstance(v, str) for v in column.values)]
    for wanted in (x, y, colour):
        if wanted not in numbers:
            raise InputError(
                f"'{wanted}' is none of the columns of numbers, which are {', '.join(numbers) or 'missing'}"
            )
    for title, column in columns.items():
        if len(column.values) != len(structures):
            raise InputError(
                f"'{title}' has {len(column.values)} values for {len(structures)} structures: give one for each"
            )
    if len(numbers) < 2:
        raise InputError(f"'{x}' is the only column of numbers, but a plot needs two: give another one")
    known = np.isfinite([np.asarray(columns[axis].values, float) for axis in (x, y)]).all(axis=0)
    places = np.flatnonzero(known)
    chosen = places[some_of([structures[int(i)] for i in places])]
    if not len(chosen):
        return ""
    shown = f"{len(chosen):,} structures"
    if len(chosen) < len(structures):
        shown = f"{len(chosen):,} of {len(structures):,} structures, evenly chosen"
    if len(chosen) < len(places):
        shown += f" (a page holds at most {MOST_STRUCTURES:,}, and about {MOST_ATOMS:,} atoms)"
    dataset = _dataset([structures[int(i)] for i in chosen], {n: _picked(c, chosen) for n, c in columns.items()})
    packed = _packed({**dataset, "settings": _settings(dataset, x, y, colour)})
    text = f"{caption.rstrip('.')}. {shown}."
    kind = " data-parity" if parity else ""
    return (
        f'<div class="viewer card" id="{name}"{kind} role="group" aria-label="{escape(text)}">\n'
        '<div class="map"></div>\n<div class="side"><div class="structure"></div><div class="info"></div></div>\n'
        '<div class="meta" hidden></div>\n<p class="waiting">The viewer of structures runs when scripts are '
        f'allowed.</p>\n<script type="application/gzip">{packed}</script>\n</div>\n'
        f'<p class="note">{escape(text)} Click a point to see its structure; drag to turn it, scroll to zoom.</p>'
    )


def need_viewer() -> None:
    """Raise an `InputError` where chemiscope is not installed."""
    _library()


def scripts() -> tuple[str, str]:
    """The scripts of a page with viewers, and the policy under which only they run.

    Raises:
        InputError: where chemiscope is not installed.
    """
    library, packed = _library()
    allowed = " ".join(f"'sha256-{_hash(script)}'" for script in (START, library))
    # Data for the plots is turned into WebGL commands that are compiled in the browser: 'unsafe-eval'.
    policy = f"script-src {allowed} 'unsafe-eval'; "
    return f'<script type="application/gzip" id="chemiscope">{packed}</script>\n<script>{START}</script>\n', policy


@cache
def _library() -> tuple[str, str]:
    """The viewer as it is, and compressed."""
    found = find_spec("chemiscope")  # its files are read, the package is never imported
    folders = found.submodule_search_locations if found is not None else None
    for folder in folders or ():
        if (Path(folder) / SCRIPT).exists():
            library = (Path(folder) / SCRIPT).read_text(encoding="utf-8")
            return library, _zipped(library)
    raise InputError("the viewer of structures needs chemiscope 1.1: pip install 'transfermium[viewer]'")


def _dataset(structures: Sequence[ase.Atoms], columns: Mapping[str, Column]) -> dict[str, Any]:
    """What chemiscope reads."""
    return {
        "meta": {"name": "structures"},
        "structures": [_structure(atoms) for atoms in structures],
        "properties": {
            title: {
                "target": "structure",
                "values": list(column.values),
                **({"units": column.unit} if column.unit else {}),
            }
            for title, column in columns.items()
        },
    }


def _structure(atoms: ase.Atoms) -> dict[str, Any]:
    crystal = atoms.pbc.any() and atoms.cell.rank == 3
    turn = _turn() if crystal else np.eye(3)
    x, y, z = (atoms.positions @ turn).T.round(DIGITS).tolist()
    found = {"size": len(atoms), "names": list(atoms.symbols), "x": x, "y": y, "z": z}
    return {**found, "cell": np.ravel(atoms.cell @ turn).round(DIGITS).tolist()} if crystal else found


def _turn() -> np.ndarray:
    """Of rows, about z and then about x: c points up, a to the right."""
    (cz, cx), (sz, sx) = np.cos((TURN, LEAN)), np.sin((TURN, LEAN))
    return np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])


def _settings(dataset: Mapping[str, Any], x: str, y: str, colour: str) -> dict[str, Any]:
    axes = {name: {"property": title} for name, title in (("x", x), ("y", y), ("color", colour))}
    cells = any("cell" in structure for structure in dataset["structures"])
    return {
        "target": "structure",
        "map": {**axes, "palette": "cividis", "size": {"factor": 40}},
        "structure": [{"unitCell": cells, "axes": "abc" if cells else "off"}],
    }


def _picked(column: Column, chosen: np.ndarray) -> Column:
    return Column([column.values[int(i)] for i in chosen], column.unit)  # type: ignore[arg-type]


def _packed(content: Any) -> str:
    """JSON, where what is not finite is null, compressed."""
    plain = json.dumps(_without_nan(content), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _zipped(plain)


def _without_nan(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    if isinstance(content, float | np.floating):
        return float(content) if np.isfinite(content) else None
    return content.item() if isinstance(content, np.generic) else content


def _zipped(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# The browser unpacks the viewer, draws each set of structures, and adds to a parity plot the line of equality.
START = """
"use strict";
(async () => {
  const unpacked = async (element) => {
    const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return await new Response(stream).text();
  };
  const shown = async (view) => {
    const part = (name) => view.querySelector("." + name);
    const config = Object.fromEntries(["meta", "map", "info", "structure"].map((name) => [name, part(name)]));
    const content = await unpacked(view.querySelector("script"));
    const dataset = JSON.parse(content, (_, value) => (value === null ? NaN : value));
    const axes = ["x", "y"].map((axis) => dataset.properties[dataset.settings.map[axis].property].values);
    const warnings = new Chemiscope.Warnings();
    warnings.addHandler((message) => console.warn(message));
    const visualizer = await Chemiscope.DefaultVisualizer.load(config, dataset, warnings);
    if ("parity" in view.dataset) {
      const [low, high] = [Math.min(...axes.flat()), Math.max(...axes.flat())];
      const margin = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
      const range = [low - margin, high + margin];
      const [x0, x1] = range;
      const line = { color: "#59636e", width: 1, dash: "dash" };
      visualizer.map._relayout?.({
        shapes: [{ type: "line", layer: "below", x0, y0: x0, x1, y1: x1, line }],
        "xaxis.range": range,
        "yaxis.range": range,
      });
    }
    part("waiting").remove();
    view.visualizer = visualizer;
  };
  const views = document.querySelectorAll(".viewer");
  try {
    const library = document.createElement("script");
    library.textContent = await unpacked(document.getElementById("chemiscope"));
    document.head.append(library);
    for (const view of views) await shown(view);
  } catch (error) {
    console.error(error);
    for (const note of document.querySelectorAll(".viewer .waiting"))
      note.textContent = `This browser cannot show the structures: ${error.message}`;
  }
})();
"""

"""What `doctor` found, for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ..data.labels import Labels
from .page import Page
from .run import label_row

MOST_SHOWN = 10
COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
Content = Mapping[str, Any]


def show(content: Content, labels: Labels, console: Console) -> None:
    """Print the manifest of labels and all findings; what comes from files is text, and cannot steer the terminal."""
    if labels.entries:
        console.print(labels.table())
    for one in content["findings"]:
        title, kind = _plain(one["title"]), _plain(f" [{one['kind']}]")
        console.print(
            Text.assemble((one["severity"], COLOURS[one["severity"]]), " ", title, (kind, "dim")), soft_wrap=True
        )
        lines = [f"  cause: {one['cause']}", *(f"  measured: {words}" for words in one["evidence"])]
        if one["structures"]:
            lines.append(f"  structures: {listed(one['structures'])}")
        lines += [f"  {'fix: ' if k == 0 else '     '}{line}" for k, line in enumerate(one["fix"].splitlines())]
        console.print(Text("\n".join(map(_plain, lines)), style="dim"), soft_wrap=True)
    console.print(Text(verdict(content)), style="bold", soft_wrap=True)


def doctor_page(content: Content, labels: Labels) -> Page:
    """The same as a page, with all of it as JSON."""
    page = Page("Doctor: is this data sound?", ", ".join(map(str, content["sources"])))
    page.verdict(verdict(content))
    page.heading("Findings")
    if not content["findings"]:
        page.text("Nothing was found.")
    page.table(
        [
            {name: one[name] for name in ("severity", "kind")}
            | {"finding": one["title"], "structures": len(one["structures"]) or "all"}
            for one in content["findings"]
        ],
        "What was found, errors first.",
    )  # fmt: skip
    for one in content["findings"]:
        page.heading(f"{one['severity'].capitalize()}: {one['kind']}").text(f"{one['title']}.").text(
            f"Likely cause: {one['cause']}."
        )
        for words in one["evidence"]:
            page.text(f"Measured: {words}.")
        if one["structures"]:
            page.text(f"Structures: {listed(one['structures'])}.")
        page.details("How to mend it", one["fix"])
    page.heading("Labels").table(
        [label_row(entry) for entry in labels.entries], "Labels that were found, in our units."
    )
    return page.numbers(content)


def verdict(content: Content) -> str:
    """Everything in one sentence."""
    counts = {name: sum(one["severity"] == name for one in content["findings"]) for name in COLOURS}
    found = ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for name, n in counts.items() if n) or "nothing wrong"
    names = ("structure", "atom", "element")
    sizes = [f"{content[f'{what}s']:,} {what}{'' if content[f'{what}s'] == 1 else 's'}" for what in names]
    return f"{found} in {sizes[0]}, {sizes[1]} of {sizes[2]} ({content['seconds']:.1f} s)"


def listed(indices: Sequence[int]) -> str:
    """The first few of some indices."""
    shown = ", ".join(map(str, indices[:MOST_SHOWN]))
    return (
        f"{shown} and {len(indices) - MOST_SHOWN:,} more (doctor.json has all)" if len(indices) > MOST_SHOWN else shown
    )


def _plain(text: str) -> str:
    """Without control characters."""
    return "".join(one for one in text if one.isprintable())

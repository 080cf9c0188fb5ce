"""What the terminal shows: all but results on standard error, so that these can be piped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

UNSEEN = dict.fromkeys(
    [*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}"
)  # they steer terminals


class Terminal(Console):
    """Shows control characters, which keys and ids of foreign files may hold, instead of sending them."""

    heard: set[str] | None = None  # what was printed already, where it is to be printed once

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)

    def print(self, *objects: Any, **options: Any) -> None:
        if self.heard is not None and all(isinstance(one, str | Text | Table) for one in objects):
            said = "".join(segment.text for one in objects for segment in self.render(one))
            if said.strip() and said in self.heard:
                return
            self.heard.add(said)
        super().print(*objects, **options)

    @contextmanager
    def once(self) -> Iterator[None]:
        """Within it nothing is printed twice, as where several runs would say the same of the same data."""
        before, self.heard = self.heard, set() if self.heard is None else self.heard
        try:
            yield
        finally:
            self.heard = before


def visible(text: str) -> str:
    """The same with a sign in place of each control character but tabs and line ends."""
    return text.translate(UNSEEN)


WINDOW = 300.0  # seconds whose pace says how long the rest takes: steps come in bursts, between validations and cells

console = Terminal(stderr=True, highlight=False)
results = Terminal()  # on standard output


def bar(quiet: bool = False) -> Progress:
    """An empty set of progress bars with remaining time; silent when `quiet`."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Column

    from .bars import Bars

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        console=console,
        disable=quiet,
        speed_estimate_period=WINDOW,
    )


def track(items: Iterable[T], title: str, total: int | None = None, quiet: bool = False) -> Iterator[T]:
    """The same items, with a progress bar that counts them."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    from .bars import Bars

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with Bars(*columns, console=console, disable=quiet, transient=True) as progress:
        yield from progress.track(items, total=total, description=title)


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of named cells as a table, with any name that one of them has, the unit last; numbers are right-aligned."""
    result = Table(title=Text(title), title_justify="left", header_style="bold")
    names = sorted(dict.fromkeys(name for row in rows for name in row), key=lambda name: name == "unit")
    for name in names:
        numeric = not isinstance(next(row[name] for row in rows if name in row), str)
        result.add_column(Text(visible(name)), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        cells = (row.get(name, "") for name in names)
        result.add_row(*(Text(f"{v:.4g}" if isinstance(v, float) else visible(str(v))) for v in cells))
    return result


def and_(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))

"""What is said while something takes long."""

import io
import itertools

import pytest
from rich.console import Console

from transfermium import bars
from transfermium.console import table


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_terminal_progress_is_told_in_lines(monkeypatch, terminal):
    clock = [100.0]
    monkeypatch.setattr(bars, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    with bars.Bars(console=console, auto_refresh=False) as shown:
        task = shown.add_task("training", total=100, note="")
        for step in range(1, 101):
            clock[0] += 30.0
            shown.update(task, completed=step, note=f"[step] {step}")
        said = [line for line in console.file.getvalue().splitlines() if line.startswith("training: ")]
    if terminal:
        assert not said
        return
    assert said[0].startswith("training: 1 %, [step] 1")
    steps = [int(line.split("[step] ")[1].split(",")[0]) for line in said]
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert gaps == sorted(gaps) and 1 == gaps[0] < gaps[-1] <= 20, "less and less often, at least every ten minutes"
    assert 10 < len(said) < 30


def test_nothing_is_told_of_what_is_short_or_silent(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=False)
    with bars.Bars(console=console) as shown:
        for _ in shown.track(range(50)):
            pass
    monkeypatch.setattr(bars, "FIRST", 0.0)
    with bars.Bars(console=console, disable=True) as shown:
        shown.advance(shown.add_task("training", total=1))
    assert ":" not in console.file.getvalue().replace("0:00:00", "")


def test_what_has_no_end_is_counted(monkeypatch):
    monkeypatch.setattr(bars, "FIRST", 0.0)
    console = Console(file=io.StringIO(), force_terminal=False)
    with bars.Bars(console=console) as shown:
        task = shown.add_task("packing", total=None)
        shown.update(task, completed=1234)
    assert "packing: 1,234\n" in console.file.getvalue()


def test_brackets_stay_in_tables():
    console = Console(file=io.StringIO(), width=80)
    console.print(table("Gap [ev]", [{"of [Cu]": "[red]"}]))
    assert all(text in console.file.getvalue() for text in ("Gap [ev]", "of [Cu]", "[red]"))

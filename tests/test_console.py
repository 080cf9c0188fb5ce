"""What is said while something takes long."""

import io
import itertools

import pytest
from rich.console import Console

from transfermium import bars
from transfermium.console import Terminal, table


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


def test_names_are_whole_where_a_table_has_little_room():
    console = Console(file=io.StringIO(), width=30)
    console.print(table("errors", [dict.fromkeys(("labels", "scratch", "scratch_long"), "1")]))
    shown = console.file.getvalue()
    assert "…" not in shown and "_" in shown


def test_rows_with_other_names_have_columns_of_their_own():
    console = Console(file=io.StringIO(), width=80)
    rows = [{"quantity": "element", "accuracy": 0.5, "unit": ""}, {"quantity": "forces", "MAE": 0.25, "unit": "Å"}]
    console.print(table("errors", rows))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    assert ["element", "0.5", "", ""] in lines and ["forces", "", "0.25", "Å"] in lines


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


def test_control_characters_of_foreign_files_are_shown_and_not_sent():
    shown = Terminal(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    shown.print("energy\x1b[2J\x07: found\x9b1m")
    shown.print(table("labels", [{"key\x1b]0;title": "e\x1b[31m", "n": 1}]))
    with bars.Bars(console=shown, auto_refresh=False) as progress:
        progress.add_task("reading \x1b[3J", total=3, note="")
        progress.refresh()
    said = shown.file.getvalue()
    assert not any(sent in said for sent in ("\x1b[2J", "\x1b[3J", "\x07", "\x9b", "\x1b]0", "\x1b[31m"))
    assert "energy\N{REPLACEMENT CHARACTER}[2J" in said and "key\N{REPLACEMENT CHARACTER}]0;title" in said
    assert "\x1b[?25l" in said and "reading \N{REPLACEMENT CHARACTER}" in said, "what steers the bar is sent"


def test_runs_of_the_same_data_say_it_once():
    shown = Terminal(file=io.StringIO(), width=80)

    @shown.once()
    def speak(deeper: int) -> None:
        shown.print(table("labels", [{"key": "energy", "n": 1}]))
        shown.print(f"[bold]rung {deeper}[/bold]")
        shown.print()
        if deeper:
            speak(deeper - 1)

    speak(2)
    speak(0)
    said = shown.file.getvalue()
    assert said.count("energy") == 2 and [said.count(f"rung {k}") for k in range(3)] == [2, 1, 1]
    assert said.count("\n\n") == 4

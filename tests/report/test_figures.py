"""Figures say what the numbers say."""

import math

import pytest

from transfermium.report.figures import forest


@pytest.mark.parametrize(
    ("low", "high", "arrows"),
    [(0.8, 1.2, []), (0.9, 30.0, [">"]), (0.01, 1.1, ["<"]), (0.0, math.inf, ["<", ">"])],
)
def test_an_interval_that_leaves_its_panel_ends_in_an_arrow(low: float, high: float, arrows: list[str]):
    (axes,) = (axes for axes in forest({"water": [("mask", 1.0, low, high)]}).axes if axes.get_visible())
    drawn = [line for line in axes.lines if line.get_marker() in ("<", ">")]
    assert [line.get_marker() for line in drawn] == arrows
    left, right = axes.get_xlim()
    assert all(left < float(line.get_xdata()[0]) < right for line in drawn)

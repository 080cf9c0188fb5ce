"""Whoever chose the largest or the smallest rate is told to try one more."""

import itertools

import pytest

from transfermium.study.rates import RATES, SPAN, beyond


def test_the_largest_rate_names_who_chose_it_and_what_to_try() -> None:
    said = beyond([("scratch", 2e-3), ("full", 5e-4), ("scratch", 2e-3), ("head", 2e-3)], [2e-3, 1e-3, 1e-4])
    assert said == "scratch and head learned best at the largest rate tried, 0.002: try 0.008 as well."


def test_both_ends_are_told() -> None:
    said = beyond([("scratch", 8e-3), ("full", 5e-4)], RATES)
    assert "scratch learned best at the largest rate tried, 0.008: try 0.032 as well." in said
    assert "full learned best at the smallest rate tried, 0.0005: try 0.000125 as well." in said


@pytest.mark.parametrize("chosen", [[], [("scratch", RATES[0])]])
def test_what_is_in_between_is_not_told(chosen: list[tuple[str, float]]) -> None:
    assert beyond(chosen, RATES) == ""


def test_one_rate_is_no_choice() -> None:
    assert beyond([("scratch", 1e-3)], [1e-3]) == beyond([("scratch", 1e-3)], [1e-3, 1e-3]) == ""


def test_usual_rates_are_a_span_apart_and_the_first_is_in_the_middle() -> None:
    ordered = sorted(RATES)
    assert all(high == pytest.approx(SPAN * low) for low, high in itertools.pairwise(ordered))
    assert RATES[0] == ordered[len(ordered) // 2]

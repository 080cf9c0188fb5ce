"""Intervals cover the truth as often as they promise, and pairing makes them narrow."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from transfermium.errors import InputError
from transfermium.study.intervals import Interval, bootstrap, compare, paired, student

REPETITIONS = 500


def coverage(draw: Callable[[np.random.Generator], Interval], truth: float) -> float:
    rng = np.random.default_rng(0)
    return float(np.mean([not draw(rng).excludes(truth) for _ in range(REPETITIONS)]))


def promised(level: float, allowed: float = 0.0) -> tuple[float, float]:
    """Four standard deviations of a binomial around the level, and what a known bias takes from below."""
    spread = 4 * math.sqrt(level * (1 - level) / REPETITIONS)
    return level - spread - allowed, level + spread


# ----------------------------------------------------------------------------------------------------- Student's t


def test_three_values_have_the_interval_of_the_tables() -> None:
    half = 4.30265 / math.sqrt(3)
    assert student([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - half, 2 + half), abs=1e-5)
    assert student([1.0, 2.0, 3.0], confidence=0.9) == pytest.approx((2, 0.314145, 3.685855), abs=1e-5)


def test_one_value_has_no_bounds() -> None:
    assert student([5.0]) == (5.0, -math.inf, math.inf)
    assert paired([2.0], [1.0], ratio=True) == pytest.approx((2.0, 0.0, math.inf))


@pytest.mark.parametrize("n", [3, 10])
def test_students_interval_covers_the_mean_as_often_as_it_says(n: int) -> None:
    low, high = promised(0.95)
    assert low < coverage(lambda rng: student(rng.normal(7.0, 2.0, n)), 7.0) < high


def test_pairing_removes_what_the_pairs_share() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(1.0, 0.5, 5)  # a hard draw of labels is hard for both arms
    a, b = seeds + rng.normal(0.1, 0.01, 5), seeds + rng.normal(0.0, 0.01, 5)
    together = paired(a, b)
    assert together.excludes(0.0)
    assert together.high - together.low < 0.1 * (student(a).high - student(a).low)


def test_a_ratio_is_the_geometric_mean_and_turns_around() -> None:
    there, back = (paired(*arms, ratio=True) for arms in (([2.0, 8.0], [1.0, 1.0]), ([1.0, 1.0], [2.0, 8.0])))
    assert there.value == pytest.approx(4.0)
    assert back == pytest.approx((1 / there.value, 1 / there.high, 1 / there.low))


# ------------------------------------------------------------------------------------------------------- bootstrap


def test_the_bootstrap_of_a_normal_mean_is_the_closed_form() -> None:
    errors = np.random.default_rng(1).normal(10.0, 1.0, 400)
    half = 1.95996 * errors.std() / math.sqrt(400)
    found = bootstrap(errors)
    assert found.value == pytest.approx(errors.mean())
    assert (found.low, found.high) == pytest.approx((errors.mean() - half, errors.mean() + half), abs=0.05 * half)


def test_the_same_seed_gives_the_same_interval_in_any_number_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = np.random.default_rng(1).exponential(size=50)
    whole = bootstrap(errors, resamples=1000)
    monkeypatch.setattr("transfermium.study.intervals.DRAWN_AT_ONCE", 5_000)
    assert bootstrap(errors, resamples=1000) == whole


def test_the_bootstrap_covers_a_skewed_mean() -> None:
    low, high = promised(0.95, allowed=0.02)  # a hundred skewed errors are known to cost a little
    found = coverage(lambda rng: bootstrap(rng.lognormal(0.0, 0.8, 100), resamples=1000), math.exp(0.32))
    assert low < found < high


def clustered(rng: np.random.Generator, groups: bool) -> Interval:
    """Forty materials of ten structures each, whose errors have most in common."""
    errors = np.repeat(rng.exponential(1.0, 40), 10) + rng.exponential(0.2, 400)
    return bootstrap(errors, groups=list(np.repeat(np.arange(40), 10)) if groups else None, resamples=500)


def test_structures_of_one_material_are_no_independent_tests() -> None:
    low, high = promised(0.95, allowed=0.03)
    assert low < coverage(lambda rng: clustered(rng, groups=True), 1.2) < high
    assert coverage(lambda rng: clustered(rng, groups=False), 1.2) < 0.7


def test_groups_may_have_names_and_sizes() -> None:
    errors = [1.0, 1.0, 1.0, 4.0]
    assert bootstrap(errors, groups=["NaCl", "NaCl", "NaCl", "MgO"]).value == pytest.approx(1.75)
    assert bootstrap(errors, groups=["NaCl"] * 4) == (1.75, -math.inf, math.inf)


def test_what_is_hard_for_both_arms_cancels() -> None:
    rng = np.random.default_rng(2)
    hard = rng.exponential(1.0, 200)
    a, b = hard + rng.exponential(0.1, 200) + 0.1, hard + rng.exponential(0.1, 200)
    assert bootstrap(a, b).excludes(0.0)
    apart = bootstrap(a)
    assert not apart.excludes(float(b.mean()))


def test_a_ratio_covers_the_truth() -> None:
    def draw(rng: np.random.Generator) -> Interval:
        hard = rng.exponential(1.0, 100)
        return bootstrap(2 * hard * rng.uniform(0.5, 1.5, 100), hard, ratio=True, resamples=500)

    low, high = promised(0.95, allowed=0.02)
    assert low < coverage(draw, 2.0) < high


def test_equal_arms_have_no_width() -> None:
    errors = np.random.default_rng(3).exponential(size=(3, 20))
    assert bootstrap(errors, errors) == (0.0, 0.0, 0.0)
    assert bootstrap(errors, 0.5 * errors, ratio=True) == pytest.approx((2.0, 2.0, 2.0))


# ------------------------------------------------------------------------------------------------ seeds × materials


def test_a_comparison_reports_both_intervals_of_one_value() -> None:
    rng = np.random.default_rng(4)
    hard = rng.exponential(1.0, 100)
    a, b = (scale * hard * rng.uniform(0.8, 1.2, (3, 100)) for scale in (1.5, 1.0))
    found = compare(a, b)
    assert found.seeds.value == pytest.approx(found.materials.value)
    assert found.seeds == paired(a.mean(axis=1), b.mean(axis=1), ratio=True)
    assert found.clear


def test_seeds_that_disagree_are_not_outvoted_by_materials() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.uniform(0.9, 1.1, (3, 1000)), np.ones((3, 1000))
    a *= np.array([[0.8], [1.1], [1.7]])
    found = compare(a, b)
    assert found.materials.excludes(1.0) and not found.seeds.excludes(1.0)
    assert not found.clear


def test_one_seed_settles_nothing() -> None:
    found = compare([[2.0, 2.1, 2.2]], [[1.0, 1.0, 1.0]])
    assert found.materials.excludes(1.0) and not found.clear
    assert not compare([[2.0, 2.1, 2.2]], [[1.0, 1.0, 1.0]], ratio=False).clear


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: student([]), "needs a list of numbers"),
        (lambda: student([1.0, math.nan]), "needs a list of numbers"),
        (lambda: paired([1.0], [1.0, 2.0]), "1 values cannot be paired with 2"),
        (lambda: paired([1.0, 0.0], [1.0, 1.0], ratio=True), "errors above zero"),
        (lambda: bootstrap([1.0, math.nan]), "error 1 of seed 0 is nan"),
        (lambda: bootstrap([1.0, 2.0], [1.0]), "cannot be compared"),
        (lambda: bootstrap([1.0, 2.0], groups=["a"]), "1 groups for 2 structures"),
        (lambda: bootstrap([1.0, 2.0], ratio=True), "two arms"),
        (lambda: compare([[1.0, 2.0]], [[0.0, 0.0]]), "errors above zero"),
    ],
)
def test_what_cannot_be_estimated_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()

"""What needs no network: each law is found again in data that it made, and says what it cannot know."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

import transfermium as tm
from transfermium.study.baselines import baselines, compositions_of, unlabelled

N, TEST, ELEMENTS = 30, 12, 4
SHIFTS = np.array([-1.5, 0.25, 3.0, -40.0])
LAWS = ("constant shift", "per-element shift", "linear map")


def drawn(n: int, seed: int, elements: int = ELEMENTS) -> tuple[np.ndarray, np.ndarray]:
    """Compositions and cheap values per atom."""
    rng = np.random.default_rng(seed)
    compositions = rng.integers(0, 5, size=(n, elements))
    compositions[:, 0] += 1
    return compositions, rng.normal(size=n)


def made_by(law: str, compositions: np.ndarray, per_atom: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels that obey a law, and the cheap values."""
    fractions = compositions / compositions.sum(axis=1, keepdims=True)
    labels = {
        "constant shift": per_atom + 7.25,
        "per-element shift": per_atom + fractions @ SHIFTS,
        "linear map": 0.4 * per_atom - 12.0,
    }[law]
    size = compositions.sum(axis=1) if kind == "extensive" else 1
    return labels * size, per_atom * size


@pytest.mark.parametrize("kind", ["extensive", "intensive"])
@pytest.mark.parametrize("law", LAWS)
def test_each_law_is_found_again_in_data_that_it_made(law, kind):
    (a, x), (b, x_test) = drawn(N, 0), drawn(TEST, 1)
    labels, cheap = made_by(law, a, x, kind)
    truth, test_cheap = made_by(law, b, x_test, kind)
    found = baselines(labels, a, b, cheap, test_cheap, kind)

    assert found.keys() == {"cheap value", *LAWS}
    np.testing.assert_allclose(found[law], truth, rtol=0, atol=1e-10 * np.abs(truth).max())
    others = {"per-element shift", "linear map"} - {law} if law == "constant shift" else {"constant shift"}
    for other in others:  # both contain the constant shift, which contains neither
        assert np.allclose(found[other], truth) == (law == "constant shift")


@pytest.mark.parametrize("kind", ["extensive", "intensive"])
def test_without_a_cheap_value_the_label_itself_is_fitted(kind):
    (a, _), (b, _) = drawn(N, 0), drawn(TEST, 1)
    truth = made_by("per-element shift", b, np.zeros(TEST), kind)[0]
    labels = made_by("per-element shift", a, np.zeros(N), kind)[0]
    found = baselines(labels, a, b, kind=kind)

    assert found.keys() == {"mean", "per-element fit"}
    np.testing.assert_allclose(found["per-element fit"], truth, atol=1e-9)
    size = {"extensive": (a.sum(axis=1), b.sum(axis=1)), "intensive": (1, 1)}[kind]
    np.testing.assert_allclose(found["mean"], np.mean(labels / size[0]) * size[1] * np.ones(TEST))


def test_an_element_that_no_label_has_is_an_average_one_and_is_told():
    (a, x), (b, x_test) = drawn(N, 0), drawn(TEST, 1)
    a[:, 3] = 0
    labels, cheap = made_by("per-element shift", a, x, "extensive")
    test_cheap = x_test * b.sum(axis=1)
    found = baselines(labels, a, b, cheap, test_cheap)["per-element shift"]

    average = ((labels - cheap) / a.sum(axis=1)).mean()
    np.testing.assert_allclose(found, test_cheap + b[:, :3] @ SHIFTS[:3] + average * b[:, 3], atol=1e-9)
    assert unlabelled(a, b) == ["Li"]  # column 3
    assert unlabelled(b, a) == []


def test_elements_that_never_part_are_told_apart_from_nothing_and_needed_for_nothing():
    """In compounds A B2 the ratio never changes: only the sum counts, and it is exact."""
    rng = np.random.default_rng(0)
    a, b = (np.stack([n, 2 * n, rng.integers(1, 6, len(n))], axis=1) for n in (rng.integers(1, 9, 20), np.arange(1, 7)))
    shifts = np.array([5.0, -2.0, 1.0])
    found = baselines(a @ shifts, a, b, np.zeros(20), np.zeros(6))["per-element shift"]
    np.testing.assert_allclose(found, b @ shifts, atol=1e-9)


def test_few_noisy_labels_of_many_elements_do_little_worse_than_a_constant():
    """Twelve labels do not determine ten elements: least squares would follow the noise."""
    rng = np.random.default_rng(3)
    worse = []
    for seed in range(20):
        (a, _), (b, _) = drawn(12, seed, 10), drawn(50, 100 + seed, 10)
        labels, truth = (3.0 + rng.normal(0, 0.5, len(c)) for c in (a, b))
        found = baselines(labels, a, b, np.zeros(12), np.zeros(50), "intensive")
        error = {name: np.abs(values - truth).mean() for name, values in found.items()}
        fractions, test_fractions = (c / c.sum(axis=1, keepdims=True) for c in (a, b))
        plain = np.abs(test_fractions @ np.linalg.lstsq(fractions, labels)[0] - truth).mean()
        worse.append((error["per-element shift"] / error["constant shift"], plain / error["constant shift"]))
    ridge, plain = np.mean(worse, axis=0)
    assert ridge - 1 < (plain - 1) / 2


@pytest.mark.parametrize("n", [1, 2])
def test_a_label_or_two_are_enough_for_a_constant(n):
    (a, x), (b, x_test) = drawn(n, 0), drawn(TEST, 1)
    found = baselines(x + 2.0, a, b, x, x_test, "intensive")
    for name in ("constant shift", "linear map"):
        np.testing.assert_allclose(found[name], x_test + 2.0)
    seen = ~((b > 0) & ~(a > 0).any(axis=0)).any(axis=1)
    assert seen.any()
    np.testing.assert_allclose(found["per-element shift"][seen], (x_test + 2.0)[seen])


def test_a_line_through_equal_cheap_values_is_a_shift():
    (a, _), (b, x_test) = drawn(5, 0), drawn(TEST, 1)
    found = baselines(np.arange(5.0), a, b, np.full(5, 0.1), x_test, "intensive")
    np.testing.assert_allclose(found["linear map"], x_test + 1.9)


def test_compositions_count_atoms_by_atomic_number():
    found = compositions_of([molecule("H2O"), bulk("MgO", "rocksalt", a=4.2)])
    assert [(r.nonzero()[0].tolist(), r[r > 0].tolist()) for r in found] == [([1, 8], [2, 1]), ([8, 12], [1, 1])]
    assert unlabelled(found[:1], found[1:]) == ["Mg"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": [1.0, np.nan]}, "labels are not finite in 1 structures"),
        ({"labels": [1.0]}, r"labels are of shape \(1,\)"),
        ({"cheap": [1.0, 2.0]}, "or for none"),
        ({"cheap": [1.0, 2.0], "test_cheap": [1.0]}, "cheap values of test structures are of shape"),
        ({"labels": [], "compositions": np.zeros((0, 2))}, "need a label at least"),
        ({"kind": "per-atom"}, "must be extensive or intensive"),
        ({"test_compositions": np.zeros((2, 2))}, "no atoms"),
    ],
)
def test_what_cannot_be_fitted_is_said(changes, message):
    given = {"labels": [1.0, 2.0], "compositions": np.eye(2), "test_compositions": np.eye(2), **changes}
    with pytest.raises(tm.InputError, match=message):
        baselines(**given)


def test_it_works_on_structures():
    structures = [Atoms("CuAu", [[0, 0, 0], [2, 0, 0]]), Atoms("Cu"), Atoms("Au2", [[0, 0, 0], [2, 0, 0]])]
    a = compositions_of(structures)
    found = baselines([-7.0, -3.0, -8.0], a, a)
    np.testing.assert_allclose(found["per-element fit"], [-7.0, -3.0, -8.0])


def test_the_zero_of_a_property_changes_no_error():
    (a, _), (b, _) = drawn(N, 0), drawn(TEST, 1)
    a[:, 3] = 0  # an element of the tests that no label has
    labels = a @ SHIFTS / a.sum(axis=1)
    found, moved = (baselines(labels + zero, a, b, kind="intensive")["per-element fit"] for zero in (0.0, 100.0))
    np.testing.assert_allclose(moved - 100.0, found, atol=1e-9)

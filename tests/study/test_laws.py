"""Laws are found exactly where there is no noise, and intervals hold the truth as often as they say."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.learning_curves import SIZES, seeds, two_arms, width
from transfermium.errors import InputError
from transfermium.study.forms import BREAK
from transfermium.study.laws import fit, fits, surfaces
from transfermium.study.savings import factors

LAWS: dict[str, tuple[np.ndarray, dict[str, float]]] = {
    "power": (3 * SIZES**-0.5, {"A": 3.0, "a": 0.5}),
    "floor": (0.2 + 3 * SIZES**-0.7, {"C": 0.2, "A": 3.0, "a": 0.7}),
    "broken": (
        2 * SIZES**-0.2 * (1 + (SIZES / 70) ** (1 / BREAK)) ** (-0.6 * BREAK),
        {"A": 2.0, "a": 0.2, "b": 0.8, "n_b": 70.0},
    ),
}


# ------------------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("form", LAWS)
def test_a_law_without_noise_is_found_exactly_and_chosen(form: str) -> None:
    errors, parameters = LAWS[form]
    found = fit(SIZES, np.outer([0.9, 1.0, 1 / 0.9], errors))  # seeds that differ by a factor have the same law
    assert found.form == form
    assert found.parameters == pytest.approx(parameters, rel=1e-5)
    assert found.predict(SIZES) == pytest.approx(errors, rel=1e-6)
    assert found.exponent == pytest.approx([parameters["b" if form == "broken" else "a"]] * 3, rel=1e-5)
    assert found.inverse(float(found.predict(50)[0])).value == pytest.approx(50, rel=1e-4)
    left = 5 - len(parameters)
    assert found.extrapolation == pytest.approx(0.0, abs=1e-5) if left > 0 else math.isnan(found.extrapolation)


def test_the_law_of_one_seed_is_found_but_has_no_interval() -> None:
    found = fit(SIZES, LAWS["power"][0])
    assert found.parameters == pytest.approx({"A": 3.0, "a": 0.5})
    assert found.exponent == pytest.approx((0.5, -math.inf, math.inf))
    assert str(found.inverse(0.3)) == "100 (without bounds)"


def test_few_sizes_allow_few_laws() -> None:
    def forms(n: int) -> set[str]:
        return {law.form for law in fits(SIZES[:n], np.outer([1.0, 1.1, 1.2], LAWS["power"][0][:n]))}

    assert forms(3) == {"interpolation"}
    assert forms(4) == forms(5) == {"power", "interpolation"}
    assert forms(6) == {"power", "floor", "broken", "interpolation"}


def test_a_curve_that_no_law_describes_is_interpolated() -> None:
    errors = np.array([2.0, 1.95, 0.9, 0.88, 0.3, 0.29]) * np.array([[0.99], [1.0], [1.01]])
    found = fit(SIZES, errors * np.exp(0.003 * np.random.default_rng(0).normal(size=errors.shape)))
    assert found.form == "interpolation"
    assert found.predict(SIZES) == pytest.approx(errors.mean(axis=0), rel=0.01)
    with pytest.raises(InputError, match="no exponent"):
        _ = found.exponent


def test_interpolation_is_straight_in_logarithms_and_never_rises() -> None:
    found = fit([10, 40, 160], [1.0, 0.5, 0.25])
    assert found.predict([20, 80]) == pytest.approx([math.sqrt(0.5), math.sqrt(0.125)])
    assert np.isnan(found.predict([5, 200])).all()
    assert str(found.inverse(0.1)) == "more than 160 (without bounds)"

    risen = fit([10, 40, 160], [1.0, 0.4, 0.9])
    assert risen.predict([10, 40, 160]) == pytest.approx([1.0, 0.6, 0.6])


def test_a_run_that_diverged_does_not_bend_the_curve_but_widens_the_interval() -> None:
    errors = seeds(3, 3.0, 0.5, np.random.default_rng(1), scatter=0.02)
    spoilt = errors.copy()
    spoilt[1, -1] *= 5
    clean, found = fit(SIZES, errors, "power"), fit(SIZES, spoilt, "power")
    squares = -np.polyfit(np.log(SIZES), np.log(spoilt).mean(axis=0), 1)[0]
    assert abs(squares - clean.parameters["a"]) > 0.1
    assert abs(found.parameters["a"] - clean.parameters["a"]) < 0.02
    assert width(found.exponent) > 3 * width(clean.exponent)


def test_what_is_left_out_is_predicted() -> None:
    errors = LAWS["power"][0].copy()
    errors[-1] /= 2  # better than the law
    assert fit(SIZES, errors, "power").extrapolation == pytest.approx(1.0)


def test_laws_of_both_sizes_without_noise_are_found_exactly() -> None:
    n, m = (each.ravel() for each in np.meshgrid(SIZES, [100, 300, 1000, 3000], indexing="ij"))
    seed = np.array([[0.9], [1.0], [1 / 0.9]])
    added, *_ = surfaces(n, m, seed * (0.02 + 2 * n**-0.5 + 3 * m**-0.6))
    assert added.form == "sum"
    assert added.parameters == pytest.approx({"C": 0.02, "A": 2.0, "a": 0.5, "B": 3.0, "b": 0.6}, rel=1e-4)

    m[m == 100] = 0  # from scratch
    multiplied, *others = surfaces(n, m, seed * 2 * n**-0.5 * (1 + m / 500) ** -0.3)
    assert not others
    assert multiplied.parameters == pytest.approx({"A": 2.0, "a": 0.5, "b": 0.3, "n_0": 500.0}, rel=1e-4)
    assert multiplied.inverse(0.2, 0).value == pytest.approx(100, rel=1e-4)
    assert multiplied.extrapolation == pytest.approx(0.0, abs=1e-5)


# ------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("n_seeds", [3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(n_seeds: int) -> None:
    held: dict[str, list[bool]] = {"exponent": [], "factor": [], "labels": [], "by the normal law": []}
    for seed in range(300):
        transfer, scratch = two_arms(n_seeds, seed)
        exponent = transfer.exponent
        held["exponent"].append(not exponent.excludes(0.35))
        held["factor"].append(
            not factors(transfer, scratch, [80])[0].excludes((3.0 / (1.2 * 80**-0.35)) ** (1 / 0.45) / 80)
        )
        held["labels"].append(not transfer.inverse(1.2 * 120**-0.35).excludes(120))
        shrunk = (exponent.high - exponent.value) * 1.96 / {3: 4.303, 5: 2.776}[n_seeds]
        held["by the normal law"].append(abs(exponent.value - 0.35) <= shrunk)
    wrong = np.mean(held.pop("by the normal law"))
    for name, each in held.items():
        assert 0.91 <= np.mean(each) <= 0.99, name
    assert wrong < 0.91  # so the test can fail


@pytest.mark.parametrize(("floor", "n_seeds"), [(0.1, 3), (0.1, 5), (0.0, 3), (0.0, 5)])
def test_four_sizes_that_cannot_show_a_floor_do_not_hide_it(floor: float, n_seeds: int) -> None:
    sizes, rng, held = SIZES[:4], np.random.default_rng(0), []
    for _ in range(200):
        noise = [0.04 * (rng.normal(size=(n_seeds, 1)) + rng.normal(size=(n_seeds, 4))) for _ in range(2)]
        transfer, scratch = (
            fit(sizes, (floor + A * sizes**-0.7) * np.exp(own)) for A, own in zip((0.6, 1.0), noise, strict=True)
        )
        held.append([not factor.excludes(0.6 ** (-1 / 0.7)) for factor in factors(transfer, scratch)])
    assert (np.mean(held, axis=0) > 0.87).all()  # at each size; power laws alone have 0.7 at the largest
    assert 0.91 <= np.mean(held) <= 0.99


def test_a_seed_is_one_observation_however_many_sizes_it_has() -> None:
    rng = np.random.default_rng(0)
    many = np.unique(np.geomspace(10, 320, 60).astype(int))
    offsets = np.array([[-0.1], [0.0], [0.1]])
    found = [
        fit(n, 2 * n**-0.5 * np.exp(offsets + 1e-3 * rng.normal(size=(3, len(n)))), "power") for n in (SIZES, many)
    ]
    few, dense = (width(law.inverse(0.2)) for law in found)
    assert dense == pytest.approx(few, rel=0.05)


def test_more_seeds_give_narrower_intervals() -> None:
    def widths(n_seeds: int) -> list[float]:
        arms = [two_arms(n_seeds, seed) for seed in range(15)]
        found = [(t.exponent, t.inverse(0.2), factors(t, s, [40])[0]) for t, s in arms]
        return [float(np.median([width(each[i]) for each in found])) for i in range(3)]

    three, five, ten = widths(3), widths(5), widths(10)
    assert all(a > b > c for a, b, c in zip(three, five, ten, strict=True))


def test_other_test_materials_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    cells = seeds(3, 2.0, 0.5, rng)
    easy, hard = (np.exp(spread * rng.normal(size=40)) for spread in (0.01, 1.0))
    widths = [width(fit(SIZES, cells[..., None] * each, "power").inverse(0.2)) for each in (easy, hard)]
    assert widths[1] > 1.5 * widths[0]

    apart, together = (
        fit(SIZES, cells[..., None] * np.repeat(hard, 4), "power", groups=groups)
        for groups in (None, np.repeat(np.arange(40), 4))
    )
    assert width(together.inverse(0.2)) == pytest.approx(widths[1])  # copies of a material tell nothing new
    assert width(apart.inverse(0.2)) < width(together.inverse(0.2))


def test_rivals_share_the_interval() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        best, *others = fits(SIZES, seeds(3, 3.0, 0.5, rng, scatter=0.1))
        if best.rivals:
            break
    assert best.rivals == tuple(law for law in others if law.aicc <= best.aicc + 2 and law.weights)
    for law in (best, *best.rivals):
        own = law.interval("b" if law.form == "broken" else "a")
        assert best.exponent.low <= own.low and own.high <= best.exponent.high


def test_a_curve_too_flat_to_cross_has_no_end() -> None:
    flat = fit(SIZES, seeds(3, 1.0, 0.0, np.random.default_rng(0)), "power")
    assert flat.inverse(0.99)[1:3] == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit([10], [[1.0]]), "at least two"),
        (lambda: fit([20, 10], [1.0, 2.0]), "ascending"),
        (lambda: fit([10, 20], [1.0, 2.0, 3.0]), "2 sizes, but errors at 3"),
        (lambda: fit([10, 20], [[1.0, 2.0], [1.0, 0.0]]), "seed 1 at size 1 is 0.0"),
        (lambda: fit([10, 20], [[1.0, math.nan]]), "seed 0 at size 1 is nan"),
        (lambda: fit([10, 20], 1.0), "no curve"),
        (lambda: fit([10, 20], [1.0, 2.0], "exponential"), "no law 'exponential'"),
        (lambda: fit([10, 20], [1.0, 2.0], "power"), "2 parameters, too many for 2 sizes"),
        (lambda: fit([10, 20], np.ones((2, 2, 3)), groups=["a"]), "1 groups for 3 structures"),
        (lambda: fit([10, 20], np.ones((2, 2, 1))), "one test material"),
        (lambda: fit(SIZES, SIZES**-0.5).inverse(0.0), "never reached"),
        (lambda: fit(SIZES, SIZES**-0.5).predict(10, 20), "no number of pre-training structures"),
        (lambda: surfaces([10, 20], [0, 0], [1.0, 1.0]), "four numbers of labels"),
        (lambda: surfaces([10, 20], [0], [1.0, 1.0]), "make no surface"),
    ],
)
def test_what_cannot_be_told_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_an_exponent_at_the_end_of_what_is_allowed_has_no_interval():
    n, m = (each.ravel() for each in np.meshgrid([10, 20, 40, 80], [30, 60, 120]))
    grows = np.log(n**-0.4 * m**0.2)[None] + 0.01 * np.random.default_rng(0).normal(size=(3, len(n)))
    (law,) = surfaces(n, m, np.exp(grows), forms=["sum"])
    assert law.parameters["b"] in (pytest.approx(0.02), pytest.approx(5.0))
    recorded = law.record()["ci"]
    assert np.isnan(recorded["b"]).all()
    assert recorded["a"][0] < 0.4 < recorded["a"][1]

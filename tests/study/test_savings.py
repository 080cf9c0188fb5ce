"""What an arm saves is exact without noise, one where arms are equal, and refused where it would be guessed."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests.learning_curves import SIZES, seeds, two_arms, width
from transfermium.errors import InputError
from transfermium.study.laws import Estimate, fit
from transfermium.study.savings import answer, factors, ratio, saved, scarce, slopes, verdict


def test_factors_without_noise_are_exact() -> None:
    seed = np.array([[0.9], [1.1]])
    transfer, scratch = fit(SIZES, seed * SIZES**-0.5), fit(SIZES, seed * 1.5 * SIZES**-0.5)
    for factor in factors(transfer, scratch):
        assert factor[:3] == pytest.approx((2.25,) * 3)
    assert saved(factors(transfer, scratch)[0], 10, cost=8.0)[:3] == pytest.approx((100.0,) * 3)
    assert ratio(transfer, scratch) == pytest.approx((1 / 1.5,) * 3)


def test_identical_arms_have_the_factor_one() -> None:
    rng = np.random.default_rng(0)
    one, other = (fit(SIZES, seeds(3, 3.0, 0.5, rng)) for _ in range(2))
    assert not any(factor.excludes(1.0) for factor in factors(one, other))
    assert [factor.value for factor in factors(one, one)] == pytest.approx([1.0] * 6)
    assert slopes(one, other, 1e-6).answer == "not clear"

    flat = fit([10, 20, 40, 80], [[1.0, 0.9, 0.95, 0.5], [1.1, 1.0, 1.0, 0.6]], "interpolation")
    assert not any(factor.excludes(1.0) for factor in factors(flat, flat))  # also where it is pooled


def test_a_worse_arm_has_a_factor_below_one() -> None:
    transfer, scratch = two_arms(3)
    for factor in factors(scratch, transfer):
        assert factor.value < 1 and factor.high < 1


def test_what_both_arms_share_cancels() -> None:
    rng = np.random.default_rng(0)
    both, materials = rng.normal(size=(4, 1)), np.exp(rng.normal(size=60))
    arms = [seeds(4, A, 0.5, rng, both)[..., None] * materials for A in (1.0, 2.0)]
    transfer, scratch = (fit(SIZES, errors, "power") for errors in arms)
    assert not factors(transfer, scratch, [40])[0].excludes(4.0)
    assert width(factors(transfer, scratch, [40])[0]) < 0.3 * width(transfer.inverse(float(transfer.predict(40)[0])))


def test_units_of_the_error_change_nothing_but_its_size() -> None:
    rng = np.random.default_rng(0)
    errors, others = seeds(3, 1.2, 0.35, rng), seeds(3, 3.0, 0.45, rng)
    before = fit(SIZES, errors), fit(SIZES, others)
    after = fit(SIZES, 1000 * errors), fit(SIZES, 1000 * others)
    assert after[0].exponent == pytest.approx(before[0].exponent, rel=1e-6)
    assert after[0].inverse(200) == pytest.approx(before[0].inverse(0.2), rel=1e-6)
    for scaled, factor in zip(factors(*after), factors(*before), strict=True):
        assert scaled == pytest.approx(factor, rel=1e-6)


def test_nothing_is_told_far_beyond_the_data() -> None:
    transfer, scratch = two_arms(3)
    far = transfer.inverse(float(transfer.predict(5_000)[0]))
    assert far.value == math.inf and far.most == pytest.approx(1280)
    assert str(far).startswith("more than 1,280")
    assert not far.excludes(5_000.0) and far.excludes(20.0)
    assert transfer.inverse(float(transfer.predict(1_000)[0])).value == pytest.approx(1_000, rel=1e-3)
    assert str(transfer.inverse(100.0)) == "less than 2.5"
    with pytest.raises(InputError, match=r"from 2.5 to 1,280"):
        factors(transfer, scratch, [2_000])


def test_slopes_are_equal_within_the_margin_differ_or_are_not_clear() -> None:
    rng = np.random.default_rng(0)
    arms = {a: fit(SIZES, seeds(5, 1.0, a, rng, scatter=0.01), "power") for a in (0.5, 0.505, 0.7)}
    assert slopes(arms[0.5], arms[0.505], margin=0.05).answer == "equal"
    assert slopes(arms[0.5], arms[0.7], margin=0.05).answer == "differ"
    assert slopes(arms[0.5], arms[0.505], margin=0.001).answer == "not clear"
    assert slopes(arms[0.7], arms[0.5], 0.05).difference.value == pytest.approx(0.2, abs=0.02)


def test_the_verdict_is_one_sentence() -> None:
    transfer, scratch = two_arms(5)
    helps = verdict(transfer, scratch, target=0.2, unit="eV", cost=12)
    assert helps.startswith("Pre-training helps (errors 0.")
    assert " hours; 0.2 eV takes " in helps
    assert "from scratch_long" in verdict(transfer, scratch, against="scratch_long")
    assert verdict(scratch, transfer).startswith("Pre-training does not help here, it makes errors larger")
    assert verdict(scratch, scratch).startswith("Pre-training does not help here (")
    rng = np.random.default_rng(0)
    one, other = (fit(SIZES, seeds(3, 3.0, 0.5, rng, scatter=0.2)) for _ in range(2))
    assert verdict(one, other).startswith("It is not clear whether pre-training helps")
    alone = [fit(SIZES, np.exp(arm.logs[:1])) for arm in (transfer, scratch)]
    assert verdict(*alone).endswith("one seed gives no interval).")


def test_what_helps_at_few_labels_and_hurts_at_many_is_told_to_do_both() -> None:
    rng = np.random.default_rng(0)
    flat, steep = (fit(SIZES, seeds(4, A, a, rng, scatter=0.01)) for A, a in ((1.0, 0.2), (5.0, 0.6)))
    assert not ratio(flat, steep).excludes(1.0)
    assert answer(flat, steep) == answer(steep, flat) == "both"
    told = verdict(flat, steep, cost=2.0)
    few, many = factors(flat, steep, [10, 320])
    assert told.startswith(f"Pre-training helps with 10 labels, worth {few} times as many from scratch, and hurts with")
    assert f"320, worth {many} times" in told
    assert f"10 labels save {saved(few, 10, 2.0)} hours" in told
    assert verdict(steep, flat).startswith("Pre-training helps with 320 labels")


def test_hours_are_told_where_most_are_saved_for_certain() -> None:
    sizes, rng = SIZES[:3], np.random.default_rng(0)
    good, bad = (fit(sizes, seeds(3, A, 0.5, rng, sizes=sizes)) for A in (0.3, 3.0))
    told = verdict(good, bad, cost=3.0)  # at 40 labels scratch ends too: more than one
    assert "10 labels are worth more than 4 times as many from scratch and 20 labels more than 2; " in told
    assert "10 labels save more than 90 hours" in told
    fewer = fit(sizes[1:], np.exp(good.logs[:, 1:])), fit(sizes[:2], np.exp(bad.logs[:, :2]))
    assert "20 labels are worth more than 1 times as many from scratch." in verdict(*fewer, cost=3.0)


def test_what_there_is_too_little_of_is_named() -> None:
    rng, sizes = np.random.default_rng(0), SIZES[:4]
    cells = seeds(3, 1.0, 0.5, rng, sizes=sizes, scatter=0.01)
    kinds = np.repeat([1.0, 40.0], 6)
    arms = [fit(sizes, cells[..., None] * each, groups=[0] * 6 + [1] * 6) for each in (kinds, kinds[::-1] / 10)]
    assert scarce(*arms) == "independent test structures"
    assert "for want of independent test structures: there are 2)" in verdict(*arms)
    noisy = [fit(sizes, seeds(3, 1.0, 0.5, rng, sizes=sizes, scatter=0.3)) for _ in range(2)]
    assert scarce(*noisy) == "seeds"
    assert "for want of seeds: there are 3)" in verdict(*noisy)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: factors(two_arms(3)[0], two_arms(5)[1]), "seed by seed"),
        (lambda: ratio(fit([10, 20], [2.0, 1.0]), fit([30, 40], [2.0, 1.0])), "no size in common"),
        (lambda: slopes(*two_arms(3), margin=0.0), "nothing equal"),
        (lambda: saved(Estimate(2.0, 1.0, 3.0, 0.1, 10.0), 10, 0.0), "must cost something"),
        (lambda: saved(Estimate(2.0, 1.0, 3.0, 0.1, 10.0), 10, math.inf), "must cost something"),
    ],
)
def test_what_cannot_be_compared_is_said(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()

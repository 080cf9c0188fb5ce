"""What one arm saves against another: labels, their cost, and errors; arms are compared seed by seed."""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError
from .intervals import Interval
from .laws import Estimate, Fit, crossing, grid, half_width, half_widths, short, spanned

WORTHWHILE = 0.05  # lower errors, below which pre-training is said not to help
SEEDS, TESTS = "seeds", "independent test structures"  # what may be too few


class Slopes(NamedTuple):
    """Difference of two exponents, and "equal" (inside the margin), "differ" (outside zero) or "not clear"."""

    difference: Interval
    margin: float
    answer: str


def error_in_words(error: float, unit: str) -> str:
    return f"{short(100 * error)} % wrong" if unit == "wrong" else f"{short(error)} {unit}".strip()


def factors(transfer: Fit, scratch: Fit, sizes: ArrayLike | None = None) -> list[Estimate]:
    """Equivalent-data factor at each size: how many times the labels the other arm needs for the error of this one.

    Both arms need the same seeds in the same order, and the same test materials: what they share cancels.
    """
    sizes = np.exp(transfer.points[0]) if sizes is None else np.ravel(sizes).astype(float)
    if not ((sizes > 0.999 * transfer.least) & (sizes < 1.001 * transfer.most)).all():
        limits = f"{short(transfer.least)} to {short(transfer.most)}"
        raise InputError(f"factors at {sizes.tolist()} would be guessed: ask for sizes from {limits}")
    pairs = list(product((transfer, *transfer.rivals), (scratch, *scratch.rivals)))
    return [spanned([_factor(*pair, size) for pair in pairs]) for size in sizes.tolist()]


def saved(factor: Estimate, size: float, cost: float = 1.0) -> Estimate:
    """What the labels cost that a factor at a size saves, such as DFT hours: (factor - 1) size cost."""
    if not 0 < cost < math.inf:
        raise InputError(f"a label costs {cost}, but must cost something: give the hours of one")
    return factor.times(size * cost, -size * cost)


def slopes(first: Fit, second: Fit, margin: float, name: str = "a", other: str = "a") -> Slopes:
    """Whether two exponents are equal, within a margin that was chosen before; the same seeds for both.

    Compare fits of one form, usually the pure power law. Few seeds rarely show that slopes are equal.
    """
    if not margin > 0:
        raise InputError(f"a margin of {margin} leaves nothing equal: give a difference that is too small to matter")
    value = first.interval(name).value - second.interval(other).value
    half = float(half_width(first, first.weights[name][None], second, second.weights[other][None])[0])
    difference = Interval(value, value - half, value + half)
    if -margin < difference.low and difference.high < margin:
        return Slopes(difference, margin, "equal")
    return Slopes(difference, margin, "differ" if difference.excludes(0.0) else "not clear")


def ratio(transfer: Fit, scratch: Fit) -> Interval:
    """Geometric mean over all sizes that both arms have, and over seeds, of the error of one by that of the other."""
    own, others = _shared(transfer, scratch)
    value = float((own @ transfer.logs.mean(axis=0) - others @ scratch.logs.mean(axis=0))[0])
    half = float(half_width(transfer, own, scratch, others)[0])
    with np.errstate(over="ignore"):
        return Interval(*(float(each) for each in np.exp([value, value - half, value + half])))


def scarce(transfer: Fit, scratch: Fit) -> str:
    """What more of would narrow the interval of the ratio most: seeds, or independent test structures."""
    own, others = _shared(transfer, scratch)
    of_seeds, of_tests = half_widths(transfer, own, scratch, others)
    return TESTS if of_tests[0] > of_seeds[0] else SEEDS


def answer(transfer: Fit, scratch: Fit) -> str:
    """Whether an arm "helps" or "hurts" over all sizes, or the one at few labels and the other at many ("both"); makes
    no difference that is worthwhile ("no"), or it is "not clear"."""
    if len(transfer.logs) < 2:
        return "not clear"
    few, many = factors(transfer, scratch, _ends(transfer))
    if (few.low > 1 and many.high < 1) or (few.high < 1 and many.low > 1):
        return "both"
    overall = ratio(transfer, scratch)
    if overall.high < 1:
        return "helps"
    if overall.low > 1:
        return "hurts"
    return "no" if overall.low > 1 - WORTHWHILE else "not clear"


def verdict(
    transfer: Fit,
    scratch: Fit,
    *,
    target: float | None = None,
    unit: str = "",
    cost: float | None = None,
    what: str = "Pre-training",
    against: str = "scratch",
) -> str:
    """Whether pre-training helped and what it saved, in one sentence.

    It helped where the ratio of errors over all sizes lies below one with its whole interval. It did not where that
    interval leaves no room for errors lower by 5 %. Where a label is worth more than one at one end of the curve and
    less at the other, each with its whole interval, both are said.

    Args:
        target: an error to reach, and its `unit`.
        cost: hours of one label.
        what: the first words of the sentence.
        against: the name of the other arm.
    """
    overall, found = ratio(transfer, scratch), answer(transfer, scratch)
    numbers = f"errors {short(overall.value)} times those from {against}"
    if len(transfer.logs) > 1:
        numbers += f", {short(overall.low)} to {short(overall.high)}"
    if found == "not clear":
        lack = scarce(transfer, scratch)
        many = transfer.n_groups if lack == TESTS else len(transfer.logs)
        why = f"mostly for want of {lack}: there are {many}" if many > 1 else "but one seed gives no interval"
        return f"It is not clear whether {what[0].lower()}{what[1:]} helps ({numbers}, {why})."
    said = {
        "helps": f"{what} helps",
        "hurts": f"{what} does not help here, it makes errors larger",
        "no": f"{what} does not help here",
        "both": f"{what} {_on_both_ends(transfer, scratch, against)}",
    }[found]
    parts = [_worth(transfer, scratch, against)] if found == "helps" else []
    if found in ("helps", "both") and cost is not None and (most := _most_saved(transfer, scratch, cost)):
        parts.append(most)
    if target is not None:
        error = error_in_words(target, unit)
        parts.append(f"{error} takes {transfer.inverse(target)} labels instead of {scratch.inverse(target)}")
    return f"{said} ({numbers}){': ' if parts else ''}{'; '.join(parts)}."


def _worth(transfer: Fit, scratch: Fit, against: str) -> str:
    """What a label is worth at the ends of the curve, without "more than one", which is all that is known where the
    other curve ends too."""
    sizes = np.exp(transfer.points[0]).tolist()
    found = zip(sizes, factors(transfer, scratch), strict=True)
    few, *more = [(n, f) for n, f in found if n == sizes[0] or f.value < math.inf or f.most > 1.001]
    said = f"{short(few[0])} labels are worth {few[1]} times as many from {against}"
    return f"{said} and {short(more[-1][0])} labels {more[-1][1]}" if more else said


def _on_both_ends(transfer: Fit, scratch: Fit, against: str) -> str:
    ends = _ends(transfer)
    worth = factors(transfer, scratch, ends)
    helps, hurts = sorted(zip(ends, worth, strict=True), key=lambda end: end[1].low, reverse=True)
    return (
        f"helps with {short(helps[0])} labels, worth {helps[1]} times as many from {against}, and hurts with "
        f"{short(hurts[0])}, worth {hurts[1]} times as many"
    )


def _most_saved(transfer: Fit, scratch: Fit, cost: float) -> str:
    """The hours at the size where most are saved for certain."""
    sizes = np.exp(transfer.points[0]).tolist()
    found = [saved(factor, n, cost) for n, factor in zip(sizes, factors(transfer, scratch), strict=True)]
    certain = [min(each.low, each.most) for each in found]
    best = int(np.argmax(certain))
    return f"{short(sizes[best])} labels save {found[best]} hours" if certain[best] > 1e-6 * cost else ""


def _ends(fit: Fit) -> list[float]:
    return [float(each) for each in np.exp(fit.points[0])[[0, -1]]]


def _shared(transfer: Fit, scratch: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the cells of both arms, whose sums are the means over the sizes that both have."""
    shared = np.intersect1d(transfer.points[0], scratch.points[0])
    if not len(shared):
        raise InputError("the arms have no size in common: compare them at the same numbers of labels")
    own, others = (np.isin(arm.points[0], shared)[None] / len(shared) for arm in (transfer, scratch))
    return own, others


def _factor(transfer: Fit, scratch: Fit, size: float) -> Estimate:
    n = grid(scratch)
    values, weights = scratch.curve(np.log(n)[None])
    value, at = transfer.curve(np.log([[size]]))
    half = half_width(scratch, weights, transfer, np.repeat(at, len(n), axis=0))
    return crossing(n, values - value, half).times(1 / size)

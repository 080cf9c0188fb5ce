"""What one arm saves against another: labels, their cost, and errors; arms are compared seed by seed."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError
from .intervals import Interval
from .laws import Estimate, Fit, crossing, grid, half_width, short, spanned

WORTHWHILE = 0.05  # lower errors, below which pre-training is said not to help


class Slopes(NamedTuple):
    """Difference of two exponents, and "equal" (inside the margin), "differ" (outside zero) or "not clear"."""

    difference: Interval
    margin: float
    answer: str


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
    if not cost > 0:
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
    shared = np.intersect1d(transfer.points[0], scratch.points[0])
    if not len(shared):
        raise InputError("the arms have no size in common: compare them at the same numbers of labels")
    own, others = (np.isin(arm.points[0], shared)[None] / len(shared) for arm in (transfer, scratch))
    value = float((own @ transfer.logs.mean(axis=0) - others @ scratch.logs.mean(axis=0))[0])
    half = float(half_width(transfer, own, scratch, others)[0])
    with np.errstate(over="ignore"):
        return Interval(*(float(each) for each in np.exp([value, value - half, value + half])))


def verdict(
    transfer: Fit,
    scratch: Fit,
    *,
    target: float | None = None,
    unit: str = "",
    cost: float | None = None,
    what: str = "Pre-training",
) -> str:
    """Whether pre-training helped and what it saved, in one sentence.

    It helped where the ratio of errors over all sizes lies below one with its whole interval. It did not where that
    interval leaves no room for errors lower by 5 %.

    Args:
        target: an error to reach, and its `unit`.
        cost: hours of one label.
        what: the first words of the sentence.
    """
    overall = ratio(transfer, scratch)
    numbers = f"errors {short(overall.value)} times those from scratch"
    unclear = f"It is not clear whether {what[0].lower()}{what[1:]} helps"
    if len(transfer.logs) < 2:
        return f"{unclear} ({numbers}, but one seed gives no interval)."
    numbers += f", {short(overall.low)} to {short(overall.high)}"
    if overall.high < 1:
        said = f"{what} helps"
    elif overall.low > 1:
        said = f"{what} does not help here, it makes errors larger"
    elif overall.low > 1 - WORTHWHILE:
        said = f"{what} does not help here"
    else:
        return f"{unclear} ({numbers})."
    parts = []
    if overall.high < 1:
        sizes = np.exp(transfer.points[0])[[0, -1]].tolist()
        few, many = factors(transfer, scratch, sizes)
        worth = (
            f"{short(sizes[0])} labels are worth {few} times as many from scratch and {short(sizes[1])} labels {many}"
        )
        if cost is not None and many.low > 1:
            worth += f", which saves {saved(many, sizes[1], cost)} hours"
        parts.append(worth)
    if target is not None:
        error = f"{short(target)} {unit}".strip()
        parts.append(f"{error} takes {transfer.inverse(target)} labels instead of {scratch.inverse(target)}")
    return f"{said} ({numbers}){': ' if parts else ''}{'; '.join(parts)}."


def _factor(transfer: Fit, scratch: Fit, size: float) -> Estimate:
    n = grid(scratch)
    values, weights = scratch.curve(np.log(n)[None])
    value, at = transfer.curve(np.log([[size]]))
    half = half_width(scratch, weights, transfer, np.repeat(at, len(n), axis=0))
    return crossing(n, values - value, half).times(1 / size)

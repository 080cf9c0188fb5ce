"""Learning curves: the law behind them, what one arm saves against another, and how sure that is.

Every seed gives one curve, and its cells are correlated: they share a draw of labels and of weights. So a seed is one
observation, never its cells. A fit is linearised once, at its solution; then all that is asked of a curve, an exponent
or the log error at some n, is a weighted sum of the log errors of each seed, and Student's t over these sums holds for
few seeds whatever the correlation within a seed. Numbers of labels have no such sum. Their interval is that of Fieller:
all n at which the t test does not tell the curve from the target error, or from the other arm; it is as wide as it has
to be, without end where the curve is too flat to cross. Test materials are the same for all seeds, so their part is
added: drawn again with replacement, both arms alike, the standard deviation in quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression, nnls
from scipy.special import expit, logsumexp, softmax, stdtrit

from ..errors import InputError
from .intervals import Interval

INTERPOLATION = "interpolation"
BEYOND = 4.0  # times the largest size: further than that, nothing is said
WORTHWHILE = 0.05  # lower errors, below which pre-training is said not to help
GRID = 512  # numbers of labels on which a curve is searched for an error
BREAK = 0.5 * math.log(2)  # width of a break in log n: it takes about a doubling
RIVAL = 2.0  # difference of AICc below which two laws are about as likely
RESAMPLES = 1_000
ROUNDING = 1e-12

Curve = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Estimate(NamedTuple):
    """A value and its interval, told between two limits only: -inf is less than `least`, inf is more than `most`."""

    value: float
    low: float
    high: float
    least: float
    most: float

    def excludes(self, value: float) -> bool:
        told = -math.inf if value < self.least else math.inf if value > self.most else value
        return not self.low <= told <= self.high

    def times(self, factor: float, offset: float = 0.0) -> Estimate:
        """All of it times a positive factor, plus an offset."""
        return Estimate(*(factor * each + offset for each in self))

    def __str__(self) -> str:
        if self.low == -math.inf and self.high == math.inf:
            return f"{self._text(self.value)} (without bounds)"
        if self.low == math.inf or self.high == -math.inf:
            return self._text(self.value)
        return f"{self._text(self.value)} ({self._text(self.low)} to {self._text(self.high)})"

    def _text(self, value: float) -> str:
        if math.isinf(value):
            return f"more than {_short(self.most)}" if value > 0 else f"less than {_short(self.least)}"
        return _short(value)


class Slopes(NamedTuple):
    """Difference of two exponents, and "equal" (inside the margin), "differ" (outside zero) or "not clear"."""

    difference: Interval
    margin: float
    answer: str


@dataclass(frozen=True, eq=False)
class Fit:
    """A law through the log errors of all seeds.

    `form` is "power", "floor", "broken", "interpolation", "sum" or "product"; `parameters` are those of the
    formula of the form (see `fits` and `surfaces`); no number of labels is told outside of `least` and `most`.
    """

    form: str
    parameters: dict[str, float]
    aicc: float
    least: float
    most: float
    confidence: float
    points: np.ndarray  # log sizes, (1, n_points), of surfaces (2, n_points)
    logs: np.ndarray  # log errors, (n_seeds, n_points)
    draws: np.ndarray  # changes of their mean over seeds with other test materials, (n_resamples, n_points)
    n_groups: int
    curve: Curve  # points -> log errors (n,), and their weights on the cells of a seed (n, n_points)
    weights: dict[str, np.ndarray]  # of each exponent, (n_points,)
    rivals: tuple[Fit, ...] = ()  # laws about as likely as this one, the likeliest: its intervals span theirs

    def predict(self, n: ArrayLike, n_pretraining: ArrayLike | None = None) -> np.ndarray:
        """Errors at numbers of labels, for surfaces also of pre-training structures; interpolation knows none outside
        of its sizes (NaN)."""
        return np.exp(self.curve(self._at(n, n_pretraining))[0])

    def band(self, n: ArrayLike, n_pretraining: ArrayLike | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bounds of the errors at numbers of labels, each for itself."""
        values, weights = self.curve(self._at(n, n_pretraining))
        half = _half_width(self, weights)
        return np.exp(values - half), np.exp(values + half)

    def inverse(self, error: float, n_pretraining: float | None = None) -> Estimate:
        """Labels that are needed for an error, with all n whose error may as well be this one."""
        if not error > 0:
            raise InputError(f"an error of {error} is never reached: ask for one above zero")
        return _spanned([law._inverse(math.log(error), n_pretraining) for law in (self, *self.rivals)])

    def _inverse(self, log_error: float, n_pretraining: float | None) -> Estimate:
        n = _grid(self)
        values, weights = self.curve(self._at(n, None if n_pretraining is None else np.full(len(n), n_pretraining)))
        return _crossing(n, values - log_error, _half_width(self, weights))

    @property
    def exponent(self) -> Interval:
        """How fast the error falls at the largest sizes: b of a broken law, a of the others."""
        found = [law.interval("b" if law.form == "broken" else "a") for law in (self, *self.rivals)]
        return Interval(found[0].value, min(each.low for each in found), max(each.high for each in found))

    def interval(self, name: str) -> Interval:
        """An exponent with its interval, were this the law."""
        if name not in self.weights:
            raise InputError(f"{self.form} has no exponent '{name}': it takes at least {FORMS['power'].sizes} sizes")
        half = float(_half_width(self, self.weights[name][None])[0])
        value = self.parameters[name]
        return Interval(value, value - half, value + half)

    @cached_property
    def extrapolation(self) -> float:
        """Predicted over measured error at the largest size, minus one, when that size is left out of the fit.

        NaN where fewer sizes than parameters and one would be left.
        """
        left = self.points[0] < self.points[0].max()
        if self.form == INTERPOLATION or left.sum() <= len(self.parameters):
            return math.nan
        theta = _solved(FORMS[self.form], self.points[:, left], self.logs[:, left])
        predicted = FORMS[self.form].law(theta[None], self.points[:, ~left])[0][0]
        return math.expm1(float((predicted - self.logs[:, ~left].mean(axis=0)).mean()))

    def record(self) -> dict[str, Any]:
        """What a results file keeps."""
        exponents = {name: list(self.interval(name)[1:]) for name in self.weights}
        return {
            "form": self.form,
            "parameters": self.parameters,
            "ci": exponents,
            "aicc": self.aicc,
            "extrapolation": self.extrapolation,
        }

    def _at(self, n: ArrayLike, n_pretraining: ArrayLike | None) -> np.ndarray:
        if (n_pretraining is None) != (len(self.points) == 1):
            needs = "needs" if n_pretraining is None else "has no"
            raise InputError(f"{self.form} {needs} number of pre-training structures: give it for surfaces only")
        with np.errstate(divide="ignore"):
            return np.log([np.ravel(each).astype(float) for each in (n, n_pretraining) if each is not None])


def fits(
    sizes: ArrayLike,
    errors: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    forms: Sequence[str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Fit]:
    """Fit all laws that so many sizes allow, the likeliest by AICc first.

    "power" is A n^-a (from four sizes on); "floor" C + A n^-a with C >= 0, and "broken" A n^-a up to n_b and then
    ~ n^-b (from six sizes on). They minimise a Huber loss of the log errors from many starts; a Huber loss counts cells
    beyond two standard deviations linearly, so that one run that diverged does not bend a curve. It does widen the
    intervals, which see all there is. AICc is that of normal log errors of which those of a seed are correlated alike.

    "interpolation" joins the mean log errors by straight lines in log n. It competes with one parameter per size, and
    wins where no law describes the curve. Where more labels made it worse, neighbours are averaged until the curve
    never rises (isotonic regression): the lower envelope would follow the luckiest cells instead, and be too low.

    Laws within 2 of the least AICc are rivals of the first one, whose intervals span theirs: which of them comes first
    is chance.

    Args:
        sizes: numbers of labels in ascending order, (n_sizes,).
        errors: above zero, (n_sizes,), (n_seeds, n_sizes), or on each test structure (n_seeds, n_sizes, n_test).
        groups: the material of each test structure; without it, each is a material of its own.
        forms: names to fit, whatever the number of sizes recommends, if there are more than parameters.
        seed: of the test materials drawn; arms that are compared need the same.
    """
    sizes = np.asarray(sizes, float)
    logs, draws, n_groups = _cells(errors, groups, seed)
    if sizes.ndim != 1 or len(sizes) < 2 or not (sizes > 0).all() or not (np.diff(sizes) > 0).all():
        raise InputError(f"sizes {sizes.tolist()} make no curve: give at least two, above zero and ascending")
    if logs.shape[1] != len(sizes):
        raise InputError(f"there are {len(sizes)} sizes, but errors at {logs.shape[1]}: give one for each")
    allowed = [name for name in CURVES if len(sizes) >= FORMS[name].sizes]
    names = list(forms or [*allowed, INTERPOLATION])
    return _ranked(names, (*CURVES, INTERPOLATION), np.log(sizes)[None], logs, draws, n_groups, confidence)


def fit(sizes: ArrayLike, errors: ArrayLike, form: str | None = None, **options: Any) -> Fit:
    """The likeliest law of `fits`, or the one that is named."""
    return fits(sizes, errors, forms=None if form is None else [form], **options)[0]


def surfaces(
    n_labels: ArrayLike,
    n_pretraining: ArrayLike,
    errors: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    forms: Sequence[str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Fit]:
    """Fit laws of both numbers of structures, the likeliest by AICc first.

    "sum" is C + A n_labels^-a + B n_pretraining^-b, and needs pre-training everywhere; "product" is
    A n_labels^-a (1 + n_pretraining / n_0)^-b, and takes training from scratch as zero structures.

    Args:
        n_labels, n_pretraining: of each point, (n_points,); at least four different numbers of labels and three of
            pre-training structures.
        errors: (n_points,), (n_seeds, n_points) or (n_seeds, n_points, n_test); otherwise as in `fits`.
    """
    n, m = np.asarray(n_labels, float), np.asarray(n_pretraining, float)
    logs, draws, n_groups = _cells(errors, groups, seed)
    if not n.shape == m.shape == logs.shape[1:] or not ((n > 0).all() and (m >= 0).all()):
        raise InputError(
            f"{logs.shape[1]} errors make no surface: give a number of labels above zero and one of structures for each"
        )
    if len(np.unique(n)) < 4 or len(np.unique(m)) < 3:
        raise InputError("a surface needs four numbers of labels and three of pre-training structures: add some")
    names = list(forms or (SURFACES if (m > 0).all() else ["product"]))
    if "sum" in names and not (m > 0).all():
        raise InputError("a sum of laws has no value without pre-training: leave those points out, or fit 'product'")
    with np.errstate(divide="ignore"):
        points = np.log([n, m])
    return _ranked(names, SURFACES, points, logs, draws, n_groups, confidence)


def factors(transfer: Fit, scratch: Fit, sizes: ArrayLike | None = None) -> list[Estimate]:
    """Equivalent-data factor at each size: how many times the labels the other arm needs for the error of this one.

    Both arms need the same seeds in the same order, and the same test materials: what they share cancels.
    """
    sizes = np.exp(transfer.points[0]) if sizes is None else np.ravel(sizes).astype(float)
    if not ((sizes > 0.999 * transfer.least) & (sizes < 1.001 * transfer.most)).all():
        limits = f"{_short(transfer.least)} to {_short(transfer.most)}"
        raise InputError(f"factors at {sizes.tolist()} would be guessed: ask for sizes from {limits}")
    pairs = list(product((transfer, *transfer.rivals), (scratch, *scratch.rivals)))
    return [_spanned([_factor(*pair, size) for pair in pairs]) for size in sizes.tolist()]


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
    half = float(_half_width(first, first.weights[name][None], second, second.weights[other][None])[0])
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
    half = float(_half_width(transfer, own, scratch, others)[0])
    with np.errstate(over="ignore"):
        return Interval(*(float(each) for each in np.exp([value, value - half, value + half])))


def verdict(
    transfer: Fit, scratch: Fit, *, target: float | None = None, unit: str = "", cost: float | None = None
) -> str:
    """Whether pre-training helped and what it saved, in one sentence.

    It helped where the ratio of errors over all sizes lies below one with its whole interval. It did not where that
    interval leaves no room for errors lower by 5 %.

    Args:
        target: an error to reach, and its `unit`.
        cost: hours of one label.
    """
    overall = ratio(transfer, scratch)
    numbers = f"errors {_short(overall.value)} times those from scratch"
    if len(transfer.logs) < 2:
        return f"It is not clear whether pre-training helps ({numbers}, but one seed gives no interval)."
    numbers += f", {_short(overall.low)} to {_short(overall.high)}"
    if overall.high < 1:
        said = "Pre-training helps"
    elif overall.low > 1:
        said = "Pre-training does not help here, it makes errors larger"
    elif overall.low > 1 - WORTHWHILE:
        said = "Pre-training does not help here"
    else:
        return f"It is not clear whether pre-training helps ({numbers})."
    sizes = np.exp(transfer.points[0])[[0, -1]].tolist()
    few, many = factors(transfer, scratch, sizes)
    worth = f"{_short(sizes[0])} labels are worth {few} times as many from scratch and {_short(sizes[1])} labels {many}"
    if cost is not None and many.low > 1:
        worth += f", which saves {saved(many, sizes[1], cost)} hours"
    if target is not None:
        error = f"{_short(target)} {unit}".strip()
        worth += f"; {error} takes {transfer.inverse(target)} labels instead of {scratch.inverse(target)}"
    return f"{said} ({numbers}): {worth}."


def _factor(transfer: Fit, scratch: Fit, size: float) -> Estimate:
    n = _grid(scratch)
    values, weights = scratch.curve(np.log(n)[None])
    value, at = transfer.curve(np.log([[size]]))
    half = _half_width(scratch, weights, transfer, np.repeat(at, len(n), axis=0))
    return _crossing(n, values - value, half).times(1 / size)


def _spanned(found: Sequence[Estimate]) -> Estimate:
    """The first value, and an interval that holds all of them."""
    return found[0]._replace(low=min(each.low for each in found), high=max(each.high for each in found))


def _half_width(
    fit: Fit, weights: np.ndarray, other: Fit | None = None, others: np.ndarray | None = None
) -> np.ndarray:
    """Half of the interval of weighted sums of the cells of each seed, or of the difference of those of two arms."""
    seeds, draws = fit.logs @ weights.T, fit.draws @ weights.T
    if other is not None and others is not None:
        if len(other.logs) != len(fit.logs) or other.n_groups != fit.n_groups:
            raise InputError("arms are compared seed by seed on the same test materials: give the same to both")
        seeds, draws = seeds - other.logs @ others.T, draws - other.draws @ others.T
    if len(seeds) < 2:
        return np.full(len(weights), np.inf)
    tail = (1 + fit.confidence) / 2
    half = stdtrit(len(seeds) - 1, tail) * seeds.std(axis=0, ddof=1) / math.sqrt(len(seeds))
    if len(draws):
        half = np.hypot(half, stdtrit(fit.n_groups - 1, tail) * draws.std(axis=0))
    return np.asarray(half)


def _grid(fit: Fit) -> np.ndarray:
    """Numbers of labels on which a curve is searched; its sizes are among them, the corners of an interpolation."""
    return np.union1d(np.geomspace(fit.least, fit.most, GRID), np.exp(fit.points[0]).clip(fit.least, fit.most))


def _crossing(n: np.ndarray, above: np.ndarray, half: np.ndarray) -> Estimate:
    """Where a curve that falls reaches zero: the first n, and all n at which it may be zero."""
    down = [_first(n, above), _first(n, above - half)]
    never = _first(n[::-1], -(above + half)[::-1])  # coming from many labels, the first n that may still be too few
    high = math.inf if never == -math.inf else -math.inf if never == math.inf else never
    return Estimate(down[0], down[1], high, float(n[0]), float(n[-1]))


def _first(n: np.ndarray, values: np.ndarray) -> float:
    """The first n at which values reach zero from above: -inf if they start below, inf if never."""
    reached = values <= ROUNDING
    if not reached.any():
        return math.inf
    if values[0] < -ROUNDING:
        return -math.inf
    i = int(reached.argmax())
    if i == 0 or not math.isfinite(values[i] - values[i - 1]):
        return float(n[i])
    share = min(values[i - 1] / (values[i - 1] - values[i]), 1.0)
    return float(n[i - 1] * (n[i] / n[i - 1]) ** share)


class Form(NamedTuple):
    """A family of laws: log errors against log sizes, (1, n_points) of a curve and (2, n_points) of a surface."""

    names: tuple[str, ...]  # of the k parameters; "log A" is the logarithm of A
    sizes: int  # numbers of labels from which on it is tried
    law: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    """Parameters (starts, k) and points -> log errors (starts, n_points) and their slopes (starts, n_points, k)."""
    starts: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Points and their mean log errors -> (starts, k)."""
    bounds: Callable[[np.ndarray, np.ndarray], list[tuple[float, float]]]


def _power(theta: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    A, a = theta.T[..., None]
    x = points[0] + 0 * A
    return A - a * x, np.stack([np.ones_like(x), -x], axis=-1)


def _broken(theta: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    A, a, b, n_b = theta.T[..., None]
    x = points[0] + 0 * A
    beyond = BREAK * np.logaddexp(0, (x - n_b) / BREAK)
    slopes = [np.ones_like(x), beyond - x, -beyond, (b - a) * expit((x - n_b) / BREAK)]
    return A - a * x - (b - a) * beyond, np.stack(slopes, axis=-1)


def _sum(theta: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A constant plus a power of each size: a curve with a floor, or a surface."""
    C, *powers = theta.T[..., None]
    x = points[:, None] + 0 * C
    terms = np.stack([C + 0 * x[0], *(A - a * x for A, a, x in zip(powers[::2], powers[1::2], x, strict=True))])
    shares = softmax(terms, axis=0)
    slopes = [shares[0], *(each for share, x in zip(shares[1:], x, strict=True) for each in (share, -x * share))]
    return logsumexp(terms, axis=0), np.stack(slopes, axis=-1)


def _product(theta: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    A, a, b, n_0 = theta.T[..., None]
    x, y = points[0] + 0 * A, points[1]
    gain = np.logaddexp(0, y - n_0)
    slopes = [np.ones_like(x), -x, -gain, b * expit(y - n_0)]
    return A - a * x - b * gain, np.stack(slopes, axis=-1)


def _straight(form: str, places: np.ndarray, points: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """All but the last parameter is linear where that one is known: least squares at each of its places."""
    found = []
    for place in places:
        slopes = FORMS[form].law(np.array([[0.0, 0.0, 0.0, place]]), points)[1][0, :, :3]
        found.append([*np.linalg.lstsq(slopes, logs)[0], place])
    return np.array(found)


def _positive(points: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """The factors are linear where exponents are known: least squares of relative errors, none negative."""
    found = []
    for exponents in product((0.1, 0.3, 0.7, 1.5), repeat=len(points)):
        powers = [np.exp(-a * (x - x.mean())) for a, x in zip(exponents, points, strict=True)]
        relative = np.stack([np.ones_like(logs), *powers], axis=1) / np.exp(logs - logs.min())[:, None]
        shares = nnls(relative, np.ones_like(logs))[0]
        C, *levels = np.log(np.maximum(shares, 1e-3 * shares.max())) + logs.min()
        scaled = [level + a * x.mean() for level, a, x in zip(levels, exponents, points, strict=True)]
        found.append([C, *chain.from_iterable(zip(scaled, exponents, strict=True))])
    return np.array(found)


def _floor_and_powers(points: np.ndarray, logs: np.ndarray) -> list[tuple[float, float]]:
    nothing = logs.min() - 12  # a floor of e^-12 of the least error is none
    return [(nothing, logs.max()), *[LEVEL, FALLING] * len(points)]


LEVEL, EITHER, FALLING = (-math.inf, math.inf), (-10.0, 10.0), (0.02, 5.0)
FORMS = {
    "power": Form(
        ("log A", "a"), 4, _power,
        lambda points, logs: np.linalg.lstsq(np.stack([1 + 0 * points[0], -points[0]], axis=1), logs)[0][None],
        lambda points, logs: [LEVEL, EITHER],
    ),
    "floor": Form(("log C", "log A", "a"), 6, _sum, _positive, _floor_and_powers),
    "broken": Form(
        ("log A", "a", "b", "log n_b"), 6, _broken,
        lambda points, logs: _straight("broken", points[0, 1:-1], points, logs),
        lambda points, logs: [LEVEL, EITHER, EITHER, (points[0, 1], points[0, -2])],
    ),
    "sum": Form(("log C", "log A", "a", "log B", "b"), 4, _sum, _positive, _floor_and_powers),
    "product": Form(
        ("log A", "a", "b", "log n_0"), 4, _product,
        lambda points, logs: _straight("product", np.unique(points[1][np.isfinite(points[1])]), points, logs),
        lambda points, logs: [LEVEL, EITHER, EITHER, _around(points[1])],
    ),
}  # fmt: skip
CURVES, SURFACES = ("power", "floor", "broken"), ("sum", "product")


def _around(x: np.ndarray) -> tuple[float, float]:
    finite = x[np.isfinite(x)]
    return float(finite.min()) - math.log(BEYOND), float(finite.max()) + math.log(BEYOND)


def _ranked(
    names: Sequence[str],
    known: Sequence[str],
    points: np.ndarray,
    logs: np.ndarray,
    draws: np.ndarray,
    n_groups: int,
    confidence: float,
) -> list[Fit]:
    found = []
    for name in names:
        if name not in known:
            raise InputError(f"there is no law '{name}': choose among {', '.join(known)}")
        if name == INTERPOLATION:
            parameters, curve, weights = _interpolated(points[0], logs.mean(axis=0))
            k, least, most = len(points[0]), np.exp(points[0, 0]), np.exp(points[0, -1])
        else:
            k = len(FORMS[name].names)
            least, most = np.exp(points[0].min()) / BEYOND, np.exp(points[0].max()) * BEYOND
            if points.shape[1] <= k:
                raise InputError(f"{name} has {k} parameters, too many for {points.shape[1]} sizes: add sizes")
            parameters, curve, weights = _fitted(FORMS[name], points, logs)
        aicc = _aicc(logs - curve(points)[0], k)
        limits = float(least), float(most)
        found.append(Fit(name, parameters, aicc, *limits, confidence, points, logs, draws, n_groups, curve, weights))
    best, *others = sorted(found, key=lambda fit: fit.aicc)  # of equals, the simpler stays first
    rivals = tuple(law for law in others if law.weights and law.aicc <= best.aicc + RIVAL)
    return [replace(best, rivals=rivals if best.weights else ()), *others]


def _fitted(form: Form, points: np.ndarray, logs: np.ndarray) -> tuple[dict[str, float], Curve, dict[str, np.ndarray]]:
    """The best parameters, the curve, and what a cell moves."""
    theta = _solved(form, points, logs)
    bounds = form.bounds(points, logs.mean(axis=0))
    free = [
        not name.startswith("log") or low < value < high
        for name, value, (low, high) in zip(form.names, theta, bounds, strict=True)
    ]
    inverse = np.zeros((len(theta), points.shape[1]))
    inverse[free] = np.linalg.pinv(form.law(theta[None], points)[1][0][:, free], rcond=1e-8)

    def curve(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = form.law(theta[None], at)
        return values[0], slopes[0] @ inverse

    parameters = {
        name.removeprefix("log "): math.exp(value) if name.startswith("log") else float(value)
        for name, value in zip(form.names, theta, strict=True)
    }
    return parameters, curve, {name: inverse[i] for i, name in enumerate(form.names) if not name.startswith("log")}


def _interpolated(x: np.ndarray, logs: np.ndarray) -> tuple[dict[str, float], Curve, dict[str, np.ndarray]]:
    """Straight lines between means that never rise."""
    blocks = isotonic_regression(logs, increasing=False).blocks
    member = np.repeat(np.arange(len(blocks) - 1), np.diff(blocks))
    pooled = (member[:, None] == member) / np.bincount(member)[member]  # (n_sizes, n_sizes)

    def curve(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        between = np.stack([np.interp(at[0], x, row) for row in np.eye(len(x))], axis=1)
        between[(at[0] < x[0] - 1e-9) | (at[0] > x[-1] + 1e-9)] = np.nan
        weights = between @ pooled
        return weights @ logs, weights

    return {}, curve, {}


def _solved(form: Form, points: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Parameters with the least Huber loss; what a whole seed has in common is no outlier."""
    offsets = np.median(logs - np.median(logs, axis=0), axis=1, keepdims=True)
    logs = logs - (offsets - offsets.mean())
    means = logs.mean(axis=0)
    bounds = np.array(form.bounds(points, means)).T
    theta = _descended(form, np.clip(form.starts(points, means), *bounds), bounds, points, logs, 0.1)
    n_cells, n_fitted = logs.size, len(theta) + len(logs) - 1
    residuals = np.abs(logs - form.law(theta[None], points)[0][0])
    scale = 1.4826 * float(np.median(residuals)) * math.sqrt(n_cells / max(n_cells - n_fitted, 1))
    return _descended(form, theta[None], bounds, points, logs, max(2 * scale, 1e-9))


def _descended(
    form: Form, theta: np.ndarray, bounds: np.ndarray, points: np.ndarray, logs: np.ndarray, delta: float
) -> np.ndarray:
    """The best of several descents, all at once: Gauss-Newton steps on reweighted residuals, damped where they fail."""
    damping, done = np.full(len(theta), 1e-3), np.zeros(len(theta), bool)
    values, slopes = form.law(theta, points)
    loss = _huber(logs - values[:, None], delta)
    for _ in range(200):
        residuals = logs - values[:, None]  # (starts, n_seeds, n_points)
        weights = np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
        gradient = np.einsum("asj,ajk->ak", weights * residuals, slopes)
        curvature = np.einsum("aj,ajk,ajl->akl", weights.sum(axis=1), slopes, slopes)
        diagonal = np.einsum("akk->ak", curvature)
        diagonal += damping[:, None] * diagonal + 1e-10
        trial = np.clip(theta + np.linalg.solve(curvature, gradient[..., None])[..., 0], *bounds)
        tried, slopes_tried = form.law(trial, points)
        reached = _huber(logs - tried[:, None], delta)
        better = reached < loss
        done |= better & (loss - reached <= 1e-10 * loss)
        damping = np.where(better, damping / 5, damping * 5)
        done |= damping > 1e6
        theta, values = np.where(better[:, None], trial, theta), np.where(better[:, None], tried, values)
        slopes, loss = np.where(better[:, None, None], slopes_tried, slopes), np.minimum(loss, reached)
        if done.all():
            break
    return np.asarray(theta[loss.argmin()])


def _huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residuals)
    return np.asarray(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(axis=(1, 2)))


def _aicc(residuals: np.ndarray, k: int) -> float:
    """Normal log errors, those of a seed correlated alike; the correlation and the variance are parameters too."""
    n_seeds, n_points = residuals.shape
    n = residuals.size
    between = n_points * float(np.square(residuals.mean(axis=1)).sum())
    within = float(np.square(residuals - residuals.mean(axis=1, keepdims=True)).sum())
    tiny = 1e-16  # what rounding leaves of an exact fit
    if n_seeds == 1 or between / n_seeds < within / (n - n_seeds):
        deviance = n * math.log((within + between) / n + tiny)
    else:
        deviance = (n - n_seeds) * math.log(within / (n - n_seeds) + tiny)
        deviance += n_seeds * math.log(between / n_seeds + tiny)
    k += 1 if n_seeds == 1 else 2
    return deviance + 2 * k + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf


def _cells(errors: ArrayLike, groups: Sequence[Any] | None, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Log errors (n_seeds, n_points), how their mean over seeds changes with other test materials, and how many
    materials there are."""
    errors = np.asarray(errors, float)
    errors = errors[None] if errors.ndim == 1 else errors
    means = errors.mean(axis=2) if errors.ndim == 3 and errors.shape[2] else errors
    if means.ndim != 2 or not means.size:
        raise InputError(
            f"errors of shape {errors.shape} make no curve: give (n_seeds, n_sizes), or with n_test behind"
        )
    if not (np.isfinite(means) & (means > 0)).all():
        row, column = (int(i) for i in np.argwhere(~(np.isfinite(means) & (means > 0)))[0])
        raise InputError(f"the error of seed {row} at size {column} is {means[row, column]}: give one above zero")
    logs = np.log(means)
    if errors.ndim == 2:
        return logs, np.zeros((0, logs.shape[1])), 0
    n_test = errors.shape[2]
    if groups is not None and len(groups) != n_test:
        raise InputError(f"there are {len(groups)} groups for {n_test} structures: name the material of each")
    member = np.arange(n_test) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    counts = np.bincount(member)
    n = len(counts)
    if n < 2:
        raise InputError("one test material gives no interval: give several, or errors without test structures")
    sums = errors @ (member[:, None] == np.arange(n))  # (n_seeds, n_points, n_materials)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    changed = np.log(np.maximum(sums @ drawn.T / (drawn @ counts), 1e-300))  # (n_seeds, n_points, n_resamples)
    return logs, math.sqrt(n / (n - 1)) * (changed - logs[..., None]).mean(axis=0).T, n


def _short(value: float) -> str:
    """Three digits."""
    return f"{float(f'{value:.3g}'):,g}"

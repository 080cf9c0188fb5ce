"""Learning curves: the law behind the errors of an arm, the labels it needs, and how sure that is.

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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression
from scipy.special import stdtrit

from ..errors import InputError
from .forms import BEYOND, CURVES, FORMS, SURFACES, Form, solved
from .intervals import Interval

INTERPOLATION = "interpolation"
GRID = 512  # numbers of labels on which a curve is searched for an error
RIVAL = 2.0  # difference of AICc below which two laws are about as likely
RESAMPLES = 1_000
ROUNDING = 1e-12
UNBOUNDED = "(without bounds)"  # what is said of an estimate that nothing is known of

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
            return f"{self._text(self.value)} {UNBOUNDED}"
        if self.low == math.inf or self.high == -math.inf:
            return self._text(self.value)
        return f"{self._text(self.value)} ({self._text(self.low)} to {self._text(self.high)})"

    def _text(self, value: float) -> str:
        if math.isinf(value):
            return f"more than {short(self.most)}" if value > 0 else f"less than {short(self.least)}"
        return short(value)


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
        half = half_width(self, weights)
        return np.exp(values - half), np.exp(values + half)

    def inverse(self, error: float, n_pretraining: float | None = None) -> Estimate:
        """Labels that are needed for an error, with all n whose error may as well be this one."""
        if not error > 0:
            raise InputError(f"an error of {error} is never reached: ask for one above zero")
        return spanned([law._inverse(math.log(error), n_pretraining) for law in (self, *self.rivals)])

    def _inverse(self, log_error: float, n_pretraining: float | None) -> Estimate:
        n = grid(self)
        values, weights = self.curve(self._at(n, None if n_pretraining is None else np.full(len(n), n_pretraining)))
        return crossing(n, values - log_error, half_width(self, weights))

    @property
    def exponent(self) -> Interval:
        """How fast the error falls at the largest sizes: b of a broken law, a of the others."""
        laws = (self, *(law for law in self.rivals if law.weights))
        found = [law.interval("b" if law.form == "broken" else "a") for law in laws]
        return Interval(found[0].value, min(each.low for each in found), max(each.high for each in found))

    def interval(self, name: str) -> Interval:
        """An exponent with its interval, were this the law."""
        if name not in self.weights:
            raise InputError(f"{self.form} has no exponent '{name}': it takes at least {FORMS['power'].sizes} sizes")
        half = float(half_width(self, self.weights[name][None])[0])
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
        theta = solved(FORMS[self.form], self.points[:, left], self.logs[:, left])
        predicted = FORMS[self.form].law(theta[None], self.points[:, ~left])[0][0]
        return math.expm1(float((predicted - self.logs[:, ~left].mean(axis=0)).mean()))

    def record(self) -> dict[str, Any]:
        """What a results file keeps; exponents at the end of what a form allows have no interval there (NaN)."""
        known = {
            name: self.interval(name) if self._inside(name) else Interval(*[math.nan] * 3) for name in self.weights
        }
        exponents = {name: [found.low, found.high] for name, found in known.items()}
        return {
            "form": self.form,
            "parameters": self.parameters,
            "ci": exponents,
            "aicc": self.aicc,
            "extrapolation": self.extrapolation,
        }

    def _inside(self, name: str) -> bool:
        """Whether an exponent is found within its bounds; at one, nothing moves it, and it would look certain."""
        form = FORMS[self.form]
        low, high = form.bounds(self.points, self.logs.mean(axis=0))[form.names.index(name)]
        return low + 1e-9 < self.parameters[name] < high - 1e-9

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
    is chance. Four or five sizes hardly tell a power from a curve with a floor, and the power law is then too sure of
    itself: the interpolation is its rival whatever the AICc, and goes on beyond the sizes at its last slope.

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


def spanned(found: Sequence[Estimate]) -> Estimate:
    """The first value, and an interval that holds all of them."""
    return found[0]._replace(low=min(each.low for each in found), high=max(each.high for each in found))


def half_width(fit: Fit, weights: np.ndarray, other: Fit | None = None, others: np.ndarray | None = None) -> np.ndarray:
    """Half of the interval of weighted sums of the cells of each seed, or of the difference of those of two arms."""
    return np.hypot(*half_widths(fit, weights, other, others))


def half_widths(
    fit: Fit, weights: np.ndarray, other: Fit | None = None, others: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The parts of `half_width`: what the seeds leave open, and what the test materials do."""
    seeds, draws = fit.logs @ weights.T, fit.draws @ weights.T
    if other is not None and others is not None:
        if len(other.logs) != len(fit.logs) or other.n_groups != fit.n_groups:
            raise InputError("arms are compared seed by seed on the same test materials: give the same to both")
        seeds, draws = seeds - other.logs @ others.T, draws - other.draws @ others.T
    nothing, tail = np.zeros(len(weights)), (1 + fit.confidence) / 2
    if len(seeds) < 2:
        return nothing + np.inf, nothing
    half = stdtrit(len(seeds) - 1, tail) * seeds.std(axis=0, ddof=1) / math.sqrt(len(seeds))
    return half, stdtrit(fit.n_groups - 1, tail) * draws.std(axis=0) if len(draws) else nothing


def grid(fit: Fit) -> np.ndarray:
    """Numbers of labels on which a curve is searched; its sizes are among them, the corners of an interpolation."""
    return np.union1d(np.geomspace(fit.least, fit.most, GRID), np.exp(fit.points[0]).clip(fit.least, fit.most))


def crossing(n: np.ndarray, above: np.ndarray, half: np.ndarray) -> Estimate:
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
    if not best.weights:
        return [best, *others]
    rivals = [law for law in others if law.weights and law.aicc <= best.aicc + RIVAL]
    if points.shape[1] < FORMS["floor"].sizes:
        _, goes_on, _ = _interpolated(points[0], logs.mean(axis=0), goes_on=True)
        one_sided = 2 * confidence - 1  # a curve with a floor leaves the power law on one side only
        rivals += [
            replace(law, curve=goes_on, least=best.least, most=best.most, confidence=one_sided)
            for law in others
            if law.form == INTERPOLATION
        ]
    return [replace(best, rivals=tuple(rivals)), *others]


def _fitted(form: Form, points: np.ndarray, logs: np.ndarray) -> tuple[dict[str, float], Curve, dict[str, np.ndarray]]:
    """The best parameters, the curve, and what a cell moves."""
    theta = solved(form, points, logs)
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


def _interpolated(
    x: np.ndarray, logs: np.ndarray, goes_on: bool = False
) -> tuple[dict[str, float], Curve, dict[str, np.ndarray]]:
    """Straight lines between means that never rise; beyond the ends nothing, or the lines there go on."""
    blocks = isotonic_regression(logs, increasing=False).blocks
    member = np.repeat(np.arange(len(blocks) - 1), np.diff(blocks))
    pooled = (member[:, None] == member) / np.bincount(member)[member]  # (n_sizes, n_sizes)

    slopes = np.diff(np.eye(len(x)), axis=0) / np.diff(x)[:, None]  # of the lines, as sums of the means

    def curve(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        between = np.stack([np.interp(at[0], x, row) for row in np.eye(len(x))], axis=1)
        below, above = np.minimum(at[0] - x[0], 0.0), np.maximum(at[0] - x[-1], 0.0)
        if goes_on:
            between += np.outer(below, slopes[0]) + np.outer(above, slopes[-1])
        else:
            between[above - below > 1e-9] = np.nan
        weights = between @ pooled
        return weights @ logs, weights

    return {}, curve, {}


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


def short(value: float) -> str:
    """Three digits."""
    return f"{float(f'{value:.3g}'):,g}"

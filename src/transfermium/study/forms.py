"""Families of laws of errors against numbers of labels, and the parameters of one that describe errors best."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, product
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.special import expit, logsumexp, softmax

BEYOND = 4.0  # times the largest size: further than that, nothing is said
BREAK = 0.5 * math.log(2)  # width of a break in log n: it takes about a doubling


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


def solved(form: Form, points: np.ndarray, logs: np.ndarray) -> np.ndarray:
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

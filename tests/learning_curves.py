"""Synthetic learning curves with known laws."""

from __future__ import annotations

import numpy as np

from transfermium.study.intervals import Interval
from transfermium.study.laws import Estimate, Fit, fit

SIZES = np.array([10, 20, 40, 80, 160, 320])


def seeds(
    n_seeds: int,
    A: float,
    a: float,
    rng: np.random.Generator,
    both: np.ndarray | None = None,
    sizes: np.ndarray = SIZES,
    scatter: float = 0.04,
) -> np.ndarray:
    """Errors of a power law: each seed has an offset, which `both` arms share in part, and independent scatter."""
    offset = 0.05 * rng.normal(size=(n_seeds, 1)) + (0.0 if both is None else both)
    return np.asarray(A * sizes**-a * np.exp(offset + scatter * rng.normal(size=(n_seeds, len(sizes)))))


def two_arms(n_seeds: int, seed: int = 0) -> tuple[Fit, Fit]:
    """Transfer and scratch."""
    rng = np.random.default_rng(seed)
    both = 0.06 * rng.normal(size=(n_seeds, 1))
    transfer, scratch = seeds(n_seeds, 1.2, 0.35, rng, both), seeds(n_seeds, 3.0, 0.45, rng, both)
    return fit(SIZES, transfer, "power"), fit(SIZES, scratch, "power")


def width(interval: Interval | Estimate) -> float:
    return interval.high - interval.low

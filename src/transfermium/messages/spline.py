"""Radial functions as cubic B-splines.

They depend on one number only, so they are evaluated on a grid of lengths instead of on every edge.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INTERVALS_PER_ANGSTROM = 160  # at least
INTERVALS_PER_FUNCTION = 16  # of a basis: the more functions, the faster they vary
SPLINES = (  # the four B-splines on an interval, as polynomials of the place in it
    (1 / 6, -1 / 2, 1 / 2, -1 / 6),
    (2 / 3, 0.0, -1.0, 1 / 2),
    (1 / 6, 1 / 2, 1 / 2, -1 / 2),
    (0.0, 0.0, 0.0, 1 / 6),
)
TAPS = (1 / 36, -5 / 18, 3 / 2, -5 / 18, 1 / 36)  # undo the smoothing of B-splines, to sixth order


class Grid(NamedTuple):
    """Equal intervals of lengths, to three beyond the cutoff, so that what vanishes there vanishes exactly."""

    start: float  # Å
    step: float  # Å
    intervals: int

    @property
    def n_coefficients(self) -> int:
        return self.intervals + 3

    def samples(self, device: torch.device) -> Tensor:
        """Lengths at which functions must be known: (intervals + 7,), three beyond either end, all positive.

        In double precision: rounding differs from one length to the next, and slopes would magnify that.
        """
        return self.start + self.step * torch.arange(-3, self.intervals + 4, device=device, dtype=torch.float64)


def grid(cutoff: float, functions: int = 0) -> Grid:
    """A grid fine enough for the slopes of radial networks on a basis of so many functions.

    Their errors stay below a few 10⁻⁵ of the largest force for the bases of `nn`. A finer grid would not help: slopes
    are differences of its coefficients, which are of single precision.
    """
    intervals = max(round(INTERVALS_PER_ANGSTROM * cutoff), INTERVALS_PER_FUNCTION * functions, 1)
    step = cutoff / (intervals + 1)
    return Grid(4 * step, step, intervals)


def coefficients(values: Tensor) -> Tensor:
    """B-spline coefficients from samples: (intervals + 7, ...) to (intervals + 3, ...); differentiable.

    The interpolation is local; its error is that of a cubic spline, a few 10⁻⁶ of the fastest radial functions in use.
    """
    n = len(values) - 4
    parts = [tap * values.narrow(0, k, n) for k, tap in enumerate(TAPS)]
    return sum(parts[1:], parts[0])


def evaluate(table: Tensor, lengths: Tensor, at: Grid) -> Tensor:
    """The splines at lengths, as kernels evaluate them: (n_coefficients, ...), (n,) to (n, ...)."""
    t = ((lengths - at.start) / at.step).clamp(max=at.intervals)
    row = t.detach().floor().clamp(0, at.intervals - 1)
    first = row.long()
    x = (t - row).view(-1, *[1] * (table.ndim - 1))
    parts = [
        (a + x * (b + x * (c + x * d))) * table.index_select(0, first + k) for k, (a, b, c, d) in enumerate(SPLINES)
    ]
    return sum(parts[1:], parts[0])

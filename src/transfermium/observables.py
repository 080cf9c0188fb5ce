"""What a simulation says, as pure functions on arrays: drift, temperature, density, structure and diffusion.

Times are in ps, lengths in Å, energies in eV. `n_frames` frames follow each other at equal intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import ase.data
import numpy as np
from ase import units
from vesin import NeighborList

COLLAPSED = 3.0  # Å; errors of an RDF beyond which a liquid is no longer one (arXiv:2210.07237)
YEH_HUMMER = 2.837297  # of a cubic box (10.1021/jp0477147)
FITTED = (0.1, 0.5)  # of the longest lag: where the mean-square displacement of a liquid is a line, and well sampled
RATTLING = 1.0  # ps in which atoms only move in their cages


class Estimate(NamedTuple):
    """A number with its 95 % interval, which is NaN where there are too few values for one."""

    value: float
    low: float
    high: float


class Rdf(NamedTuple):
    """Radial distribution functions of every frame, for each pair of elements."""

    r: np.ndarray  # (n_bins,), middles of the bins
    g: dict[str, np.ndarray]  # "H-O" -> (n_frames, n_bins)

    def mean(self) -> dict[str, np.ndarray]:
        """Averages over the frames: (n_bins,) for each pair."""
        return {pair: g.mean(axis=0) for pair, g in self.g.items()}


def average(values: np.ndarray) -> Estimate:
    """The mean of a time series, with an interval that knows that values near each other are alike."""
    values = np.asarray(values, float)
    n, mean = len(values), float(np.mean(values)) if len(values) else np.nan
    if n < 3:
        return Estimate(mean, np.nan, np.nan)
    own = n / inefficiency(values)
    return _interval(mean, float(values.std(ddof=1)) / np.sqrt(own), own - 1)


def drift(times: np.ndarray, energies: np.ndarray, n_atoms: int) -> Estimate:
    """The slope of a conserved energy by least squares, in meV/atom/ps.

    Its interval allows for residuals that are alike at times near each other, as oscillations are.
    """
    t = np.asarray(times, float) - np.mean(times)
    e = 1000 * (np.asarray(energies, float) - np.mean(energies)) / n_atoms
    if len(t) < 4:
        return Estimate(np.nan, np.nan, np.nan)
    slope = float(t @ e / (t @ t))
    rest = e - slope * t
    own = len(t) / inefficiency(rest)
    error = np.sqrt(rest @ rest / max(len(t) - 2, 1) / (t @ t) * len(t) / own)
    return _interval(slope, float(error), own - 2)


def inefficiency(values: np.ndarray) -> float:
    """How many values of a time series count as one: 1 + 2 times the sum of its autocorrelations up to the first
    that is not positive."""
    x = np.asarray(values, float) - np.mean(values)
    n = len(x)
    if not np.ptp(x) > 0:
        return 1.0
    power = np.abs(np.fft.rfft(x, 2 * n)) ** 2
    correlation = np.fft.irfft(power)[:n] / (x @ x)  # biased: already weighted by 1 - lag / n
    last = int(np.argmax(correlation <= 0)) or n
    return float(np.clip(1 + 2 * correlation[1:last].sum(), 1.0, n))


def temperature(kinetic: np.ndarray, freedoms: int) -> np.ndarray:
    """Of kinetic energies, in K."""
    return 2 * np.asarray(kinetic, float) / (freedoms * units.kB)


def density(masses: np.ndarray, volumes: np.ndarray) -> np.ndarray:
    """In g/cm³, of masses in atomic units and volumes in Å³."""
    return np.sum(masses) / np.asarray(volumes, float) * units._amu * 1e27


def widths(cell: np.ndarray) -> np.ndarray:
    """Distances between opposite faces of a cell whose rows are its vectors: (3,)."""
    return 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)


def rdf(positions: np.ndarray, cells: np.ndarray, numbers: np.ndarray, radius: float, width: float = 0.05) -> Rdf:
    """Radial distribution functions up to `radius`, of any cell, periodic in three directions.

    They are one for independent atoms, however few. Beyond half the width of the cell images of other atoms count, of
    the atom itself never.

    Args:
        positions: (n_frames, n_atoms, 3), wrapped or not.
        cells: (n_frames, 3, 3).
        numbers: atomic numbers, (n_atoms,).
        width: of the bins.
    """
    elements, kinds = np.unique(numbers, return_inverse=True)
    names = [ase.data.chemical_symbols[z] for z in elements]
    bins = max(round(radius / width), 1)
    borders = np.linspace(0, radius, bins + 1)
    shells = 4 / 3 * np.pi * np.diff(borders**3)
    search = NeighborList(cutoff=radius, full_list=False, n_threads=1)

    n = len(elements)
    found = np.zeros((len(positions), n, n, bins))
    for frame, (own, cell) in enumerate(zip(positions, cells, strict=True)):
        wrapped = np.linalg.solve(cell.T, own.T).T % 1.0 @ cell
        pairs, lengths = search.compute(wrapped, cell, True, quantities="Pd")
        pairs = pairs.astype(np.int64)
        other = pairs[:, 0] != pairs[:, 1]
        a, b = np.sort(kinds[pairs[other]], axis=1).T
        bin = np.minimum((lengths[other] / radius * bins).astype(int), bins - 1)
        counts = np.bincount((a * n + b) * bins + bin, minlength=n * n * bins).reshape(n, n, bins)
        found[frame] = counts * abs(np.linalg.det(cell)) / shells

    g = {}
    amounts = np.bincount(kinds)
    for a in range(n):
        for b in range(a, n):
            pairs_of = amounts[a] * amounts[b] if a != b else amounts[a] * (amounts[a] - 1) / 2
            if pairs_of:
                g[pair_name(names[a], names[b])] = found[:, a, b] / pairs_of
    return Rdf((borders[1:] + borders[:-1]) / 2, g)


def pair_name(a: str, b: str) -> str:
    """Two elements in alphabetical order, as in H-O."""
    return "-".join(sorted((a, b)))


def rdf_errors(
    times: np.ndarray, found: Rdf, reference: Mapping[str, np.ndarray], window: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Where windows of a run begin, and the largest error over the pairs of elements in each: ∫|g - g_ref| dr, in Å.

    A run of less than one window is one. A simulation counts as collapsed once an error exceeds `COLLAPSED`.

    Args:
        times: (n_frames,).
        reference: pair to (n_bins,), on the same bins; pairs that are not in it are not compared. Without any there is
            no window.
    """
    width = found.r[1] - found.r[0] if len(found.r) > 1 else 2 * found.r[0]
    since = np.asarray(times, float) - times[0]
    lasted = since[-1] + (since[1] if len(since) > 1 else 0.0)  # each frame stands for the time up to the next
    windows = max(int(lasted / window + 1e-9), 1)
    which = np.minimum((since / window + 1e-9).astype(int), windows - 1)
    starts, errors = [], []
    for number in np.unique(which) if reference else ():
        own = which == number
        starts.append(float(np.asarray(times)[own][0]))
        errors.append(
            max(np.abs(g[own].mean(axis=0) - reference[p]).sum() * width for p, g in found.g.items() if p in reference)
        )
    return np.array(starts), np.array(errors)


def msd(positions: np.ndarray, masses: np.ndarray, hold: bool = True) -> np.ndarray:
    """Mean-square displacements of each atom in Å², averaged over all origins: (n_frames, n_atoms), the first is zero.

    Args:
        positions: (n_frames, n_atoms, 3), not wrapped back into the cell.
        masses: (n_atoms,).
        hold: keep the centre of mass in place, which is wrong where some of the atoms are fixed.
    """
    x = np.asarray(positions, float)
    if hold:
        x = x - np.einsum("fak,a->fk", x, masses)[:, None] / np.sum(masses)
    x = x - x[:1]  # smaller numbers, fewer digits lost
    n = len(x)
    power = np.abs(np.fft.rfft(x, 2 * n, axis=0)) ** 2
    products = np.fft.irfft(power, axis=0)[:n].sum(axis=-1)  # of a position and a later one, over all origins
    squares = np.square(x).sum(axis=-1)
    both = 2 * squares.sum(axis=0) - np.concatenate([np.zeros((1, x.shape[1])), np.cumsum(squares + squares[::-1], 0)])
    result: np.ndarray = np.maximum((both[:n] - 2 * products) / np.arange(n, 0, -1)[:, None], 0.0)
    return result


def diffusion(times: np.ndarray, displacements: np.ndarray, fitted: tuple[float, float] = FITTED) -> Estimate:
    """The self-diffusion coefficient in Å²/ps (1e-4 cm²/s): a sixth of the slope of mean-square displacements.

    Its interval is that of the mean over atoms, as if they moved independently. In a periodic box it is too small by
    `finite_size`. Where less than three lags are left to fit, beyond `RATTLING`, it is NaN.

    Args:
        times: lags, (n_frames,).
        displacements: of `msd`, (n_frames, n_atoms).
        fitted: between which fractions of the longest lag.
    """
    low, high = max(fitted[0] * times[-1], RATTLING), fitted[1] * times[-1]
    own = (times >= low) & (times <= high)
    if own.sum() < 3:
        return Estimate(np.nan, np.nan, np.nan)
    t = times[own] - times[own].mean()
    slopes = t @ displacements[own] / (t @ t) / 6
    n = len(slopes)
    error = float(slopes.std(ddof=1)) / np.sqrt(n) if n > 1 else np.nan
    return _interval(float(slopes.mean()), error, n - 1)


def finite_size(temperature: float, length: float, viscosity: float) -> float:
    """What a diffusion coefficient from a cubic box of `length` Å lacks, in Å²/ps (Yeh and Hummer).

    Args:
        temperature: in K.
        viscosity: in mPa s; that of the model, which is not always that of the real liquid.
    """
    si = YEH_HUMMER * units._k * temperature / (6 * np.pi * viscosity * 1e-3 * length * 1e-10)  # m²/s
    return float(si * 1e8)


def _interval(value: float, error: float, freedoms: float) -> Estimate:
    if not (freedoms > 0 and np.isfinite(error)):
        return Estimate(value, np.nan, np.nan)
    from scipy.special import stdtrit  # it takes a while to load

    reach = float(stdtrit(max(freedoms, 1), 0.975)) * error
    return Estimate(value, value - reach, value + reach)

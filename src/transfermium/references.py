"""What each element adds to a total: reference energies, and shifts of sums, by least squares on compositions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .nn import LAST_ELEMENT

PENALTIES = np.logspace(-6, 3, 19)  # of moving an element away from the others; one is a label of that element alone
RULED_OUT = 3.84  # beyond the least of minus twice the logarithm of a likelihood: the 95 % point of chi squared


def fit_references(
    numbers: Sequence[np.ndarray], energies: np.ndarray, fixed: Mapping[int, float] | None = None
) -> np.ndarray:
    """Energies per element (eV; index: atomic number) that best explain total energies, by least squares per atom.

    `fixed` elements keep their value. Elements that the data cannot tell apart (always in the same ratio) share what
    is left; elements that do not occur get zero. Few labels of many elements pull towards the mean per atom, never
    towards zero (see `per_element`).
    """
    references = np.zeros(LAST_ELEMENT + 1)
    for element, energy in (fixed or {}).items():
        references[element] = energy
    counts = np.array([len(z) for z in numbers], float)
    composition = np.stack([np.bincount(z, minlength=LAST_ELEMENT + 1) for z in numbers]) / counts[:, None]
    per_atom = np.asarray(energies, float) / counts - composition @ references
    free = np.flatnonzero(composition.any(axis=0) & ~np.isin(np.arange(LAST_ELEMENT + 1), list(fixed or {})))
    if len(free):
        references[free] = per_element(composition[:, free], per_atom)
    return references


def fit_shifts(numbers: Sequence[np.ndarray], totals: np.ndarray) -> np.ndarray:
    """What an atom of each element adds to a sum (index: atomic number), by least squares per atom, and the mean over
    all atoms for elements that do not occur: unlike an energy, a property has no zero of its own for each element.
    """
    found = fit_references(numbers, totals)
    absent = np.ones(len(found), bool)
    absent[np.unique(np.concatenate(numbers))] = False
    found[absent] = np.mean(totals / np.array([len(z) for z in numbers]))
    return found


def per_element(fractions: np.ndarray, values: np.ndarray, ruled_out: float = RULED_OUT) -> np.ndarray:
    """One number for each element, whose means over atoms best explain values: a ridge towards the best single number.

    Labels about as many as elements determine each of them, and badly: then least squares make large errors on any
    other composition. So the penalty is the smallest that labels do not rule out (see `chosen_penalty`): next to none
    with several labels to an element. The smallest of all leaves no trace in the fit.

    Args:
        fractions: of the atoms that each element is, (n, n_elements); the rest of a structure, if any, adds nothing.
        values: (n,).
        ruled_out: see `chosen_penalty`; zero for the most likely penalty, where nothing is trained afterwards.

    Returns:
        (n_elements,).
    """
    known = fractions.any(axis=1)
    fractions, values = fractions[known], values[known]
    penalty = chosen_penalty(fractions, values, ruled_out)
    share = fractions.sum(axis=1)
    mean = share @ values / (share @ share)  # the best single number
    gram = fractions.T @ fractions
    wanted = (values - mean * share) @ fractions
    moved = np.zeros(len(gram))
    for _ in range(4 if penalty == PENALTIES[0] else 1):  # then it only shares what labels leave open
        moved += np.linalg.solve(gram + penalty * np.eye(len(gram)), wanted - gram @ moved)
    return np.asarray(mean + moved)


def chosen_penalty(fractions: np.ndarray, values: np.ndarray, ruled_out: float = RULED_OUT) -> float:
    """The smallest of `PENALTIES` that the values do not rule out, in what the best single number leaves of them.

    Elements are taken to scatter about that number by a normal distribution, and values about what elements make of
    them by another: the ratio of their variances is the penalty, whose 95 % interval is that of the likelihood
    (restricted maximum likelihood). What is learned later makes the second variance smaller than it is now. Where there
    are no more values than elements, no penalty can be ruled out for being small, and the most likely one is taken.
    """
    share = fractions.sum(axis=1)
    centered = fractions - np.outer(share, share @ fractions / (share @ share))
    left = values - share * (share @ values / (share @ share))
    sizes, basis = np.linalg.eigh(centered.T @ centered)
    seen = sizes > 1e-12 * max(sizes.max(), 1.0)
    along = np.square((left @ centered) @ basis[:, seen]) / sizes[seen]
    spread = sizes[seen] / PENALTIES[:, None] + 1  # variances along each direction, in those of the values
    rest = max(float(left @ left - along.sum()), 1e-18 * float(values @ values))  # of no direction, or of rounding
    unlikely = max(len(values) - 1, 1) * np.log(np.maximum((along / spread).sum(axis=1) + rest, 1e-300))
    unlikely += np.log(spread).sum(axis=1)
    limit = unlikely.min() + (ruled_out if len(values) - 1 > seen.sum() else 0.0)
    return float(PENALTIES[np.flatnonzero(unlikely <= limit)[0]])

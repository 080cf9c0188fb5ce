"""What each element adds to a total: reference energies, and shifts of sums, by least squares on compositions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .nn import LAST_ELEMENT

PENALTIES = np.logspace(-6, 3, 19)  # of moving an element away from the others; one is a label of that element alone
PARTS = 20  # each left out once
MOST_JUDGED = 5_000  # labels, which choose the penalty


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


def per_element(fractions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """One number for each element, whose means over atoms best explain values: a ridge towards the best single number.

    Labels about as many as elements determine each of them, and badly: then least squares make large errors on any
    other composition. So the penalty is the one with the smallest mean absolute error on labels that are left out, a
    twentieth at a time. Where the smallest one is as good, the fit leaves no trace of it.

    Args:
        fractions: of the atoms that each element is, (n, n_elements); the rest of a structure, if any, adds nothing.
        values: (n,).

    Returns:
        (n_elements,).
    """
    known = fractions.any(axis=1)
    fractions, values = fractions[known], values[known]
    return _solved(fractions, values, np.array([chosen_penalty(fractions, values)]))[0]


def chosen_penalty(fractions: np.ndarray, values: np.ndarray) -> float:
    """The one of `PENALTIES` with the smallest errors on what is left out; see `per_element`."""
    judged = np.random.default_rng(0).permutation(len(values))[:MOST_JUDGED]
    missed = np.zeros(len(PENALTIES))
    for part in np.array_split(judged, PARTS) if len(judged) > 1 else ():
        kept = np.setdiff1d(judged, part)
        found = _solved(fractions[kept], values[kept], PENALTIES)
        missed += np.abs(values[part] - found @ fractions[part].T).sum(axis=1)
    nothing = 1e-9 * np.abs(values).sum()  # what rounding makes of errors
    return float(PENALTIES[np.flatnonzero(missed <= missed.min() + nothing)[0]])


def _solved(fractions: np.ndarray, values: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    """The numbers for each penalty, (n_penalties, n_elements)."""
    share = fractions.sum(axis=1)
    mean = share @ values / (share @ share)  # the best single number
    gram = fractions.T @ fractions
    sizes, basis = np.linalg.eigh(gram)
    shrunk = np.maximum(sizes, 0.0) + penalties[:, None]
    wanted = (values - mean * share) @ fractions
    moved = wanted @ basis / shrunk @ basis.T
    for _ in range(3):  # refined where the penalty is there to share what labels leave open, and for nothing else
        moved += np.where(penalties[:, None] == PENALTIES[0], (wanted - moved @ gram) @ basis / shrunk @ basis.T, 0.0)
    return mean + moved

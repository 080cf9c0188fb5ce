"""A yardstick: labels beside what some potential says of the same structures, to tell orders of magnitude and signs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ase.data import atomic_numbers
from ase.stress import voigt_6_to_full_3x3_stress

from ..evaluate import predict
from .base import NOBLE, Case

MOST_STRUCTURES, MOST_ATOMS = 160, 3_000  # that are looked at
LEAST_FORCE = 0.05  # eV/Å predicted; below, the yardstick says nothing of forces
LEAST_STRESS = 2e-3  # eV/Å³, likewise
FEW_SUBSTANCES = 10
LEAST_R = 0.45  # correlation of large forces; in public sets it is 0.69 to 0.98


class Beside(NamedTuple):
    """Labels and predictions of some structures.

    Attributes:
        indices: of the structures.
        energy: predicted, eV: (n_structures,).
        forces: labels and predictions, eV/Å: two of (n_atoms, 3).
        owner: the place in `indices` of each atom.
        stress: labels and predictions, eV/Å³: two of (n_structures, 3, 3); NaN where one is missing.
    """

    indices: np.ndarray
    energy: np.ndarray
    forces: tuple[np.ndarray, np.ndarray]
    owner: np.ndarray
    stress: tuple[np.ndarray, np.ndarray]


def beside(case: Case, indices: np.ndarray, every: bool = False) -> Beside | None:
    """Predictions for some or every one of these structures; None where there is nothing to compare."""
    key = ("yardstick", indices.tobytes(), every)
    if key not in case.kept:
        case.kept[key] = _beside(case, indices, every)
    found: Beside | None = case.kept[key]
    return found


def _beside(case: Case, indices: np.ndarray, every: bool) -> Beside | None:
    model = case.yardstick
    if model is None:
        return None
    seen = np.zeros(119, bool)
    seen[[atomic_numbers[symbol] for symbol in model.card.get("elements", {})]] = True
    seen[NOBLE] = False  # it does not know what little holds these together
    usable = np.isfinite(case.contacts.fraction) | case.contacts.alone
    usable &= (
        ~case.forgotten & ~case.composition[:, ~seen].any(axis=1) & (case.n_atoms > 1) & (case.contacts.fraction > 0.4)
    )
    labelled = np.isfinite(case.energy) | case.has_forces | np.isfinite(case.stress[:, 0, 0])
    candidates = indices[(usable & labelled)[indices]]
    order = np.random.default_rng(0).permutation(candidates)
    order = (
        order[np.argsort(case.n_atoms[order] > np.median(case.n_atoms[order]), kind="stable")] if len(order) else order
    )
    within = np.cumsum(case.n_atoms[order]) <= max(MOST_ATOMS, case.n_atoms[order[0]] if len(order) else 0)
    chosen = np.sort(order if every else order[within][:MOST_STRUCTURES])
    if not len(chosen):
        return None
    bare = [case.atoms[i].copy() for i in chosen]
    results = [a.calc.results for a in predict(model, bare, device=case.device, allow_unseen=True, verbose=False)]
    own = np.concatenate([np.arange(case.first[i], case.first[i + 1]) for i in chosen])
    forces = np.concatenate([r["forces"] for r in results])
    nothing = np.full(6, np.nan)
    stress = np.array([voigt_6_to_full_3x3_stress(r.get("stress", nothing)) for r in results])
    stress[~case.periodic[chosen]] = np.nan
    return Beside(
        chosen,
        np.array([r.get("energy", np.nan) for r in results]),
        (case.forces[own], forces),
        np.repeat(np.arange(len(chosen)), case.n_atoms[chosen]),
        (case.stress[chosen], stress),
    )


class Fit(NamedTuple):
    """Labels as a multiple of predictions.

    Attributes:
        slope: the ratio of the root mean squares, with the sign of `r`.
        r: correlation about zero.
        n: numbers compared.
    """

    slope: float
    r: float
    n: int


def fit(label: np.ndarray, prediction: np.ndarray, least: float = 0.0) -> Fit | None:
    """Compare numbers, each limited to what most of them reach, so that no outlier counts for all others."""
    known = np.isfinite(label) & np.isfinite(prediction)
    label, prediction = label[known], prediction[known]
    if len(label) < 12 or np.sqrt(np.square(prediction).mean()) < least:
        return None
    x, y = _limited(prediction), _limited(label)
    size_x, size_y = np.sqrt(np.square(x).mean()), np.sqrt(np.square(y).mean())
    if not size_x or not size_y:
        return None
    r = float((x * y).mean() / (size_x * size_y))
    return Fit(float(np.sign(r) * size_y / size_x), r, len(x))


def unrelated(found: Beside) -> bool:
    """Whether forces have nothing to do with what a potential says, though they are large."""
    label, predicted = found.forces
    one = fit(label.ravel(), predicted.ravel(), 0.3)
    size = np.sqrt(np.nanmean(np.square(label))) if np.isfinite(label).any() else 0.0
    return one is not None and abs(one.r) < LEAST_R and one.n > 500 and bool(size > 0.3)


def about_mean_pressure(stress: np.ndarray, substance: np.ndarray) -> np.ndarray:
    """Stresses less their median pressure, as the equilibrium volumes of a yardstick can be wrong in one direction.

    Of few substances they can be so in both directions: then it is the median of each.
    """
    pressure = np.trace(stress, axis1=1, axis2=2) / 3
    if len(np.unique(substance)) > FEW_SUBSTANCES:
        substance = np.zeros_like(substance)
    for one in np.unique(substance[np.isfinite(pressure)]):
        own = (substance == one) & np.isfinite(pressure)
        pressure[own] = np.median(pressure[own])
    return np.asarray(stress - pressure[:, None, None] * np.eye(3))


def contradicts(label: np.ndarray, prediction: np.ndarray, r: float) -> bool:
    """Whether stresses less their pressure, where there are any, have the other sign than `r`."""
    shear = [s - np.trace(s, axis1=1, axis2=2)[:, None, None] / 3 * np.eye(3) for s in (label, prediction)]
    one = fit(shear[0].ravel(), shear[1].ravel(), LEAST_STRESS / 4)
    return one is not None and abs(one.r) > LEAST_R and one.r * r < 0


def _limited(values: np.ndarray) -> np.ndarray:
    most = 3 * np.quantile(np.abs(values), 0.95)
    return np.clip(values, -most, most)

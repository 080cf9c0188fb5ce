"""Forces: absurd ones, those with a sum or that turn a molecule, zeros for missing ones, those of other atoms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ase import Atoms

from ..errors import InputError
from . import yardstick
from .base import Around, Case, Finding, counted, some

LARGE = 30.0  # eV/Å
NET = 0.02  # of the root mean square force of a structure, and eV/Å below: what is left per atom
NET_FORCE = 5e-3


def check(case: Case) -> Iterator[Finding]:
    """Forces by themselves, and beside the yardstick."""
    if "forces" not in case.labels:
        return
    rms = case.rms_force()
    several = case.has_forces & (case.n_atoms > 1)
    total = np.stack([np.bincount(case.owner, np.nan_to_num(case.forces[:, k]), len(case)) for k in range(3)], axis=1)
    per_atom = np.linalg.norm(total, axis=1) / case.n_atoms
    yield from _net(case, several & (per_atom > np.maximum(NET_FORCE, NET * rms)), per_atom)
    yield from _torque(case, several, rms)

    largest = np.zeros(len(case))
    np.maximum.at(largest, case.owner, np.nan_to_num(np.abs(case.forces)).max(axis=1))
    if (large := np.flatnonzero(largest > LARGE)).size:
        yield Finding(
            "forces-large",
            "warning",
            f"{counted(len(large))} with a force above {LARGE:g} eV/Å (up to {largest.max():.4g})",
            "atoms that are too close, or calculations that did not converge; a squared loss sees little else",
            case.drop("forces-large"),
            some(large),
        )
    yield from _zeros(case, several, rms)
    yield from _of_other_atoms(case)


def _net(case: Case, found: np.ndarray, per_atom: np.ndarray) -> Iterator[Finding]:
    if found.any():
        yield Finding(
            "forces-net",
            "warning",
            f"The forces on {counted(int(found.sum()))} do not sum to zero (up to {per_atom[found].max():.3g} "
            "eV/Å per atom)",
            "noise of a grid or of loose convergence, atoms that were held fixed or left out, or a field",
            case.change(*case.relabel("forces", "LABEL = LABEL - np.mean(LABEL, axis=0)")),
            some(np.flatnonzero(found)),
        )


def _torque(case: Case, several: np.ndarray, rms: np.ndarray) -> Iterator[Finding]:
    """Forces on a molecule do not turn it, unless they are given in another orientation."""
    bad, checked = [], 0
    for i in np.flatnonzero(several & (rms > 0.02)).tolist():
        atoms = case.atoms[i]
        if atoms.pbc.any() or atoms.cell.rank or len(atoms) < 3:
            continue
        away = atoms.positions - atoms.positions.mean(axis=0)
        own = case.forces[case.first[i] : case.first[i + 1]]
        torque = np.linalg.norm(np.cross(away, own).sum(axis=0))
        size = np.sqrt(np.square(np.linalg.norm(away, axis=1) * np.linalg.norm(own, axis=1)).sum())
        checked += 1
        if torque > 0.3 * size:
            bad.append(i)
    if len(bad) > max(2, 0.05 * checked):
        yield Finding(
            "forces-orientation",
            "error",
            f"The forces on {counted(len(bad))} turn the molecule",
            "positions were turned (to a standard orientation, or aligned) and forces were not, or they "
            "belong to other atoms",
            case.drop("forces-orientation"),
            some(bad),
            (f"{len(bad)} of {checked} molecules, where it should be none",),
        )


def _zeros(case: Case, several: np.ndarray, rms: np.ndarray) -> Iterator[Finding]:
    """Zeros where other structures of the same atoms have forces, and no symmetry forbids them."""
    moving = several & (rms > 0)
    if not moving.any() or np.median(rms[moving]) < 0.1:
        return
    bad = [i for i in np.flatnonzero(several & (rms == 0)).tolist() if _asymmetry(case.atoms[i]) > 0.1]
    if bad:
        yield Finding(
            "forces-zero",
            "error",
            f"Zeros for forces where nothing makes them zero: {counted(len(bad))}",
            "missing labels were written as zeros",
            case.drop("forces-zero"),
            some(bad),
        )


def _of_other_atoms(case: Case) -> Iterator[Finding]:
    """Forces that have nothing to do with those that any potential would predict."""
    found = yardstick.beside(case, case.untold(case.everything, "energy", "forces"))
    if found is None:
        return
    label, predicted = found.forces
    if yardstick.unrelated(found):
        turned = _turned(found)
        if turned > 0.7:
            yield Finding(
                "forces-orientation",
                "error",
                "The forces are those of turned structures",
                "positions were turned (to a standard cell or orientation, or aligned) and forces were not",
                _again(case),
                (),
                (f"turned, they have a correlation of {turned:.2f} with those of a potential",),
            )
        else:
            fit = yardstick.fit(label.ravel(), predicted.ravel())
            yield Finding(
                "forces-shuffled",
                "error",
                "The forces do not belong to these atoms",
                "atoms or frames are in another order than their forces, or the structures were turned after "
                "the calculation",
                _again(case),
                (),
                (f"their correlation with those of a potential is {fit.r if fit else 0:.2f}; 0.7 and more is usual",),
            )


def _again(case: Case) -> str:
    return case.change(
        "atoms.calc = None  # then read positions and forces again, from the same frame and in the same order"
    )


def _turned(found: yardstick.Beside) -> float:
    """The correlation that labels would have with predictions, if each structure could be turned."""
    label, predicted = found.forces
    whole = best = 0.0
    for k in range(len(found.indices)):
        own = found.owner == k
        if own.sum() < 6 or not np.isfinite(label[own]).all():
            continue
        u, sizes, v = np.linalg.svd(label[own].T @ predicted[own])
        sizes[2] *= np.sign(np.linalg.det(u @ v))
        norm = float(np.linalg.norm(label[own]) * np.linalg.norm(predicted[own]))
        if norm > 0:
            best, whole = best + float(sizes.sum() / norm), whole + 1
    return best / whole if whole else 0.0


def _asymmetry(atoms: Atoms) -> float:
    """How much neighbours pull atoms to one side, root mean square; zero where symmetry wants it so."""
    try:
        found = Around.of(atoms)
    except InputError:
        return 0.0
    pull = np.zeros((len(atoms), 3))
    np.add.at(pull, found.receivers, found.away * (found.fading() / found.lengths)[:, None])
    return float(np.sqrt(np.square(pull).sum(axis=1).mean()))

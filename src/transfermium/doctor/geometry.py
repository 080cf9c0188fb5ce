"""Structures themselves: atoms too close or lost, lengths in another unit, cells that were forgotten or are empty."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ase import Atoms

from ..errors import InputError
from .base import DENSEST, NOBLE, Around, Case, Finding, counted, some

TYPICAL = (0.5, 1.45)  # nearest neighbours, in sums of covalent radii
USUAL = (0.6, 1.35)  # likewise, where another unit makes sense
UNITS = {"nm": 10.0, "bohr": 0.529177210903, "pm": 0.01}  # Å
MOST_TRIED = 20  # structures
EMPTY = 10_000.0  # Å³ for an atom


def check(case: Case) -> Iterator[Finding]:
    """Distances beside sums of covalent radii."""
    contacts = case.contacts
    wrong = list(_lengths(case))
    yield from wrong
    wrong = [one for one in wrong if one.severity == "error"]
    if contacts.unusable and not wrong:
        first = next(iter(contacts.unusable.values()))
        yield Finding(
            "unusable",
            "error",
            f"{counted(len(contacts.unusable))} in which no neighbours can be found ({first})",
            "atoms in the same place, coordinates in another unit, or a cell that is none",
            case.drop("unusable"),
            some(contacts.unusable),
        )
    close = np.flatnonzero(contacts.fraction < case.shortest)
    if len(close):
        worst = int(close[np.argmin(contacts.fraction[close])])
        symbols = "-".join(case.atoms[worst].symbols[int(k)] for k in contacts.pair[worst])
        yield Finding(
            "too-close",
            "warning",
            f"{counted(len(close))} with atoms closer than {case.shortest:g} of the sum of their covalent radii",
            "a broken structure, a wrong cell or duplicated atoms; or meant so, for repulsion",
            case.drop("too-close"),
            some(close),
            (f"the shortest: {symbols} at {contacts.distance[worst]:.3f} Å in structure {worst}",),
        )
    lost = case.forgotten if case.forgotten.mean() > 0.5 else False  # neighbours across the border, in all of them
    alone = np.flatnonzero(contacts.alone & ~np.asarray(lost))
    if len(alone) and not wrong:
        yield Finding(
            "exploded",
            "warning",
            f"{counted(len(alone))} with an atom that has no neighbour within 4 Å",
            "an atom flew off, or was not wrapped back into its cell in a file without pbc",
            case.drop("exploded"),
            some(alone),
        )
    yield from _forgotten_cells(case)
    yield from _empty_cells(case)


def _lengths(case: Case) -> Iterator[Finding]:
    """Lengths that make sense in another unit only; noble gases and dimers can have any."""
    contacts = case.contacts
    judged = np.flatnonzero((case.n_atoms > 2) & ~case.composition[:, NOBLE].any(axis=1))
    if len(judged) < 3:
        return
    typical = contacts.typical[judged]
    middle = float(np.median(typical[np.isfinite(typical)])) if np.isfinite(typical).mean() > 0.5 else np.inf
    dense = sum("denser" in why for why in contacts.unusable.values()) > 0.5 * len(case)
    if TYPICAL[0] < middle < TYPICAL[1] and not dense:
        return
    said = "Nearest neighbours are farther apart than in any solid or molecule"
    if dense:
        said = "Atoms are packed denser than any matter"
    elif np.isfinite(middle):
        said = f"Nearest neighbours are {middle:.2g} sums of covalent radii apart, where 0.7 to 1.3 is usual"
    tried = [case.atoms[i] for i in judged[np.linspace(0, len(judged) - 1, MOST_TRIED).astype(int)]]
    if all(atoms.pbc.all() and -1 < atoms.positions.min() <= atoms.positions.max() < 2 for atoms in tried):
        inside = [Atoms(a.numbers, scaled_positions=a.positions, cell=a.cell, pbc=True) for a in tried]
        if _is_usual(inside):
            mend = case.reshape("atoms.set_scaled_positions(atoms.positions)")
            yield _not_in_angstrom(said, "fractional coordinates", mend)
            return
    for unit, size in UNITS.items():
        if _is_usual([Atoms(a.numbers, size * a.positions, cell=size * a.cell.array, pbc=a.pbc) for a in tried]):
            mend = case.reshape(f"atoms.set_cell({size!r} * atoms.cell.array)", f"atoms.positions *= {size!r}")
            yield _not_in_angstrom(said, unit, mend)
            return
    if np.isfinite(middle):
        yield Finding(
            "lengths-unusual",
            "warning",
            said,
            "lengths in some unit that is none of the usual ones, or cells that do not belong to the positions",
            f"import transfermium as tm\natoms = tm.read({case.sources[0]!r})[0]\n"
            "print(atoms.cell.cellpar(), atoms.get_all_distances(mic=True))",
        )


def _not_in_angstrom(said: str, unit: str, mend: str) -> Finding:
    return Finding("length-unit", "error", f"{said}: lengths are not in Å", f"{unit} were taken for Å", mend)


def _is_usual(structures: list[Atoms]) -> bool:
    """Whether nearest neighbours are as far apart as in matter."""
    found = []
    for atoms in structures:
        if atoms.pbc.all() and atoms.get_volume() < DENSEST * len(atoms):
            return False
        try:
            around = Around.of(atoms)
        except InputError:
            continue
        if len(starts := around.starts()):
            found.append(np.median(np.minimum.reduceat(around.scaled(atoms), starts)))
    return 2 * len(found) > len(structures) and bool(USUAL[0] < np.median(found) < USUAL[1])


def _forgotten_cells(case: Case) -> Iterator[Finding]:
    """Dense structures with a cell that does not repeat."""
    found = np.flatnonzero(case.forgotten)
    if len(found):
        yield Finding(
            "pbc-lost",
            "warning",
            f"{counted(len(found))} fill a cell that does not repeat (pbc is False)",
            "pbc was lost in a conversion, so that atoms at the border miss their neighbours",
            case.reshape("atoms.pbc = True"),
            some(found),
        )


def _empty_cells(case: Case) -> Iterator[Finding]:
    """Cells that are nearly empty."""
    found = np.flatnonzero((case.n_atoms > 2) & (np.nan_to_num(case.volume) > EMPTY * case.n_atoms))
    if len(found):
        most = float((case.volume[found] / case.n_atoms[found]).max())
        yield Finding(
            "cell-empty",
            "note",
            f"{counted(len(found))} with more than {EMPTY:,.0f} Å^3 of a periodic cell for an atom (up to {most:,.0f})",
            "a cell in another unit than positions, or molecules in boxes that do not need to repeat",
            case.reshape("atoms.pbc = False  # if they are molecules"),
            some(found),
        )

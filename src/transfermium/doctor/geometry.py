"""Structures themselves: atoms too close or lost, lengths in another unit, cells that were forgotten."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .base import Case, Finding, counted, some

TYPICAL = (0.5, 1.45)  # nearest neighbours, in sums of covalent radii


def check(case: Case) -> Iterator[Finding]:
    """Distances beside sums of covalent radii."""
    contacts = case.contacts
    wrong = list(_lengths(case))
    yield from wrong
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
    alone = np.flatnonzero(contacts.alone)
    if 0 < len(alone) <= 0.2 * len(case):
        yield Finding(
            "exploded",
            "warning",
            f"{counted(len(alone))} with an atom that has no neighbour within 4 Å",
            "an atom flew off, or was not wrapped back into its cell in a file without pbc",
            case.drop("exploded"),
            some(alone),
        )
    yield from _forgotten_cells(case)


def _lengths(case: Case) -> Iterator[Finding]:
    contacts = case.contacts
    typical = contacts.typical[(case.n_atoms > 1) & np.isfinite(contacts.typical)]
    apart = contacts.alone | ~np.isfinite(case.contacts.typical)
    lost = float(apart[case.n_atoms > 2].mean()) if (case.n_atoms > 2).any() else 0.0
    middle = float(np.median(typical)) if len(typical) else np.inf
    dense = sum("denser" in why for why in contacts.unusable.values()) > 0.5 * len(case)
    if (case.n_atoms > 1).sum() < 3 or (TYPICAL[0] < middle < TYPICAL[1] and lost < 0.5 and not dense):
        return
    small = dense or middle < TYPICAL[0]
    said = (
        "Atoms are packed denser than any matter"
        if dense
        else f"Nearest neighbours are {middle:.2g} sums of covalent radii apart, where 0.7 to 1.3 is usual"
    )
    cause = "fractional coordinates or nm were taken for Å" if small else "bohr or pm were taken for Å"
    unit = "10.0" if small else "0.529177210903"
    yield Finding(
        "length-unit",
        "error",
        f"{said}: lengths are not in Å",
        cause,
        case.change(f"atoms.set_cell({unit} * atoms.cell.array)", f"atoms.positions *= {unit}"),
    )


def _forgotten_cells(case: Case) -> Iterator[Finding]:
    """Dense structures with a cell that does not repeat."""
    found = np.flatnonzero(case.forgotten)
    if len(found):
        yield Finding(
            "pbc-lost",
            "warning",
            f"{counted(len(found))} fill a cell that does not repeat (pbc is False)",
            "pbc was lost in a conversion, so that atoms at the border miss their neighbours",
            case.change("atoms.pbc = True"),
            some(found),
        )

"""Molecules: which atoms are held together by covalent bonds, in any cell and in any order."""

from __future__ import annotations

from typing import NamedTuple

import ase
import numpy as np
from ase.data import covalent_radii
from ase.geometry import find_mic

from .graph import Cutoff, Neighbors

COVALENT = [1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 32, 33, 34, 35, 51, 52, 53]  # what bonds; ions and metals stay alone
STRETCH = 1.25  # longest bond over the sum of covalent radii: 1.9 Å for C-C
STRETCH_H = 1.5  # of a hydrogen, which has one bond: 1.46 Å for O-H, also on its way from one oxygen to another


class Molecules(NamedTuple):
    """The molecules of one structure; an atom without bonds is one too."""

    owner: np.ndarray  # (n_atoms,), which molecule an atom belongs to
    bonds: np.ndarray  # (n_bonds, 2), each in both directions
    positions: np.ndarray  # (n_atoms, 3), Å; each molecule in one piece, whatever faces of the cell it crosses
    endless: np.ndarray  # (n_molecules,), bonded to images of themselves: chains, layers and networks
    crowded: np.ndarray  # (n_molecules,), with atoms that are nearer to an image of another one than to itself

    @property
    def sizes(self) -> np.ndarray:
        """Atoms of each molecule."""
        return np.bincount(self.owner)


def molecules(atoms: ase.Atoms) -> Molecules:
    """Molecules from bonds between nonmetals: atoms closer than 1.25 times the sum of their covalent radii.

    A hydrogen is bonded to its nearest neighbour alone (by that measure), up to 1.5 times the sum, so that hydrogen
    bonds and shared protons join no molecules.

    Raises `InputError` for structures in which no neighbours can be searched.
    """
    found = _bonds(atoms)
    owner, offsets = _joined(len(atoms), found)
    cell = np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)
    astray = (offsets[found.senders] != offsets[found.receivers] + found.shifts).any(axis=1)
    endless = np.bincount(owner[found.receivers], astray, minlength=owner.max(initial=-1) + 1) > 0
    positions = atoms.positions + offsets @ cell
    bonds = np.stack([found.receivers, found.senders], axis=1)
    return Molecules(owner, bonds, positions, endless, _crowded(owner, positions, endless, cell, atoms.pbc))


def _bonds(atoms: ase.Atoms) -> Neighbors:
    """Covalent bonds as directed edges."""
    bonding = np.flatnonzero(np.isin(atoms.numbers, COVALENT))
    some = ase.Atoms(atoms.numbers[bonding], atoms.positions[bonding], cell=atoms.cell, pbc=atoms.pbc)
    radii, hydrogen = covalent_radii[some.numbers], some.numbers == 1
    found = Cutoff(2 * STRETCH_H * float(radii.max(initial=0.3))).neighbors(some)
    here, there = found.receivers, found.senders
    stretch = found.lengths(some) / (radii[here] + radii[there])  # (n_edges,)
    least = np.full(len(some), np.inf)
    np.minimum.at(least, here, stretch)
    most = np.where(hydrogen, np.minimum(least + 1e-6, STRETCH_H), np.inf)
    most_of_both = np.minimum(most[here], most[there])
    kept = stretch <= np.where(np.isfinite(most_of_both), most_of_both, STRETCH)
    return Neighbors(bonding[here[kept]], bonding[there[kept]], found.shifts[kept])


def _joined(n: int, bonds: Neighbors) -> tuple[np.ndarray, np.ndarray]:
    """The molecule of each atom, (n,), and by how many cells to move it to where the others are, (n, 3).

    Each atom joins its neighbour of the lowest number, until all that are bonded have that of the first among them.
    """
    index, offsets = np.arange(n), np.zeros((n, 3), int)
    while True:
        joining = np.flatnonzero(index[bonds.senders] < index[bonds.receivers])
        if not len(joining):
            return np.unique(index, return_inverse=True)[1].reshape(n), offsets
        joining = joining[np.argsort(-index[bonds.senders[joining]], kind="stable")]  # of several, the last one counts
        here, there = bonds.receivers[joining], bonds.senders[joining]
        offsets[here] = offsets[there] - bonds.shifts[joining]
        index[here] = index[there]


def _crowded(
    owner: np.ndarray, positions: np.ndarray, endless: np.ndarray, cell: np.ndarray, pbc: np.ndarray
) -> np.ndarray:
    crowded = np.zeros(len(endless), bool)
    if not pbc.any():
        return crowded
    low, high = np.full((2, len(endless), 3), np.inf)
    np.minimum.at(low, owner, positions)
    np.minimum.at(high, owner, -positions)
    shortest = 1 / np.linalg.norm(np.linalg.pinv(cell[pbc]), axis=0).max()  # no lattice vector is shorter than this
    for one in np.flatnonzero((np.linalg.norm(high + low, axis=1) >= shortest / 2) & ~endless):
        own = positions[owner == one]
        for vectors in own[:, None] - own:
            crowded[one] |= bool((find_mic(vectors, cell, pbc)[1] < np.linalg.norm(vectors, axis=1) - 1e-6).any())
    return crowded

"""Boxes of rigid water molecules, in cells of any shape and with atoms in any order."""

from __future__ import annotations

import numpy as np
from ase import Atoms

ANGLE, BOND = np.radians(104.52), 0.9572  # of TIP3P, in Å
CELL = np.array([[1.0, 0.0, 0.0], [0.35, 0.95, 0.0], [-0.25, 0.3, 0.9]])  # triclinic, to be scaled


def waters(n: int = 8, seed: int = 0, shuffled: bool = True) -> Atoms:
    """Molecules in random orientations near the points of a grid, wrapped into a triclinic cell.

    `arrays["molecule"]` says which molecule each atom is of.
    """
    rng = np.random.default_rng((n, seed))
    side = round(n ** (1 / 3) + 0.49)
    cell = 3.6 * side * CELL
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), axis=-1).reshape(-1, 3)[:n]
    corners = (grid + rng.random(3)) / side @ cell
    positions = np.concatenate([corner + water(rng) for corner in corners])
    atoms = Atoms("OH2" * n, positions, cell=cell, pbc=True)
    atoms.set_array("molecule", np.repeat(np.arange(n), 3))
    atoms.wrap()
    return atoms[rng.permutation(3 * n)] if shuffled else atoms


def water(rng: np.random.Generator) -> np.ndarray:
    """Positions of O, H and H in a random orientation, with O at the origin."""
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    flat = BOND * np.array([[0, 0, 0], [1, 0, 0], [np.cos(ANGLE), np.sin(ANGLE), 0]])
    return flat @ q.T

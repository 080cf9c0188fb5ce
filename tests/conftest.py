"""Small structures built in code, the public data where it is there, and one thread for all of it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.build import molecule as build_molecule
from hypothesis import settings

torch.set_num_threads(1)  # on a shared machine more threads are slower, and change the last bits of sums

settings.register_profile("transfermium", deadline=None)
settings.load_profile("transfermium")


@pytest.fixture(autouse=True)
def same_weights_in_any_order() -> None:
    """Weights a test draws without a seed of its own do not depend on the tests that this process ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def public_data() -> Path:
    """Folder of public data sets (see docs/data.md): `TRANSFERMIUM_DATA`, or `shared/data` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TRANSFERMIUM_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no public data in {folder}: set TRANSFERMIUM_DATA")
    return folder


@pytest.fixture
def crystal() -> Atoms:
    """Rattled rocksalt MgO: 2 atoms, a cell far smaller than any cutoff."""
    return rattled(bulk("MgO", "rocksalt", a=4.21), seed=0)


@pytest.fixture
def alloy() -> Atoms:
    """Rattled fcc Cu-Au supercell: 8 atoms, a triclinic cell."""
    atoms = bulk("Cu", "fcc", a=3.8) * (2, 2, 2)
    atoms.numbers[np.random.default_rng(1).permutation(8)[:3]] = 79
    strain = np.array([[0.02, 0.01, 0.0], [0.0, -0.01, 0.03], [0.0, 0.0, 0.01]])
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return rattled(atoms, seed=1)


@pytest.fixture
def molecule() -> Atoms:
    """Rattled ethanol: 9 atoms, no cell."""
    return rattled(build_molecule("CH3CH2OH"), seed=2)


@pytest.fixture
def lone_atom() -> Atoms:
    """One oxygen atom in empty space: a graph without edges."""
    return Atoms("O", positions=[[0.1, 0.2, 0.3]])


@pytest.fixture
def structures(crystal: Atoms, alloy: Atoms, molecule: Atoms, lone_atom: Atoms) -> list[Atoms]:
    """One of each of the above."""
    return [crystal, alloy, molecule, lone_atom]


def rattled(atoms: Atoms, seed: int, sigma: float = 0.05) -> Atoms:
    atoms.positions += sigma * np.random.default_rng(seed).normal(size=atoms.positions.shape)
    return atoms

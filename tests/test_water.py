"""The water in the package: what the README of its folder promises."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

import transfermium as tm
from transfermium import waters
from transfermium.graph import Cutoff
from transfermium.molecules import molecules
from transfermium.observables import density, rdf

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(waters.__file__).parent
FRAMES = {("flexible", 64): 200, ("rigid", 64): 100, ("flexible", 258): 20, ("rigid", 258): 20}
BOXES = {box: tm.water(*box) for box in FRAMES}
every_box = pytest.mark.parametrize("box", BOXES, ids=lambda box: f"{box[0]}-{box[1]}")


def geometry(frames: list[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of bonds in Å, (n_molecules, 2), and angles in degrees, (n_molecules,)."""
    o, *hs = np.concatenate([atoms.positions.reshape(-1, 3, 3) for atoms in frames]).swapaxes(0, 1)
    bonds = np.stack([h - o for h in hs], axis=1)
    lengths = np.linalg.norm(bonds, axis=2)
    return lengths, np.degrees(np.arccos((bonds[:, 0] * bonds[:, 1]).sum(axis=1) / lengths.prod(axis=1)))


@every_box
def test_frames_and_molecules_are_as_many_as_promised(box: tuple[str, int]) -> None:
    frames = BOXES[box]
    assert len(frames) == FRAMES[box]
    for k, atoms in enumerate(frames):
        assert atoms.get_chemical_symbols() == ["O", "H", "H"] * box[1] and atoms.pbc.all() and atoms.calc is None
        assert atoms.info == {"source": "TIP3P", "rigid": box[0] == "rigid", "frame": k}
        assert set(atoms.arrays) == {"numbers", "positions"}


@every_box
def test_the_density_is_that_of_water(box: tuple[str, int]) -> None:
    for atoms in BOXES[box]:
        assert float(density(atoms.get_masses(), atoms.get_volume())) == pytest.approx(0.997, abs=1e-5)


@every_box
def test_molecules_are_whole_and_bonds_find_them(box: tuple[str, int]) -> None:
    for atoms in BOXES[box][::10]:
        scaled = atoms.get_scaled_positions(wrap=False)[::3]
        assert scaled.min() > -1e-5 and scaled.max() < 1 + 1e-5
        found = molecules(atoms)
        assert found.sizes.tolist() == [3] * box[1]
        assert (found.owner.reshape(-1, 3) == found.owner[::3, None]).all()
        np.testing.assert_allclose(found.positions - found.positions[::3].repeat(3, 0), bonds_of(atoms), atol=1e-9)


def bonds_of(atoms: Atoms) -> np.ndarray:
    return np.asarray(atoms.positions - atoms.positions[::3].repeat(3, axis=0))


@pytest.mark.parametrize("n", waters.MOLECULES)
def test_rigid_molecules_are_those_of_tip3p(n: int) -> None:
    lengths, angles = geometry(BOXES["rigid", n])
    assert np.abs(lengths - 0.9572).max() < 2e-4  # positions have four decimals
    assert np.abs(angles - 104.52).max() < 0.02
    assert lengths.mean() == pytest.approx(0.9572, abs=2e-6)
    assert angles.mean() == pytest.approx(104.52, abs=2e-4)


@pytest.mark.parametrize("n", waters.MOLECULES)
def test_flexible_molecules_vibrate_as_classical_springs_at_300_kelvin(n: int) -> None:
    """kT over the force constants of tip3p.xml (kJ/mol/nm² and kJ/mol/rad²), about means that the liquid shifts."""
    kt = 8.314462618e-3 * 300
    lengths, angles = geometry(BOXES["flexible", n])
    assert lengths.std() == pytest.approx(10 * np.sqrt(kt / 462750.4), rel=0.05)
    assert np.radians(angles).std() == pytest.approx(np.sqrt(kt / 836.8), rel=0.15)
    assert 0.957 < lengths.mean() < 0.98 and 101 < angles.mean() < 108
    assert lengths.min() > 0.82 and lengths.max() < 1.13


@every_box
def test_no_molecules_overlap(box: tuple[str, int]) -> None:
    for atoms in BOXES[box]:
        near = Cutoff(2.5).neighbors(atoms)
        lengths, ends = near.lengths(atoms), np.stack([near.senders, near.receivers])
        assert lengths[ends[0] // 3 != ends[1] // 3].min() > 1.3
        assert lengths[(atoms.numbers[ends] == 8).all(axis=0)].min(initial=2.5) > 2.2


@every_box
def test_oxygens_are_where_those_of_liquid_water_are(box: tuple[str, int]) -> None:
    """TIP3P: a first peak of about 2.8 at 2.76 Å, and next to no structure beyond it (10.1063/1.445869)."""
    frames = BOXES[box]
    found = rdf(np.stack([a.positions[::3] for a in frames]), [a.cell.array for a in frames], [8] * box[1], radius=6.0)
    g = found.mean()["O-O"]
    top = g > 0.85 * g.max()
    assert 2.72 < np.average(found.r[top], weights=g[top]) < 2.82
    assert 2.4 < g.max() < 3.2
    assert g[found.r < 2.3].max() < 0.01
    assert g[(found.r > 5) & (found.r < 6)].mean() == pytest.approx(1.0, abs=0.06)


@every_box
def test_molecules_turn_between_frames_and_forget_where_they_pointed(box: tuple[str, int]) -> None:
    """The cosine of the angle between a dipole and itself, as in the README of the folder."""
    dipoles = [bonds_of(atoms).reshape(-1, 3, 3).sum(axis=1) for atoms in BOXES[box]]
    units = [dipole / np.linalg.norm(dipole, axis=1, keepdims=True) for dipole in dipoles]
    assert np.mean([(a * b).sum(axis=1).mean() for a, b in pairwise(units)]) < 0.7
    assert abs(np.mean([(a * b).sum(axis=1).mean() for a, b in zip(units, units[8:], strict=False)])) < 0.15


def test_a_loss_that_knows_the_rigid_molecule_alone_is_that_of_the_paper() -> None:
    assert tm.MaskAtoms().floor(BOXES["rigid", 64]) == pytest.approx(0.479, abs=0.002)
    assert 0.49 < tm.MaskAtoms().floor(BOXES["flexible", 64]) < 0.52  # vibrations blur it


def test_other_water_is_refused() -> None:
    with pytest.raises(tm.InputError, match="flexible and rigid"):
        tm.water("heavy")
    with pytest.raises(tm.InputError, match="64 and 258"):
        tm.water("rigid", 100)


def test_all_of_it_ships_and_is_small() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "transfermium"
    ]
    data = [file for file in FOLDER.iterdir() if file.suffix in (".xz", ".md")]
    assert len(data) == len(FRAMES) + 1
    assert sum(file.stat().st_size for file in data) < 2e6
    for file in data:
        assert any(fnmatch(f"waters/{file.name}", pattern) for pattern in patterns)

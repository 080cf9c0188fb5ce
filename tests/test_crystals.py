"""The crystals in the package: what the README of their folder promises."""

import numpy as np
import pytest
from ase import Atoms

import transfermium as tm

PBE, R2SCAN = tm.crystals("PBE"), tm.crystals("r2SCAN")


def test_there_are_many_materials_at_both_levels() -> None:
    materials = {atoms.info["material"] for atoms in PBE}
    assert len(materials) >= 36
    assert materials == {atoms.info["material"] for atoms in R2SCAN}


def test_no_test_material_is_in_training_at_either_level() -> None:
    train, test = (
        {compound(a) for level in ("PBE", "r2SCAN") for a in tm.crystals(level, s)} for s in ("train", "test")
    )
    assert len(test) == 10
    assert not train & test


def compound(atoms: Atoms) -> str:
    return atoms.symbols.formula.reduce()[0].format("metal")


def test_every_element_of_a_test_material_is_in_training() -> None:
    for level in ("PBE", "r2SCAN"):
        seen = {s for atoms in tm.crystals(level, "train") for s in atoms.symbols}
        assert {s for atoms in tm.crystals(level, "test") for s in atoms.symbols} <= seen


def test_labels_are_there_and_sane() -> None:
    for atoms in [*PBE, *R2SCAN]:
        assert 2 <= len(atoms) <= 8
        assert np.isfinite(atoms.get_potential_energy())
        assert np.abs(atoms.get_forces().sum(axis=0)).max() < 1e-6
        assert np.abs(atoms.get_forces()).max() < 30
    assert all(np.abs(atoms.get_stress()).max() < 1 for atoms in PBE)


def test_no_two_frames_are_the_same() -> None:
    frames = {atoms.positions.tobytes() for atoms in [*PBE, *R2SCAN]}
    assert len(frames) == len(PBE) + len(R2SCAN)


def test_the_pbe_stress_is_the_strain_derivative_of_the_energy_within_the_set() -> None:
    """Frames of one material under compression are higher in pressure: the sign of the stress is ASE's."""
    pressures, volumes = [], []
    for material in ("MgO", "NaCl", "Si"):
        frames = [atoms for atoms in PBE if atoms.info["material"] == material]
        volume = np.array([atoms.get_volume() for atoms in frames])
        pressure = np.array([-atoms.get_stress()[:3].mean() for atoms in frames])
        volumes += list(volume / volume.mean() - 1)
        pressures += list((pressure - pressure.mean()) / pressure.std())
    assert np.corrcoef(volumes, pressures)[0, 1] < -0.7


def test_other_levels_and_splits_are_refused() -> None:
    with pytest.raises(tm.InputError, match="r2SCAN"):
        tm.crystals("HSE")
    with pytest.raises(tm.InputError, match="train and test"):
        tm.crystals("PBE", "valid")

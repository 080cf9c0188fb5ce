"""A model in ASE: the same numbers, honest refusals, and dynamics that conserve energy."""

import copy
import pickle

import numpy as np
import pytest
from ase import units
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.stress import full_3x3_to_voigt_6_stress

import transfermium as tm
from tests.alloys import QUICK, alloys, gap_model, painn, potential
from transfermium.graph import to_graph


@pytest.fixture
def atoms():
    atoms = alloys(1, seed=1)[0].copy()
    atoms.calc = tm.Calculator(potential())
    return atoms


def test_it_says_what_the_model_says(atoms):
    outputs = potential()(to_graph([atoms], potential().backbone.edges))
    assert atoms.get_potential_energy() == pytest.approx(float(outputs["energy"][0]), rel=1e-7)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert atoms.get_forces() == pytest.approx(outputs["forces"].numpy(), abs=1e-6)
    assert atoms.get_stress() == pytest.approx(full_3x3_to_voigt_6_stress(outputs["stress"][0].numpy()), abs=1e-7)


def test_a_file_is_a_model(atoms, tmp_path):
    potential().save(tmp_path / "model.safetensors")
    energy = atoms.get_potential_energy()
    atoms.calc = tm.Calculator(tmp_path / "model.safetensors")
    assert atoms.get_potential_energy() == energy


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_copy_says_the_same(atoms, copied, used):
    if used:
        atoms.get_stress()
    expected = atoms.copy()
    expected.calc, atoms.calc = atoms.calc, copied(atoms.calc)
    for shift in (0.0, 0.01, 0.5):
        for one in (atoms, expected):
            one.positions[0, 0] += shift
        assert atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy(), rel=1e-6)
        assert atoms.get_forces() == pytest.approx(expected.get_forces(), abs=1e-6)
    assert copy.deepcopy(atoms).get_potential_energy() == atoms.get_potential_energy()


def test_results_follow_the_atoms(atoms):
    before = atoms.get_potential_energy()
    atoms.positions[0, 0] += 0.1
    moved = atoms.get_potential_energy()
    atoms.set_cell(atoms.cell * 1.02, scale_atoms=True)
    assert len({before, moved, atoms.get_potential_energy()}) == 3


def test_forces_are_the_slope_of_the_energy(atoms):
    model = tm.pretrain(alloys(4), tm.Potential(), painn(), steps=5, lr=0.01, dtype="float64", **QUICK)
    atoms.calc = tm.Calculator(model)
    force, energies = atoms.get_forces()[2, 1], []
    for step in (1e-4, -1e-4):
        moved = atoms.copy()
        moved.calc = atoms.calc
        moved.positions[2, 1] += step
        energies.append(moved.get_potential_energy())
    assert force == pytest.approx((energies[1] - energies[0]) / 2e-4, abs=1e-6)


def test_elements_never_seen_are_refused_unless_allowed(atoms):
    atoms.numbers[0] = 47
    with pytest.raises(tm.InputError, match=r"never saw Ag: .* allow_unseen=True"):
        atoms.get_potential_energy()
    atoms.calc = tm.Calculator(potential(), allow_unseen=True)
    assert np.isfinite(atoms.get_potential_energy())


def test_molecules_have_energy_and_forces_but_no_stress():
    water = molecule("H2O")
    water.calc = tm.Calculator(potential(), allow_unseen=True)
    assert np.isfinite(water.get_potential_energy()) and water.get_forces().shape == (3, 3)
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        water.get_stress()


def test_what_the_model_has_not_is_not_implemented():
    objective = tm.Potential(energy=1.0, forces=0.0, stress=0.0, conservative=False)
    atoms = alloys(1)[0]
    atoms.calc = tm.Calculator(tm.pretrain(alloys(4), objective, painn(), steps=1, **QUICK))
    assert np.isfinite(atoms.get_potential_energy())
    with pytest.raises(PropertyNotImplementedError, match="no forces"):
        atoms.get_forces()


@pytest.mark.parametrize("objective", [tm.Denoise(0.1), tm.Property("gap")], ids=["noise", "property"])
def test_a_model_without_energies_is_refused(objective):
    model = gap_model() if isinstance(objective, tm.Property) else None
    model = model or tm.pretrain(alloys(4), objective, painn(), steps=1, **QUICK)
    with pytest.raises(tm.InputError, match="predicts no energy"):
        tm.Calculator(model)


def test_dynamics_conserve_energy(atoms):
    momenta = np.random.default_rng(0).normal(size=(4, 3)) * np.sqrt(atoms.get_masses() * units.kB * 1000)[:, None]
    atoms.set_momenta(momenta)
    dynamics = VelocityVerlet(atoms, timestep=1.0 * units.fs)
    kinetic, total = [], []
    for _ in range(100):
        dynamics.run(1)
        kinetic.append(atoms.get_kinetic_energy())
        total.append(atoms.get_total_energy())
    assert np.ptp(kinetic) > 0.05  # eV: something happens
    assert np.ptp(total) < 0.02 * np.ptp(kinetic)


def test_relaxation_finds_lower_energies(atoms):
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=0.1, steps=10)
    assert atoms.get_potential_energy() < before

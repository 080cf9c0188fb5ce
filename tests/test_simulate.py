"""Dynamics and relaxations: physics as it is known, and the same to the last bit after a kill."""

from __future__ import annotations

import json
import re
import warnings
from functools import cache
from pathlib import Path

import ase.io
import numpy as np
import pytest
import scipy.linalg
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import all_changes
from ase.constraints import (
    ExternalForce,
    FixAtoms,
    FixBondLength,
    FixCartesian,
    FixCartesianParametricRelations,
    FixCom,
    FixedPlane,
    FixSubsetCom,
    Hookean,
)
from ase.neighborlist import neighbor_list

import transfermium as tm
from tests.alloys import QUICK, alloys, gap_model, painn, potential
from transfermium import cli, observables
from transfermium.data import resolve
from transfermium.model import read_tensors
from transfermium.report import Page
from transfermium.simulate import dynamics
from transfermium.simulate.relax import _Relaxed, relaxation_summary

SHORT = {"timestep": "1fs", "time": "40steps", "every": "5steps", "device": "cpu", "verbose": False}
ENGINES = {
    "nve": {"ensemble": "nve"},
    "langevin": {"thermostat": "langevin"},
    "bussi": {"thermostat": "bussi"},
    "nose-hoover": {"thermostat": "nose-hoover"},
    "npt": {"ensemble": "npt", "pressure": "1GPa"},
    "npt, shape": {"ensemble": "npt", "pressure": "1GPa", "shape": True},
}
each_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


@pytest.fixture
def atoms():
    return alloys(1, seed=1)[0].copy()


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    """Drawn only where a test looks at the page: they take half a second."""
    if request.cls is not TestPage:
        monkeypatch.setattr(Page, "figure", lambda self, fig, caption: self)


@cache
def direct():
    return tm.pretrain(alloys(8), tm.Potential(conservative=False), painn(), steps=2, **QUICK)


class TestPhysics:
    def test_nve_conserves_energy(self, atoms, tmp_path):
        result = tm.md(potential(), atoms, tmp_path / "run", ensemble="nve", **{**SHORT, "time": "120steps"})
        kinetic, total = (np.array(result["log"][name]) for name in ("kinetic_eV", "total_eV"))
        assert np.ptp(kinetic) > 0.02  # eV: something happens
        assert np.ptp(total) < 0.03 * np.ptp(kinetic)

    @pytest.mark.parametrize(
        "engine", [e for e in ENGINES.values() if e.keys() != {"ensemble"} and e != ENGINES["langevin"]]
    )
    def test_what_a_thermostat_gives_is_counted(self, engine, atoms, tmp_path):
        run = {**SHORT, "time": "100steps", "tau": "20fs"}
        run |= {"tau_pressure": "100fs"} if "pressure" in engine else {}
        log = tm.md(potential(), atoms, tmp_path / "run", **engine, **run)["log"]
        assert np.ptp(log["total_eV"]) > 0.02
        assert np.ptp(log["conserved_eV"]) < 0.1 * np.ptp(log["total_eV"])
        assert (np.ptp(log["volume_A3"]) > 0.01) == ("pressure" in engine)

    @pytest.mark.parametrize("thermostat", ["langevin", "bussi", "nose-hoover"])
    def test_thermostats_reach_their_temperature_in_a_harmonic_crystal(self, thermostat):
        """Of 8 atoms, where a wrong number of degrees of freedom is wrong by an eighth."""
        atoms = bulk("Al", a=4.05) * 2
        atoms.calc = Springs(atoms)
        rng = np.random.default_rng(0)
        settings = dynamics.settings_of("nvt", thermostat, 400.0, None, "4fs", "50fs")
        freedoms = dynamics.freedoms_of(atoms, settings.engine)
        assert freedoms == (24 if thermostat == "langevin" else 21)
        dynamics._draw_momenta(atoms, 100.0, freedoms, rng)
        engine = dynamics._engine(atoms, settings, rng, freedoms)
        kinetic, stored = [], []
        for step in range(4000):
            engine.step()
            if step > 300:
                kinetic.append(atoms.get_kinetic_energy())
                stored.append(atoms.get_potential_energy())
        assert observables.temperature(np.mean(kinetic), freedoms) == pytest.approx(400, rel=0.06)
        assert observables.temperature(np.mean(stored), 21) == pytest.approx(400, rel=0.1)  # equipartition

    @pytest.mark.parametrize("shape", [False, True])
    def test_only_where_asked_the_cell_changes_its_shape_and_it_never_turns(self, shape, atoms, tmp_path):
        run = {**SHORT, "time": "60steps", "tau_pressure": "1ps"}
        result = tm.md(potential(), atoms, tmp_path / "run", ensemble="npt", pressure="1GPa", shape=shape, **run)
        final = ase.io.read(tmp_path / "run" / "final.extxyz")
        strain = np.linalg.solve(atoms.cell.array, final.cell.array)
        assert strain == pytest.approx(strain.T, abs=1e-6)
        sheared = np.abs(strain - np.trace(strain) / 3 * np.eye(3)).max()
        assert (sheared > 1e-4) == shape and (sheared < 1e-9) != shape
        assert list(result["cell"]) == ["a", "b", "c", "alpha", "beta", "gamma"][: 6 if shape else 3]

    def test_random_momenta_have_exactly_the_temperature_and_move_nothing(self, atoms, tmp_path):
        log = tm.md(potential(), atoms, tmp_path / "run", ensemble="nve", temperature=250, **SHORT)["log"]
        assert log["temperature_K"][0] == pytest.approx(250)
        first = ase.io.read(tmp_path / "run" / "trajectory.extxyz", 0)
        assert first.get_momenta().sum(axis=0) == pytest.approx(0, abs=1e-6)

    def test_given_momenta_are_kept(self, atoms, tmp_path):
        tm.md(potential(), atoms, tmp_path / "warm", **SHORT)
        log = tm.md(potential(), tmp_path / "warm" / "final.extxyz", tmp_path / "run", ensemble="nve", **SHORT)["log"]
        final = ase.io.read(tmp_path / "warm" / "final.extxyz")
        assert log["kinetic_eV"][0] == pytest.approx(final.get_kinetic_energy(), rel=1e-4)

    @pytest.mark.parametrize("name", ["momenta", "velo", None])
    def test_it_says_where_momenta_are_random(self, name, atoms, tmp_path, capsys):
        if name:
            atoms.set_array(name, np.random.default_rng(0).normal(size=(4, 3)))
        tm.md(potential(), atoms, tmp_path / "run", temperature=250, **{**SHORT, "verbose": True})
        said = " ".join(capsys.readouterr().err.split())
        assert ("no momenta: it begins with random ones of 250 K" in said) == (name != "momenta")
        assert ("'velo' are not used: give them to atoms.set_velocities" in said) == (name == "velo")

    def test_given_momenta_of_atoms_that_are_held_are_no_heat(self, atoms, tmp_path):
        atoms.set_momenta(3 * np.random.default_rng(0).normal(size=(4, 3)))
        atoms.set_constraint(FixAtoms([0, 1]))
        run = {**SHORT, "time": "20steps", "every": "1steps"}
        log = tm.md(potential(), atoms, tmp_path / "run", ensemble="nve", **run)["log"]
        free = (atoms.get_momenta()[2:] ** 2 / atoms.get_masses()[2:, None]).sum() / 2
        assert log["kinetic_eV"][0] == pytest.approx(free)
        assert np.ptp(log["total_eV"]) < 0.1 * (atoms.get_kinetic_energy() - free)

    def test_molecules_do_not_turn(self, tmp_path):
        cluster = Atoms("Cu3Au", [[0, 0, 0], [2.5, 0, 0], [0, 2.6, 0], [1.2, 1.2, 1.9]])
        result = tm.md(potential(), cluster, tmp_path / "run", ensemble="nve", most_force=500, **SHORT)
        assert result["degrees of freedom"] == 6
        momenta = ase.io.read(tmp_path / "run" / "trajectory.extxyz", 0).get_momenta()
        middle = cluster.positions - cluster.get_center_of_mass()
        assert np.cross(middle, momenta).sum(axis=0) == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize("periodic", [True, False])
    @pytest.mark.parametrize("engine", ["nve", "bussi", "nose-hoover"])
    def test_the_motion_of_the_whole_is_no_heat(self, engine, periodic, tmp_path, capsys):
        """Langevin leaves it behind: thermostats take it away, without one it is counted."""
        atoms = Atoms("Cu3Au", [[0, 0, 0], [2.5, 0, 0], [0, 2.6, 0], [1.2, 1.2, 1.9]], cell=3 * [5.2], pbc=periodic)
        inner = atoms.copy()
        inner.set_momenta(np.random.default_rng(0).normal(size=(4, 3)))
        dynamics.hold_still(inner)
        spin = 0.02 * np.cross([0, 0, 1], atoms.positions - atoms.get_center_of_mass())
        atoms.set_momenta(inner.get_momenta() + atoms.get_masses()[:, None] * ([0.1, 0, 0] + (not periodic) * spin))
        run = {**SHORT, "most_force": 500, "verbose": True}
        result = tm.md(potential(), atoms, tmp_path / "run", **ENGINES[engine], **run)
        said = "The whole moved" in " ".join(capsys.readouterr().err.split())
        kinetic = result["log"]["kinetic_eV"][0]
        if engine == "nve":
            assert result["degrees of freedom"] == 12 and not said
            assert kinetic == pytest.approx(atoms.get_kinetic_energy())
        else:
            assert result["degrees of freedom"] == (9 if periodic else 6) and said
            assert kinetic == pytest.approx(inner.get_kinetic_energy())

    @pytest.mark.parametrize("periodic", [True, False])
    def test_nor_is_it_where_bonds_are_fixed(self, periodic, tmp_path):
        atoms = Atoms("Cu3Au", [[0, 0, 0], [2.5, 0, 0], [0, 2.6, 0], [1.2, 1.2, 1.9]], cell=3 * [5.2], pbc=periodic)
        atoms.set_momenta(np.random.default_rng(0).normal(size=(4, 3)) + atoms.get_masses()[:, None] * [0.1, 0, 0])
        atoms.set_constraint(FixBondLength(0, 1))
        result = tm.md(potential(), atoms, tmp_path / "run", thermostat="bussi", most_force=500, **SHORT)
        assert result["degrees of freedom"] == (8 if periodic else 5)
        final = ase.io.read(tmp_path / "run" / "final.extxyz")
        assert final.get_momenta().sum(axis=0) == pytest.approx(0, abs=1e-5)
        assert final.get_distance(0, 1, mic=periodic) == pytest.approx(2.5, abs=1e-6)

    @pytest.mark.parametrize(
        ("constraint", "freedoms"),
        [
            (FixAtoms([0]), 9),
            ([FixAtoms([0]), FixCartesian(0), FixCartesian([0, 1], (True, False, False))], 8),
            (FixedPlane(0, [0, 0, 1]), 11),
            (Hookean(0, [0.0, 0.0, 0.0], 5.0, rt=1.0), 12),
            (Hookean(0, 1, 5.0, rt=3.0), 9),
            (ExternalForce(0, 1, 0.1), 9),
            (FixCom(), 9),
            (FixSubsetCom([0, 1]), 9),
        ],
        ids=lambda one: type(one).__name__,
    )
    def test_constraints_that_tie_atoms_to_places_hold_the_whole(self, constraint, freedoms, atoms):
        atoms.set_constraint(constraint)
        assert dynamics.freedoms_of(atoms, "bussi") == freedoms

    def test_linear_molecules_are_held_still_without_a_word(self, recwarn):
        atoms = Atoms("CO2", [[0, 0, 0], [1.2, 0, 0], [-1.2, 0, 0]])
        dynamics._draw_momenta(atoms, 300.0, 4, np.random.default_rng(0))
        assert np.cross(atoms.positions, atoms.get_momenta()).sum(axis=0) == pytest.approx(0, abs=1e-9)
        assert observables.temperature(atoms.get_kinetic_energy(), 4) == pytest.approx(300) and not recwarn


class TestResuming:
    @each_engine
    def test_after_a_kill_it_is_the_same_to_the_last_bit(self, engine, atoms, tmp_path, monkeypatch):
        monkeypatch.setattr(dynamics, "SAVED", 10)
        tm.md(potential(), atoms, tmp_path / "whole", **engine, **SHORT)
        killed_at(monkeypatch, 25, lambda: tm.md(potential(), atoms, tmp_path / "run", **engine, **SHORT))
        assert int(json.loads(read_tensors(tmp_path / "run" / "state.safetensors")[1]["state"])["step"]) == 20
        tm.md(potential(), atoms, tmp_path / "run", **engine, **SHORT)
        for name in ("log.csv", "trajectory.extxyz", "final.extxyz"):
            assert (tmp_path / "run" / name).read_text() == (tmp_path / "whole" / name).read_text()
        states = [read_tensors(tmp_path / folder / "state.safetensors")[0] for folder in ("run", "whole")]
        assert all(states[0][name].equal(states[1][name]) for name in states[1])

    @pytest.mark.parametrize("engine", ["bussi", "nose-hoover"])
    def test_a_linear_molecule_that_has_bent_goes_on_with_the_same_degrees_of_freedom(self, engine, tmp_path):
        line, run = Atoms("Cu3", [[0, 0, 0], [2.4, 0, 0], [4.8, 0, 0]]), {**SHORT, **ENGINES[engine], "tau": "10fs"}
        tm.md(potential(), line, tmp_path / "run", **{**run, "time": "20steps"})
        for folder in ("run", "whole"):
            result = tm.md(potential(), line, tmp_path / folder, **run)
            assert result["degrees of freedom"] == 4
        assert (tmp_path / "run" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()

    def test_a_longer_time_goes_on(self, atoms, tmp_path, monkeypatch):
        monkeypatch.setattr(dynamics, "SAVED", 20)
        for time in ("40steps", "60steps"):
            result = tm.md(potential(), atoms, tmp_path / "run", **{**SHORT, "time": time})
        tm.md(potential(), atoms, tmp_path / "whole", **{**SHORT, "time": "60steps"})
        assert (tmp_path / "run" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()
        assert result["steps"] == 60 and len(result["log"]["step"]) == 13

    def test_a_shorter_one_is_refused(self, atoms, tmp_path):
        tm.md(potential(), atoms, tmp_path / "run", **SHORT)
        with pytest.raises(tm.InputError, match=r"already holds 0\.04 ps"):
            tm.md(potential(), atoms, tmp_path / "run", **{**SHORT, "time": "20steps"})

    def test_another_simulation_is_refused(self, atoms, tmp_path):
        tm.md(potential(), atoms, tmp_path / "run", **SHORT)
        with pytest.raises(tm.InputError, match=r"another run: temperature was 300\.0 there and is 400\.0 now"):
            tm.md(potential(), atoms, tmp_path / "run", temperature=400, **SHORT)
        atoms.set_constraint(FixAtoms([0]))
        with pytest.raises(tm.InputError, match="another run: constraints was null there"):
            tm.md(potential(), atoms, tmp_path / "run", **SHORT)

    def test_constraints_that_files_cannot_hold_are_named(self, atoms, tmp_path, capsys):
        class Held(FixAtoms):
            todict = property()  # of one's own making, and without words for itself

        atoms.set_constraint([Held([0]), FixedPlane(1, [0, 0, 1])])
        tm.md(potential(), atoms, tmp_path / "run", **{**SHORT, "verbose": True})
        assert "FixedPlane, Held: obeyed here, but extended XYZ" in " ".join(capsys.readouterr().err.split())


class TestExplosions:
    def test_it_stops_at_the_step_and_atom_and_keeps_the_last_good_frame(self, atoms, tmp_path, capsys):
        run = {**SHORT, "timestep": "20fs", "tau": "200fs", "verbose": True}
        for _ in range(2):  # the same command says the same
            result = tm.md(potential(), atoms, tmp_path / "run", temperature=9000, most_force=20, **run)
            stopped = result["stopped"]
            assert stopped.startswith("the simulation exploded at step ") and "atom" in stopped
            assert "last_good.extxyz" in stopped
            assert "exploded" in " ".join(capsys.readouterr().err.split())
        good = ase.io.read(tmp_path / "run" / "last_good.extxyz")
        assert int(stopped.split("step ")[1].split()[0]) == good.info["step"] + 1
        good.calc = tm.Calculator(potential())
        assert np.linalg.norm(good.get_forces(), axis=1).max() < 20
        assert "exploded" in (tmp_path / "run" / "simulation.html").read_text()

    def test_there_is_one_last_frame(self, atoms, tmp_path, monkeypatch):
        tm.md(potential(), atoms, tmp_path / "run", **SHORT)
        longer = {**SHORT, "time": "60steps"}
        with monkeypatch.context() as patch:
            patch.setattr(dynamics.Simulation, "_what_is_wrong", lambda self: "bad" if self.step == 49 else None)
            assert "step 50" in tm.md(potential(), atoms, tmp_path / "run", **longer)["stopped"]
        assert [file.name for file in (tmp_path / "run").glob("*.extxyz")].count("final.extxyz") == 0
        assert ase.io.read(tmp_path / "run" / "last_good.extxyz").info["step"] == 49
        tm.md(potential(), atoms, tmp_path / "run", **longer)
        assert ase.io.read(tmp_path / "run" / "final.extxyz").info["step"] == 60
        assert not (tmp_path / "run" / "last_good.extxyz").exists()

    def test_a_volume_that_explodes_names_the_atom_with_the_largest_force(self, atoms, tmp_path, monkeypatch):
        monkeypatch.setattr(dynamics, "STRETCHED", 1.0001)
        run = {**SHORT, "ensemble": "npt", "pressure": "50GPa", "tau_pressure": "50fs"}
        stopped = tm.md(potential(), atoms, tmp_path / "run", **run)["stopped"]
        last_good = ase.io.read(tmp_path / "run" / "last_good.extxyz")
        begun = ase.io.read(tmp_path / "run" / "trajectory.extxyz", "0")
        assert last_good.info["step"] == begun.info["step"] and np.array_equal(last_good.cell, begun.cell)
        assert re.search(
            r"the volume is [\d.]+ times what it was, with the largest force on atom \d \((Cu|Au)\)", stopped
        )

    def test_a_cell_that_no_graph_can_be_made_of_names_the_atom_that_moved_farthest(self, atoms, tmp_path):
        run = {**SHORT, "ensemble": "npt", "pressure": "20000GPa", "tau_pressure": "50fs"}
        result = tm.md(potential(), atoms, tmp_path / "run", most_force=1e9, **run)
        assert re.search(r"atom \d \((Cu|Au)\) moved by .* Å in one step", result["stopped"])
        assert "is it in Å" not in result["stopped"]
        last_good = ase.io.read(tmp_path / "run" / "last_good.extxyz")
        assert last_good.get_volume() > atoms.get_volume() / 8

    def test_a_structure_that_begins_so_is_refused(self, atoms, tmp_path):
        with pytest.raises(tm.InputError, match=r"begins with a force of .* relax it first"):
            tm.md(potential(), atoms, tmp_path / "run", most_force=1e-3, **SHORT)

    def test_an_atom_that_leaves_is_seen(self, tmp_path):
        pair = Atoms("Cu3", [[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0]])
        pair.set_momenta(pair.get_masses()[:, None] * np.array([[0, 0, 0], [3.0, 0, 0], [0, 0, 0]]) / 10)
        run = {**SHORT, "time": "2000steps", "timestep": "2fs"}
        stopped = tm.md(potential(), pair, tmp_path / "run", ensemble="nve", most_force=1e4, **run)["stopped"]
        assert "has left all others: none is within 4 Å" in stopped or "temperature" in stopped


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ensemble": "nph"}, "no ensemble 'nph'"),
            ({"thermostat": "andersen"}, "no thermostat 'andersen'"),
            ({"ensemble": "nve", "thermostat": "bussi"}, "leave out bussi"),
            ({"ensemble": "npt"}, "a pressure, such as 1bar"),
            ({"pressure": "1bar"}, "a pressure, such as 1bar"),
            ({"ensemble": "npt", "pressure": "1"}, "'1' is no pressure"),
            ({"shape": True}, "leave shape out"),
            ({"timestep": "1"}, "timestep is '1', which is no time"),
            ({"every": "1.5fs"}, "every is 1.5fs, which is no whole number of steps of 1 fs"),
            ({"time": "manysteps"}, "no number of steps"),
            ({"temperature": -1}, "makes no sense"),
            ({"tau": "2fs"}, "less than five timesteps"),
            ({"tau": "50fs", "ensemble": "nve"}, "leave tau out"),
            ({"tau_pressure": "2ps"}, "leave tau_pressure"),
            ({"tau_pressure": "2", "ensemble": "npt", "pressure": "1bar"}, "tau_pressure is '2', which is no time"),
            ({"skip": "40fs"}, "leave something"),
            ({"time": "0ps"}, "time is 0ps, but must be a step of 1 fs at least"),
            ({"skip": "-5steps"}, "no number of steps"),
            ({"time": "nanps"}, "which is no time"),
            ({"time": "infps"}, "which is no time"),
            ({"ensemble": "npt", "pressure": "nanGPa"}, "is no pressure"),
        ],
    )
    def test_settings(self, options, message, atoms, tmp_path):
        with pytest.raises(tm.InputError, match=message):
            tm.md(potential(), atoms, tmp_path / "run", **{**SHORT, **options})
        assert not (tmp_path / "run").exists()

    def test_elements_never_seen(self, atoms, tmp_path):
        atoms.numbers[0] = 47
        with pytest.raises(tm.InputError, match="has Ag, which the model never saw"):
            tm.md(potential(), atoms, tmp_path / "run", **SHORT)
        with pytest.raises(tm.InputError, match="structure 1 has Ag"):
            tm.relax(potential(), [*alloys(1), atoms], verbose=False)

    def test_models_without_forces(self, atoms, tmp_path):
        with pytest.raises(tm.InputError, match="no energy"):
            tm.md(gap_model(), atoms, tmp_path / "run", **SHORT)

    def test_cells_that_are_none(self, atoms, tmp_path):
        atoms.pbc = False
        with pytest.raises(tm.InputError, match="npt needs a structure that is periodic"):
            tm.md(potential(), atoms, tmp_path / "run", **ENGINES["npt"], **SHORT)
        with pytest.raises(tm.InputError, match="structure 0 is not periodic"):
            tm.relax(potential(), [atoms], cell=True)

    def test_constraints_of_which_nobody_knows_what_they_take(self, atoms, tmp_path):
        atoms.set_constraint(FixCartesianParametricRelations.from_expressions([0], ["x", "y"], ["x", "y", "0"]))
        with pytest.raises(tm.InputError, match="cannot count what FixCartesianParametricRelations holds: remove it"):
            tm.md(potential(), atoms, tmp_path / "run", **SHORT)
        assert not (tmp_path / "run").exists()

    def test_files_of_several_structures(self, tmp_path):
        ase.io.write(tmp_path / "all.extxyz", alloys(3))
        with pytest.raises(tm.InputError, match="has 3 structures: choose one with index"):
            tm.md(potential(), tmp_path / "all.extxyz", tmp_path / "run", **SHORT)
        tm.md(potential(), tmp_path / "all.extxyz", tmp_path / "run", index=-1, **SHORT)

    def test_direct_forces_are_warned_of(self, atoms, tmp_path, capsys):
        run = {**SHORT, "verbose": True}
        result = tm.md(direct(), atoms, tmp_path / "run", ensemble="nve", **run)
        assert "no derivatives of its energy" in " ".join(capsys.readouterr().err.split())
        assert result["forces"] == "direct"


class TestPage:
    def test_numbers_and_figures(self, atoms, tmp_path):
        result = tm.md(potential(), atoms * (2, 2, 2), tmp_path / "run", reference=[atoms * (2, 2, 2)], **SHORT)
        page = (tmp_path / "run" / "simulation.html").read_text()
        assert page.count("<svg") == 7 and "http" not in page.split("<footer>")[0].replace("http-equiv", "")
        assert json.loads((tmp_path / "run" / "simulation.json").read_text()) == result
        assert set(result["reference"]["errors"]) == {"Au-Au", "Au-Cu", "Cu-Cu"}
        assert result["density"]["value"] == pytest.approx(
            atoms.get_masses().sum() / atoms.get_volume() * 1.66054, rel=1e-4
        )

    def test_atoms_that_are_fixed_diffuse_nowhere(self, atoms, tmp_path):
        atoms.numbers[:] = [29, 29, 79, 29]
        atoms.set_constraint([FixAtoms([0]), FixCartesian(2)])
        result = tm.md(potential(), atoms, tmp_path / "run", **SHORT)
        frames = ase.io.read(tmp_path / "run" / "trajectory.extxyz", ":")
        moved = (frames[-1].positions - frames[0].positions)[[1, 3]]
        assert result["msd"]["Cu"][-1] == pytest.approx(np.square(moved).sum(axis=1).mean(), rel=1e-4)
        assert list(result["diffusion"]) == ["Cu"] and list(result["msd"]) == ["lag", "Cu"]

    def test_it_says_how_long_it_ran_and_a_density_that_is_fixed_has_no_interval(self, atoms, tmp_path):
        options = {**SHORT, "time": "7steps", "every": "5steps", "skip": "0steps", "timestep": "2fs"}
        result = tm.md(potential(), atoms, tmp_path / "run", **options)
        assert result["log"]["time_ps"][-1] == pytest.approx(0.010)
        assert "to its end: 0.014 ps" in (tmp_path / "run" / "simulation.html").read_text()
        assert result["density"]["value"] > 1 and result["density"]["low"] is None

    def test_what_is_skipped_is_not_averaged(self, atoms, tmp_path):
        result = tm.md(potential(), atoms, tmp_path / "run", skip="20steps", **SHORT)
        assert result["averaged_ps"] == pytest.approx(0.02)
        assert result["temperature"]["value"] == pytest.approx(np.mean(result["log"]["temperature_K"][4:]))

    def test_what_a_reference_cannot_be_compared_with_is_said(self, atoms, tmp_path, capsys):
        frames = [atoms * (2, 2, 2), Atoms("Cu2", [[0, 0, 0], [2.5, 0, 0]])]
        result = tm.md(potential(), atoms, tmp_path / "run", reference=frames, **{**SHORT, "verbose": True})
        assert "1 of 2 frames of the reference are not periodic" in " ".join(capsys.readouterr().err.split())
        assert result["reference"]["frames"] == 1 and result["reference"]["uneven"] == ["Au-Au", "Cu-Cu"]
        assert "Au-Au, Cu-Cu: the reference has cells of another size" in (tmp_path / "run/simulation.html").read_text()
        same = tm.md(potential(), atoms, tmp_path / "same", reference=[atoms], **SHORT)
        assert same["reference"]["uneven"] == []

    def test_pairs_so_rare_that_the_reference_would_fail_itself_are_not_scored(self, tmp_path):
        """Two gold atoms in copper, at places of their own in each frame."""
        frames = []
        for seed in range(6):
            frames.append(bulk("Cu", a=3.8) * (3, 3, 3))
            frames[-1].numbers[np.random.default_rng(seed).permutation(27)[:2]] = 79
            frames[-1].rattle(0.1, seed=seed)
        result = tm.md(potential(), frames[0], tmp_path / "run", reference=frames, **SHORT)
        assert "Au-Au" in result["reference"]["noisy"] and "Cu-Cu" in result["reference"]["scored"]
        assert "they are not scored unless they are named" in (tmp_path / "run/simulation.html").read_text()
        asked = tm.md(potential(), frames[0], tmp_path / "asked", reference=frames, pairs=["Au-Au"], **SHORT)
        assert asked["reference"]["scored"] == ["Au-Au"] and asked["reference"]["noisy"] == []

        gold = [one[one.numbers == 79] for one in frames]
        gold[0].positions = frames[0].positions[:2]
        rare = tm.md(potential(), gold[0], tmp_path / "rare", reference=gold, **SHORT)
        assert rare["reference"]["scored"] == [] and "was not judged" in (tmp_path / "rare/simulation.html").read_text()

    def test_pairs_have_to_be_there(self, atoms, tmp_path):
        with pytest.raises(tm.InputError, match="do not both have H-O: choose pairs among"):
            tm.md(potential(), atoms, tmp_path / "run", reference=alloys(2), pairs=["O-H"], **SHORT)

    def test_a_pair_takes_two_atoms(self, tmp_path):
        lone, several = bulk("Cu"), bulk("Cu", cubic=True)
        for structure, reference in ((lone, lone), (lone, several), (several, lone)):
            with pytest.raises(tm.InputError, match="no pair of elements in common, which takes two atoms"):
                tm.md(potential(), structure, tmp_path / "run", reference=[reference], **SHORT)


class TestRelaxations:
    @pytest.mark.parametrize("optimizer", ["FIRE", "LBFGS"])
    def test_they_reach_fmax_and_lower_the_energy(self, optimizer, crystal):
        (atoms,) = tm.relax("small", [crystal], fmax=0.02, optimizer=optimizer, verbose=False)
        assert atoms.info["relaxed"] and atoms.info["relax_energy_change"] < 0
        assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 0.02
        again = atoms.copy()
        again.calc = tm.Calculator("small")
        assert again.get_forces() == pytest.approx(atoms.get_forces(), abs=1e-5)

    def test_cells_come_to_rest_too(self):
        (atoms,) = tm.relax(potential(), alloys(1), fmax=0.02, cell=True, steps=300, verbose=False)
        assert atoms.info["relaxed"]
        assert np.abs(atoms.get_stress()).max() * atoms.get_volume() < 0.1
        assert atoms.get_volume() != pytest.approx(alloys(1)[0].get_volume(), rel=1e-4)

    def test_of_the_logarithm_of_a_deformation_no_rounding_is_told(self, monkeypatch):
        """And nothing else is kept from being told."""
        logm = scipy.linalg.logm

        def warning(words):
            def told(matrix):
                warnings.warn(words, RuntimeWarning, stacklevel=2)
                return logm(matrix)

            monkeypatch.setattr(scipy.linalg, "logm", told)

        warning("logm result may be inaccurate, approximate err = 3e-13")
        tm.relax(potential(), alloys(1), cell=True, steps=3, verbose=False)
        warning("another one")
        with pytest.warns(RuntimeWarning, match="another one"):
            tm.relax(potential(), alloys(1), cell=True, steps=3, verbose=False)

    def test_labels_that_structures_came_with_give_way(self, tmp_path):
        atoms = alloys(1, seed=1)[0].copy()
        atoms.info |= {"energy": -1.0, "stress": np.zeros(6), "source": "mine"}
        atoms.arrays["forces"] = np.ones((len(atoms), 3))
        (relaxed,) = tm.relax(potential(), [atoms], tmp_path / "out.extxyz", steps=2, verbose=False)
        written = ase.io.read(tmp_path / "out.extxyz")
        assert written.info["source"] == "mine" and "energy" not in written.info
        assert type(relaxed.get_potential_energy()) is float
        assert written.get_potential_energy() == pytest.approx(relaxed.get_potential_energy(), abs=1e-6) != -1.0
        assert written.get_forces() == pytest.approx(relaxed.get_forces(), abs=1e-6)

    def test_labels_under_other_names_give_way_and_momenta_too(self, tmp_path):
        atoms = alloys(1, seed=1)[0].copy()
        atoms.info |= {"REF_energy": -1.0, "dft_stress": np.zeros(6), "virial": np.eye(3)}
        atoms.arrays["REF_forces"] = np.ones((len(atoms), 3))
        atoms.set_momenta(np.ones((len(atoms), 3)))
        (relaxed,) = tm.relax(potential(), [atoms], tmp_path / "out.extxyz", steps=2, verbose=False)
        written = tm.read(tmp_path / "out.extxyz")
        labels = resolve(written, ["energy", "forces", "stress"])
        assert labels["energy"].value(written[0]) == pytest.approx(relaxed.get_potential_energy(), abs=1e-6)
        assert labels["forces"].value(written[0]) == pytest.approx(relaxed.get_forces(), abs=1e-6)
        assert not any(entry.also_found for entry in labels.entries) and not written[0].has("momenta")

    def test_one_that_cannot_begin_does_not_stop_the_others(self, tmp_path, capsys):
        structures = [atoms.copy() for atoms in alloys(3)]
        structures[1].positions[1] = structures[1].positions[0]
        relaxed = tm.relax(potential(), structures, tmp_path / "out.extxyz", fmax=0.1)
        assert "two atoms at the same place" in relaxed[1].info["relax_trouble"]
        assert "relax_energy_change" not in relaxed[1].info and not relaxed[1].calc.results
        assert "2 of 3 structures reached 0.1 eV/Å; 1 fell apart" in " ".join(capsys.readouterr().err.split())
        assert len(tm.relax(potential(), structures, tmp_path / "out.extxyz", fmax=0.1, verbose=False)) == 3

    def test_other_constraints_make_other_relaxations(self, tmp_path):
        atoms = alloys(1)[0].copy()
        tm.relax(potential(), [atoms], tmp_path / "out.extxyz", steps=1, verbose=False)
        atoms.set_constraint(FixAtoms([0]))
        with pytest.raises(tm.InputError, match="holds other relaxations"):
            tm.relax(potential(), [atoms], tmp_path / "out.extxyz", steps=1, verbose=False)

    def test_what_ended_higher_is_counted(self):
        info = {"relaxed": True, "relax_energy_change": 0.2}
        text = relaxation_summary(
            [Atoms("Cu", info=info), Atoms("Cu", info={**info, "relax_energy_change": -0.1})], 0.05
        )
        assert text == "2 of 2 structures reached 0.05 eV/Å; 1 ended with a higher energy, at a saddle: use FIRE"

    def test_what_did_not_converge_is_counted(self, capsys):
        relaxed = tm.relax(potential(), alloys(3), fmax=1e-4, steps=1)
        assert not any(atoms.info["relaxed"] for atoms in relaxed)
        assert "0 of 3 structures reached 0.0001 eV/Å; 3 did not" in " ".join(capsys.readouterr().err.split())

    def test_the_same_command_goes_on(self, tmp_path, monkeypatch):
        run = {"fmax": 0.1, "device": "cpu", "verbose": False}
        tm.relax(potential(), alloys(4), tmp_path / "whole.extxyz", **run)

        append = _Relaxed.append

        def stop_at_two(self, atoms):
            if len(self.list.read_text().splitlines()) == 3:
                with self.out.open("a") as file:
                    file.write("4\nhalf of a struct")
                raise KeyboardInterrupt
            append(self, atoms)

        monkeypatch.setattr(_Relaxed, "append", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            tm.relax(potential(), alloys(4), tmp_path / "out.extxyz", **run)
        monkeypatch.setattr(_Relaxed, "append", append)
        relaxed = tm.relax(potential(), alloys(4), tmp_path / "out.extxyz", **run)
        assert (tmp_path / "out.extxyz").read_text() == (tmp_path / "whole.extxyz").read_text()
        assert len(relaxed) == 4 and all(bool(atoms.info["relaxed"]) for atoms in relaxed)
        with pytest.raises(tm.InputError, match="holds other relaxations"):
            tm.relax(potential(), alloys(4), tmp_path / "out.extxyz", **{**run, "fmax": 0.2})

    def test_other_files_are_not_touched(self, tmp_path):
        (tmp_path / "mine.extxyz").write_text("precious")
        with pytest.raises(tm.InputError, match="choose another file"):
            tm.relax(potential(), alloys(1), tmp_path / "mine.extxyz", verbose=False)
        assert (tmp_path / "mine.extxyz").read_text() == "precious"


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        potential().save("m.safetensors")
        ase.io.write("a.extxyz", alloys(2))

    def test_md(self, capsys):
        words = "md m.safetensors a.extxyz --index 0 --time 10fs --every 5fs --ensemble nve --device cpu --out RUN"
        cli.main([*words.split(), "--json"])
        assert json.loads(capsys.readouterr().out)["steps"] == 20
        cli.main(words.split())  # finished: nothing is done again

    def test_md_says_whether_it_held_together_and_what_it_measured(self, capsys):
        words = "md m.safetensors a.extxyz --index 0 --time 40steps --every 5steps --device cpu --out RUN"
        cli.main(words.split())
        out, err = capsys.readouterr()
        assert "It ran to its end: 0.02 ps, at " in err and "Report: RUN/simulation.html" in err
        table = [row.split() for row in out.splitlines()]
        measured = json.loads(Path("RUN/simulation.json").read_text())["temperature"]
        assert any(row[1:2] == ["temperature"] and f"{measured['value']:.4g}" in row for row in table)
        assert any("density" in row and "g/cm³" in row for row in table)

    def test_md_that_loses_the_structure_of_its_reference_exits_with_one(self, capsys, monkeypatch):
        monkeypatch.setattr(observables, "COLLAPSED", 0.1)
        words = "md m.safetensors a.extxyz --index 0 --time 40steps --every 5steps --device cpu --out RUN"
        with pytest.raises(SystemExit) as exit:
            cli.main([*words.split(), "--reference", "a.extxyz"])
        assert exit.value.code == 1
        out, err = capsys.readouterr()
        assert "But it lost the structure of the reference in the window that begins at 0 ps." in err
        assert "RDF error of" in out

    def test_md_that_explodes_exits_with_one(self):
        words = "md m.safetensors a.extxyz --index 0 --timestep 20fs --tau 200fs --every 1steps --temperature 9000"
        with pytest.raises(SystemExit) as exit:
            cli.main([*words.split(), "--most-force", "20", "--out", "RUN"])
        assert exit.value.code == 1

    def test_relax(self):
        cli.main(["relax", "m.safetensors", "a.extxyz", "--out", "relaxed.extxyz", "--fmax", "0.1"])
        assert len(ase.io.read("relaxed.extxyz", ":")) == 2
        with pytest.raises(SystemExit) as exit:
            cli.main(["relax", "m.safetensors", "a.extxyz", "--out", "other.extxyz", "--fmax", "1e-5", "--steps", "1"])
        assert exit.value.code == 1


class Springs(AseCalculator):
    """Harmonic springs between nearest neighbours: a crystal that knows no place in space."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, atoms: Atoms, strength: float = 2.0):
        super().__init__()
        self.rest = atoms.positions.copy()
        i, j, vectors = neighbor_list("ijD", atoms, 3.0)
        along = vectors / np.linalg.norm(vectors, axis=1)[:, None]
        n = len(atoms)
        matrix = np.zeros((n, 3, n, 3))
        for a, b, d in zip(i, j, along, strict=True):
            spring = strength * (np.outer(d, d) + 0.2 * np.eye(3))
            matrix[a, :, a] += spring
            matrix[a, :, b] -= spring
        self.matrix = matrix.reshape(3 * n, 3 * n)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        u = (self.atoms.positions - self.rest).ravel()
        force = -self.matrix @ u
        self.results = {"energy": float(-force @ u / 2), "forces": force.reshape(-1, 3)}
        self.results["free_energy"] = self.results["energy"]


def killed_at(monkeypatch, step, run):
    record = dynamics.Simulation._record

    def record_or_die(self):
        record(self)
        if self.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dynamics.Simulation, "_record", record_or_die)
        with pytest.raises(KeyboardInterrupt):
            run()

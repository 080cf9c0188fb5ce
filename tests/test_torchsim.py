"""Many structures at once in torch-sim: the same numbers as in ASE, and honest refusals."""

from __future__ import annotations

import copy
import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, potential
from transfermium import cli
from transfermium.graph import Cutoff

RUN: dict[str, Any] = {"engine": "torch-sim", "device": "cpu", "verbose": False}
with_torch_sim = pytest.mark.skipif(
    find_spec("torch_sim") is None, reason="needs the extra torch-sim: pip install -e '.[torch-sim]'"
)


@cache
def model() -> tm.Model:
    """In double precision, so that differences are not rounding."""
    return copy.deepcopy(potential()).double()


def structures() -> list[Atoms]:
    """Crystals and molecules in turn, of several sizes."""
    cells = [atoms.copy() for atoms in alloys(3, seed=7)]
    cells[1] *= (1, 1, 2)
    molecules = [
        Atoms("Cu2Au", [[0, 0, 0], [2.6, 0, 0], [0.9, 2.5, 0.2]]),
        Atoms("CuAu3", [[0, 0, 0], [2.6, 0, 0], [0.9, 2.5, 0.2], [1.1, 0.8, 2.4]], cell=[20, 20, 20]),
    ]
    return [cells[0], molecules[0], cells[1], molecules[1], cells[2]]


@with_torch_sim
class TestModel:
    def test_energy_forces_and_stress_are_those_in_ase(self):
        from transfermium.simulate.torchsim import TorchSim

        simulated = TorchSim(model(), "cpu")
        for some in (structures()[0::2], structures()[1::2]):
            found = simulated(_state(some, simulated))
            first = 0
            for k, atoms in enumerate(some):
                atoms.calc = tm.Calculator(model(), "cpu")
                forces = found["forces"][first : first + len(atoms)]
                first += len(atoms)
                assert found["energy"][k].item() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
                assert forces.numpy() == pytest.approx(atoms.get_forces(), abs=1e-9)
                if atoms.pbc.all():
                    assert found["stress"][k].numpy() == pytest.approx(atoms.get_stress(voigt=False), abs=1e-9)
                else:
                    assert found["stress"][k].isnan().all()

    def test_torch_sim_finds_it_valid(self):
        from torch_sim.models.interface import validate_model_outputs

        from transfermium.simulate.torchsim import TorchSim

        simulated = TorchSim(model(), "cpu", allow_unseen=True)
        validate_model_outputs(simulated, simulated.device, simulated.dtype)

    def test_results_have_the_precision_of_states(self):
        import torch

        from transfermium.simulate.torchsim import TorchSim

        simulated = TorchSim(potential(), "cpu", dtype=torch.float32)
        found = simulated(_state(alloys(2), simulated))
        assert {value.dtype for value in found.values()} == {torch.float32}

    def test_elements_that_it_never_saw_are_refused(self):
        from transfermium.simulate.torchsim import TorchSim

        simulated = TorchSim(model(), "cpu")
        with pytest.raises(tm.InputError, match="never saw Ni"):
            simulated(_state([Atoms("Ni2", [[0, 0, 0], [2, 0, 0]])], simulated))


def _state(some: list[Atoms], simulated: Any) -> Any:
    import torch_sim

    return torch_sim.io.atoms_to_state(some, simulated.device, simulated.dtype)


@with_torch_sim
class TestRelaxation:
    @pytest.mark.parametrize("cell", [False, True])
    def test_the_first_steps_are_those_of_ase(self, cell):
        """Later on FIRE's mixing of velocities is one step ahead, by a hundredth."""
        given = structures()[0::2] if cell else structures()
        options = {"cell": cell, "fmax": 1e-6, "steps": 6, "device": "cpu", "verbose": False}
        expected = tm.relax(model(), given, **options)
        found = tm.relax(model(), given, engine="torch-sim", **options)
        for one, other, start in zip(found, expected, given, strict=True):
            assert one.info == other.info | {"relax_energy_change": pytest.approx(other.info["relax_energy_change"])}
            assert np.abs(one.positions - start.positions).max() > 0.01
            assert (np.abs(one.cell.array - start.cell.array).max() > 0.01) == cell
            assert one.positions == pytest.approx(other.positions, abs=1e-9)
            assert one.cell.array == pytest.approx(other.cell.array, abs=1e-9)
            assert one.calc.results.keys() == other.calc.results.keys()
            for name, value in other.calc.results.items():
                assert one.calc.results[name] == pytest.approx(value, abs=1e-8)

    @pytest.mark.parametrize("cell", [False, True])
    def test_minima_are_those_of_ase(self, cell):
        given = structures()[0:3:2] if cell else structures()[:2]
        options = {"cell": cell, "fmax": 0.02, "device": "cpu", "verbose": False}
        expected = tm.relax(model(), given, **options)
        found = tm.relax(model(), given, engine="torch-sim", **options)
        for one, other in zip(found, expected, strict=True):
            assert one.info["relaxed"] and one.info["relax_steps"] > 5
            assert one.get_potential_energy() == pytest.approx(other.get_potential_energy(), abs=1e-3)
            assert one.positions == pytest.approx(other.positions, abs=0.02)
            assert np.linalg.norm(one.get_forces(), axis=1).max() < 0.02
            if cell:
                assert np.abs(one.get_stress()).max() * one.get_volume() / len(one) < 0.02

    def test_no_structure_feels_its_company(self):
        together = tm.relax(model(), structures(), fmax=0.05, **RUN)
        for edges in (1, 250):  # one after the other; some, and others when these are done
            apart = tm.relax(model(), structures(), fmax=0.05, edges=edges, **RUN)
            for one, other in zip(together, apart, strict=True):
                assert one.info["relax_steps"] == other.info["relax_steps"]
                assert one.positions == pytest.approx(other.positions, abs=1e-9)

    def test_a_structure_at_rest_stays_and_steps_end(self):
        (atoms,) = tm.relax(model(), alloys(1), fmax=0.05, **RUN)
        (again,) = tm.relax(model(), [atoms], fmax=0.06, **RUN)
        assert (again.info["relaxed"], again.info["relax_steps"]) == (True, 0)
        (cut,) = tm.relax(model(), alloys(1), fmax=0.001, steps=3, **RUN)
        assert (cut.info["relaxed"], cut.info["relax_steps"]) == (False, 3)

    @pytest.mark.parametrize("cell", [False, True])
    def test_one_that_cannot_begin_does_not_stop_the_others(self, cell):
        given = structures()[0::2]
        given[1].positions[1] = given[1].positions[0]
        expected, found = (
            tm.relax(model(), given, cell=cell, steps=3, **{**RUN, **way}) for way in ({"engine": "ase"}, {})
        )
        assert [one.info.get("relax_trouble") for one in found] == [one.info.get("relax_trouble") for one in expected]
        assert "two atoms at the same place" in found[1].info["relax_trouble"] and not found[1].calc.results
        assert found[2].positions == pytest.approx(expected[2].positions, abs=1e-9)

    def test_what_falls_apart_is_left_as_it_was_and_others_go_on(self, monkeypatch):
        expected = tm.relax(model(), structures(), fmax=0.05, **RUN)
        calls = []
        search = Cutoff.neighbors

        def fail_once(self: Cutoff, atoms: Atoms, *arguments: Any) -> Any:
            if str(atoms.symbols) == "CuAu3" and not atoms.pbc.any():
                calls.append(atoms.positions)
                if len(calls) == 4:  # counted, at the start, after one step, after two
                    raise tm.InputError("two atoms at the same place")
            return search(self, atoms, *arguments)

        monkeypatch.setattr(Cutoff, "neighbors", fail_once)
        found = tm.relax(model(), structures(), fmax=0.05, **RUN)
        assert [atoms.info["relaxed"] for atoms in found] == [True, True, True, False, True]
        assert found[3].info["relax_trouble"] == "two atoms at the same place"
        assert found[3].positions == pytest.approx(calls[2])
        for k in (0, 1, 2, 4):
            assert found[k].positions == pytest.approx(expected[k].positions, abs=1e-9)

    def test_the_file_is_that_of_ase_and_goes_on(self, tmp_path):
        given = structures()
        options = {**RUN, "fmax": 0.05, "edges": 250}
        whole = tm.relax(model(), given, tmp_path / "whole.extxyz", **options)
        assert [str(atoms.symbols) for atoms in whole] == [str(atoms.symbols) for atoms in given]
        assert whole[3].info.keys() == {"relaxed", "relax_steps", "relax_energy_change"}

        lines = (tmp_path / "whole.extxyz.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "part.extxyz").write_bytes((tmp_path / "whole.extxyz").read_bytes())
        (tmp_path / "part.extxyz.jsonl").write_text("".join(lines[:3]))  # as after a kill
        tm.relax(model(), given, tmp_path / "part.extxyz", **options)
        for one, other in zip(*(ase.io.read(tmp_path / f"{n}.extxyz", ":") for n in ("part", "whole")), strict=True):
            assert one.positions == pytest.approx(other.positions, abs=1e-7)
        with pytest.raises(tm.InputError, match="holds other relaxations"):
            tm.relax(model(), given, tmp_path / "part.extxyz", **{**options, "engine": "ase"})

    def test_on_the_command_line(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        potential().save("m.safetensors")
        ase.io.write("a.extxyz", alloys(2))
        words = "relax m.safetensors a.extxyz --engine torch-sim --device cpu --out relaxed.extxyz"
        cli.main(words.split())
        assert all(atoms.info["relaxed"] for atoms in ase.io.read("relaxed.extxyz", ":"))


@with_torch_sim
class TestRefusals:
    def test_structures_that_it_would_move_otherwise(self):
        held, slab, mirrored = (atoms.copy() for atoms in alloys(3))
        held.set_constraint(FixAtoms([0]))
        slab.pbc = [True, True, False]
        mirrored.cell = mirrored.cell[[1, 0, 2]]
        for atoms, words, cell in (
            (held, "structure 1 has constraints", False),
            (slab, "structure 1 is not periodic in all", False),
            (mirrored, "structure 1 has left-handed", True),
        ):
            with pytest.raises(tm.InputError, match=words):
                tm.relax(model(), [alloys(1)[0], atoms], cell=cell, **RUN)
        assert tm.relax(model(), [mirrored], **RUN)[0].info["relaxed"]

    def test_models_and_options(self):
        forces_only = tm.pretrain(alloys(6), tm.Potential(energy=0, conservative=False), painn(), steps=1, **QUICK)
        with pytest.raises(tm.InputError, match="predicts no energy"):
            tm.relax(forces_only, alloys(1), **RUN)
        for options, words in (
            ({"optimizer": "LBFGS"}, "with FIRE here, not with LBFGS"),
            ({"engine": "lammps"}, "choose ase or torch-sim"),
            ({"edges": 0}, "at least one structure"),
        ):
            with pytest.raises(tm.InputError, match=words):
                tm.relax(model(), alloys(1), **{**RUN, **options})


def test_without_the_extra_its_name_is_said(monkeypatch):
    monkeypatch.delitem(sys.modules, "transfermium.simulate.torchsim", raising=False)
    monkeypatch.delattr("transfermium.simulate.torchsim", raising=False)
    monkeypatch.setitem(sys.modules, "torch_sim", None)
    with pytest.raises(tm.InputError, match=r"pip install 'transfermium\[torch-sim\]'"):
        tm.relax(potential(), alloys(1), **RUN)

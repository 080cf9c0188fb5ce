"""Teachers: whose labels a run learns, that they are asked once, and what happens when they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, potential, same_bits, weights_of
from transfermium import cli
from transfermium.teacher import FILE, TRIED, taught, teacher_of

EMT_NAME = "ase.calculators.emt:EMT"


class Counted(EMT):
    """EMT that counts how often it is asked, is killed at a certain call, and fails on some formulae."""

    calls = 0
    killed_at = 0
    fails_on: tuple[str, ...] = ()

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        type(self).calls += 1
        if type(self).calls == type(self).killed_at:
            raise KeyboardInterrupt
        if atoms.get_chemical_formula() in self.fails_on:
            raise RuntimeError("no convergence\nin 100 steps")
        super().calculate(atoms, properties, system_changes)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    for name, value in {"calls": 0, "killed_at": 0, "fails_on": ()}.items():
        monkeypatch.setattr(Counted, name, value)


def bare(n: int = 10, seed: int = 0) -> list[ase.Atoms]:
    """Alloys without labels."""
    return [atoms.copy() for atoms in alloys(n, seed)]


def pretrained(structures, teacher=EMT_NAME, objective=None, **options) -> tm.Model:
    options = {"steps": 3, **QUICK, **options}
    return tm.pretrain(structures, objective or tm.Potential(), painn(), teacher=teacher, **options)


class TestLabels:
    @pytest.mark.parametrize(
        "teacher", [EMT_NAME, EMT(), EMT, lambda: EMT()], ids=["name", "object", "class", "function"]
    )
    def test_a_run_learns_what_the_calculator_says(self, teacher):
        expected = tm.pretrain(alloys(10), tm.Potential(), painn(), steps=3, **QUICK)
        assert same_bits(weights_of(pretrained(bare(), teacher)), weights_of(expected))

    def test_the_card_says_who_taught(self, tmp_path):
        card = pretrained(bare(), out=tmp_path / "run").card
        assert card["levels"] == {f"teacher: {EMT_NAME}": 9}
        assert card["history"][-1]["teacher"]["name"] == EMT_NAME
        assert json.loads((tmp_path / "run/config.json").read_text())["teacher"]["left out"] == []
        assert "teacher" not in potential().card["history"][-1]

    def test_only_what_the_objective_learns_is_asked(self):
        lesson = taught(EMT(), bare(2), None, tm.Potential(energy=0, stress=0), verbose=False)
        assert "forces" in lesson.structures[0].arrays and not lesson.structures[0].info.keys() & {"energy", "stress"}

    def test_molecules_have_no_stress(self):
        atoms = molecule("H2O")
        found = taught(EMT(), [atoms], None, tm.Potential(), verbose=False).structures[0]
        assert "stress" not in found.info and found.info["energy"] == pytest.approx(energy(atoms))

    def test_forces_on_fixed_atoms_are_not_zero(self):
        atoms = bare(1)[0]
        atoms.set_constraint(FixAtoms([0, 1, 2, 3]))
        found = taught(EMT(), [atoms], None, tm.Potential(), verbose=False).structures[0]
        np.testing.assert_allclose(found.arrays["forces"], alloys(1)[0].get_forces())

    def test_nothing_given_is_changed(self):
        structures = bare(3)
        pretrained(structures, steps=0)
        assert all(a == b and a.info == b.info and a.calc is None for a, b in zip(structures, bare(3), strict=True))

    def test_validation_structures_are_labelled_too(self):
        options = {**QUICK, "split_by": "auto"}
        model = pretrained(bare(6), valid=bare(3, seed=1), **options)
        expected = tm.pretrain(alloys(6), tm.Potential(), painn(), steps=3, valid=alloys(3, seed=1), **options)
        assert model.card["metrics"]["validation"] == expected.card["metrics"]["validation"]

    def test_labels_of_other_quantities_stay(self):
        lesson = taught(
            EMT(), bare(2), None, tm.Together({"a": tm.Potential(), "b": tm.Property("gap")}), verbose=False
        )
        assert lesson.structures[0].info["gap"] == alloys(1)[0].info["gap"]


class TestModels:
    def test_a_model_teaches_what_it_predicts(self, tmp_path):
        potential().save(tmp_path / "teacher.safetensors")
        expected = tm.predict(potential(), bare(3), verbose=False)
        for teacher in (potential(), tmp_path / "teacher.safetensors", str(tmp_path / "teacher.safetensors")):
            found = taught(teacher, bare(3), None, tm.Potential(), verbose=False).structures
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a.arrays["forces"], b.get_forces(), atol=1e-4)
                np.testing.assert_allclose(a.info["stress"], b.get_stress(), atol=1e-5)
                assert a.info["energy"] == pytest.approx(b.get_potential_energy(), abs=1e-4)

    def test_the_one_that_ships_does(self):
        crystals = [atoms.copy() for atoms in tm.crystals("PBE", "test")[:4]]
        student = pretrained(crystals, "small", steps=1, edges=5000)
        assert student.card["levels"] == {"teacher: small": 3}

    def test_a_student_comes_near_its_teacher(self):
        student = pretrained(bare(24), potential(), steps=80, lr=0.02)
        truth = taught(potential(), bare(8, seed=3), None, tm.Potential(), verbose=False).structures
        forces = tm.evaluate(student, truth, verbose=False)["forces"]
        assert forces["mae"] < 0.5 * np.mean([np.abs(a.arrays["forces"]).mean() for a in truth])

    def test_other_weights_are_another_teacher(self):
        first, second = teacher_of(potential()), teacher_of(pretrained(bare(4), steps=1))
        assert first.identity != second.identity and first.identity == teacher_of(potential()).identity


class TestFolder:
    def test_a_killed_run_goes_on_where_it_was(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Counted, "killed_at", 6)
        with pytest.raises(KeyboardInterrupt):
            pretrained(bare(), Counted, out=tmp_path / "run")
        with (tmp_path / "run" / FILE).open("ab") as file:
            file.write(b'{"structure": "half a li')  # as a kill in the middle of writing leaves it
        monkeypatch.setattr(Counted, "killed_at", 0)
        model = pretrained(bare(), Counted, out=tmp_path / "run")

        assert Counted.calls == 11  # the killed one twice
        assert same_bits(weights_of(model), weights_of(pretrained(bare())))
        lines = [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()]
        assert len(lines) == 11 and len({line.get("structure") for line in lines}) == 11

    def test_a_finished_one_asks_nothing(self, tmp_path):
        first = pretrained(bare(), Counted, out=tmp_path / "run")
        again = pretrained(bare(), Counted, out=tmp_path / "run")
        assert Counted.calls == 10 and same_bits(weights_of(first), weights_of(again))

    def test_equal_structures_are_asked_about_once(self):
        taught(Counted, bare(4) + bare(4), bare(4), tm.Potential(), verbose=False)
        assert Counted.calls == 4

    def test_it_holds_one_teacher(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Counted, "killed_at", 3)
        with pytest.raises(KeyboardInterrupt):
            pretrained(bare(), Counted, out=tmp_path / "run")
        for other in (EMT, potential()):
            with pytest.raises(tm.InputError, match=r"holds labels of another teacher \(.*Counted, or other settings"):
                pretrained(bare(), other, out=tmp_path / "run")

    def test_other_settings_are_another_teacher(self, tmp_path):
        pretrained(bare(4), LennardJones(epsilon=0.1, rc=3.0), out=tmp_path / "run")
        pretrained(bare(4), LennardJones(epsilon=0.1, rc=3.0), out=tmp_path / "run")
        with pytest.raises(tm.InputError, match="holds labels of another teacher"):
            pretrained(bare(4), LennardJones(epsilon=0.2, rc=3.0), out=tmp_path / "run")

    def test_a_run_that_has_begun_takes_no_other_structures(self, tmp_path):
        pretrained(bare(), out=tmp_path / "run")
        before = (tmp_path / "run" / FILE).read_bytes()
        with pytest.raises(tm.InputError, match="holds a run on other structures: choose another folder"):
            pretrained(bare(seed=1), out=tmp_path / "run")
        assert (tmp_path / "run" / FILE).read_bytes() == before

    def test_a_folder_of_something_else_is_refused_before_any_work(self, tmp_path):
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(tm.InputError, match="is not a run of transfermium"):
            pretrained(bare(), Counted, out=tmp_path)
        assert Counted.calls == 0

    def test_a_dry_run_asks_little_and_writes_nothing(self, tmp_path):
        model = pretrained(bare(20), Counted, out=tmp_path / "run", dry_run=True)
        assert Counted.calls == TRIED and not (tmp_path / "run").exists()
        assert model.card["dry run"]["structures"] == 18

    def test_a_ladder_asks_once(self, tmp_path):
        options = {"strategy": "auto", "steps": 1, "valid_fraction": 0.3, "out": tmp_path / "run", **QUICK}
        model = tm.finetune(potential(), bare(12), tm.Potential(), teacher=Counted, **options)
        assert Counted.calls == 12 and model.card["history"][-1]["teacher"]["name"].endswith("Counted")


class TestFailures:
    @pytest.fixture(autouse=True)
    def fails(self, monkeypatch) -> list[int]:
        formula = bare()[3].get_chemical_formula()
        monkeypatch.setattr(Counted, "fails_on", (formula,))
        return [i for i, atoms in enumerate(bare()) if atoms.get_chemical_formula() == formula]

    def test_a_structure_on_which_it_fails_is_named(self, fails):
        message = rf"Counted fails on structure {fails[0]} \(\w+\): RuntimeError: no convergence in 100 steps: .*-skip"
        with pytest.raises(tm.InputError, match=message):
            pretrained(bare(), Counted)

    def test_or_left_out_when_that_was_asked_for(self, fails, tmp_path, capsys):
        kept = [atoms for i, atoms in enumerate(alloys(10)) if i not in fails]
        expected = tm.pretrain(kept, tm.Potential(), painn(), steps=3, **QUICK)
        for _ in range(2):
            model = pretrained(bare(), Counted, teacher_skip=True, out=tmp_path / "run", **{**QUICK, "verbose": True})
            said = " ".join(capsys.readouterr().err.split())
            assert f"{len(fails)} structures are left out, on which the teacher fails" in said
            assert f"fails on structure {fails[0]}" in said
        assert same_bits(weights_of(model), weights_of(expected)) and Counted.calls == 10
        assert model.card["history"][-1]["teacher"]["left out"] == fails

    def test_the_same_run_may_skip_after_it_has_failed(self, fails, tmp_path):
        with pytest.raises(tm.InputError):
            pretrained(bare(), Counted, out=tmp_path / "run")
        asked = Counted.calls
        pretrained(bare(), Counted, teacher_skip=True, out=tmp_path / "run")
        assert Counted.calls == asked + 10 - fails[0]

    def test_what_is_not_finite_is_a_failure(self):
        with pytest.raises(tm.InputError, match=r"structure 0 .*: of its forces a number is not finite"):
            pretrained(bare(), Broken)

    def test_unseen_elements_of_a_model_are_failures(self):
        with pytest.raises(tm.InputError, match=r"fails on structure 0 .*never saw"):
            pretrained([molecule("H2O")], potential())

    def test_when_all_fail_nothing_is_left(self):
        with pytest.raises(tm.InputError, match="fails on every structure"):
            pretrained(bare(), Broken, teacher_skip=True)


class Broken(Calculator):
    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        self.results = {"energy": np.nan, "forces": np.full((len(atoms), 3), np.nan)}


class TestErrors:
    def test_labels_that_are_there_are_not_replaced(self):
        structures = bare()
        structures[7].info["dft_energy"] = 1.0
        with pytest.raises(
            tm.InputError, match=r"1 of 10 structures have 'energy' already, as dft_energy: .*overwrite"
        ):
            pretrained(structures)
        with pytest.raises(tm.InputError, match="3 of 3 structures have"):
            pretrained(bare(), valid=alloys(3))

    def test_unless_that_was_asked_for(self):
        structures = alloys(10)
        for atoms in structures:
            atoms.info |= {"REF_energy": 1.0, "virial": np.ones(9)}
            atoms.arrays["dft_forces"] = np.ones((4, 3))
        model = pretrained(structures, teacher_overwrite=True)
        assert same_bits(weights_of(model), weights_of(pretrained(bare())))

    @pytest.mark.parametrize(
        ("teacher", "message"),
        [
            ("nothing.here:EMT", "the module nothing is neither installed nor in this folder"),
            ("ase.calculators.emt:EMD", r"the module ase\.calculators\.emt has no EMD"),
            ("ase.calculators.emt", "is no file of a model, and not module:function"),
            ("ase.build:molecule", r"the teacher ase\.build:molecule cannot be made: TypeError: .*name"),
            ("os:getcwd", "makes str, which is no ASE calculator"),
            (7, "is neither an ASE calculator nor a function"),
        ],
        ids=str,
    )
    def test_what_is_no_teacher(self, teacher, message):
        with pytest.raises(tm.InputError, match=message):
            pretrained(bare(), teacher)

    @pytest.mark.parametrize(
        ("objective", "message"),
        [
            (tm.Property("gap"), "a teacher gives energy, forces and stress, but this objective learns gap"),
            (tm.Denoise(), "but this objective learns without labels"),
            (tm.Potential(stress=1.0), "has no stress, which the objective learns: it has energy, forces"),
            (tm.Potential(energy=0, forces=0), "has none of stress|has no stress"),
        ],
        ids=["property", "denoise", "stress", "only stress"],
    )
    def test_what_it_cannot_teach(self, objective, message):
        with pytest.raises(tm.InputError, match=message):
            pretrained(bare(), Broken, objective)

    def test_what_says_two_things(self):
        with pytest.raises(tm.InputError, match="a key or unit is named for 'energy', which the teacher gives"):
            pretrained(bare(), label={"energy": "E"})
        with pytest.raises(tm.InputError, match="name the teacher too"):
            pretrained(bare(), None, teacher_skip=True)
        together = tm.Together({"a": tm.Potential(), "b": tm.Potential()})
        with pytest.raises(tm.InputError, match="a teacher labels one set of structures"):
            tm.pretrain({"a": bare(), "b": bare()}, together, painn(), teacher=EMT, **QUICK)


def test_the_command_line_takes_a_function_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mylab.py").write_text(
        "from ase.calculators.lj import LennardJones\ndef weak(): return LennardJones(epsilon=0.1)"
    )
    ase.io.write("a.extxyz", bare(6))
    tiny = "--backbone PaiNN --backbone.width 8 --backbone.depth 1 --backbone.cutoff 4 --edges 400 --device cpu"
    cli.main(f"pretrain a.extxyz --objective Potential {tiny} --steps 1 --teacher mylab:weak --out RUN".split())
    model = tm.load("RUN")
    assert model.card["history"][-1]["teacher"]["name"] == "mylab:weak" and "mylab:weak" in str(model.card["levels"])
    found = json.loads((tmp_path / "RUN" / FILE).read_text().splitlines()[1])
    assert found["energy"] == pytest.approx(energy(bare(1)[0], LennardJones(epsilon=0.1)))


def energy(atoms: ase.Atoms, calculator: Calculator | None = None) -> float:
    atoms = atoms.copy()
    atoms.calc = calculator or EMT()
    return float(atoms.get_potential_energy())

"""Alignment: what it reports, what compositions leave open, and elements that no label determines."""

from __future__ import annotations

import functools
import html

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given, settings
from hypothesis import strategies as st

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, potential, without
from transfermium.align import confounded
from transfermium.unseen import WITHOUT

COPPER, GOLD = 29, 79
SHIFTS = {COPPER: 3.0, GOLD: -5.0}  # another level of theory, in eV


class TestReport:
    def test_labels_and_elements_are_counted(self):
        structures = [*copper(3), *alloys(4)]
        for atoms in structures[:2]:
            atoms.calc.results.pop("energy")
        report = aligned(structures)
        counted = {s: sum(s in a.symbols for a in structures[2:]) for s in ("Cu", "Au")}
        assert report["labels per element"] == counted
        assert report["elements told apart"] == "2 of 2" and "not told apart" not in report

    def test_residuals_are_those_of_base_and_aligned_model(self):
        structures = moved(alloys(8))
        model = tuned(structures, steps=0, valid_fraction=0)
        found = model.card["history"][-1]["alignment"]["residual"]["energy"]
        for when, of in (("before", potential()), ("after", model)):
            errors = [
                (p.get_potential_energy() - a.get_potential_energy()) / len(a)
                for p, a in zip(tm.predict(of, structures, verbose=False), structures, strict=True)
            ]
            assert found[when] == pytest.approx(np.abs(errors).mean(), rel=1e-5)
        assert found["labels"] == 8 and found["after"] < 0.2 < found["before"]

    def test_a_property_has_residuals_too(self):
        structures = alloys(8)
        for atoms in structures:
            atoms.info["gap"] += 3.0
        base = tm.pretrain(alloys(8), tm.Property("gap"), painn(), steps=2, **QUICK)
        model = tm.finetune(base, structures, tm.Property("gap"), steps=0, **QUICK)
        found = model.card["history"][-1]["alignment"]["residual"]["gap"]
        assert found["after"] < 1 < 2 < found["before"]

    def test_constants_of_each_element_are_found_at_every_level(self):
        """The fit is linear: labels that differ by constants per element have shifts that differ by these."""
        data = {"pbe": alloys(8), "scan": alloys(8, seed=1)}
        objective = tm.Together({level: tm.Potential() for level in data})
        base = tm.pretrain(data, objective, painn(), steps=2, **QUICK)
        reports = [
            tm.finetune(base, levels, objective, steps=0, **QUICK).card["history"][-1]["alignment"]
            for levels in (data, {"pbe": data["pbe"], "scan": moved(alloys(8, seed=1))})
        ]
        for level, expected in (("pbe", {COPPER: 0.0, GOLD: 0.0}), ("scan", SHIFTS)):
            before, after = (report[f"reference shift (eV) of {level}_energy"] for report in reports)
            assert [after[s] - before[s] for s in ("Cu", "Au")] == pytest.approx(list(expected.values()), abs=0.01)
        assert reports[1]["residual"]["scan_energy"]["after"] < 0.5 < reports[1]["residual"]["scan_energy"]["before"]

    def test_it_is_printed_with_what_cannot_be_told_apart(self, capsys):
        structures = [bulk("CuAu", "rocksalt", a=5.0 + 0.02 * k) for k in range(5)]
        for atoms in structures:
            atoms.calc = EMT()
            atoms.calc = SinglePointCalculator(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces())
        options = {**QUICK, "verbose": True}
        tm.finetune(potential(), structures, tm.Potential(), steps=0, **options)
        printed = " ".join(capsys.readouterr().err.split())
        assert "do not tell apart Cu and Au (only as CuAu)" in printed
        assert "the mean absolute residual of 'energy' on 4 labels goes from" in printed


class TestConfounded:
    @pytest.mark.parametrize(
        ("rows", "symbols", "expected"),
        [
            ([[2, 1], [4, 2]], ["H", "O"], ["H and O (only as H2O)"]),
            ([[2, 1], [2, 2]], ["H", "O"], []),
            ([[64, 32, 1, 1], [60, 30, 3, 3], [64, 32, 0, 0]], ["H", "O", "Na", "Cl"],
             ["H and O (only as H2O)", "Na and Cl (only as NaCl)"]),
            ([[1, 1, 0, 2], [0, 1, 1, 2]], ["C", "N", "O", "F"], ["C, N, O and F (in 2 ways of 4)"]),
            ([[3, 0, 0], [0, 1, 1]], ["Al", "Ga", "N"], ["Ga and N (only as GaN)"]),
        ],
    )  # fmt: skip
    def test_elements_are_named(self, rows, symbols, expected):
        assert confounded(np.array(rows), symbols) == expected

    @settings(max_examples=40)
    @given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4).filter(any), min_size=1, max_size=6))
    def test_what_is_not_named_is_what_any_fit_finds(self, rows):
        composition = np.array(rows)
        there = composition.any(axis=0)
        composition, symbols = composition[:, there], np.array(["C", "N", "O", "F"])[there].tolist()
        named = " ".join(confounded(composition, symbols))
        truth = np.array([1.0, -2.0, 3.5, 0.7])[there]
        blind = np.eye(len(symbols)) - np.linalg.pinv(composition) @ composition
        found = np.linalg.pinv(composition) @ (composition @ truth) + blind @ np.array([5.0, 7.0, 11.0, 13.0])[there]
        for k, symbol in enumerate(symbols):
            assert (symbol in named) == (blind[k, k] > 1e-9)
            assert symbol in named or found[k] == pytest.approx(truth[k], abs=1e-6)


class TestElementsWithoutLabels:
    """The base knows copper and gold; the new labels, at another level of theory, are of copper alone."""

    def test_energies_with_them_are_refused_by_name_and_forces_are_not(self):
        model, mixed = copper_only(), with_gold()
        assert model.card[WITHOUT] == ["Au"]
        assert reference(model, GOLD) == reference(potential(), GOLD)
        mixed.calc = tm.Calculator(model)
        assert mixed.get_forces() == pytest.approx(forces(potential(), mixed), abs=1e-5)
        assert np.isfinite(mixed.get_stress()).all()
        with pytest.raises(tm.InputError, match=r"no label .* has Au, .*'isolated', 'group' or 'keep'.*allow_unseen"):
            mixed.get_potential_energy()
        mixed.calc = tm.Calculator(model, allow_unseen=True)
        assert np.isfinite(mixed.get_potential_energy())
        pure = copper(1)[0]
        pure.calc = tm.Calculator(model)
        assert np.isfinite(pure.get_potential_energy())

    def test_predictions_leave_them_out_and_say_so(self, capsys, tmp_path):
        pure, mixed = tm.predict(copper_only(), [copper(1)[0], with_gold()], tmp_path / "p.csv")
        assert set(pure.calc.results) == {"energy", "forces", "stress"}
        assert set(mixed.calc.results) == {"forces", "stress"}
        assert "has Au: the energy of 1 structure is left out" in " ".join(capsys.readouterr().err.split())
        (whole,) = tm.predict(copper_only(), [with_gold()], allow_unseen=True, verbose=False)
        assert np.isfinite(whole.get_potential_energy())

    def test_an_evaluation_counts_them_and_says_so(self, capsys):
        found = tm.evaluate(copper_only(), [*copper(2), *alloys(3)])
        assert found["energy_per_atom"]["n"] == 5
        assert "No label that this model learned from has Au" in " ".join(capsys.readouterr().err.split())

    def test_elements_that_nobody_saw_have_no_energy_either(self):
        silver = copper(1)[0]
        silver.numbers[0] = 47
        (predicted,) = tm.predict(copper_only(), [silver], verbose=False)
        assert set(predicted.calc.results) == {"forces", "stress"}

    def test_the_mean_shift_of_the_others_can_stand_in(self):
        model = copper_only(unseen="group")
        shift = reference(model, GOLD) - reference(potential(), GOLD)
        assert shift == pytest.approx(reference(model, COPPER) - reference(potential(), COPPER))
        assert WITHOUT not in model.card
        alignment = model.card["history"][-1]["alignment"]
        assert alignment["reference shift (eV)"] == pytest.approx({"Cu": shift, "Au": shift})
        assert alignment["elements without labels"]["energy"] == {"unseen": "group", "elements": ["Au"]}

    def test_old_references_can_be_kept(self):
        model = copper_only(unseen="keep")
        assert reference(model, GOLD) == reference(potential(), GOLD) and WITHOUT not in model.card
        assert np.isfinite(tm.Calculator(model).get_potential_energy(with_gold()))

    @pytest.mark.parametrize("base", ["with isolated atoms", "without"])
    def test_isolated_atoms_tell_the_shift(self, base):
        """Where levels differ by constants per element, gold moves by its own, as exactly as copper does."""
        old = tm.pretrain([*alloys(8), *(lone({}) if base != "without" else [])], tm.Potential(), painn(), **TINY)
        model = tm.finetune(
            old, [*moved(copper(6)), *lone(SHIFTS)], tm.Potential(), unseen="isolated", steps=0, **QUICK
        )
        shift = {z: reference(model, z) - reference(old, z) for z in SHIFTS}
        if base != "without":
            assert shift[GOLD] - SHIFTS[GOLD] == pytest.approx(shift[COPPER] - SHIFTS[COPPER], abs=1e-6)
        else:  # references of the base are no isolated atoms: gold lies from its own as copper does
            lies = {a.numbers[0]: a.get_potential_energy() - reference(model, a.numbers[0]) for a in lone(SHIFTS)}
            assert lies[GOLD] == pytest.approx(lies[COPPER])
        assert WITHOUT not in model.card

    def test_isolated_atoms_must_be_there(self):
        with pytest.raises(tm.InputError, match=r"needs isolated atoms .*\(Au\): add structures of one atom"):
            copper_only.__wrapped__(unseen="isolated")

    def test_isolated_atoms_alone_are_no_reference(self):
        model = tm.finetune(potential(), [*moved(copper(6)), *lone(SHIFTS)], tm.Potential(), steps=0, **QUICK)
        assert model.card[WITHOUT] == ["Au"]

    @pytest.mark.parametrize(
        ("options", "words"),
        [({"unseen": "ignore"}, "must be one of refuse, isolated, group, keep"),
         ({"unseen": "group", "align": False}, "leave one of them out")],
    )  # fmt: skip
    def test_wrong_options_are_refused(self, options, words):
        with pytest.raises(tm.InputError, match=words):
            copper_only.__wrapped__(**options)

    def test_nothing_is_refused_where_references_stay(self):
        assert WITHOUT not in copper_only(align=False).card

    def test_it_lasts_until_labels_come(self):
        assert tm.finetune(copper_only(), copper(4), tm.Potential(), steps=0, **QUICK).card[WITHOUT] == ["Au"]
        assert tm.finetune(copper_only(), copper(4), tm.Potential(), align=False, **TINY).card[WITHOUT] == ["Au"]
        assert WITHOUT not in tm.finetune(copper_only(), alloys(8), tm.Potential(), steps=0, **QUICK).card

    def test_a_new_head_knows_what_it_was_calibrated_on(self):
        base = tm.pretrain(alloys(6), tm.Denoise(0.1, conservative=False), painn(), **TINY)
        assert tm.finetune(base, copper(6), tm.Potential(), steps=0, **QUICK).card[WITHOUT] == ["Au"]
        model = tm.finetune(base, [*copper(6), *lone({})], tm.Potential(), steps=0, **QUICK)
        assert WITHOUT not in model.card

    def test_forces_alone_give_no_reference(self):
        model = tm.pretrain([*copper(4), *without(alloys(4), "energy")], tm.Potential(), painn(), **TINY)
        assert model.card[WITHOUT] == ["Au"]
        assert WITHOUT not in tm.pretrain([*copper(4), *alloys(4)], tm.Potential(), painn(), **TINY).card

    def test_they_are_told_where_they_validate(self, capsys):
        options = {**QUICK, "verbose": True}
        model = tm.finetune(
            potential(), copper(4), tm.Potential(), valid=alloys(2, seed=7), steps=0, **{**options, "split_by": "auto"}
        )
        assert model.card["history"][-1]["alignment"]["validated without reference"] == {"energy": ["Au"]}
        assert "Au validate 'energy' all the same" in " ".join(capsys.readouterr().err.split())

    def test_each_level_has_its_own(self):
        data = {"pbe": alloys(6), "scan": alloys(6, seed=1)}
        objective = tm.Together({level: tm.Potential() for level in data})
        base = tm.pretrain(data, objective, painn(), **TINY)
        model = tm.finetune(base, {**data, "scan": copper(6)}, objective, steps=0, **QUICK)
        assert model.part("scan").card[WITHOUT] == ["Au"] and model.part("pbe").card[WITHOUT] == []
        assert np.isfinite(tm.Calculator(model, part="pbe").get_potential_energy(with_gold()))
        with pytest.raises(tm.InputError, match="has Au"):
            tm.Calculator(model, part="scan").get_potential_energy(with_gold())

    def test_the_report_and_the_command_line_know_it(self, tmp_path, monkeypatch, capsys):
        from ase.io import write

        from transfermium.cli import main

        monkeypatch.chdir(tmp_path)
        potential().save("base.safetensors")
        write("copper.extxyz", moved(copper(6)))
        write("mixed.extxyz", [with_gold()])
        words = "finetune base.safetensors copper.extxyz --objective Potential --steps 0 --device cpu --out"
        main([*words.split(), "run"])
        assert "No label of 'energy' has Au" in html.unescape((tmp_path / "run/report.html").read_text())
        main(["predict", "run", "mixed.extxyz", "--out", "without.extxyz", "--device", "cpu"])
        main(["predict", "run", "mixed.extxyz", "--out", "with.extxyz", "--allow-unseen", "--device", "cpu"])
        assert ["energy" in tm.read(f"{name}.extxyz")[0].calc.results for name in ("without", "with")] == [False, True]
        main([*words.split(), "kept", "--unseen", "keep"])
        assert WITHOUT not in tm.load("kept/model.safetensors").card
        with pytest.raises(SystemExit):
            main([*words.split(), "run", "--unseen", "group"])
        assert 'run holds another run: unseen was null there and is "group" now' in " ".join(
            capsys.readouterr().err.split()
        )


TINY = {**QUICK, "steps": 1}


def aligned(structures: list[Atoms]) -> dict:
    return tuned(structures, steps=0, valid_fraction=0).card["history"][-1]["alignment"]


def tuned(structures: list[Atoms], **options) -> tm.Model:
    return tm.finetune(potential(), structures, tm.Potential(), **{**QUICK, **options})


@functools.cache
def copper_only(**options) -> tm.Model:
    return tuned(moved(copper(6)), steps=0, **options)


def copper(n: int) -> list[Atoms]:
    structures = alloys(n, seed=5)
    for atoms in structures:
        atoms.numbers[:] = COPPER
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **results)
    return structures


def with_gold() -> Atoms:
    return next(atoms for atoms in alloys(9, seed=7) if GOLD in atoms.numbers).copy()


def moved(structures: list[Atoms]) -> list[Atoms]:
    """The same at another level of theory, which differs by a constant per element."""
    for atoms in structures:
        atoms.calc.results["energy"] += sum(SHIFTS[z] for z in atoms.numbers)
    return structures


def lone(shifts: dict[int, float]) -> list[Atoms]:
    atoms = [Atoms([z], info={"config_type": "IsolatedAtom"}) for z in SHIFTS]
    for one, energy in zip(atoms, (-1.5, -2.25), strict=True):
        one.calc = SinglePointCalculator(one, energy=energy + shifts.get(int(one.numbers[0]), 0.0))
    return atoms


def reference(model: tm.Model, element: int) -> float:
    return float(model.heads["energy"].references[element])


def forces(model: tm.Model, atoms: Atoms) -> np.ndarray:
    return tm.predict(model, [atoms], verbose=False)[0].get_forces()

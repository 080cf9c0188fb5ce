"""Errors in physical units equal those worked out by hand, and predictions come back from files."""

from __future__ import annotations

import csv

import ase
import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.units import GPa, Hartree

import transfermium as tm
from tests.alloys import QUICK, alloys, gap_model, painn, potential, without
from transfermium.evaluate import printable, printable_elements

STRESS = ["stress_xx", "stress_yy", "stress_zz", "stress_yz", "stress_xz", "stress_xy"]


@pytest.fixture(scope="module")
def held_out() -> list[ase.Atoms]:
    return alloys(7, seed=1)


@pytest.fixture(scope="module")
def predicted(held_out) -> list[ase.Atoms]:
    return tm.predict(potential(), held_out, verbose=False)


@pytest.fixture(scope="module")
def result(held_out) -> dict:
    return tm.evaluate(potential(), held_out, verbose=False)


@pytest.fixture(scope="module")
def classifier() -> tm.Model:
    """Whether an alloy is large."""
    return tm.pretrain(sorted_by_size(alloys(24)), classes(), painn(), steps=60, lr=0.02, **QUICK)


class TestPotential:
    def test_the_form_of_the_result(self, result):
        units = {"energy_per_atom": "eV/atom", "forces": "eV/Å", "stress": "eV/Å^3"}
        assert list(result) == ["n", *units] and result["n"] == 7
        for name, unit in units.items():
            assert list(result[name]) == ["mae", "rmse", "r2", "n", "unit", "per_element"]
            assert result[name]["unit"] == unit
        assert [result[name]["n"] for name in units] == [7, 28, 7]

    def test_energies(self, held_out, predicted, result):
        labels, outputs = (
            np.array([atoms.get_potential_energy() / 4 for atoms in source]) for source in (held_out, predicted)
        )
        agree(result["energy_per_atom"], labels, outputs)

    def test_forces(self, held_out, predicted, result):
        labels, outputs = (np.concatenate([atoms.get_forces() for atoms in source]) for source in (held_out, predicted))
        agree(result["forces"], labels, outputs)

    def test_stress_counts_all_nine_components(self, held_out, predicted, result):
        labels, outputs = (
            np.array([atoms.get_stress(voigt=False) for atoms in source]) for source in (held_out, predicted)
        )
        agree(result["stress"], labels, outputs)

    def test_forces_by_element_are_those_of_its_atoms(self, held_out, predicted, result):
        numbers = np.concatenate([atoms.numbers for atoms in held_out])
        errors = np.abs(
            np.concatenate([p.get_forces() - a.get_forces() for p, a in zip(predicted, held_out, strict=True)])
        )
        expected = {symbol: errors[numbers == z].mean() for symbol, z in {"Cu": 29, "Au": 79}.items()}
        assert result["forces"]["per_element"] == pytest.approx(expected)

    def test_energies_by_element_are_those_of_structures_that_contain_it(self, held_out, predicted, result):
        errors = [
            abs(p.get_potential_energy() - a.get_potential_energy()) / 4
            for p, a in zip(predicted, held_out, strict=True)
        ]
        for symbol in ("Cu", "Au"):
            expected = np.mean([e for e, atoms in zip(errors, held_out, strict=True) if symbol in atoms.symbols])
            assert result["energy_per_atom"]["per_element"][symbol] == pytest.approx(expected)

    def test_batches_do_not_matter(self, held_out, result):
        one_by_one = tm.evaluate(potential(), held_out, edges=1, verbose=False)
        assert one_by_one["forces"]["mae"] == pytest.approx(result["forces"]["mae"], rel=1e-5)

    def test_a_file_is_a_model(self, tmp_path, held_out, result):
        potential().save(tmp_path / "model.safetensors")
        assert tm.evaluate(tmp_path / "model.safetensors", held_out, verbose=False) == result

    def test_missing_labels_are_not_counted(self, held_out, result):
        half = [*held_out[:3], *without(held_out[3:], "forces", "stress")]
        found = tm.evaluate(potential(), half, verbose=False)
        assert (found["n"], found["energy_per_atom"]["n"], found["forces"]["n"], found["stress"]["n"]) == (7, 7, 12, 3)
        assert found["energy_per_atom"] == result["energy_per_atom"]
        assert found["forces"]["mae"] == pytest.approx(
            tm.evaluate(potential(), held_out[:3], verbose=False)["forces"]["mae"]
        )

    def test_a_label_that_nobody_has_is_left_out(self, held_out):
        assert list(tm.evaluate(potential(), without(held_out, "stress"), verbose=False)) == [
            "n",
            "energy_per_atom",
            "forces",
        ]

    def test_no_label_at_all_is_an_error(self, held_out):
        with pytest.raises(tm.InputError, match=r"no structure has any of the labels energy, forces, stress.*--label"):
            tm.evaluate(potential(), without(held_out, "energy", "forces", "stress"), verbose=False)

    def test_keys_and_units_can_be_named(self, held_out, result):
        others = without(held_out, "energy")
        for atoms, original in zip(others, held_out, strict=True):
            atoms.info["E"] = original.get_potential_energy() / Hartree
        named = tm.evaluate(potential(), others, label={"energy": "E"}, unit={"energy": "hartree"}, verbose=False)
        assert named["energy_per_atom"]["mae"] == pytest.approx(result["energy_per_atom"]["mae"])
        assert named["energy_per_atom"]["unit"] == "eV/atom"

    def test_molecules_have_no_stress(self):
        molecules = [cut_out(atoms) for atoms in alloys(3, seed=1)]
        assert "stress" not in tm.evaluate(potential(), molecules, verbose=False)

    def test_a_model_that_was_never_trained_has_nothing_to_be_measured_by(self, held_out):
        with pytest.raises(tm.InputError, match="never trained"):
            tm.evaluate(tm.Model(painn(), tm.Potential().outputs(8)), held_out, verbose=False)

    def test_denoising_is_measured_too(self, held_out):
        model = tm.pretrain(alloys(6), tm.Denoise(0.1), painn(), steps=1, **QUICK)
        found = tm.evaluate(model, held_out, verbose=False)
        assert found["forces"]["unit"] == "Å" and found["forces"]["rmse"] == pytest.approx(0.1, rel=0.5)
        assert found == tm.evaluate(model, held_out, verbose=False)


class TestProperty:
    def test_it_is_in_the_unit_of_its_labels(self, held_out):
        found = tm.evaluate(gap_model(), held_out, unit={"gap": "eV"}, verbose=False)
        labels = np.array([atoms.info["gap"] for atoms in held_out])
        outputs = np.array([a.info["gap"] for a in tm.predict(gap_model(), held_out, verbose=False)])
        assert list(found) == ["n", "gap"]
        agree(found["gap"], labels, outputs)

    def test_the_unit_it_was_trained_in_is_remembered(self, held_out):
        model = tm.pretrain(alloys(5), tm.Property("gap"), painn(), unit={"gap": "meV"}, steps=1, **QUICK)
        assert tm.evaluate(model, held_out, verbose=False)["gap"]["unit"] == "meV"

    def test_equal_labels_have_no_r2(self, held_out):
        same = [atoms.copy() for atoms in held_out]
        for atoms in same:
            atoms.info["gap"] = 5.0
        assert "r2" not in tm.evaluate(gap_model(), same, verbose=False)["gap"]

    def test_per_atom(self, held_out):
        model = tm.pretrain(with_charges(alloys(6)), tm.Property("charge", kind="per-atom"), painn(), steps=2, **QUICK)
        found = tm.evaluate(model, with_charges(held_out), verbose=False)["charge"]
        outputs = [a.arrays["charge"] for a in tm.predict(model, held_out, verbose=False)]
        labels = [a.arrays["charge"] for a in with_charges(held_out)]
        agree(found, np.concatenate(labels), np.concatenate(outputs))
        assert found["n"] == 28 and set(found["per_element"]) == {"Cu", "Au"}


class TestClasses:
    def test_accuracy_and_roc_auc(self, classifier):
        structures = sorted_by_size(alloys(9, seed=1))
        truth = np.array([atoms.info["large"] for atoms in structures])
        found = tm.evaluate(classifier, structures, verbose=False)["large"]

        predicted = tm.predict(classifier, structures, verbose=False)
        chances = np.array([atoms.info["large_probabilities"] for atoms in predicted])
        assert chances.sum(axis=1) == pytest.approx(1)
        assert [atoms.info["large"] for atoms in predicted] == list(chances.argmax(axis=1))
        assert found["accuracy"] == pytest.approx((chances.argmax(axis=1) == truth).mean())
        assert found["cross_entropy"] == pytest.approx(-np.log(chances[np.arange(9), truth]).mean())
        pairs = [high > low for high in chances[truth == 1, 1] for low in chances[truth == 0, 1]]
        assert found["roc_auc"] == pytest.approx(np.mean(pairs))
        assert found["roc_auc"] > 0.5

    def test_one_class_alone_has_no_roc_auc(self, classifier):
        large = [atoms for atoms in sorted_by_size(alloys(9, seed=1)) if atoms.info["large"]]
        assert set(tm.evaluate(classifier, large, verbose=False)["large"]) == {"accuracy", "cross_entropy", "n", "unit"}

    def test_a_class_that_is_not_there_is_refused(self):
        structures = sorted_by_size(alloys(6))
        structures[0].info["large"] = 2
        with pytest.raises(tm.InputError, match="2 classes are numbered 0 to 1"):
            tm.pretrain(structures, classes(), painn(), steps=1, **QUICK)


class TestPrinted:
    def test_units_are_those_that_people_read(self, result):
        rows = {row["quantity"]: row for row in printable(result)}
        energy, forces, stress = rows["energy per atom"], rows["forces"], rows["stress"]
        assert [row["unit"] for row in (energy, forces, stress)] == ["meV/atom", "meV/Å", "GPa"]
        assert float(energy["MAE"]) == pytest.approx(result["energy_per_atom"]["mae"] * 1000, rel=1e-3)
        assert float(forces["RMSE"]) == pytest.approx(result["forces"]["rmse"] * 1000, rel=1e-3)
        assert float(stress["MAE"]) == pytest.approx(result["stress"]["mae"] / GPa, rel=1e-3)
        assert float(forces["R2"]) == pytest.approx(result["forces"]["r2"], rel=1e-3)

    def test_elements(self, result):
        rows = printable_elements(result)
        assert [row["element"] for row in rows] == ["Cu", "Au"]
        assert list(rows[0]) == ["element", "energy per atom (meV/atom)", "forces (meV/Å)", "stress (GPa)"]
        assert float(rows[1]["forces (meV/Å)"]) == pytest.approx(result["forces"]["per_element"]["Au"] * 1000, rel=1e-3)

    def test_classes(self, classifier):
        result = tm.evaluate(classifier, sorted_by_size(alloys(6)), verbose=False)
        assert printable_elements(result) == []
        assert list(printable(result)[0]) == ["quantity", "labels", "accuracy", "roc_auc", "cross_entropy", "unit"]


class TestPredict:
    def test_extended_xyz_comes_back(self, tmp_path, held_out, predicted):
        tm.predict(potential(), held_out, tmp_path / "new" / "p.extxyz", verbose=False)
        for atoms, expected in zip(tm.read(tmp_path / "new" / "p.extxyz"), predicted, strict=True):
            assert atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy())
            assert atoms.get_forces() == pytest.approx(expected.get_forces(), abs=1e-7)
            assert atoms.get_stress() == pytest.approx(expected.get_stress(), abs=1e-7)
            assert atoms.positions == pytest.approx(expected.positions, abs=1e-7)

    def test_csv_comes_back(self, tmp_path, held_out, predicted):
        named = [atoms.copy() for atoms in held_out]
        for index, atoms in enumerate(named):
            atoms.info["material_id"] = f"m-{index}"
        tm.predict(potential(), named, tmp_path / "p.csv", verbose=False)
        with open(tmp_path / "p.csv", newline="") as file:
            rows = list(csv.DictReader(file))

        assert list(rows[0]) == ["index", "material_id", "formula", "energy", *STRESS]
        assert [row["material_id"] for row in rows] == [f"m-{index}" for index in range(7)]
        for row, atoms in zip(rows, predicted, strict=True):
            assert row["formula"] == atoms.get_chemical_formula()
            assert float(row["energy"]) == pytest.approx(atoms.get_potential_energy())
            assert [float(row[name]) for name in STRESS] == pytest.approx(atoms.get_stress())

    def test_a_property_in_a_csv(self, tmp_path, held_out):
        results = tm.predict(gap_model(), held_out, tmp_path / "gap.csv", verbose=False)
        with open(tmp_path / "gap.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [float(row["gap"]) for row in rows] == pytest.approx([atoms.info["gap"] for atoms in results])

    def test_classes_in_a_csv_with_how_likely_each_is(self, tmp_path, held_out, classifier):
        results = tm.predict(classifier, held_out, tmp_path / "large.csv", verbose=False)
        with open(tmp_path / "large.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = ["large", "large_probability_0", "large_probability_1"]
        assert list(rows[0]) == ["index", "formula", *columns]
        for row, atoms in zip(rows, results, strict=True):
            likely = [float(row[name]) for name in columns[1:]]
            assert likely == pytest.approx(atoms.info["large_probabilities"]) and sum(likely) == pytest.approx(1)
            assert int(row["large"]) == atoms.info["large"] == np.argmax(likely)

    def test_words_in_a_csv(self, tmp_path):
        structures = sorted_by_size(alloys(8))
        for atoms in structures:
            atoms.info["size"] = ("small", "large")[atoms.info.pop("large")]
        sizes = tm.Property("size", task="classification", classes=["small", "large"])
        tm.predict(tm.pretrain(structures, sizes, painn(), steps=1, **QUICK), structures, tmp_path / "p.csv")
        with open(tmp_path / "p.csv", newline="") as file:
            (row, *_) = csv.DictReader(file)
        likely = {word: float(row[f"size_probability_{word}"]) for word in ("small", "large")}
        assert row["size"] == max(likely, key=likely.__getitem__)

    def test_predictions_are_in_the_order_of_the_structures(self, held_out, predicted):
        for atoms, same in zip(predicted, tm.predict(potential(), held_out, edges=1, verbose=False), strict=True):
            assert same.symbols.get_chemical_formula() == atoms.symbols.get_chemical_formula()
            assert same.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-5)

    def test_what_was_given_stays_as_it_is_and_labels_are_replaced(self, held_out):
        before = [atoms.get_potential_energy() for atoms in held_out]
        for atoms in tm.predict(gap_model(), held_out, verbose=False):
            assert atoms.calc is None
        assert [atoms.get_potential_energy() for atoms in held_out] == before
        assert held_out[0].info["gap"] == alloys(1, seed=1)[0].info["gap"]

    def test_no_label_is_needed(self):
        (atoms,) = tm.predict(potential(), bare(alloys(1)[0]), verbose=False)
        assert np.isfinite(atoms.get_potential_energy())

    def test_molecules_have_no_stress(self, tmp_path):
        cluster = cut_out(alloys(1)[0])
        (atoms,) = tm.predict(potential(), cluster, tmp_path / "p.csv", verbose=False)
        assert set(atoms.calc.results) == {"energy", "forces"}
        with open(tmp_path / "p.csv", newline="") as file:
            assert next(csv.DictReader(file))["stress_xx"] == ""

    def test_an_ending_that_is_not_known_is_refused(self, tmp_path):
        with pytest.raises(tm.InputError, match=r"ends in '.cif'"):
            tm.predict(potential(), alloys(1), tmp_path / "p.cif", verbose=False)

    def test_elements_that_were_never_seen_are_told(self, capsys):
        tm.predict(potential(), molecule("H2O"))
        assert "never saw H, O" in " ".join(capsys.readouterr().err.split())


def agree(found: dict, labels: np.ndarray, outputs: np.ndarray) -> None:
    error = outputs - labels
    assert found["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert found["r2"] == pytest.approx(1 - (error**2).mean() / labels.var(), rel=1e-4)


def classes() -> tm.Property:
    return tm.Property("large", task="classification")


def sorted_by_size(structures: list[ase.Atoms]) -> list[ase.Atoms]:
    """The same with a class: whether the cell is larger than most."""
    for atoms in structures:
        atoms.info["large"] = int(atoms.get_volume() > 3.85**3)
    return structures


def with_charges(structures: list[ase.Atoms]) -> list[ase.Atoms]:
    copies = [atoms.copy() for atoms in structures]
    for atoms in copies:
        atoms.arrays["charge"] = np.where(atoms.numbers == 79, -0.3, 0.2) + 0.01 * atoms.positions[:, 0]
    return copies


def cut_out(atoms: ase.Atoms) -> ase.Atoms:
    """The cell as a cluster, with a made-up energy."""
    return ase.Atoms(atoms.numbers, atoms.positions, info={"energy": 1.0})


def bare(atoms: ase.Atoms) -> ase.Atoms:
    return ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)


def test_keys_and_units_named_in_training_are_used_again(tmp_path):
    structures = [a.copy() for a in alloys(8)]
    for i, atoms in enumerate(structures):
        atoms.calc = None
        atoms.info["gap_pbe"] = 1.0 + i
    model = tm.pretrain(
        structures, tm.Property("gap"), painn(), steps=1, label={"gap": "gap_pbe"}, unit={"gap": "eV"}, verbose=False
    )
    found = tm.evaluate(model, structures, verbose=False)["gap"]
    assert (found["n"], found["unit"]) == (8, "eV")


def test_predictions_take_the_place_of_labels_under_any_key(tmp_path):
    structures = alloys(6)
    model = tm.pretrain(structures, tm.Potential(), painn(), steps=1, verbose=False)
    labelled = structures[0].copy()
    labelled.info["REF_energy"] = 123.0
    labelled.arrays["dft_forces"] = np.ones((len(labelled), 3))
    (predicted,) = tm.predict(model, [labelled], verbose=False)
    assert "REF_energy" not in predicted.info
    assert "dft_forces" not in predicted.arrays


def test_derivatives_are_evaluated_also_where_they_were_not_trained_on():
    structures = alloys(6)
    model = tm.pretrain(structures, tm.Potential(stress=0.0), painn(), steps=1, verbose=False)
    assert {"energy_per_atom", "forces", "stress"} <= set(tm.evaluate(model, structures, verbose=False))


def test_structures_it_was_trained_on_are_told(capsys):
    data = alloys(12)
    model = tm.pretrain(data, tm.Potential(), painn(), steps=1, **QUICK)
    for structures, told in ((data, True), (alloys(12, seed=3), False)):
        capsys.readouterr()
        tm.evaluate(model, structures)
        assert ("trained on 12 of these 12 structures" in " ".join(capsys.readouterr().err.split())) is told
    model.attached = {}  # as of files that do not know
    tm.evaluate(model, data)
    assert "The model was trained on these structures" in " ".join(capsys.readouterr().err.split())


def test_errors_by_element_are_shown_where_they_differ():
    result = {
        "energy_per_atom": {"unit": "eV/atom", "per_element": {"Na": 0.1, "Cl": 0.1}},
        "forces": {"unit": "eV/Å", "per_element": {"Na": 0.1, "Cl": 0.2}},
    }
    rows = printable_elements(result)
    assert [list(row) for row in rows] == [["element", "forces (meV/Å)"]] * 2
    assert printable_elements({"energy_per_atom": result["energy_per_atom"]}) == []

"""Delta learning: what is learned is a difference, and what is said is the whole."""

from __future__ import annotations

import csv
import json

import ase
import ase.io
import numpy as np
import pytest
from ase.units import Hartree

import transfermium as tm
from tests.alloys import QUICK, alloys, gap_model, painn, same_bits, weights_of
from transfermium.evaluate import compared, objective_of
from transfermium.report import run_report
from transfermium.testing import check_objective

DELTA = tm.Property("gap", minus="cheap")


def both(n: int = 12, seed: int = 0, factor: float = 1.0) -> list[ase.Atoms]:
    """Alloys with a gap, and a cheap value that lacks what is smooth in the volume and large in the composition."""
    structures = alloys(n, seed)
    for atoms in structures:
        atoms.info["cheap"] = (atoms.info["gap"] - 0.02 * atoms.get_volume() + 100.0 * count(atoms)) * factor
    return structures


def count(atoms: ase.Atoms) -> int:
    return int((atoms.numbers == 79).sum())


def trained(objective: tm.Objective = DELTA, structures: list[ase.Atoms] | None = None, **options) -> tm.Model:
    options = {"steps": 12, "lr": 0.01, **QUICK, **options}
    return tm.pretrain(both() if structures is None else structures, objective, painn(), **options)


def gaps(structures: list[ase.Atoms]) -> np.ndarray:
    return np.array([atoms.info["gap"] for atoms in structures])


def cheaps(structures: list[ase.Atoms]) -> np.ndarray:
    return np.array([atoms.info["cheap"] for atoms in structures])


@pytest.fixture(scope="module")
def model() -> tm.Model:
    return trained()


@pytest.fixture(scope="module")
def held_out() -> list[ase.Atoms]:
    return both(6, seed=1)


class TestLearning:
    def test_it_is_that_of_a_label_which_is_the_difference(self, model):
        structures = both()
        for atoms in structures:
            atoms.info["gap"] -= atoms.info.pop("cheap")
        plain = trained(tm.Property("gap"), structures)

        assert list(model.outputs) == ["gap_minus_cheap"]
        renamed = {name.replace("gap_minus_cheap", "gap"): t for name, t in weights_of(model).items()}
        assert same_bits(renamed, weights_of(plain))
        weights = [m.card["objective"]["arguments"]["weight"] for m in (model, plain)]
        assert weights[0] == pytest.approx(weights[1], rel=1e-9)

    @pytest.mark.parametrize("objective", [
        tm.Property("gap", "extensive", minus="cheap"), tm.Property("charge", "per-atom", minus="cheap"),
        tm.Property("gap", pooling="composition", uncertainty=True, minus="cheap"),
        tm.Together({"a": tm.Property("gap"), "b": DELTA}),
    ])  # fmt: skip
    def test_it_keeps_the_laws_of_objectives(self, objective):
        check_objective(objective)

    def test_models_without_it_are_as_they_were(self):
        assert list(gap_model().outputs) == ["gap"] and objective_of(gap_model()).differences() == {}
        spec = json.loads(json.dumps(gap_model().card["objective"]))
        assert spec["arguments"].pop("minus") is None  # an older file has no such argument
        older = tm.Model(gap_model().backbone, gap_model().outputs, {**gap_model().card, "objective": spec})
        assert objective_of(older).labels() == {"gap": True}

    def test_a_probe_learns_the_difference(self, held_out):
        base = trained(tm.Property("gap"))
        probe = tm.finetune(base, both(40, seed=5), DELTA, strategy="probe", **QUICK)
        errors = tm.evaluate(probe, held_out, verbose=False)["gap"]
        assert errors["mae"] < 0.5 * np.abs(gaps(held_out) - cheaps(held_out) - 0.1).mean()


class TestWhole:
    def test_predictions_are_the_output_and_the_cheap_value(self, model, held_out):
        found = tm.predict(model, held_out, verbose=False)
        outputs = model(graph_of(model, held_out))["gap_minus_cheap"].double().numpy()
        np.testing.assert_allclose(gaps(found), outputs + cheaps(held_out), rtol=1e-12)
        assert "gap_minus_cheap" not in found[0].info and cheaps(found).tolist() == cheaps(held_out).tolist()

    def test_errors_are_those_of_the_whole(self, model, held_out):
        found = tm.evaluate(model, held_out, verbose=False)["gap"]
        predicted, truth = gaps(tm.predict(model, held_out, verbose=False)), gaps(held_out)
        assert found["mae"] == pytest.approx(np.abs(predicted - truth).mean())
        assert found["r2"] == pytest.approx(1 - np.square(predicted - truth).mean() / truth.var())

    def test_what_studies_compare_is_the_whole(self, model, held_out):
        pairs = compared(model, objective_of(model), held_out, 1000)
        assert list(pairs) == ["gap"]
        np.testing.assert_allclose([target[0] for target, _ in pairs["gap"]], gaps(held_out), rtol=1e-12)

    def test_tables_have_the_whole(self, model, held_out, tmp_path):
        for name in ("p.csv", "p.extxyz"):
            tm.predict(model, held_out, tmp_path / name, verbose=False)
        expected = gaps(tm.predict(model, held_out, verbose=False))
        with (tmp_path / "p.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["index", "formula", "gap"]
        np.testing.assert_allclose([float(row["gap"]) for row in rows], expected)
        np.testing.assert_allclose(gaps(ase.io.read(tmp_path / "p.extxyz", ":")), expected)

    def test_a_file_gives_the_same(self, model, held_out, tmp_path):
        model.save(tmp_path / "m.safetensors")
        again = tm.predict(tmp_path / "m.safetensors", held_out, verbose=False)
        assert gaps(again).tolist() == gaps(tm.predict(model, held_out, verbose=False)).tolist()

    def test_the_report_shows_the_whole(self, tmp_path):
        model = trained(out=tmp_path / "run", unit={"gap": "eV"})
        run_report(tmp_path / "run")
        report = json.loads((tmp_path / "run/report.json").read_text())
        found = json.dumps(report)
        parity = json.loads((tmp_path / "run/validation.json").read_text())["parity"]["gap"]
        assert set(np.round(parity["label"], 6)) <= set(np.round(gaps(both()), 6))
        assert parity["unit"] == "eV" and model.card["metrics"]["validation"].keys() == {"gap"} and "gap" in found
        assert "of PaiNN on gap" in (tmp_path / "run/report.html").read_text()

    def test_energies_are_results_of_a_calculator(self):
        structures = both()
        for atoms in structures:
            atoms.info["cheap"] = atoms.get_potential_energy() - 3.0
        model = trained(tm.Property("energy", "extensive", minus="cheap"), structures)
        found = tm.predict(model, structures, verbose=False)
        assert found[0].get_potential_energy() == pytest.approx(structures[0].get_potential_energy(), abs=1.0)
        with pytest.raises(tm.InputError, match="predicts no energy"):  # it knows no cheap value of what moves
            tm.Calculator(model)

    def test_the_cheap_value_may_be_what_a_calculator_left(self, held_out):
        for atoms in (structures := [*both(), *held_out]):
            atoms.info["total"] = atoms.get_potential_energy() + 20.0 + 0.1 * count(atoms)
        model = trained(tm.Property("total", "extensive", minus="energy"), structures, steps=40)
        found = np.array([atoms.info["total"] for atoms in tm.predict(model, held_out, verbose=False)])
        truth = np.array([atoms.info["total"] for atoms in held_out])
        assert np.abs(found - truth).max() < 1.0
        errors = tm.evaluate(model, held_out, verbose=False)["total"]
        assert errors["mae"] == pytest.approx(np.abs(found - truth).mean())
        with pytest.raises(tm.InputError, match="'energy' in eV cannot be brought to the unit of 'total'"):
            trained(tm.Property("total", minus="energy"), structures, unit={"total": "hartree"})

    def test_per_atom(self, held_out):
        for atoms in (structures := [*both(), *held_out]):
            atoms.arrays["charge"] = atoms.numbers / 10 + 0.01 * atoms.positions[:, 0]
            atoms.arrays["base"] = 0.01 * atoms.positions[:, 0]
        model = trained(tm.Property("charge", "per-atom", minus="base"), structures, steps=60)
        found = tm.predict(model, held_out, verbose=False)
        expected = tm.evaluate(model, held_out, verbose=False)["charge"]
        errors = np.concatenate([f.arrays["charge"] - a.arrays["charge"] for f, a in zip(found, held_out, strict=True)])
        assert expected["mae"] == pytest.approx(np.abs(errors).mean())
        numbers = np.concatenate([atoms.numbers for atoms in held_out])
        assert expected["per_element"]["Au"] == pytest.approx(np.abs(errors[numbers == 79]).mean())

    def test_parts_of_several_objectives(self, held_out):
        model = trained(tm.Together({"delta": DELTA, "field": tm.Potential()}))
        part = tm.predict(model, held_out, part="delta", verbose=False)
        for found in (tm.predict(model, held_out, verbose=False), part):
            assert gaps(found).tolist() == gaps(part).tolist()
        errors = tm.evaluate(model, held_out, verbose=False)
        assert errors["gap"]["mae"] == pytest.approx(np.abs(gaps(part) - gaps(held_out)).mean())


class TestTransfer:
    def test_zero_steps_leave_a_difference_as_it_is(self, model, held_out):
        tuned = tm.finetune(model, both(8, seed=2), DELTA, steps=0, align=False, **QUICK)
        assert same_bits(weights_of(tuned), weights_of(model))
        assert (
            gaps(tm.predict(tuned, held_out, verbose=False)).tolist()
            == gaps(tm.predict(model, held_out, verbose=False)).tolist()
        )

    def test_a_head_for_the_whole_is_not_one_for_the_difference(self, held_out):
        tuned = tm.finetune(gap_model(), both(8), DELTA, steps=2, **QUICK)
        assert tuned.card["history"][-1]["alignment"]["kept heads"] == []
        back = tm.finetune(tuned, both(8), tm.Property("gap"), steps=0, **QUICK)
        assert list(back.outputs) == ["gap"] and np.isfinite(tm.evaluate(back, held_out, verbose=False)["gap"]["mae"])

    def test_an_alignment_is_of_the_difference(self, model, held_out):
        shifted = both(8, seed=2)
        for atoms in shifted:
            atoms.info["gap"] += 5.0
        tuned = tm.finetune(model, shifted, DELTA, strategy="aligned", valid_fraction=0, **QUICK)
        before, after = (gaps(tm.predict(m, shifted, verbose=False)) for m in (model, tuned))
        assert np.mean(after - gaps(shifted)) == pytest.approx(0, abs=1e-5)
        np.testing.assert_allclose(after - before, np.mean(after - before), atol=1e-5)


class TestUnits:
    def test_the_cheap_value_is_in_the_unit_of_the_label(self, held_out):
        plain = trained(steps=4)
        for unit in ({"gap": "eV"}, {"gap": "eV", "cheap": "eV"}):
            assert same_bits(weights_of(trained(steps=4, unit=unit)), weights_of(plain))

    def test_of_other_structures_too_where_only_the_label_has_a_unit(self, held_out):
        model = trained(unit={"gap": "eV"})
        others = both(6, seed=9)
        right = tm.evaluate(model, others, verbose=False)["gap"]["mae"]
        for atoms in others:
            atoms.info["gap"], atoms.info["cheap"] = 1e3 * atoms.info["gap"], 1e3 * atoms.info["cheap"]
        for unit in ({"gap": "meV"}, {"gap": "meV", "cheap": "meV"}):
            assert tm.evaluate(model, others, unit=unit, verbose=False)["gap"]["mae"] == pytest.approx(right, rel=1e-6)
        mixed = both(6, seed=9, factor=1 / Hartree)
        for atoms in mixed:
            atoms.info["gap"] *= 1e3
        model = trained(structures=both(factor=1 / Hartree), unit={"gap": "eV", "cheap": "hartree"})
        found = tm.evaluate(model, mixed, unit={"gap": "meV"}, verbose=False)["gap"]["mae"]
        assert found == pytest.approx(right, rel=1e-2)

    def test_or_in_a_unit_that_is_declared_and_remembered(self, held_out):
        units = {"gap": "eV", "cheap": "hartree"}
        plain, model = trained(), trained(structures=both(factor=1 / Hartree), unit=units)
        others = both(6, seed=1, factor=1 / Hartree)
        expected = gaps(tm.predict(plain, held_out, verbose=False))
        np.testing.assert_allclose(gaps(tm.predict(model, others, verbose=False)), expected, atol=1e-4)
        wrong = gaps(tm.predict(model, others, unit={"cheap": "eV"}, verbose=False))
        assert np.abs(wrong - expected).max() > 1
        assert tm.evaluate(model, others, verbose=False)["gap"]["mae"] == pytest.approx(
            tm.evaluate(plain, held_out, verbose=False)["gap"]["mae"], abs=1e-4
        )
        entry = next(e for e in model.card["labels"]["labels"] if e["quantity"] == "cheap")
        assert (entry["unit"], entry["given_unit"]) == ("eV", "hartree")
        assert entry["maximum"] == pytest.approx(cheaps(both()).max())

    def test_an_energy_and_its_cheap_value_are_converted_alike(self):
        ev, hartree = both(), both()
        for a, b in zip(ev, hartree, strict=True):
            a.info |= {"total": a.get_potential_energy(), "cheap": a.get_potential_energy() - 2 - 0.1 * count(a)}
            b.info |= {name: a.info[name] / Hartree for name in ("total", "cheap")}
        objective = tm.Property("energy", "extensive", minus="cheap")
        plain = trained(objective, ev, label={"energy": "total"})
        model = trained(objective, hartree, label={"energy": "total"}, unit={"energy": "hartree"})
        found, expected = (tm.predict(m, s, verbose=False) for m, s in ((model, hartree), (plain, ev)))
        energies = [[atoms.get_potential_energy() for atoms in some] for some in (found, expected)]
        np.testing.assert_allclose(*energies, atol=1e-4)
        for unit in ({"energy": "hartree/atom"}, {"cheap": "parsec"}):
            with pytest.raises(tm.InputError, match=r"'cheap' in .* cannot be brought to the unit of 'energy'"):
                trained(objective, hartree, label={"energy": "total"}, unit=unit)

    def test_keys_that_were_named_are_used_again(self, held_out):
        for atoms in (structures := both()):
            atoms.info["E cheap"] = atoms.info.pop("cheap")
        model = trained(structures=structures, label={"cheap": "E cheap"})
        assert same_bits(weights_of(model), weights_of(trained()))
        expected = gaps(tm.predict(model, held_out, verbose=False))
        for atoms in (others := both(6, seed=1)):
            atoms.info["E cheap"] = atoms.info.pop("cheap")
        assert gaps(tm.predict(model, others, verbose=False)).tolist() == expected.tolist()
        for atoms in others:
            atoms.info["third"] = atoms.info.pop("E cheap")
        assert gaps(tm.predict(model, others, label={"cheap": "third"}, verbose=False)).tolist() == expected.tolist()


class TestErrors:
    def test_a_structure_with_a_label_and_without_a_cheap_value_is_named(self, model):
        structures = both()
        for index in (4, 7):
            del structures[index].info["cheap"]
        message = r"structure 4 has 'gap' but no 'cheap', which is to be subtracted \(and 1 more\)"
        for use in (trained, lambda structures: tm.finetune(model, structures, DELTA, **QUICK)):
            with pytest.raises(tm.InputError, match=message):
                use(structures=structures)
        with pytest.raises(tm.InputError, match=message):
            tm.evaluate(model, structures, verbose=False)
        with pytest.raises(tm.InputError, match=r"structure 4 has no 'cheap', to which .* \(2 of 12 structures"):
            tm.predict(model, structures, verbose=False)

    def test_a_structure_without_either_teaches_nothing(self, model):
        structures = both()
        for name in ("gap", "cheap"):
            del structures[4].info[name]
        assert trained(structures=structures).card["history"][-1]["steps"] == 12
        assert tm.evaluate(model, structures, verbose=False)["gap"]["n"] == 11

    def test_of_several_objectives_it_teaches_another_one(self):
        structures = both()
        del structures[4].info["cheap"]
        model = trained(tm.Together({"a": tm.Property("gap"), "b": DELTA}), structures, valid_fraction=0)
        assert set(model.outputs) == {"gap", "gap_minus_cheap"}

    def test_a_cheap_value_that_nobody_has_is_misspelt(self):
        with pytest.raises(tm.InputError, match=r"no structure has 'cheep'; .* did you mean cheap\?"):
            trained(tm.Property("gap", minus="cheep"))

    def test_other_models_take_no_cheap_value(self, held_out):
        with pytest.raises(tm.InputError, match="'cheap' is not needed: for a prediction this model needs no label"):
            tm.predict(gap_model(), held_out, label={"cheap": "x"}, verbose=False)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"minus": "gap"}, "minus itself"),
            ({"minus": "a b"}, "cannot name a label"),
            ({"minus": "cheap", "task": "classification"}, "no class"),
        ],
    )
    def test_what_is_no_difference_is_refused(self, arguments, message):
        with pytest.raises(tm.InputError, match=message):
            tm.Property("gap", **arguments)


def graph_of(model: tm.Model, structures: list[ase.Atoms]):
    from transfermium.graph import to_graph

    return to_graph(structures, model.backbone.edges)

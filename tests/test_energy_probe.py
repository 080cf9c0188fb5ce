"""Probes of energies: what is linear is found exactly, forces follow, and a base that is right is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from tests.alloys import QUICK, alloys, potential, same_bits, weights_of, without
from transfermium.report import run_report
from transfermium.transfer.energy_probe import FOLDS, LINEAR, NONE, Equations, _chosen, _error, _folds, _normal, _solved
from transfermium.transfer.probe import told_of_probe

POTENTIAL = tm.Potential()


def probe(structures: list[Atoms], base: tm.Model | None = None, **options: Any) -> tm.Model:
    options = {"valid_fraction": 0.0, **QUICK, **options}
    return tm.finetune(
        base or potential(), structures, options.pop("objective", POTENTIAL), strategy="probe", **options
    )


def labelled_by(model: tm.Model, structures: list[Atoms], shift: float = 0.0) -> list[Atoms]:
    """Copies with what a model says as their labels, each gold atom shifted."""
    copies = tm.predict(model, [atoms.copy() for atoms in structures], verbose=False)
    for atoms in copies:
        found = {name: atoms.calc.results[name] for name in ("energy", "forces", "stress")}
        found["energy"] += shift * float((atoms.numbers == 79).sum())
        atoms.calc = SinglePointCalculator(atoms, **found)
    return copies


def corrected() -> tm.Model:
    """The potential with a correction, whose features go on being those of the potential."""
    model = probe(alloys(3))
    generator = torch.Generator().manual_seed(0)
    correction = model.heads["energy"].correction
    correction.copy_(0.3 * torch.randn(correction.shape, generator=generator, dtype=torch.float64))
    return model


def errors(model: tm.Model, structures: list[Atoms]) -> dict[str, float]:
    found = tm.evaluate(model, structures, verbose=False)
    return {name: found[name]["mae"] for name in ("energy_per_atom", "forces", "stress") if name in found}


def report_of(model: tm.Model) -> dict[str, Any]:
    return model.card["history"][-1]["alignment"]


def test_what_is_linear_in_the_features_is_found() -> None:
    truth = corrected()
    tests = labelled_by(truth, alloys(20, seed=9), shift=2.0)
    found = probe(labelled_by(truth, alloys(40, seed=1), shift=2.0))
    before = errors(tm.finetune(potential(), tests, POTENTIAL, strategy="aligned", **QUICK), tests)
    for name, error in errors(found, tests).items():
        assert error < 0.02 * before[name]
    assert same_bits(weights_of(found, "backbone."), weights_of(potential(), "backbone."))
    assert report_of(found)["probe"] == LINEAR


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_a_frame_that_is_far_off_does_not_rule_the_fit(size: float) -> None:
    truth, rng = corrected(), np.random.default_rng(0)
    given = without(labelled_by(truth, alloys(40, seed=1)), "energy", "stress")
    tests = labelled_by(truth, alloys(20, seed=9))
    for k, atoms in enumerate(given):
        noise = rng.normal(0, size if k == 7 else 0.05, (len(atoms), 3))
        atoms.calc.results["forces"] = atoms.get_forces() + noise
    found, before = errors(probe(given, unseen="keep"), tests), errors(potential(), tests)
    assert found["forces"] < 0.05 * before["forces"]


@pytest.mark.parametrize("quantity", ["energy", "forces", "stress"])
def test_each_label_alone_is_enough(quantity: str) -> None:
    """What is learned of one quantity holds for the others, as they are derivatives of one energy."""
    truth = corrected()
    others = {"energy", "forces", "stress"} - {quantity}
    given = without(labelled_by(truth, alloys(60, seed=1)), *others)
    tests = labelled_by(truth, alloys(20, seed=9))
    found, before = errors(probe(given, unseen="keep"), tests), errors(potential(), tests)
    assert found["forces"] < 0.1 * before["forces"]
    assert found["stress"] < 0.1 * before["stress"]


def test_few_real_labels_are_better_used_than_by_references_alone() -> None:
    tests = alloys(30, seed=9)
    aligned = errors(tm.finetune(potential(), alloys(20, seed=1), POTENTIAL, strategy="aligned", **QUICK), tests)
    found = errors(probe(alloys(20, seed=1)), tests)
    assert found["forces"] < 0.8 * aligned["forces"]
    assert found["energy_per_atom"] < aligned["energy_per_atom"]


def test_forces_and_stress_are_derivatives() -> None:
    atoms = alloys(1, seed=5)[0]
    atoms.calc = tm.Calculator(probe(alloys(12), dtype="float64"))
    forces, stress = atoms.get_forces(), atoms.get_stress(voigt=False)
    step = 1e-4
    for axis in range(3):
        energies = []
        for sign in (-1, 1):
            moved = atoms.copy()
            moved.positions[1, axis] += sign * step
            moved.calc = atoms.calc
            energies.append(moved.get_potential_energy())
        assert (energies[0] - energies[1]) / (2 * step) == pytest.approx(forces[1, axis], abs=1e-5)
    energies = []
    for sign in (-1, 1):
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array @ (np.eye(3) * (1 + sign * step)), scale_atoms=True)
        strained.calc = atoms.calc
        energies.append(strained.get_potential_energy())
    slope = (energies[1] - energies[0]) / (2 * step) / atoms.get_volume()
    assert slope == pytest.approx(np.trace(stress), abs=1e-6)


def test_the_errors_it_reports_are_those_of_leaving_a_part_out() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=6)
    folds = np.repeat(np.arange(5), 8)
    x = np.hstack([rng.normal(size=(40, 4)), rng.integers(0, 3, (40, 1)), np.ones((40, 1))])
    rows = np.column_stack([x, x @ truth + 0.3 * rng.normal(size=40)])
    known = {"energy": Equations(rows, folds, np.ones(40, bool), 2.0)}

    plain, best = _chosen(known, 4)
    assert best.errors["energy"] < plain.errors["energy"]
    misses = []
    for k in range(5):
        kept, left = rows[folds != k], rows[folds == k]
        size = (kept[:, :4] ** 2).mean()
        ridge = np.sqrt(np.r_[np.full(4, best.penalty * size), 0, 0] * len(kept))  # references are free
        above = np.vstack([kept[:, :-1], np.diag(ridge)])
        w = np.linalg.lstsq(above, np.r_[kept[:, -1], np.zeros(6)], rcond=None)[0]
        assert w == pytest.approx(_solved(_normal(known, k), 4, best.penalty), rel=1e-4)
        misses.append(np.abs(left[:, -1] - left[:, :-1] @ w))
    assert best.errors["energy"] == pytest.approx(np.mean(misses), rel=1e-4)
    weights = {k: _solved(_normal(known, k), 4, best.penalty) for k in range(5)}
    assert _error(known["energy"], weights) == best.errors["energy"]


def test_materials_are_left_out_whole() -> None:
    structures = alloys(40)
    for number, atoms in enumerate(structures):
        atoms.info["material_id"] = f"mp-{number // 2}"
    folds = _folds(structures)
    assert all(folds[2 * k] == folds[2 * k + 1] for k in range(20))
    assert set(folds) == set(range(FOLDS))
    for atoms in structures:
        atoms.info["material_id"] = "mp-1"
    assert set(_folds(structures)) == set(range(FOLDS))


def test_a_base_that_is_right_is_left_alone() -> None:
    given = labelled_by(potential(), alloys(30, seed=1), shift=3.0)
    tests = labelled_by(potential(), alloys(20, seed=9), shift=3.0)
    found = probe(given)
    assert all(error < 1e-3 for error in errors(found, tests).values())
    assert report_of(found)["probe"] in (NONE, LINEAR)
    shifts = report_of(found)["reference shift (eV)"]
    assert shifts["Au"] - shifts["Cu"] == pytest.approx(3.0, abs=1e-2)


def test_a_base_without_an_energy_begins_with_references() -> None:
    base = tm.pretrain(alloys(16), tm.Denoise(0.1, conservative=False), potential().backbone, steps=5, **QUICK)
    tests = alloys(30, seed=9)
    zero = np.mean([np.abs(atoms.get_forces()).mean() for atoms in tests])
    assert errors(probe(alloys(30, seed=1), base), tests)["forces"] < 0.8 * zero


def test_references_stay_where_they_are_to_stay() -> None:
    found = probe(alloys(12), align=False)
    assert torch.equal(found.heads["energy"].references, potential().heads["energy"].references)
    assert "reference shift (eV)" not in report_of(found)


def left_out(model: tm.Model, name: str) -> tuple[float, float]:
    found = report_of(model)["errors of what is left out"][name]
    return found["before"], found["after"]


def test_what_is_said_of_energies_is_true() -> None:
    """Of crystals with elements that the other parts have: others would say how references are guessed."""
    train, test = tm.crystals("r2SCAN", "train"), tm.crystals("r2SCAN", "test")
    model = probe(train, tm.load("small"), unseen="group")
    aligned = tm.finetune("small", train, POTENTIAL, strategy="aligned", unseen="group", **QUICK)
    for name, quantity in (("energy", "energy_per_atom"), ("forces", "forces")):
        before = tm.evaluate(aligned, test, verbose=False)[quantity]["mae"]
        assert left_out(model, name)[0] == pytest.approx(before, rel=0.6)
    after = tm.evaluate(model, test, verbose=False)["forces"]["mae"]
    assert after < 0.9 * tm.evaluate(aligned, test, verbose=False)["forces"]["mae"]
    assert left_out(model, "forces")[1] == pytest.approx(after, rel=0.6)


@pytest.mark.parametrize("zero", [-1e3, -5e5])
def test_the_zero_of_energies_is_no_matter(zero: float) -> None:
    """As of total energies with pseudopotentials or all electrons."""
    given, tests = alloys(30, seed=1), alloys(20, seed=9)
    for atoms in (*given, *tests):
        atoms.calc.results["energy"] += float(np.where(atoms.numbers == 79, zero, zero / 3).sum())
    shifted, plain = errors(probe(given), tests), errors(probe(alloys(30, seed=1)), alloys(20, seed=9))
    for name in plain:
        assert shifted[name] == pytest.approx(plain[name], rel=0.1)


def test_forces_alone_are_better_used_too() -> None:
    given, tests = without(tm.crystals("r2SCAN", "train"), "energy"), tm.crystals("r2SCAN", "test")
    found, base = probe(given, tm.load("small"), unseen="keep"), tm.load("small")
    one, other = (tm.evaluate(m, tests, verbose=False)["forces"]["mae"] for m in (found, base))
    assert one < 0.95 * other


@pytest.mark.parametrize("few", [1, 2])
def test_one_or_two_energies_do_no_harm(few: int) -> None:
    structures, tests = alloys(30, seed=1), alloys(20, seed=9)
    forces = without(structures, "energy", "stress")
    some = [*structures[:few], *forces[few:]]
    assert errors(probe(some), tests)["forces"] < 0.6 * errors(potential(), tests)["forces"]


def test_labels_on_one_material_of_two_are_enough() -> None:
    structures = alloys(20, seed=1)
    for number, atoms in enumerate(structures):
        atoms.info["material_id"] = f"mp-{number % 2}"
        if number % 2:
            atoms.calc = None
    assert report_of(probe(structures))["probe"] == LINEAR


def test_forces_of_few_among_many_are_all_used() -> None:
    structures = [*without(alloys(800, seed=2), "forces", "stress"), *alloys(8, seed=1)]
    tests = alloys(20, seed=9)
    few = errors(probe(structures), tests)
    assert few["forces"] < 0.8 * errors(potential(), tests)["forces"]
    assert left_out(probe(structures), "forces")[0] > 0


@pytest.mark.parametrize("strategy", ["zero-shot", "aligned", "full", "head", "lora", "replay"])
def test_what_is_trained_later_begins_with_the_probe(strategy: str) -> None:
    base, tests = probe(alloys(30, seed=1)), alloys(20, seed=9)
    options: dict[str, Any] = {} if strategy in ("zero-shot", "aligned") else {"steps": 1, "lr": 1e-9}
    if strategy == "replay":
        options["replay"] = alloys(6, seed=2)
    model = tm.finetune(base, alloys(12, seed=1), POTENTIAL, strategy=strategy, **options, **QUICK)
    assert report_of(model)["kept heads"] == ["energy"]
    assert errors(model, tests)["forces"] == pytest.approx(errors(base, tests)["forces"], rel=1e-3)


def test_a_probe_goes_on_from_a_probe() -> None:
    first = probe(alloys(6, seed=1))
    again, tests = probe(alloys(30, seed=1), first), alloys(20, seed=9)
    assert errors(again, tests)["forces"] < errors(first, tests)["forces"]
    same = probe(labelled_by(first, alloys(12, seed=1)), first)
    assert errors(same, labelled_by(first, tests))["forces"] < 1e-3


@pytest.mark.parametrize("kind", ["intensive", "extensive"])
def test_a_probe_of_a_property_may_be_aligned(kind: str) -> None:
    structures = alloys(20, seed=1)
    base = tm.finetune(potential(), structures, tm.Property("gap", kind=kind), strategy="probe", **QUICK)
    for atoms in structures:
        atoms.info["gap"] += 3.0 * (len(atoms) if kind == "extensive" else 1)
    untouched, moved = (
        tm.finetune(base, structures, tm.Property("gap", kind=kind), strategy=strategy, **QUICK)
        for strategy in ("zero-shot", "aligned")
    )
    tests = alloys(5, seed=9)
    one, same, other = (
        np.array([a.info["gap"] for a in tm.predict(m, [t.copy() for t in tests], verbose=False)])
        for m in (base, untouched, moved)
    )
    assert np.array_equal(one, same)
    assert other - one == pytest.approx(3.0 * (4 if kind == "extensive" else 1), abs=0.2)


def test_a_probe_that_cannot_be_trained_is_said_to_be_left_behind(capsys) -> None:
    base = tm.finetune(potential(), alloys(12), tm.Property("gap"), strategy="probe", **QUICK)
    capsys.readouterr()
    tm.finetune(base, alloys(12), tm.Property("gap"), steps=1, **{**QUICK, "verbose": True})
    assert "The base has a probe for 'gap', which cannot be trained: it begins anew" in " ".join(
        capsys.readouterr().err.split()
    )


def test_it_is_a_model_like_others(tmp_path) -> None:
    model = probe(alloys(12), out=tmp_path / "run")
    again = tm.load(tmp_path / "run")
    tests = alloys(4, seed=9)
    one, other = ([a.get_potential_energy() for a in tm.predict(m, tests, verbose=False)] for m in (model, again))
    assert one == other
    page = run_report(tmp_path / "run").read_text()
    assert "Nothing was trained. Linear correction of the energy" in page
    assert ">Training<" not in page  # no curve of one point
    assert "Reference energies were fitted again" in page
    assert "mean errors of what is left out, before and after: energy" in told_of_probe(report_of(again))


def test_twice_the_cell_has_twice_the_energy() -> None:
    model, atoms = probe(alloys(12)), alloys(1)[0]
    one, two = (tm.predict(model, [a], verbose=False)[0] for a in (atoms, atoms.repeat((2, 1, 1))))
    assert two.get_potential_energy() == pytest.approx(2 * one.get_potential_energy(), abs=1e-4)
    assert two.get_forces()[:4] == pytest.approx(one.get_forces(), abs=1e-4)


def alone() -> Atoms:
    crystal = bulk("Cu", "fcc", a=3.6)
    crystal.calc = SinglePointCalculator(crystal, energy=1.0)
    return crystal


@pytest.mark.parametrize(
    ("structures", "objective", "words"),
    [
        (alloys(2), POTENTIAL, "a probe needs at least three structures with the same label, but there are 2"),
        ([alloys(1)[0].copy()] * 20 + alloys(2), POTENTIAL, "but there are 2"),
        ([alone() for _ in range(5)], POTENTIAL, "all atoms of an element look the same"),
        (alloys(5), tm.Potential(conservative=False), "or an energy whose derivatives are forces and stress"),
    ],
)
def test_what_cannot_be_probed_is_said(structures: list[Atoms], objective: tm.Objective, words: str) -> None:
    with pytest.raises(tm.InputError, match=words):
        probe(structures, objective=objective)

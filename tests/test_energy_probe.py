"""Probes of energies: what is linear is found exactly, forces follow, and a base that is right is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from tests.alloys import QUICK, alloys, potential, same_bits, weights_of, without
from transfermium.energy_probe import FOLDS, Gram, _chosen, _errors, _folds, _solved
from transfermium.probe import told_of_probe
from transfermium.report import run_report

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
    assert report_of(found)["probe"] == "linear correction of the energy"


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
    y = x @ truth + 0.3 * rng.normal(size=40)
    rows = np.column_stack([x, y])
    sums = np.stack([rows[folds == k].T @ rows[folds == k] for k in range(5)])
    grams = {"energy": Gram(sums, np.full(5, 8.0), 2.0)}

    plain, best = _chosen(grams, 4)
    assert best.error < plain.error
    squares = []
    for k in range(5):
        kept, left = rows[folds != k], rows[folds == k]
        size = 4.0 * (kept[:, :-1] ** 2).sum(axis=0) / len(kept)
        ridge = np.r_[np.full(4, best.penalty * size[:4].mean()), 1e-4 * size[4], 1e-9 * size[5]]
        ridge *= len(kept) / 4.0
        w = np.linalg.lstsq(
            np.vstack([kept[:, :-1], np.diag(np.sqrt(ridge))]), np.r_[kept[:, -1], np.zeros(6)], rcond=None
        )[0]
        assert w == pytest.approx(_solved(grams, 4, best.penalty, k), rel=1e-6)
        squares.append((left[:, -1] - left[:, :-1] @ w) ** 2)
    assert best.errors["energy"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-6)
    weights = [_solved(grams, 4, best.penalty, k) for k in range(5)]
    assert _errors(grams, weights, np.arange(5)) == best.errors


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


def test_it_is_a_model_like_others(tmp_path) -> None:
    model = probe(alloys(12), out=tmp_path / "run")
    again = tm.load(tmp_path / "run")
    tests = alloys(4, seed=9)
    one, other = ([a.get_potential_energy() for a in tm.predict(m, tests, verbose=False)] for m in (model, again))
    assert one == other
    page = run_report(tmp_path / "run").read_text()
    assert "Nothing was trained. " in page
    assert "Reference energies were fitted again" in page
    assert "RMSE of what is left out, without it and with it: energy" in told_of_probe(report_of(again))
    tuned = tm.finetune(again, alloys(10), POTENTIAL, steps=2, **QUICK)  # and can be trained on
    assert type(tuned.heads["energy"]) is tm.EnergyHead


def test_twice_the_cell_has_twice_the_energy() -> None:
    model, atoms = probe(alloys(12)), alloys(1)[0]
    one, two = (tm.predict(model, [a], verbose=False)[0] for a in (atoms, atoms.repeat((2, 1, 1))))
    assert two.get_potential_energy() == pytest.approx(2 * one.get_potential_energy(), abs=1e-4)
    assert two.get_forces()[:4] == pytest.approx(one.get_forces(), abs=1e-4)


@pytest.mark.parametrize(
    ("structures", "objective", "words"),
    [
        (alloys(2), POTENTIAL, "a probe needs at least three structures with labels, but there are 2"),
        (alloys(5), tm.Potential(conservative=False), "or an energy whose derivatives are forces and stress"),
    ],
)
def test_what_cannot_be_probed_is_said(structures: list[Atoms], objective: tm.Objective, words: str) -> None:
    with pytest.raises(tm.InputError, match=words):
        probe(structures, objective=objective)

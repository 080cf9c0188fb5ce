"""Masking: what is removed and where the rest points, in any cell; and which elements are hidden."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

import transfermium as tm
from tests.alloys import alloys, painn
from tests.waters import ANGLE, BOND, CELL, waters
from transfermium.data.load import VALIDATION, rng_of
from transfermium.evaluate import printable
from transfermium.graph import Sample, to_batch, to_graph
from transfermium.model import described
from transfermium.molecules import molecules
from transfermium.objectives.base import told
from transfermium.testing import check_objective

METAL = ("H", "leaf", "Cu")  # what somebody may ask of copper
QUICK: dict[str, Any] = {"edges": 3000, "device": "cpu", "split_by": "random", "verbose": False, "lr": 0.01}


def masked(objective: tm.MaskAtoms, atoms: Atoms, seed: int = 0) -> Sample:
    return objective.prepare(atoms, np.random.default_rng(seed))


def removed(atoms: Atoms, sample: Sample) -> np.ndarray:
    """Numbers of the atoms that are not in the sample."""
    there = {tuple(position) for position in sample.atoms.positions}
    return np.array([i for i, position in enumerate(atoms.positions) if tuple(position) not in there], int)


def nearest_image(vectors: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """The shortest of each vector and its images, by trying 125 cells."""
    cells = np.array(list(itertools.product(range(-2, 3), repeat=3))) @ cell
    images = vectors[:, None] + cells
    return np.stack([rows[np.linalg.norm(rows, axis=1).argmin()] for rows in images])


def flags(sample: Sample) -> np.ndarray:
    return sample.inputs["masked"][:, 0] == 1


# -------------------------------------------------------------------------------------------------------- molecules


class TestMolecules:
    def test_are_found_across_faces_of_a_triclinic_cell_and_in_any_order(self):
        atoms = waters(27)
        found = molecules(atoms)
        assert len(set(zip(found.owner.tolist(), atoms.arrays["molecule"].tolist(), strict=True))) == 27
        assert found.sizes.tolist() == [3] * 27 and not found.endless.any() and not found.crowded.any()
        apart = np.linalg.norm(atoms.positions[found.bonds[:, 0]] - atoms.positions[found.bonds[:, 1]], axis=1)
        joined = np.linalg.norm(found.positions[found.bonds[:, 0]] - found.positions[found.bonds[:, 1]], axis=1)
        assert apart.max() > 3 and np.allclose(joined, BOND)

    def test_are_moved_by_whole_cells(self):
        atoms = waters(8)
        cells = np.linalg.solve(atoms.cell.array.T, (molecules(atoms).positions - atoms.positions).T)
        np.testing.assert_allclose(cells, cells.round(), atol=1e-9)
        assert np.abs(cells).max() == pytest.approx(1)

    @pytest.mark.parametrize("name", ["C6H6", "CH3CH2OH", "SO2", "CH3Cl", "Si2H6", "N2", "H2", "PH3", "CO2"])
    def test_of_known_ones_are_whole(self, name):
        atoms = molecule(name)
        assert molecules(atoms).sizes.tolist() == [len(atoms)]

    def test_hydrogen_bonds_join_none_and_a_shared_proton_has_one_owner(self):
        dimer = Atoms("OHOH", [[0, 0, 0], [1.15, 0, 0], [2.4, 0, 0], [2.4, 0.97, 0]])
        assert molecules(dimer).owner.tolist() == [0, 0, 1, 1]

    def test_ions_and_metals_have_none(self):
        for atoms in (bulk("NaCl", "rocksalt", a=5.64), bulk("Cu", cubic=True)):
            found = molecules(atoms)
            assert len(found.bonds) == 0 and found.sizes.max() == 1

    def test_networks_and_chains_are_endless(self):
        chain = Atoms("CH2CH2", [[0, 0, 0], [-0.5, 0.9, 0], [-0.5, -0.9, 0], [0.85, 0, 1.27], [1.4, 0.9, 1.27],
                                 [1.4, -0.9, 1.27]], cell=[9, 9, 2.54], pbc=True)  # fmt: skip
        for atoms in (bulk("C", "diamond", a=3.57), chain):
            assert molecules(atoms).endless.tolist() == [True]
        chain.pbc = [True, True, False]
        assert molecules(chain).endless.tolist() == [False]

    def test_a_cell_that_is_small_for_its_molecule_is_noticed(self):
        ethane = molecule("C2H6")
        ethane.set_cell([3.9, 9, 9])
        ethane.pbc = [False, True, True]
        ethane.rotate(90, "y")  # its axis is now x, which is 3.9 Å long
        assert not molecules(ethane).crowded.any()
        ethane.pbc = True
        assert molecules(ethane).crowded.tolist() == [True]
        assert not molecules(ethane.repeat((2, 1, 1))).crowded.any()

    @pytest.mark.parametrize("atoms", [Atoms(), Atoms("H"), Atoms("Cu2", [[0, 0, 0], [2, 0, 0]])])
    def test_bear_little(self, atoms):
        found = molecules(atoms)
        assert found.sizes.tolist() == [1] * len(atoms) and len(found.endless) == len(found.crowded) == len(atoms)


# ------------------------------------------------------------------------------------------------------- the removal


class TestRemoval:
    def test_one_hydrogen_of_half_of_the_molecules_is_gone(self):
        atoms = waters(27)
        counts = []
        for seed in range(20):
            sample = masked(tm.MaskAtoms(), atoms, seed)
            gone = removed(atoms, sample)
            counts.append(len(gone))
            assert len(sample.atoms) == 81 - len(gone) and set(atoms.numbers[gone]) == {1}
            assert len(set(atoms.arrays["molecule"][gone])) == len(gone)  # never two of one molecule
        assert set(counts) == {13, 14}  # on average the fraction

    def test_all_of_them_for_a_fraction_of_one_and_at_least_one(self):
        atoms = waters(8)
        assert len(removed(atoms, masked(tm.MaskAtoms(1.0), atoms))) == 8
        assert len(removed(atoms, masked(tm.MaskAtoms(0.01), atoms))) == 1

    def test_the_coin_is_fair_and_molecules_are_chosen_alike(self):
        atoms = waters(8)
        objective, n = tm.MaskAtoms(), 400
        times = Counter(itertools.chain(*(removed(atoms, masked(objective, atoms, seed)) for seed in range(n))))
        expected, deviation = n / 4, np.sqrt(n * 3 / 16)
        found = np.array([times[i] for i in np.flatnonzero(atoms.numbers == 1)])
        assert np.abs(found - expected).max() < 4 * deviation
        assert np.square(found - expected).mean() < 2 * deviation**2  # and as often as dice, not by turns
        assert np.square(found - expected).mean() > 0.25 * deviation**2

    def test_survivors_are_flagged_and_point_at_the_missing_atom_across_faces(self):
        atoms = waters(27)
        far = 0
        for seed in range(5):
            sample = masked(tm.MaskAtoms(), atoms, seed)
            gone = removed(atoms, sample)
            kept = np.setdiff1d(np.arange(len(atoms)), gone)
            owner = {atoms.arrays["molecule"][i]: i for i in gone}
            lost = np.array([owner.get(m, -1) for m in atoms.arrays["molecule"][kept]])
            assert np.array_equal(flags(sample), lost >= 0)
            assert np.array_equal(np.isfinite(sample.targets["direction"]).all(axis=1), lost >= 0)
            straight = (atoms.positions[lost] - atoms.positions[kept])[lost >= 0]
            vectors = nearest_image(straight, atoms.cell.array)
            expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            np.testing.assert_allclose(sample.targets["direction"][lost >= 0], expected, atol=1e-9)
            far += int((np.linalg.norm(straight, axis=1) > 3).sum())
        assert far > 10  # the test has seen molecules that are cut by faces

    def test_the_graph_is_that_of_the_survivors(self):
        atoms = waters(27)
        sample = masked(tm.MaskAtoms(), atoms)
        graph = to_batch([sample], tm.PaiNN(8).edges).graph
        gone = removed(atoms, sample)
        bare = atoms.copy()
        del bare[gone]
        expected = to_graph([bare], tm.PaiNN(8).edges)
        assert graph.n_atoms == 81 - len(gone) and len(gone) > 0
        for name in ("positions", "atomic_numbers", "senders", "receivers", "cell_shifts"):
            assert torch.equal(getattr(graph, name), getattr(expected, name))

    def test_directions_turn_with_the_structure(self):
        atoms, q = waters(8), np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
        turned = atoms.copy()
        turned.set_cell(atoms.cell.array @ q.T)
        turned.positions = atoms.positions @ q.T
        before, after = (masked(tm.MaskAtoms(length=1.0), a, seed=3) for a in (atoms, turned))
        np.testing.assert_allclose(after.targets["direction"], before.targets["direction"] @ q.T, atol=1e-9)
        np.testing.assert_allclose(after.targets["distance"], before.targets["distance"], atol=1e-9)

    def test_distances_are_those_of_the_molecule(self):
        sample = masked(tm.MaskAtoms(length=1.0), waters(8))
        expected = np.where(sample.atoms.numbers == 8, BOND, 2 * BOND * np.sin(ANGLE / 2))
        np.testing.assert_allclose(sample.targets["distance"][flags(sample)], expected[flags(sample)], atol=1e-9)
        assert np.isnan(sample.targets["distance"][~flags(sample)]).all()

    @pytest.mark.parametrize(("atoms", "symbols"), [("H", {"H"}), ("O", {"O"}), ("leaf", {"H"})])
    def test_what_is_removed_can_be_chosen(self, atoms, symbols):
        alcohol = molecule("CH3CH2OH")
        seen = set()
        for seed in range(40):
            sample = masked(tm.MaskAtoms(atoms=atoms), alcohol, seed)
            (gone,) = removed(alcohol, sample)
            seen.add(gone)
            assert flags(sample).all()
        assert {alcohol.symbols[i] for i in seen} == symbols
        assert len(seen) == {"H": 6, "O": 1, "leaf": 6}[atoms]

    def test_without_flag_nothing_is_told(self):
        assert masked(tm.MaskAtoms(flag=False), waters(8)).inputs == {}
        assert tm.MaskAtoms(flag=False).scalar_inputs() == ()

    @pytest.mark.parametrize("atoms", [Atoms("HF", [[0, 0, 0], [0.92, 0, 0]]), bulk("Cu"), Atoms("H"), Atoms()])
    def test_where_nothing_can_be_removed_the_structure_stays_and_teaches_nothing(self, atoms):
        sample = masked(tm.MaskAtoms(), atoms)
        assert sample.atoms is atoms and np.isnan(sample.targets["direction"]).all() and not flags(sample).any()


# ------------------------------------------------------------------------------------------------- loss and its floor


def loss_of(forces: np.ndarray, objective: tm.MaskAtoms, sample: Sample) -> dict[str, float]:
    terms = objective.loss({"forces": torch.from_numpy(forces)}, to_batch([sample], tm.PaiNN(8).edges))
    return {name: float(total / count) for name, (total, count) in terms.items()}


class TestLoss:
    def test_is_one_minus_the_cosine_over_flagged_atoms_whatever_the_length(self):
        sample = masked(tm.MaskAtoms(), waters(8))
        target = np.nan_to_num(sample.targets["direction"], nan=7.0)
        for factor, expected in [(5.0, 0.0), (0.2, 0.0), (-3.0, 2.0), (0.0, 1.0)]:
            assert loss_of(factor * target, tm.MaskAtoms(), sample)["direction"] == pytest.approx(expected, abs=1e-3)
        sideways = np.cross(target, [0.3, -0.5, 0.8])
        assert loss_of(sideways, tm.MaskAtoms(), sample)["direction"] == pytest.approx(1.0)

    def test_of_the_length_is_the_error_in_angstrom_times_its_weight(self):
        objective = tm.MaskAtoms(length=2.0)
        sample = masked(objective, waters(8))
        vectors = sample.targets["direction"] * sample.targets["distance"][:, None]
        longer = np.nan_to_num(vectors + 0.3 * sample.targets["direction"])
        assert loss_of(longer, objective, sample) == {
            "direction": pytest.approx(0.0, abs=1e-5), "distance": pytest.approx(0.6, abs=1e-5),
        }  # fmt: skip

    def test_a_force_of_zero_can_be_differentiated(self):
        sample = masked(tm.MaskAtoms(), waters(8))
        forces = torch.zeros((len(sample.atoms), 3), dtype=torch.float64, requires_grad=True)
        total, _ = tm.MaskAtoms().loss({"forces": forces}, to_batch([sample], tm.PaiNN(8).edges))["direction"]
        total.backward()
        assert forces.grad is not None and torch.isfinite(forces.grad).all()

    def test_the_floor_of_rigid_water_is_that_of_its_angle(self):
        """From O the removed H is on a cone about the other bond; from H its direction follows from the triangle."""
        expected = 1 - (abs(np.cos(ANGLE)) + np.cos((np.pi - ANGLE) / 2)) / 2
        assert expected == pytest.approx(0.479, abs=0.001)
        assert tm.MaskAtoms().floor([waters(27, seed) for seed in range(4)]) == pytest.approx(expected, abs=0.005)
        without_o = tm.MaskAtoms(atoms="O").floor([waters(27)])
        assert without_o == pytest.approx(1 - np.cos((np.pi - ANGLE) / 2), abs=1e-6)

    def test_the_floor_is_what_the_best_of_such_guesses_reaches(self):
        """No other rule that knows the remaining bond alone does better on the very data."""
        atoms = waters(27)
        sample = masked(tm.MaskAtoms(1.0), atoms)
        found = molecules(sample.atoms)
        guess = np.zeros((len(sample.atoms), 3))
        guess[found.bonds[:, 0]] = found.positions[found.bonds[:, 1]] - found.positions[found.bonds[:, 0]]
        guess[sample.atoms.numbers == 8] *= -1  # an obtuse angle
        floor = tm.MaskAtoms().floor([atoms])
        assert loss_of(guess, tm.MaskAtoms(), sample)["direction"] == pytest.approx(floor, abs=0.05)

    def test_a_molecule_that_gives_its_hydrogens_away_has_a_low_floor(self):
        assert tm.MaskAtoms().floor([molecule("CH3CH2OH")]) < 0.05 < tm.MaskAtoms().floor([waters(8)])

    def test_the_floor_counts_molecules_as_often_as_they_lose_an_atom(self):
        """One alone always does, in a box half of them."""
        structures = [waters(8, seed) for seed in range(4)] + [molecule("CH3CH2OH")] * 40
        flagged = {"O": 0, "C": 0}  # per molecule of water two atoms, of ethanol eight
        for k, atoms in enumerate(structures):
            left = masked(tm.MaskAtoms(), atoms, k)
            flagged["C" if 6 in left.atoms.numbers else "O"] += int(left.inputs["masked"].sum())
        water, ethanol = tm.MaskAtoms().floor(structures[:4]), tm.MaskAtoms().floor(structures[4:])
        expected = (flagged["O"] * water + flagged["C"] * ethanol) / sum(flagged.values())
        assert tm.MaskAtoms().floor(structures) == pytest.approx(expected, rel=0.02)

    @pytest.mark.parametrize("conservative", [True, False])
    def test_derivatives_of_single_molecules_are_warned_of(self, conservative):
        objective = tm.MaskAtoms(conservative=conservative)
        told = objective.warnings([molecule("CH3CH2OH"), waters(8), bulk("Cu")])
        assert any("1 of 3 structures are single molecules" in text for text in told) == conservative

    def test_the_floor_is_told_before_training(self, capsys):
        tm.pretrain([*(waters(8, seed) for seed in range(3)), bulk("Cu")], tm.MaskAtoms(), painn(), steps=0,
                    **{**QUICK, "verbose": True, "valid_fraction": 0})  # fmt: skip
        said = " ".join(capsys.readouterr().err.split())
        assert "A loss of 0.479" in said and "needs only a simple guess from what is left of each molecule" in said
        assert "single molecules" not in said
        assert "1 of 4 structures have nothing to mask and teach nothing (1: no two nonmetals" in said

    def test_an_evaluation_has_the_loss_and_the_floor_beside_it(self):
        structures = [waters(8, seed) for seed in range(3)]
        model = tm.pretrain(structures, tm.MaskAtoms(), painn(), steps=1, valid_fraction=0, **QUICK)
        (direction,) = (found for name, found in tm.evaluate(model, structures, verbose=False).items() if name != "n")
        samples = [tm.MaskAtoms().prepare(a, rng_of(0, VALIDATION, 0, k)) for k, a in enumerate(structures)]
        batch = to_batch(samples, model.backbone.edges)
        total, count = tm.MaskAtoms().loss(model(batch.graph, ["forces"]), batch)["direction"]
        assert direction["loss"] == pytest.approx(float(total / count), abs=1e-5)
        assert direction["floor"] == pytest.approx(0.479, abs=0.005)
        assert printable({"n": 3, "direction": direction})[0]["floor"] == "0.4792"

        mixed = tm.evaluate(model, [*structures, molecule("O2"), *structures[:2]], verbose=False)
        assert mixed["n"] == 6 and mixed["direction"]["n"] == 5, "from oxygen alone nothing can be removed"

    def test_the_floor_of_a_distance_is_the_deviation_from_its_median(self):
        """Of OH bonds of two lengths a quarter is the longer one: half of them by which the median is off."""
        structures = [molecule("H2O") for _ in range(4)]
        for atoms in structures:
            atoms.set_distance(0, 1, BOND, fix=0)
            atoms.set_distance(0, 2, BOND, fix=0)
        for k in (1, 2):
            structures[0].set_distance(0, k, BOND + 0.4, fix=0)
        across = [atoms.get_distance(1, 2) for atoms in structures]
        expected = (0.4 / 4 + (across[0] - across[1]) / 4) / 2
        objective = tm.MaskAtoms(length=2.0)
        floors = objective.floors(structures)
        assert floors == {"direction": pytest.approx(tm.MaskAtoms().floor(structures)),
                          "distance": pytest.approx(expected)}  # fmt: skip
        assert objective.floor(structures) == pytest.approx(floors["direction"] + 2 * expected)
        assert tm.MaskAtoms().floors(structures).keys() == {"direction"}

    def test_a_distance_is_evaluated_in_angstrom_and_told_apart_from_the_direction(self, capsys):
        structures = [waters(8, seed) for seed in range(3)]
        for seed, atoms in enumerate(structures):
            atoms.rattle(0.05, seed=seed)
        objective = tm.MaskAtoms(length=3.0)
        model = tm.pretrain(structures, objective, painn(), steps=1, **{**QUICK, "verbose": True, "valid_fraction": 0})
        floors = objective.floors(structures)
        said = " ".join(capsys.readouterr().err.split())
        assert (
            f"A loss of {floors['direction']:.3f} in the direction and an error of {floors['distance']:.3f} Å in the "
            "distance need only a simple guess"
        ) in said
        found = tm.evaluate(model, structures, verbose=False)
        samples = [objective.prepare(a, rng_of(0, VALIDATION, 0, k)) for k, a in enumerate(structures)]
        batch = to_batch(samples, model.backbone.edges)
        total, count = objective.loss(model(batch.graph, ["forces"]), batch)["distance"]
        assert found["distance"] == {"loss": pytest.approx(float(total / count) / 3, rel=1e-4), "n": 3, "unit": "Å",
                                     "floor": pytest.approx(floors["distance"])}  # fmt: skip
        assert 0.01 < found["distance"]["floor"] < 0.1 and found["direction"]["unit"] == ""

    def test_neighbours_are_needed_to_get_below(self):
        """On waters that all point the same way as their neighbours, which alone tell where the hydrogen was."""
        atoms = ordered()
        objective = tm.MaskAtoms(conservative=False)
        model = tm.pretrain([atoms] * 8, objective, tm.PaiNN(16, depth=2, cutoff=4.0), steps=60, seed=1,
                            valid=[atoms], **{**QUICK, "split_by": "auto"})  # fmt: skip
        assert model.card["metrics"]["validation loss"] < 0.3 < 0.47 < objective.floor([waters(27)])


def ordered() -> Atoms:
    """Ten waters in one orientation, in a triclinic cell."""
    one = waters(1, shuffled=False)
    one.set_cell(3.2 * CELL)
    return one.repeat((5, 2, 1))


# --------------------------------------------------------------------------------------------------------------- flag


class TestFlag:
    def test_zero_equals_absent_equals_the_plain_model(self):
        torch.manual_seed(0)
        objective, atoms = tm.MaskAtoms(), waters(8)
        backbone = told(painn(), objective)
        with torch.no_grad():
            for weight in backbone.node_inputs.inputs.parameters():
                weight.normal_()  # as after training
        model = tm.Model(backbone, objective.outputs(8)).double().eval()
        plain = tm.Model(painn(), objective.outputs(8)).double().eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "masked" not in k})
        flagged, zero = ([{"masked": np.full((24, 1), value)}] for value in (1.0, 0.0))
        given = [to_graph([atoms], backbone.edges, inputs) for inputs in (zero, (), flagged)]
        zeros, absent, ones = (model(graph)["forces"] for graph in given)
        expected = plain(given[1])["forces"]
        assert torch.equal(zeros, absent) and torch.equal(absent, expected)
        assert not torch.allclose(ones, expected)

    def test_it_starts_without_effect_and_is_learned(self):
        structures = [waters(8, seed) for seed in range(4)]
        for steps, learned in ((0, False), (5, True)):
            model = tm.pretrain(structures, tm.MaskAtoms(), painn(), steps=steps, valid_fraction=0, **QUICK)
            assert bool(model.state_dict()["backbone.node_inputs.inputs.masked.weight"].any()) == learned


# ------------------------------------------------------------------------------------------------------------ transfer


def pulled(n: int) -> list[Atoms]:
    """Waters whose hydrogens are pushed apart from one another, as labels to be tuned to."""
    from ase.calculators.singlepoint import SinglePointCalculator

    found = []
    for seed in range(n):
        atoms = waters(8, seed)
        atoms.positions += 0.05 * np.random.default_rng(seed).normal(size=(24, 3))
        bonds = molecules(atoms)
        here, there = bonds.bonds.T
        vectors = bonds.positions[there] - bonds.positions[here]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        forces = np.zeros((24, 3))
        np.add.at(forces, here, 5.0 * (lengths - BOND) * vectors / lengths)
        atoms.calc = SinglePointCalculator(atoms, energy=float(1.25 * ((lengths - BOND) ** 2).sum()), forces=forces)
        found.append(atoms)
    return found


class TestTransfer:
    @pytest.mark.parametrize("conservative", [True, False])
    def test_fine_tuning_to_a_potential_keeps_all_weights_and_fits_the_scale(self, conservative):
        structures = [waters(8, seed) for seed in range(4)]
        base = tm.pretrain(structures, tm.MaskAtoms(conservative=conservative), painn(), steps=3, **QUICK)
        objective = tm.Potential(stress=0.0, conservative=conservative)
        model = tm.finetune(base, pulled(5), objective, steps=0, **QUICK)
        head = "energy" if conservative else "forces"
        assert head in model.card["history"][-1]["alignment"]["kept heads"]
        assert model.card["history"][-1]["alignment"]["scale"].keys() == {head}
        same = [n for n in base.state_dict() if n.startswith(("backbone.", f"heads.{head}.")) and "scale" not in n]
        kept = [n for n in same if "references" not in n]
        assert all(torch.equal(base.state_dict()[name], model.state_dict()[name]) for name in kept) and len(kept) > 5
        errors = tm.evaluate(model, pulled(5), verbose=False)
        assert errors["forces"]["unit"] == "eV/Å"
        tuned = tm.finetune(base, pulled(5), objective, steps=5, **QUICK)  # without a flag, although the base had one
        assert tuned.card["history"][-1]["steps"] == 5

    def test_forces_of_a_masking_model_are_no_forces(self, tmp_path):
        model = tm.pretrain([waters(8, s) for s in range(3)], tm.MaskAtoms(), painn(), steps=1, out=tmp_path, **QUICK)
        (found,) = tm.predict(model, [waters(8)], verbose=False)
        assert found.calc is None and found.arrays["masking_direction"].shape == (24, 3)
        assert model.card["quantities"]["forces"] == ["masking direction", ""]
        again = tm.load(tmp_path / "model.safetensors")
        assert again.card["objective"] == described(tm.MaskAtoms())
        assert np.isfinite(again.card["metrics"]["validation loss"])
        ase.io.read(tmp_path / "validation.extxyz")


class TestTogether:
    def test_views_of_different_sizes_share_a_batch(self):
        objective = tm.Together({"atom": tm.MaskAtoms(length=1.0), "way": tm.Denoise(told_forces=True),
                                 "element": tm.MaskElements()})  # fmt: skip
        structures = pulled(3)
        for atoms in structures:
            atoms.set_array("forces", atoms.get_forces())
            atoms.calc = None
        samples = [objective.prepare(atoms, np.random.default_rng((s, k))) for k, atoms in enumerate(structures)
                   for s in range(8)]  # fmt: skip
        sizes = Counter(len(s.atoms) for s in samples)
        taught = Counter(n.split()[0] for s in samples for n, t in s.targets.items() if np.isfinite(t).any())
        assert set(sizes) == {20, 24} and set(taught) == {"atom", "way", "element"}
        for sample in samples:
            own = {name.split()[0] for name, t in sample.targets.items() if np.isfinite(t).any()}
            assert len(own) == 1  # one view is drawn at each access
        torch.manual_seed(0)
        model = tm.Model(told(painn(), objective), objective.outputs(8))
        batch = to_batch(samples, painn().edges)
        terms = objective.loss(model(batch.graph, objective.wanted(batch.targets)), batch)
        assert terms.keys() == {"atom direction", "atom distance", "way forces", "element element"}
        assert all(torch.isfinite(total) and count > 0 for total, count in terms.values())

    def test_they_keep_every_law(self):
        objective = tm.Together({"atom": tm.MaskAtoms(), "way": tm.Denoise(), "element": tm.MaskElements()})
        check_objective(objective, structures=[waters(n) for n in (2, 3, 4, 5)])  # sizes draw different views

    def test_they_are_learned_in_one_run_and_a_part_is_tuned(self):
        objective = tm.Together({"atom": tm.MaskAtoms(), "way": tm.Denoise(), "element": tm.MaskElements()})
        base = tm.pretrain([waters(8, s) for s in range(6)], objective, painn(), steps=6, valid_fraction=0.3, **QUICK)
        assert objective.scalar_inputs() == ("masked",)
        assert base.card["quantities"]["atom_forces"][0] == "atom masking direction"
        tuned = tm.finetune(base, pulled(5), tm.Potential(stress=0.0), part="atom", steps=1, **QUICK)
        assert "energy" in tuned.card["history"][-1]["alignment"]["kept heads"]


# ------------------------------------------------------------------------------------------------------------ elements


class TestElements:
    def test_a_fraction_is_hidden_and_asked_for(self):
        objective, atoms = tm.MaskElements(0.25), waters(8)
        for seed in range(5):
            sample = objective.prepare(atoms, np.random.default_rng(seed))
            hidden = sample.atoms.numbers == 0
            assert hidden.sum() == 6 and np.array_equal(sample.atoms.positions, atoms.positions)
            assert np.array_equal(sample.targets["element"][hidden], atoms.numbers[hidden])
            assert np.isnan(sample.targets["element"][~hidden]).all()
            assert np.array_equal(sample.atoms.numbers[~hidden], atoms.numbers[~hidden])

    def test_classes_are_the_elements_of_the_data(self):
        samples = [tm.MaskElements().prepare(atoms, np.random.default_rng(0)) for atoms in [waters(8), *alloys(4)]]
        settled = tm.MaskElements().settled(samples)
        assert settled.elements == ["H", "O", "Cu", "Au"] and settled.outputs(8)["element"].classes == 4
        sample = settled.prepare(waters(8), np.random.default_rng(1))
        hidden = sample.atoms.numbers == 0
        assert np.array_equal(sample.targets["element"][hidden], (waters(8).numbers[hidden] == 8).astype(float))

    def test_elements_that_are_not_told_apart_are_not_hidden(self):
        sample = tm.MaskElements(0.9, ["Cu", "Au"]).prepare(Atoms("CuOH", np.eye(3)), np.random.default_rng(0))
        assert sample.atoms.numbers.tolist() == [0, 8, 1]

    @pytest.mark.parametrize("atoms", [Atoms(), Atoms("Cu")])
    def test_the_last_atom_is_not_hidden(self, atoms):
        sample = tm.MaskElements(0.9).prepare(atoms, np.random.default_rng(0))
        assert sample.atoms == atoms and np.isnan(sample.targets["element"]).all()

    def test_a_model_learns_to_name_them(self):
        structures = [waters(8, seed) for seed in range(8)]
        model = tm.pretrain(structures, tm.MaskElements(0.15), painn(cutoff=3.0), steps=60, valid_fraction=0.25,
                            **{**QUICK, "ema": 0.9})  # fmt: skip
        errors = tm.evaluate(model, structures, verbose=False)
        assert errors["element"]["accuracy"] > 0.95 and errors["element"]["n"] > 20
        assert model.card["objective"]["arguments"]["elements"] == ["H", "O"]


# -------------------------------------------------------------------------------------------------------------- errors


class TestErrors:
    @pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
    def test_fractions(self, fraction):
        with pytest.raises(tm.InputError, match=r"^fraction is .*, but must be above 0 and at most 1 of the mol"):
            tm.MaskAtoms(fraction)
        with pytest.raises(tm.InputError, match=r"^fraction is .*, but must be above 0 and below 1 of the atoms"):
            tm.MaskElements(fraction)

    def test_single_atoms_hide_nothing(self):
        single = [bulk(symbol) for symbol in ("Cu", "Ag", "Au", "Al")]
        assert "4 of 6 structures are single atoms" in tm.MaskElements().warnings([*single, *alloys(2)])[0]
        for fraction in (0.0, 0.25):
            with pytest.raises(tm.InputError, match=r"nothing to hide, for all \d structures are single atoms.*repeat"):
                tm.pretrain(single, tm.MaskElements(), painn(), steps=2, **{**QUICK, "valid_fraction": fraction})
        with pytest.raises(tm.InputError, match="no structure has an atom of Fe, Ni beside"):
            tm.pretrain(alloys(4), tm.MaskElements(elements=["Fe", "Ni"]), painn(), steps=2, **QUICK)

    def test_an_evaluation_of_what_has_nothing_to_mask(self):
        model = tm.pretrain([waters(4, seed) for seed in range(4)], tm.MaskAtoms(), painn(cutoff=3.0), steps=1, **QUICK)
        with pytest.raises(
            tm.InputError, match=r"can be compared: 3 of 3 structures have nothing to mask.*no two nonmetals are bonded"
        ):
            tm.evaluate(model, alloys(3), verbose=False)

    def test_nothing_left_to_be_seen(self):
        with pytest.raises(tm.InputError, match="nothing is left to be seen"):
            tm.MaskElements(1.0)

    @pytest.mark.parametrize("atoms", ["h", "X", "hydrogen", ""])
    def test_what_cannot_be_removed(self, atoms):
        with pytest.raises(tm.InputError, match=f"atoms is '{atoms}', but must be an element such as H, or leaf"):
            tm.MaskAtoms(atoms=atoms)

    def test_other_numbers(self):
        with pytest.raises(tm.InputError, match="the weight of the length is -1"):
            tm.MaskAtoms(length=-1)
        with pytest.raises(tm.InputError, match="'Xx' is no element"):
            tm.MaskElements(elements=["H", "Xx"])

    @pytest.mark.parametrize(
        ("structures", "objective", "sentence"),
        [
            *(
                ([bulk("Cu")] * 3, tm.MaskAtoms(atoms=a), "metals and most salts have no molecules.* Denoise")
                for a in METAL
            ),
            ([bulk("PdH", "rocksalt", a=4.1)] * 3, tm.MaskAtoms(), "metals and most salts have no molecules.* Denoise"),
            ([molecule("O2")] * 3, tm.MaskAtoms(), "there is no H .*atoms='leaf'"),
            ([molecule("BF3") + Atoms("H", [[5, 5, 5]])] * 3, tm.MaskAtoms(), "no H is bonded to another nonmetal"),
            (
                [bulk("C", "diamond", a=3.57)] * 3,
                tm.MaskAtoms(atoms="leaf"),
                "there is no leaf .*: choose atoms='H' or",
            ),
            ([bulk("C", "diamond", a=3.57)] * 3, tm.MaskAtoms(atoms="C"), "bonds of the C go on without end"),
            ([Atoms("HF", [[0, 0, 0], [0.92, 0, 0]])] * 3, tm.MaskAtoms(), "one alone has no direction"),
            ([bulk("Cu")] * 3, tm.MaskElements(), "nothing to hide, for all 3 structures are single atoms"),
            ([bulk("Cu") * (2, 1, 1)] * 3, tm.MaskElements(), "all atoms are Cu: there is no element to guess"),
        ],
    )
    def test_nothing_to_learn(self, structures, objective, sentence):
        with pytest.raises(tm.InputError, match=sentence) as error:
            tm.pretrain(structures, objective, painn(), steps=1, valid_fraction=0, **QUICK)
        assert "\n" not in str(error.value)

    def test_a_cell_that_is_too_small(self):
        ethane = molecule("C2H6")
        ethane.rotate(90, "y")
        ethane.set_cell([3.9, 9, 9])
        ethane.pbc = True
        with pytest.raises(tm.InputError, match=r"cells are too small to tell atoms.* repeat them, as atoms.repeat"):
            tm.pretrain([ethane] * 3, tm.MaskAtoms(), painn(), steps=1, valid_fraction=0, **QUICK)

    def test_levels_cannot_be_told_flags(self):
        with pytest.raises(tm.InputError, match="tells the model numbers"):
            tm.Fidelities(tm.MaskAtoms(), ["pbe", "scan"])

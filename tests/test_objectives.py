"""Objectives: what is asked of a structure, and how its labels are weighed."""

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.build import molecule as built
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from transfermium.errors import InputError
from transfermium.graph import Batch, Cutoff, Sample, to_batch
from transfermium.model import described
from transfermium.objectives.base import absolute_errors, label
from transfermium.objectives.denoise import rigid_rotation


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def samples_of(objective: tm.Objective, structures: list[Atoms]) -> list[Sample]:
    return [objective.prepare(atoms, rng(i)) for i, atoms in enumerate(structures)]


def batch_of(objective: tm.Objective, structures: list[Atoms]) -> Batch:
    return to_batch(samples_of(objective, structures), Cutoff(4.0))


def labelled(structures: list[Atoms], name: str, labels: Any) -> list[Atoms]:
    for atoms, value in zip(structures, labels, strict=True):
        atoms.info[name] = value
    return structures


@pytest.fixture
def computed(crystal: Atoms, alloy: Atoms) -> list[Atoms]:
    """Two crystals with energy, forces and stress."""
    for k, atoms in enumerate((crystal, alloy)):
        random = rng(k)
        stress = 0.01 * random.normal(size=(3, 3))
        atoms.info["energy"] = -4.0 * len(atoms) + random.normal()
        atoms.info["stress"] = stress + stress.T
        atoms.set_array("forces", random.normal(size=(len(atoms), 3)))
    return [crystal, alloy]


# ------------------------------------------------------------------------------------------------------------ denoise


def test_noise_is_the_way_back(structures: list[Atoms]) -> None:
    for atoms in structures:
        sample = tm.Denoise().prepare(atoms, rng())
        np.testing.assert_allclose(sample.atoms.positions + sample.targets["forces"], atoms.positions, atol=1e-12)


def test_noise_has_no_mean(structures: list[Atoms]) -> None:
    for atoms in structures:
        noise = tm.Denoise().prepare(atoms, rng()).targets["forces"]
        np.testing.assert_allclose(noise.mean(axis=0), 0, atol=1e-14)


@pytest.mark.parametrize("sigma", [0.05, 1.0])
def test_noise_does_not_turn_molecules(molecule: Atoms, sigma: float) -> None:
    """Around the noisy positions, where a conservative model is asked: its forces have no torque there."""
    noisy, targets, _ = tm.Denoise(sigma).prepare(molecule, rng())
    np.testing.assert_allclose(np.cross(noisy.positions, targets["forces"]).sum(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.cross(molecule.positions, targets["forces"]).sum(axis=0), 0, atol=1e-12)


def test_noise_keeps_its_size(alloy: Atoms, molecule: Atoms) -> None:
    """A fraction 1 - 1/n of the variance is left without the mean, 1 - 2/n without the rotation of a molecule too."""
    for atoms, left in ((alloy, 1 - 1 / len(alloy)), (molecule, 1 - 2 / len(molecule))):
        noise = [tm.Denoise(sigma=0.2).prepare(atoms, rng(seed)).targets["forces"] for seed in range(400)]
        assert np.mean(np.square(noise)) == pytest.approx(0.2**2 * left, rel=0.05)


def test_noise_is_fresh_for_every_rng(molecule: Atoms) -> None:
    objective = tm.Denoise()
    first, same, other = (objective.prepare(molecule, rng(seed)).atoms.positions for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.isclose(first, other).any()
    generator = rng(1)
    again, next_one = (objective.prepare(molecule, generator).atoms.positions for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.isclose(again, next_one).any()


def test_noise_on_one_atom_is_none(lone_atom: Atoms) -> None:
    assert not tm.Denoise().prepare(lone_atom, rng()).targets["forces"].any()


def test_noisy_structures_keep_cell_and_elements(crystal: Atoms) -> None:
    noisy = tm.Denoise().prepare(crystal, rng()).atoms
    assert np.array_equal(noisy.numbers, crystal.numbers)
    assert np.array_equal(noisy.cell, crystal.cell)
    assert noisy.pbc.all()


def test_a_gradient_step_along_a_perfect_answer_restores(crystal: Atoms) -> None:
    """-dE/dx of E = |x - x0|²/2 is the target, so that relaxing the learned energy restores the structure."""
    noisy, targets, _ = tm.Denoise().prepare(crystal, rng())
    x = torch.from_numpy(noisy.positions).requires_grad_()
    energy = (x - torch.from_numpy(crystal.positions)).square().sum() / 2
    (slope,) = torch.autograd.grad(energy, x)
    np.testing.assert_allclose(-slope, targets["forces"], atol=1e-12)


@pytest.mark.parametrize("across", [False, True])
def test_a_molecule_in_a_box_is_not_asked_to_turn(across) -> None:
    """Also where it lies across a face; but the same in a dense box keeps its noise."""
    water = built("H2O", vacuum=6.0)
    water.pbc = True
    if across:
        water.positions -= water.positions[0]
        water.wrap()
    target = tm.Denoise(0.1).prepare(water, np.random.default_rng(0)).targets["forces"]
    lengths = water.cell.array.diagonal()
    whole = water.positions - lengths * np.round((water.positions - water.positions[0]) / lengths)
    noisy = whole - target
    assert np.abs(np.cross(noisy - noisy.mean(axis=0), target).sum(axis=0)).max() < 1e-12
    water.cell *= 0.4
    turned = tm.Denoise(0.1).prepare(water, np.random.default_rng(0)).targets["forces"]
    assert np.abs(rigid_rotation(water.positions, turned)).max() > 1e-2


def test_rigid_rotations_are_found_whole() -> None:
    random = rng()
    positions = random.normal(size=(6, 3))
    turning = np.cross(random.normal(size=3), positions - positions.mean(axis=0))
    np.testing.assert_allclose(rigid_rotation(positions, turning), turning, atol=1e-12)
    line = np.outer(np.arange(4.0), [0, 0, 1])  # the axis of a linear molecule turns nothing
    assert np.isfinite(rigid_rotation(line, random.normal(size=(4, 3)))).all()


def test_the_loss_is_in_units_of_sigma(crystal: Atoms) -> None:
    objective = tm.Denoise(sigma=0.25)
    batch = batch_of(objective, [crystal])
    total, count = objective.loss({"forces": torch.zeros(2, 3)}, batch)["forces"]
    assert float(total) == pytest.approx(float(batch.targets["forces"].abs().sum()) / 0.25)
    assert int(count) == 6


@pytest.mark.parametrize("sigma", [0.0, -0.1, 10.0, np.nan])
def test_sigma_has_to_make_sense(sigma: float) -> None:
    with pytest.raises(InputError, match="noise must be above 0 and below 5 Å"):
        tm.Denoise(sigma)


# ---------------------------------------------------------------------------------------------------------- potential


def test_weights_that_are_not_given_are_one_over_the_rms(computed: list[Atoms]) -> None:
    settled = tm.Potential().settled(samples_of(tm.Potential(), computed))
    forces = np.concatenate([atoms.arrays["forces"] for atoms in computed])
    stress = np.stack([atoms.info["stress"] for atoms in computed])
    assert settled.forces == pytest.approx(1 / np.sqrt(np.mean(forces**2)))
    assert settled.stress == pytest.approx(1 / np.sqrt(np.mean(stress**2)))


def test_the_energy_weight_is_that_of_what_references_leave() -> None:
    structures = [bulk("Cu", a=a) for a in (3.5, 3.6, 3.7)] + [bulk("Au", a=a) for a in (4.0, 4.1)]
    labelled(structures, "energy", [-99.0, -100.0, -101.0, 51.0, 49.0])
    settled = tm.Potential().settled(samples_of(tm.Potential(), structures))
    assert settled.energy == pytest.approx(1 / np.sqrt(4 / 5), rel=1e-4)


def test_labels_that_are_not_there_have_no_weight(crystal: Atoms) -> None:
    settled = tm.Potential().settled(samples_of(tm.Potential(), labelled([crystal], "energy", [-3.0])))
    assert (settled.forces, settled.stress) == (0.0, 0.0)
    assert settled.labels().keys() == {"energy"}
    assert settled.prepare(crystal, rng()).targets.keys() == {"energy"}


def test_given_weights_stay(computed: list[Atoms]) -> None:
    given = tm.Potential(energy=2.0, forces=0.0)
    settled = given.settled(samples_of(given, computed))
    assert (settled.energy, settled.forces) == (2.0, 0.0)
    assert settled.stress is not None and settled.stress > 0
    assert described(settled.settled(samples_of(settled, computed))) == described(settled)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_energies_without_spread_weigh_one(n: int) -> None:
    structures = labelled([bulk("Cu") for _ in range(n)], "energy", [-45_678.901] * n)
    assert tm.Potential().settled(samples_of(tm.Potential(), structures)).energy == 1.0


def test_a_potential_without_any_label_is_an_error(crystal: Atoms) -> None:
    with pytest.raises(InputError, match="no structure has an energy, forces or a stress"):
        tm.Potential().settled(samples_of(tm.Potential(), [crystal]))


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["energy", "forces", "stress"])
def test_weights_have_to_be_finite_and_not_negative(name: str, weight: float) -> None:
    with pytest.raises(InputError, match=f"the weight of {name} is {weight}, but must be zero or positive"):
        tm.Potential(**{name: weight})  # type: ignore[arg-type]


def test_a_potential_has_to_learn_something() -> None:
    with pytest.raises(InputError, match="nothing to learn"):
        tm.Potential(energy=0.0, forces=0.0, stress=0.0)


def test_energies_are_compared_per_atom(computed: list[Atoms]) -> None:
    objective = tm.Potential(energy=3.0, forces=0.0, stress=0.0)
    batch = batch_of(objective, computed)
    off = {"energy": batch.targets["energy"] + torch.tensor([2.0, 8.0])}  # 1 eV/atom each
    total, count = objective.loss(off, batch)["energy"]
    assert float(total) == pytest.approx(6.0)
    assert int(count) == 2


def test_small_errors_of_energies_are_rounded_off(computed: list[Atoms]) -> None:
    objective = tm.Potential(energy=1.0, forces=0.0, stress=0.0, rounding={"energy": 0.1})
    batch = batch_of(objective, computed[:1])

    def error_at(offset: float) -> float:
        return float(objective.loss({"energy": batch.targets["energy"] + 2 * offset}, batch)["energy"][0])

    assert error_at(1e-3) == pytest.approx(1e-3**2 / 0.2, rel=1e-3)
    assert error_at(100.0) == pytest.approx(100.0 - 0.1, rel=1e-3)


def test_conservative_or_direct_is_one_argument() -> None:
    kinds = {name: type(output) for name, output in tm.Potential().outputs(8).items()}
    assert kinds == {"energy": tm.EnergyHead, "forces": tm.Gradient, "stress": tm.Strain}
    kinds = {name: type(output) for name, output in tm.Potential(conservative=False, stress=0.0).outputs(8).items()}
    assert kinds == {"energy": tm.EnergyHead, "forces": tm.VectorHead}


@pytest.mark.parametrize("conservative", [True, False])
def test_a_stress_without_a_volume_counts_as_missing(computed: list[Atoms], conservative: bool) -> None:
    slab = computed[0].copy()
    slab.pbc = [True, True, False]
    objective = tm.Potential(conservative=conservative)
    batch = batch_of(objective, [computed[0], slab])
    model = tm.Model(tm.PaiNN(8, depth=1, cutoff=4.0), objective.outputs(8))
    terms = objective.loss(model(batch.graph, batch.targets), batch)
    assert int(terms["stress"][1]) == 9
    assert all(bool(total.isfinite()) for total, _ in terms.values())
    assert np.isfinite(slab.info["stress"]).all()


def test_labels_are_found_where_ase_keeps_them(crystal: Atoms) -> None:
    crystal.calc = SinglePointCalculator(crystal, energy=-3.0, forces=np.ones((2, 3)))
    targets = tm.Potential().prepare(crystal, rng()).targets
    assert targets["energy"].tolist() == [-3.0]
    assert targets["forces"].shape == (2, 3)
    assert np.isnan(targets["stress"]).all()


def test_a_label_of_the_wrong_shape_is_an_error(crystal: Atoms) -> None:
    for value, message in (("high", "the label 'gap' is 'high', but must be a number"), ([1.0, 2.0], "a number")):
        crystal.info["gap"] = value
        with pytest.raises(InputError, match=message):
            label(crystal, "gap", (1,))


def test_errors_are_counted_where_there_are_labels() -> None:
    output = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    target = torch.tensor([[1.5, torch.nan], [torch.nan, 1.0]], dtype=torch.float64)
    total, count = absolute_errors(output, target, 2.0)
    total.backward()
    assert (total.item(), int(count)) == (7.0, 2)
    assert output.grad is not None
    assert output.grad.tolist() == [[-2.0, 0.0], [0.0, 2.0]]


# ----------------------------------------------------------------------------------------------------------- property


def test_a_property_weighs_one_over_its_spread(structures: list[Atoms]) -> None:
    objective = tm.Property("gap")
    settled = objective.settled(samples_of(objective, labelled(structures, "gap", [1.0, 3.0, 1.0, 3.0])))
    assert settled.weight == pytest.approx(1.0)
    settled = objective.settled(samples_of(objective, labelled(structures, "gap", [10.0, 30.0, 10.0, 30.0])))
    assert settled.weight == pytest.approx(0.1)


@pytest.mark.parametrize("value", [0.0, 0.1, 100_000.1])
def test_a_property_without_spread_weighs_one(value: float) -> None:
    objective = tm.Property("gap")
    structures = labelled([bulk("Cu") for _ in range(3)], "gap", [value] * 3)
    assert objective.settled(samples_of(objective, structures)).weight == 1.0


def test_a_given_weight_stays(crystal: Atoms) -> None:
    objective = tm.Property("gap", weight=7.0)
    assert objective.settled(samples_of(objective, labelled([crystal], "gap", [1.0]))).weight == 7.0


@pytest.mark.parametrize(
    ("objective", "head"),
    [
        (tm.Property("x"), tm.ScalarHead(8)),
        (tm.Property("x", pooling="attention"), tm.ScalarHead(8, "attention")),
        (tm.Property("x", "extensive"), tm.ScalarHead(8, "sum")),
        (tm.Property("x", "per-atom"), tm.AtomHead(8)),
        (tm.Property("x", task="classification", classes=4), tm.ClassHead(8, 4)),
        (tm.Property("x", "per-atom", "classification"), tm.AtomHead(8, 2)),
    ],
)
def test_the_kind_of_a_property_chooses_its_head(objective: tm.Property, head: tm.Head) -> None:
    assert {name: described(output) for name, output in objective.outputs(8).items()} == {"x": described(head)}


@pytest.mark.parametrize("wrong", [2, -1, 0.5])
def test_classes_have_to_be_numbered(structures: list[Atoms], wrong: float) -> None:
    objective = tm.Property("metal", task="classification")
    labelled(structures, "metal", [0, 1, wrong, np.nan])
    with pytest.raises(InputError, match=f"'metal' has the label {wrong:g}, but 2 classes are numbered 0 to 1"):
        objective.settled(samples_of(objective, structures))


def test_cross_entropy_leaves_out_what_has_no_class(structures: list[Atoms]) -> None:
    objective = tm.Property("metal", task="classification", weight=2.0)
    batch = batch_of(objective, labelled(structures, "metal", [0, 1, np.nan, 1]))
    scores = torch.zeros(4, 2, requires_grad=True)
    total, count = objective.loss({"metal": scores}, batch)["metal"]
    total.backward()
    assert total.item() == pytest.approx(2 * 3 * np.log(2))
    assert int(count) == 3
    assert scores.grad is not None
    assert not scores.grad[2].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "local"}, "kind is 'local', but must be one of intensive, extensive, per-atom"),
        ({"task": "ranking"}, "task is 'ranking', but must be one of regression, classification"),
        ({"kind": "extensive", "task": "classification"}, "a class cannot be extensive"),
        ({"name": "band gap"}, "'band gap' cannot name a property"),
    ],
)
def test_a_property_that_makes_no_sense_is_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tm.Property(**{"name": "x", **arguments})


class TestDenoise:
    def test_strain_is_drawn_and_found_back(self, alloy):
        objective = tm.Denoise(0.01, strain=0.05)
        sample = objective.prepare(alloy, np.random.default_rng(0))
        noise = -sample.targets["forces"]
        strain = sample.targets["stress"][0] - noise.T @ noise / sample.atoms.get_volume()
        np.testing.assert_allclose(strain, strain.T, atol=1e-15)
        np.testing.assert_allclose(sample.atoms.cell.array, alloy.cell.array @ (np.eye(3) + strain), atol=1e-12)
        back = sample.atoms.copy()
        back.positions += sample.targets["forces"]
        np.testing.assert_allclose(back.get_scaled_positions(wrap=False), alloy.get_scaled_positions(wrap=False))

    def test_a_molecule_has_no_strain(self, molecule):
        sample = tm.Denoise(strain=0.05).prepare(molecule, np.random.default_rng(0))
        assert np.isnan(sample.targets["stress"]).all()
        assert np.isfinite(sample.targets["forces"]).all()

    def test_signs_are_those_of_a_minimum(self):
        """Of E = noise²/2 + V strain²/2: the force is -noise, the stress +strain."""
        atoms = Atoms("Cu", cell=[3.0] * 3, pbc=True) * (2, 1, 1)
        sample = tm.Denoise(0.1, strain=0.05).prepare(atoms, np.random.default_rng(1))
        stretched = np.diag(sample.atoms.cell.array) > np.diag(atoms.cell.array)
        assert np.array_equal(np.diag(sample.targets["stress"][0]) > 0, stretched)
        moved = sample.atoms.get_scaled_positions(wrap=False) - atoms.get_scaled_positions(wrap=False)
        assert float((moved @ sample.atoms.cell.array * sample.targets["forces"]).sum()) < 0

    def test_stress_is_that_of_the_energy_whose_force_is_the_way_back(self, alloy):
        """Of Σ noise²/2, by finite differences; the strain that was drawn is next to nothing."""
        sample = tm.Denoise(0.2, strain=1e-9).prepare(alloy, np.random.default_rng(0))
        scaled = alloy.get_scaled_positions(wrap=False)

        def energy(step):
            deformation = np.eye(3) + (step + step.T) / 2
            cell = sample.atoms.cell.array @ deformation
            return 0.5 * np.square(sample.atoms.positions @ deformation - scaled @ cell).sum()

        h = 1e-5 * np.eye(9).reshape(9, 3, 3)
        slopes = np.array([(energy(step) - energy(-step)) / 2e-5 for step in h]).reshape(3, 3)
        np.testing.assert_allclose(slopes / sample.atoms.get_volume(), sample.targets["stress"][0], atol=1e-8)

    def test_every_scale_of_noise_is_drawn(self, alloy):
        objective = tm.Denoise([0.02, 0.2])
        drawn = [objective.prepare(alloy, np.random.default_rng(k)) for k in range(40)]
        assert {float(s.targets["noise"][0]) for s in drawn} == {0.02, 0.2}
        for sample in drawn:
            assert 0.4 < np.std(sample.targets["forces"]) / sample.targets["noise"][0] < 1.6

    def test_errors_count_relative_to_their_noise(self, alloy):
        objective = tm.Denoise([0.02, 0.2])
        samples = [objective.prepare(alloy, np.random.default_rng(k)) for k in range(12)]
        batch = to_batch(samples, Cutoff(4.0))
        total, count = objective.loss({"forces": torch.zeros(batch.targets["forces"].shape)}, batch)["forces"]
        assert 0.5 < float(total) / int(count) < 1.1  # E|x| of a unit Gaussian is 0.8

    def test_forces_are_told_and_noise_is_learned(self, alloy):
        forces = np.random.default_rng(0).normal(size=(len(alloy), 3))
        alloy.arrays["forces"] = forces
        objective = tm.Denoise(told_forces=True)
        sample = objective.prepare(alloy, np.random.default_rng(0))
        assert np.array_equal(sample.inputs["forces"], forces)
        assert not np.array_equal(sample.targets["forces"], forces)
        bare = alloy.copy()
        del bare.arrays["forces"]
        other = objective.prepare(bare, np.random.default_rng(0))
        assert not other.inputs["forces"].any()
        assert np.isnan(other.targets["forces"]).all()

    def test_structures_far_from_equilibrium_are_pointed_out(self, alloy):
        alloy.arrays["forces"] = np.full((len(alloy), 3), 2.0)
        (text,) = tm.Denoise().warnings([alloy])
        assert "the median force is 3.5 eV/Å" in text
        assert tm.Denoise(told_forces=True).warnings([alloy]) == []
        alloy.arrays["forces"] *= 0.01
        assert tm.Denoise().warnings([alloy]) == []

    def test_the_largest_strain_turns_no_cell_inside_out(self, alloy):
        noise = tm.Denoise(strain=0.1)
        volumes = [noise.prepare(alloy, rng(seed)).atoms.cell.handedness for seed in range(3_000)]
        assert set(volumes) == {alloy.cell.handedness}

    def test_strain_of_molecules_is_refused(self, molecule):
        with pytest.raises(tm.InputError, match="no structure is periodic in three directions: leave strain out"):
            noise = tm.Denoise(strain=0.02)
            noise.settled(samples_of(noise, [molecule]))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"sigma": 0.0}, "sigma is 0.0 Å"),
            ({"sigma": [0.1, -1.0]}, "sigma is -1.0 Å"),
            ({"sigma": []}, "sigma names no noise"),
            ({"strain": 0.2}, "strain is 0.2, but must be between zero and 0.1"),
        ],
    )
    def test_senseless_noise_is_refused(self, arguments, words):
        with pytest.raises(tm.InputError, match=words):
            tm.Denoise(**arguments)


class TestTogether:
    def test_names_are_plain_where_they_are_clear(self):
        clear = tm.Together({"gap": tm.Property("gap"), "field": tm.Potential()})
        assert set(clear.outputs(4)) == {"gap", "energy", "forces", "stress"}
        levels = tm.Together({"pbe": tm.Potential(), "scan": tm.Potential()})
        assert set(levels.outputs(4)) == {f"{p}_{n}" for p in ("pbe", "scan") for n in ("energy", "forces", "stress")}
        assert levels.outputs(4)["scan_forces"] == tm.Gradient("scan_energy")

    def test_a_structure_teaches_the_part_that_it_is_for(self, alloy):
        alloy.info |= {"energy": -3.0, "part": "scan"}
        sample = tm.Together({"pbe": tm.Potential(), "scan": tm.Potential()}).prepare(alloy, np.random.default_rng(0))
        assert np.isnan(sample.targets["pbe energy"]).all()
        assert sample.targets["scan energy"] == [-3.0]

    def test_one_view_is_drawn_where_parts_see_other_structures(self, alloy):
        alloy.info["energy"] = -3.0
        objective = tm.Together({"field": tm.Potential(), "noise": tm.Denoise(conservative=False)})
        seen = set()
        for k in range(20):
            sample = objective.prepare(alloy, np.random.default_rng(k))
            clean = np.array_equal(sample.atoms.positions, alloy.positions)
            assert np.isfinite(sample.targets["field energy"]).all() == clean
            assert np.isfinite(sample.targets["noise forces"]).all() == (not clean)
            seen.add(clean)
        assert seen == {True, False}

    def test_weights_multiply_the_terms(self, alloy):
        alloy.info["energy"] = -3.0
        totals = []
        for weights in (None, {"b": 0.25}):
            objective = tm.Together({"a": tm.Potential(1.0, 0, 0), "b": tm.Potential(1.0, 0, 0)}, weights)
            batch = to_batch([objective.prepare(alloy, np.random.default_rng(0))], Cutoff(4.0))
            outputs = {name: torch.zeros(1) for name in ("a_energy", "b_energy")}
            totals.append({name: float(total) for name, (total, _) in objective.loss(outputs, batch).items()})
        assert totals[1] == {"a energy": totals[0]["a energy"], "b energy": totals[0]["b energy"] / 4}

    def test_senseless_parts_are_refused(self):
        for arguments, words in (
            ({"parts": {}}, "nothing to learn together"),
            ({"parts": {"a b": tm.Potential()}}, "'a b' cannot name a part"),
            ({"parts": {"a": 3}}, "the part 'a' is 3"),
            ({"parts": {"a": tm.Potential()}, "weights": {"b": 1.0}}, "weight for 'b', but the parts are a"),
        ):
            with pytest.raises(tm.InputError, match=words):
                tm.Together(**arguments)

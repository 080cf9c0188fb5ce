"""Masked positions: who is asked for which place, a density whose integral is one, and what is learned."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

import transfermium as tm
from tests.alloys import alloys, painn
from tests.waters import ANGLE, BOND, water, waters
from transfermium.data.load import random_rotation, turned
from transfermium.graph import Sample, to_batch
from transfermium.heads import MISSING, AskedHead
from transfermium.model import described
from transfermium.objectives import positions
from transfermium.objectives.base import told
from transfermium.objectives.positions import Rings
from transfermium.testing import check_head, check_objective

QUICK: dict[str, Any] = {"edges": 3000, "device": "cpu", "split_by": "random", "verbose": False, "lr": 0.01}


def prepared(objective: tm.MaskPositions, atoms: Atoms, seed: int = 0) -> Sample:
    return objective.prepare(atoms, np.random.default_rng(seed))


def asked(sample: Sample) -> np.ndarray:
    return np.isfinite(sample.targets["position"]).all(axis=1)


def removed(atoms: Atoms, sample: Sample) -> np.ndarray:
    there = {tuple(position) for position in sample.atoms.positions}
    return np.array([i for i, position in enumerate(atoms.positions) if tuple(position) not in there], int)


# ----------------------------------------------------------------------------------------------------------- the places


class TestPlaces:
    def test_a_fraction_is_gone_and_two_are_left(self):
        atoms = waters(27)
        gone = [len(removed(atoms, prepared(tm.MaskPositions(), atoms, seed))) for seed in range(20)]
        assert set(gone) == {4, 5}  # on average 5 % of 81
        assert len(removed(atoms, prepared(tm.MaskPositions(1e-6), atoms))) == 1
        assert len(prepared(tm.MaskPositions(0.999), molecule("CH4")).atoms) == 2

    def test_all_that_are_near_and_no_others_are_asked_for_an_atom_that_was_there(self):
        atoms, objective = waters(27), tm.MaskPositions(0.1, radius=3.0)
        cell, across = atoms.cell.array, 0
        images = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3), axis=-1).reshape(-1, 3) @ cell
        for seed in range(3):
            sample = prepared(objective, atoms, seed)
            gone = removed(atoms, sample)
            vectors = atoms.positions[gone] - sample.atoms.positions[:, None]  # (n_atoms, n_gone, 3)
            all_images = vectors[:, :, None] + images
            near = np.linalg.norm(all_images, axis=3) < 3.0
            assert np.array_equal(asked(sample), near.any(axis=(1, 2))) and asked(sample).any()
            for k in np.flatnonzero(asked(sample)):
                target = sample.targets["position"][k]
                (hole, image), *others = np.argwhere(np.linalg.norm(all_images[k] - target, axis=2) < 1e-9)
                assert not others and sample.inputs[MISSING][k, 0] == atoms.numbers[gone[hole]]
                across += int(np.abs(images[image]).max() > 0)
            assert np.array_equal(sample.inputs["masked"][:, 0], asked(sample))
            assert not sample.inputs[MISSING][~asked(sample)].any()
        assert across > 5  # the test has seen places across faces of the cell

    def test_of_several_places_each_is_asked_for_alike(self):
        line = Atoms("NaClH2", [[-2, 0, 0], [0, 0, 0], [1.5, 0, 0], [-1.1, 0, 0]])
        seen: Counter[float] = Counter()
        for seed in range(300):
            sample = prepared(tm.MaskPositions(0.999, "H"), line, seed)
            assert sample.atoms.get_chemical_formula() == "ClNa"
            seen[round(float(sample.targets["position"][1, 0]), 6)] += 1
        assert seen.keys() == {1.5, -1.1} and abs(seen[1.5] - 150) < 4 * np.sqrt(75)

    def test_images_are_places_too(self):
        """Between a Cl and its image half-way lies one Na, which has lost both."""
        rock, objective = bulk("NaCl", "rocksalt", a=5.64, cubic=True), tm.MaskPositions(0.01, "Cl", radius=3.0)
        signs = []
        for seed in range(20):
            sample = prepared(objective, rock, seed)
            found = sample.targets["position"][asked(sample)]
            np.testing.assert_allclose(np.sort(np.abs(found), axis=1), [[0, 0, 2.82]] * 3, atol=1e-9)
            signs += np.sign(found.sum(axis=1)).tolist()
        assert 15 < signs.count(1.0) < 45

    @pytest.mark.parametrize(("atoms", "symbols"), [("any", {"C", "O", "H"}), ("O", {"O"}), ("leaf", {"H"})])
    def test_what_is_removed_can_be_chosen(self, atoms, symbols):
        alcohol = molecule("CH3CH2OH")
        gone = [removed(alcohol, prepared(tm.MaskPositions(atoms=atoms), alcohol, seed)) for seed in range(40)]
        assert {alcohol.symbols[i] for (i,) in gone} == symbols

    def test_the_same_chance_gives_the_same_places(self):
        one, same, other = (prepared(tm.MaskPositions(), waters(8), seed) for seed in (3, 3, 4))
        assert one.atoms == same.atoms and one.atoms != other.atoms
        np.testing.assert_array_equal(one.targets["position"], same.targets["position"])

    def test_without_flag_the_backbone_is_not_told(self):
        objective = tm.MaskPositions(flag=False)
        assert objective.scalar_inputs() == () and prepared(objective, waters(8)).inputs.keys() == {MISSING}

    @pytest.mark.parametrize(
        "atoms",
        [Atoms(), Atoms("H"), Atoms("HF", [[0, 0, 0], [0.92, 0, 0]]), bulk("Cu"), Atoms("Cu3", 30 * np.eye(3))],
    )
    def test_where_nothing_can_be_removed_the_structure_stays_and_teaches_nothing(self, atoms):
        sample = prepared(tm.MaskPositions(), atoms)
        assert sample.atoms is atoms and not asked(sample).any() and not sample.inputs["masked"].any()

    @pytest.mark.parametrize(
        ("chosen", "atoms", "words"),
        [
            ("He", Atoms("Cu2He", [[0, 0, 0], [2.2, 0, 0], [0, 5.5, 0]]), "within 3.5 Å of any He.*larger radius"),
            ("any", Atoms("Cu3", 30 * np.eye(3)), "within 3.5 Å of any atom.*larger radius"),
            ("any", bulk("Cu"), "less than three atoms"),
            ("He", bulk("NaCl", "rocksalt", a=5.64, cubic=True), "there is no He"),
        ],
    )
    def test_where_nothing_can_be_asked_the_reason_is_that_of_the_whole_structure(self, chosen, atoms, words):
        objective = tm.MaskPositions(atoms=chosen)
        with pytest.raises(tm.InputError, match=words):
            objective.settled([prepared(objective, atoms)])


# ---------------------------------------------------------------------------------------------------------- the density


def some_outputs(objective: tm.MaskPositions, n: int, seed: int = 0, size: float = 1.0) -> dict[str, Tensor]:
    """Random outputs of a model for n atoms."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**dict.fromkeys(objective.axes, (n, 3)), "rings": (n, 5 * objective.rings)}
    return {name: size * torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def one_ring(slope: float, curvature: float, axis: tuple[float, float, float] = (0.0, 0.0, 1.0)) -> Rings:
    def number(value: float) -> Tensor:
        return torch.tensor([[value]], dtype=torch.float64, requires_grad=True)

    direction = torch.tensor([[axis]], dtype=torch.float64, requires_grad=True)
    return Rings(number(0.0), direction, number(slope), number(curvature), number(0.0), number(1.0))


def integral(rings: Rings, points: int) -> float:
    """Of the density of the first atom over all space, on a grid in ln r, the cosine and the azimuth."""
    cosine, weight = np.polynomial.legendre.leggauss(48)
    azimuth, sine = 2 * np.pi * np.arange(48) / 48, np.sqrt(1 - cosine**2)
    units = np.stack([np.outer(sine, np.cos(azimuth)), np.outer(sine, np.sin(azimuth)), np.outer(cosine, np.ones(48))])
    sphere = torch.from_numpy(units.reshape(3, -1).T)
    area = torch.from_numpy(np.repeat(weight, 48) * 2 * np.pi / 48)
    center, width = rings.center.detach(), rings.width.detach()
    low, high = float((center - 6 * width).min()), float((center + 6 * width).max())
    step = float(width.min())
    everywhere = Rings(*(x.detach()[:1].expand(len(sphere), *x.shape[1:]) for x in rings))
    total = 0.0
    for log_r in np.arange(low, high + step, step):
        density = torch.exp(everywhere.log_density(np.exp(log_r) * sphere, points))
        total += float((density * area).sum()) * np.exp(3 * log_r) * step
    return total


class TestDensity:
    @pytest.mark.parametrize("size", [0.0, 1.0, 3.0])
    def test_its_integral_over_space_is_one(self, size):
        objective = tm.MaskPositions(rings=3, resolution=0.15)
        rings = objective.distribution(some_outputs(objective, 1, size=size))
        assert integral(rings, points=35) == pytest.approx(1, abs=1e-3)

    @pytest.mark.parametrize("resolution", [0.02, 0.05, 0.5])
    def test_the_sharpest_rings_are_normalised(self, resolution):
        from scipy.integrate import quad

        points, most = int(np.ceil(4 / resolution)) + 8, resolution**-2
        for slope, curvature in [(most, 0.0), (-most, 0.0), (0.0, most / 2), (most, most / 2), (-most / 2, most / 2)]:
            peak = np.clip(slope / (2 * curvature) if curvature else np.sign(slope), -1, 1)
            top = slope * peak - curvature * peak**2
            z, _ = quad(lambda t, a=slope, b=curvature, c=top: np.exp(a * t - b * t**2 - c), -1, 1, points=[peak])
            cosine = 0.3
            expected = slope * cosine - curvature * cosine**2 - top - np.log(2 * np.pi * z)
            x = torch.tensor([[np.sqrt(1 - cosine**2), 0.0, cosine]], dtype=torch.float64)
            found = one_ring(slope, curvature).log_density(x, points) + 0.5 * np.log(2 * np.pi)
            assert float(found.detach()) == pytest.approx(expected, abs=1e-8)

    @pytest.mark.parametrize("kappa", [1e-12, 1e-3, 1.0, 30.0, 400.0])
    def test_without_curvature_a_ring_is_von_mises_fisher(self, kappa):
        x = torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64)
        closed = np.log(kappa / (2 * np.pi)) + kappa * (0.8 - 1) - np.log(-np.expm1(-2 * kappa))
        found = float(one_ring(kappa, 0.0).log_density(x).detach()) + 0.5 * np.log(2 * np.pi)
        assert found == pytest.approx(closed, abs=1e-4 if kappa == 1e-12 else 1e-9)

    @pytest.mark.parametrize("slope", [0.0, 1e-12, 1.0, 400.0, -400.0])
    @pytest.mark.parametrize("axis", [(0.0, 0.0, 1.0), (0.0, 0.0, 0.0), (1e-9, 0.0, 0.0)])
    def test_its_gradients_are_finite_for_flat_and_for_sharp_rings(self, slope, axis):
        for curvature in (0.0, 1e-9, 200.0):
            rings = one_ring(slope, curvature, axis)
            rings.log_density(torch.tensor([[0.3, -0.5, 0.9]], dtype=torch.float64)).sum().backward()
            assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in rings)

    @pytest.mark.parametrize("size", [0.0, 1.0, 1e3])
    def test_outputs_of_any_size_can_be_learned_from(self, size):
        objective = tm.MaskPositions()
        sample = prepared(objective, waters(8))
        outputs = {n: x.requires_grad_() for n, x in some_outputs(objective, len(sample.atoms), size=size).items()}
        total, count = objective.loss(outputs, to_batch([sample], tm.PaiNN(8).edges))["position"]
        total.backward()
        assert torch.isfinite(total) and count == asked(sample).sum()
        assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in outputs.values())

    def test_a_ring_is_likely_at_its_angle_all_around(self):
        ring = one_ring(2 * -0.25 * 200, 200.0)  # about a cosine of -0.25
        angles = np.linspace(0, 2 * np.pi, 5)
        x = torch.tensor([[np.sqrt(1 - 0.0625) * np.cos(a), np.sqrt(1 - 0.0625) * np.sin(a), -0.25] for a in angles])
        rings = Rings(*(value.detach().expand(5, *value.shape[1:]) for value in ring))
        logs = rings.log_density(x.double())
        assert logs.max() - logs.min() < 1e-9 and logs[0] > rings.log_density(x.double() @ flipped())[0] + 10


def flipped() -> Tensor:
    return torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))


class TestTurning:
    @pytest.mark.parametrize(
        "backbone", [painn(), tm.EGNN(8, depth=2), tm.TensorNet(8, depth=1)], ids=["PaiNN", "EGNN", "TensorNet"]
    )
    def test_the_likelihood_turns_with_the_structure(self, backbone):
        objective = tm.MaskPositions()
        torch.manual_seed(0)
        model = tm.Model(told(backbone, objective), objective.outputs(8)).double().eval()
        sample = prepared(objective, waters(8))
        mirrored = np.diag([1.0, 1.0, -1.0]) @ random_rotation(np.random.default_rng(2))
        losses = []
        for rotation in (np.eye(3), random_rotation(np.random.default_rng(1)), mirrored):
            batch = to_batch([turned(sample, rotation)], model.backbone.edges)
            losses.append(float(objective.loss(model(batch.graph), batch)["position"][0]))
        assert losses[1:] == pytest.approx(losses[:1] * 2, abs=1e-8)
        alone = to_batch([sample._replace(targets=turned(sample, random_rotation(np.random.default_rng(1))).targets)],
                         model.backbone.edges)  # fmt: skip
        assert abs(float(objective.loss(model(alone.graph), alone)["position"][0]) - losses[0]) > 1e-3

    @pytest.mark.parametrize("head", [AskedHead(tm.VectorHead(8)), AskedHead(tm.AtomHead(8, classes=20))])
    def test_heads_keep_every_law(self, head):
        check_head(head)

    def test_the_element_that_is_missing_matters(self):
        objective = tm.MaskPositions()
        torch.manual_seed(0)
        model = tm.Model(told(painn(), objective), objective.outputs(8)).double().eval()
        sample = prepared(objective, waters(8))
        other = sample._replace(inputs={**sample.inputs, MISSING: 9.0 - sample.inputs[MISSING]})
        outputs = [model(to_batch([s], painn().edges).graph) for s in (sample, other)]
        assert all(not torch.allclose(outputs[0][name], outputs[1][name]) for name in outputs[0])

    @pytest.mark.parametrize("backbone", [tm.EGNN(8, depth=1), tm.GNS(8, depth=2)], ids=["EGNN", "GNS"])
    def test_backbones_without_vectors_or_rotation_keep_every_law(self, backbone):
        check_objective(tm.MaskPositions(), backbone)


# ------------------------------------------------------------------------------------------------- loss and its floor


def lone_waters(n: int = 10) -> list[Atoms]:
    return [Atoms("OH2", water(np.random.default_rng(seed))) for seed in range(n)]


class TestFloor:
    def test_of_a_lone_water_is_that_of_one_ring(self):
        """The bond that is left tells the angle of the other, and nothing else does."""
        objective, h = tm.MaskPositions(atoms="H", resolution=0.1), 0.1
        sharp = np.log(np.sqrt(2 * np.pi) * h)
        distances = 3 * np.log([BOND, 2 * BOND * np.sin(ANGLE / 2)])
        without = sharp + np.log(4 * np.pi) + distances.mean()
        assert objective.floor(lone_waters(), nearest=False) == pytest.approx(without, abs=1e-6)
        with_one = 2 * sharp + np.log(2 * np.pi) + distances.mean()
        assert objective.floor(lone_waters()) == pytest.approx(with_one, abs=0.01)

    def test_falls_with_what_is_known(self):
        structures = [waters(27, seed) for seed in range(4)]
        objective = tm.MaskPositions()
        assert objective.floor(structures) < objective.floor(structures, nearest=False) - 0.5

    def test_is_what_no_guess_from_distances_alone_gets_below(self):
        """A distribution over distances that is fitted to the very data, and the same in all directions."""
        structures = [waters(27, seed) for seed in range(3)]
        objective = tm.MaskPositions(atoms="O", radius=2.0)
        distances: dict[int, list[float]] = {}
        for k in np.random.default_rng(0).permutation(3):
            sample = objective.prepare(structures[k], np.random.default_rng((0, int(k))))
            lengths = np.linalg.norm(sample.targets["position"], axis=1)
            for atom in np.flatnonzero(asked(sample)):
                distances.setdefault(int(sample.atoms.numbers[atom]), []).append(float(lengths[atom]))
        losses = []
        for some in map(np.log, distances.values()):
            width = np.hypot(some.std(), 0.05)
            normal = -0.5 * ((some - some.mean()) / width) ** 2 - np.log(width * np.sqrt(2 * np.pi))
            losses.extend(-(normal - np.log(4 * np.pi) - 3 * some))
        assert objective.floor(structures, nearest=False) < np.mean(losses)

    def test_takes_some_atoms_of_a_large_structure(self, monkeypatch):
        """The work grows with their square."""
        counted: list[int] = []
        monkeypatch.setattr(positions, "MOST_CLUES", 30)
        monkeypatch.setattr(positions, "_best", lambda rows, *_: counted.append(len(rows)) or np.zeros(len(rows)))
        tm.MaskPositions().floor([waters(64)])
        assert sum(counted) == 30

    def test_is_told_before_training(self, capsys):
        structures = [*(waters(8, seed) for seed in range(3)), bulk("Cu")]
        tm.pretrain(structures, tm.MaskPositions(atoms="H"), painn(), steps=0,
                    **{**QUICK, "verbose": True, "valid_fraction": 0})  # fmt: skip
        said = " ".join(capsys.readouterr().err.split())
        floors = [tm.MaskPositions(atoms="H").floor(structures, nearest) for nearest in (False, True)]
        assert f"A loss of {floors[0]:.3f} needs no directions, and one of {floors[1]:.3f} only that to the" in said
        assert "1 of 4 structures have nothing to mask and teach nothing (1: there is no H)" in said

    def test_is_beside_the_loss_of_an_evaluation(self):
        structures = [waters(8, seed) for seed in range(3)]
        model = tm.pretrain(structures, tm.MaskPositions(), painn(), steps=1, valid_fraction=0, **QUICK)
        position = tm.evaluate(model, structures, verbose=False)["position"]
        assert position["floor"] == pytest.approx(tm.MaskPositions().floor(structures))

    def test_there_is_none_where_nothing_is_masked(self):
        assert np.isnan(tm.MaskPositions().floor([bulk("Cu")]))


# ----------------------------------------------------------------------------------------------------------- learning


class TestLearning:
    def test_surroundings_are_needed_to_get_below_what_distances_tell(self):
        structures = [waters(27, seed) for seed in range(24)]
        objective = tm.MaskPositions()
        model = tm.pretrain(structures, objective, tm.PaiNN(16, depth=2, cutoff=4.0), steps=60, **QUICK)
        assert model.card["metrics"]["validation loss"] < objective.floor(structures, nearest=False) - 0.1

    def test_a_ring_is_learned_where_only_an_angle_is_known(self):
        """All vectors at what is left of a lone water are along its bond: no mixture of beams could say where."""
        structures, objective = lone_waters(), tm.MaskPositions(atoms="H", rings=2, resolution=0.1)
        model = tm.pretrain(structures, objective, painn(width=16), steps=100, **QUICK)
        floor = objective.floor(structures)
        assert floor - 0.01 < model.card["metrics"]["validation loss"] < floor + 0.6

    def test_weights_of_the_backbone_go_on_to_a_potential_and_heads_do_not(self, tmp_path):
        base = tm.pretrain(alloys(6), tm.MaskPositions(), painn(), steps=3, out=tmp_path, **QUICK)
        assert base.card["objective"] == described(tm.MaskPositions())
        ase.io.read(tmp_path / "validation.extxyz")
        again = tm.load(tmp_path / "model.safetensors")
        model = tm.finetune(again, alloys(6), tm.Potential(), steps=0, **QUICK)
        assert model.card["history"][-1]["alignment"]["kept heads"] == []
        assert set(model.outputs) == {"energy", "forces", "stress"}
        kept = [name for name in base.state_dict() if name.startswith("backbone.")]
        assert all(torch.equal(base.state_dict()[name], model.state_dict()[name]) for name in kept) and len(kept) > 5
        tuned = tm.finetune(again, alloys(6), tm.Potential(), steps=3, **QUICK)  # without flags or elements told
        assert np.isfinite(tm.evaluate(tuned, alloys(6), verbose=False)["forces"]["mae"])

    def test_predictions_and_evaluations_have_what_there_is(self):
        structures = [waters(8, seed) for seed in range(3)]
        model = tm.pretrain(structures, tm.MaskPositions(rings=2), painn(), steps=1, valid_fraction=0, **QUICK)
        (found,) = tm.predict(model, [waters(8)], verbose=False)
        assert found.calc is None and found.arrays["masking_axis_2"].shape == (24, 3)
        assert found.arrays["masking_rings"].shape == (24, 10)
        errors = tm.evaluate(model, structures, verbose=False)
        assert np.isfinite(errors["position"]["loss"])


class TestTogether:
    def test_they_are_learned_in_one_run_with_others(self):
        objective = tm.Together({"place": tm.MaskPositions(), "atom": tm.MaskAtoms(), "way": tm.Denoise()})
        structures = [waters(8, seed) for seed in range(6)]
        samples = [objective.prepare(atoms, np.random.default_rng((s, k))) for k, atoms in enumerate(structures)
                   for s in range(4)]  # fmt: skip
        taught = {n.split()[0] for s in samples for n, t in s.targets.items() if np.isfinite(t).any()}
        assert taught == {"place", "atom", "way"}
        model = tm.pretrain(structures, objective, painn(), steps=4, valid_fraction=0.3, **QUICK)
        assert np.isfinite(model.card["metrics"]["validation loss"])
        assert {"axis_1", "rings", "atom_forces", "way_forces"} <= set(model.outputs)

    def test_they_keep_every_law(self):
        objective = tm.Together({"place": tm.MaskPositions(), "way": tm.Denoise()})
        check_objective(objective, structures=[waters(n) for n in (2, 3, 4, 5)])


# -------------------------------------------------------------------------------------------------------------- errors


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"fraction": 0.0}, "fraction is 0.0, but must be above 0 and below 1 of the atoms"),
            ({"fraction": 1.0}, "nothing is left to be asked"),
            ({"atoms": "water"}, "atoms is 'water', but must be any, an element such as H, or leaf"),
            ({"radius": 0}, "radius is 0 Å, but must be above 0 and below 20 Å"),
            ({"rings": 0}, "0 rings make no distribution"),
            ({"resolution": 0.001}, "resolution is 0.001, but must be between 0.02 and 0.5"),
        ],
    )
    def test_arguments(self, arguments, sentence):
        with pytest.raises(tm.InputError, match=sentence):
            tm.MaskPositions(**arguments)

    @pytest.mark.parametrize(
        ("structures", "objective", "sentence"),
        [
            ([bulk("Cu", cubic=True)] * 3, tm.MaskPositions(atoms="H"), r"there is no H in 3 .*atoms='any'"),
            ([bulk("Cu", cubic=True)] * 3, tm.MaskPositions(atoms="leaf"), r"there is no leaf \(atom with one bond\)"),
            ([bulk("NaCl", "rocksalt", a=5.64)] * 3, tm.MaskPositions(), "have less than three atoms .* repeat cells"),
            ([bulk("Cu", cubic=True)] * 3, tm.MaskPositions(radius=2.0), "no other atom is within 2 Å .* larger"),
        ],
    )  # fmt: skip
    def test_nothing_to_learn(self, structures, objective, sentence):
        with pytest.raises(tm.InputError, match=sentence) as error:
            tm.pretrain(structures, objective, painn(), steps=1, valid_fraction=0, **QUICK)
        assert "\n" not in str(error.value)

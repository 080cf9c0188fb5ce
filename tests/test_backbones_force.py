"""EGNN, GNS and ForceNet: what they see, how they are trained on turned structures, how far from turning they stay."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from torch import Tensor

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, ready, weights_of
from tests.waters import waters
from transfermium.backbones.forcenet import harmonics
from transfermium.data.load import VALIDATION, Batches, random_rotation, rng_of, turned
from transfermium.equivariance import equivariance_error, told_of_equivariance
from transfermium.graph import AtomGraph, Batch, Cutoff, Sample, to_graph
from transfermium.model import BondVectors, FreeVectors
from transfermium.objectives import Objective
from transfermium.testing import check_backbone, check_objective
from transfermium.train import TrainConfig, _Run

CUTOFF = Cutoff(4.0)


def egnn(**changes: Any) -> tm.EGNN:
    return tm.EGNN(**{"width": 8, "depth": 2, "cutoff": 4.0, "radial": 6, **changes})


def gns(**changes: Any) -> tm.GNS:
    return tm.GNS(**{"width": 8, "depth": 2, "cutoff": 4.0, "radial": 6, **changes})


def forcenet(**changes: Any) -> tm.ForceNet:
    return tm.ForceNet(**{"width": 8, "depth": 2, "cutoff": 4.0, "frequencies": 10, **changes})


FORCE_CENTRIC = pytest.mark.parametrize("make", [gns, forcenet], ids=["GNS", "ForceNet"])
ALL = pytest.mark.parametrize("make", [egnn, gns, forcenet], ids=["EGNN", "GNS", "ForceNet"])


def direct(backbone: tm.Backbone) -> tm.Model:
    torch.manual_seed(0)
    return tm.Model(backbone, {"forces": tm.VectorHead(backbone.width)}).double().eval()


# ------------------------------------------------------------------------------------------------- the architectures


def test_default_sizes_are_the_published_ones() -> None:
    sizes = [(b.width, b.depth) for b in (tm.EGNN(), tm.GNS(), tm.ForceNet())]
    assert sizes == [(128, 5), (128, 10), (128, 5)]
    assert tm.ForceNet().frequencies == 50


def test_harmonics_are_orthogonal_on_the_sphere() -> None:
    """By a quadrature that is exact for products of two of them."""
    cosines, weights = np.polynomial.legendre.leggauss(4)
    angles = 2 * np.pi * np.arange(8) / 8
    sines = np.sqrt(1 - cosines**2)
    grid = [[s * np.cos(a), s * np.sin(a), c] for c, s in zip(cosines, sines, strict=True) for a in angles]
    y = harmonics(torch.tensor(grid, dtype=torch.float64)).numpy()
    mean = (np.repeat(weights / 2 / 8, 8)[:, None, None] * y[:, :, None] * y[:, None, :]).sum(axis=0)
    np.testing.assert_allclose(mean, np.eye(9), atol=1e-12)


class BoastfulGNS(tm.GNS):
    laws: ClassVar[frozenset[str]] = frozenset({"rotation"})


class BoastfulForceNet(tm.ForceNet):
    laws: ClassVar[frozenset[str]] = frozenset({"rotation"})


@pytest.mark.parametrize("boastful", [BoastfulGNS, BoastfulForceNet])
def test_the_laws_that_they_do_not_claim_they_do_not_keep(boastful: Any) -> None:
    with pytest.raises(AssertionError, match="rotation_turns_or_keeps"):
        check_backbone(boastful(width=8, depth=1, cutoff=4.0))


def test_the_published_input_of_gns_keeps_the_laws() -> None:
    check_backbone(gns(radial=0))


@ALL
def test_objectives_keep_their_laws_on_them(make: Any) -> None:
    for objective in (tm.Potential(), tm.Potential(conservative=False), tm.Denoise(told_forces=True)):
        check_objective(objective, make())


@pytest.mark.parametrize("make", [egnn, gns, forcenet, lambda: tm.ET(8, 1, heads=2, cutoff=4.0)])
def test_masking_keeps_its_laws_on_them(make: Any) -> None:
    several = tm.Together({"mask": tm.MaskAtoms(), "noise": tm.Denoise()})
    for objective in (tm.MaskAtoms(), tm.MaskAtoms(conservative=False, length=1.0), tm.MaskElements(), several):
        check_objective(objective, make(), structures=[waters(n) for n in (2, 3, 4, 5)])


def test_only_vectors_that_are_free_leave_the_plane_of_a_molecule() -> None:
    water = Atoms("OHH", [[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    for make, kind in ((egnn, BondVectors), (gns, FreeVectors), (forcenet, FreeVectors)):
        model = direct(make())
        assert isinstance(model.bond_vectors, kind)
        out_of_plane = model(to_graph([water], CUTOFF))["forces"][:, 2].abs().max()
        assert out_of_plane > 1e-4 if kind is FreeVectors else out_of_plane < 1e-12


@pytest.mark.parametrize(("make", "sees"), [(egnn, False), (gns, True), (forcenet, True)])
def test_who_obeys_no_rotation_sees_components_of_what_it_is_told(make: Any, sees: bool, molecule: Atoms) -> None:
    model = direct(make(vector_inputs=("push",)))
    with torch.no_grad():
        for weight in model.backbone.told.parameters():
            weight.normal_()
    push = np.random.default_rng(0).normal(size=(len(molecule), 3))
    one, other = (model(to_graph([molecule], CUTOFF, [{"push": v}]))["forces"] for v in (push, push[:, ::-1]))
    assert torch.allclose(one, other, atol=1e-9) != sees


@ALL
def test_every_layer_can_be_looked_at(make: Any) -> None:
    """Whatever passes along edges is not taken for a layer of atoms."""
    model, structures = tm.Model(make(), {}), alloys(2)
    found = tm.features(model, structures, per_atom=True, verbose=False)
    layers = {name.rsplit(" ", 1)[0] for name in found.names}
    assert len(layers) == 4 and {"element", "final"} < layers  # two blocks
    assert found.values.shape == (8, 32)
    assert np.isfinite(found.values).all()


@ALL
def test_low_rank_updates_train_them(make: Any) -> None:
    base = tm.pretrain(alloys(4), tm.Potential(), make(), steps=1, **QUICK)
    tuned = tm.finetune(
        base, alloys(4, seed=1), tm.Potential(), strategy="lora", rank=1, steps=2, valid_fraction=0, **QUICK
    )
    before, after = weights_of(base, "backbone."), weights_of(tuned, "backbone.")
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


# --------------------------------------------------------------------------------------------- turned training data


def test_rotations_are_rotations_and_all_alike() -> None:
    rng = np.random.default_rng(0)
    found = np.stack([random_rotation(rng) for _ in range(4000)])
    np.testing.assert_allclose(found @ found.swapaxes(1, 2), np.broadcast_to(np.eye(3), found.shape), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(found), 1.0)
    np.testing.assert_allclose(found.mean(axis=0), 0.0, atol=0.05)
    np.testing.assert_allclose((found**2).mean(axis=0), 1 / 3, atol=0.03)
    trace = np.trace(found, axis1=1, axis2=2)  # 1 + 2 cos of an angle whose density is (1 - cos) / π
    assert np.mean(trace**2) == pytest.approx(1.0, abs=0.1)


def test_labels_of_a_turned_structure_are_those_that_it_has() -> None:
    """Energy, forces and stress of a potential that knows nothing of ours."""
    (atoms,) = ready(alloys(1))
    sample = turned(tm.Potential().prepare(atoms, np.random.default_rng(0)), random_rotation(np.random.default_rng(1)))
    sample.atoms.calc = EMT()
    assert not np.allclose(sample.atoms.cell, atoms.cell)
    energy, forces, stress = (sample.targets[name] for name in ("energy", "forces", "stress"))
    np.testing.assert_allclose(energy, sample.atoms.get_potential_energy(), atol=1e-8)
    np.testing.assert_allclose(forces, sample.atoms.get_forces(), atol=1e-8)
    np.testing.assert_allclose(stress[0], sample.atoms.get_stress(voigt=False), atol=1e-8)


@pytest.mark.parametrize("objective", [tm.Denoise(strain=0.02, told_forces=True), tm.Potential()], ids=["moved", "not"])
def test_all_of_a_sample_turns_together(objective: Objective, alloy: Atoms, molecule: Atoms) -> None:
    """Positions, cell, forces that are told or learned, and stress; scalars and lengths of edges stay."""
    structures = [alloy, molecule]
    rng = np.random.default_rng(0)
    for atoms in structures:
        atoms.arrays["forces"] = rng.normal(size=(len(atoms), 3))
        atoms.info |= {"energy": 1.5, "stress": rng.normal(size=(3, 3))}
    plain, turning = (Batches(structures, objective, CUTOFF, seed=3, turning=t) for t in (False, True))
    rotations = []
    for epoch in (0, 0, 1):  # neighbours are found, kept, and used again
        for index in (0, 1):
            before, after = (b[epoch, np.array([index])] for b in (plain, turning))
            rotation = _rotation_between(before.graph.positions, after.graph.positions)
            rotations.append(rotation)
            np.testing.assert_allclose(after.graph.cell, before.graph.cell @ rotation.T, atol=1e-12)
            np.testing.assert_allclose(after.graph.edge_vectors(), before.graph.edge_vectors() @ rotation.T, atol=1e-9)
            for name, told in before.graph.inputs.items():
                np.testing.assert_allclose(after.graph.inputs[name], told @ rotation.T, atol=1e-12)
            for name, target in before.targets.items():
                vector, tensor = target.shape[1:] == (3,), target.shape[1:] == (3, 3)
                due = rotation @ target @ rotation.T if tensor else target @ rotation.T if vector else target
                np.testing.assert_allclose(after.targets[name], due, atol=1e-12)
    np.testing.assert_allclose(rotations[0], rotations[2], atol=1e-12)  # the same address, the same batch
    for k, others in ((0, (1, 4)), (1, (5,))):
        assert all((rotations[k] - rotations[other]).abs().max() > 0.1 for other in others)


def _rotation_between(before: Tensor, after: Tensor) -> Tensor:
    matrix = torch.linalg.lstsq(before - before.mean(dim=0), after - after.mean(dim=0)).solution.mT
    np.testing.assert_allclose(matrix @ matrix.mT, np.eye(3), atol=1e-9)
    return matrix


@pytest.mark.parametrize(
    ("backbone", "turning"), [(gns(), True), (forcenet(), True), (egnn(), False), (painn(), False)]
)
def test_training_turns_what_the_backbone_needs_turned(backbone: tm.Backbone, turning: bool) -> None:
    objective = tm.Potential(conservative=False)
    model = tm.Model(backbone, objective.outputs(backbone.width))
    run = _Run(model, objective, ready(alloys(2)), TrainConfig(steps=1), ready(alloys(2)), None, lambda done: None)
    assert (run.batches.turning, run.valid.turning) == (turning, False)


# ------------------------------------------------------------------------------------------------ equivariance errors


class Stubborn(tm.Backbone):
    """Features of an element alone."""

    laws: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.edges = CUTOFF
        self.element = torch.nn.Embedding(119, 4)

    def forward(self, graph: AtomGraph) -> tm.Features:
        return tm.Features(self.element(graph.atomic_numbers))


def test_vectors_that_never_turn_are_wrong_by_the_root_of_two(alloy: Atoms, molecule: Atoms) -> None:
    """|c - Rc|² is 2|c|² on average over rotations."""
    model = direct(Stubborn())
    assert isinstance(model.bond_vectors, FreeVectors)
    torch.nn.init.zeros_(model.bond_vectors.filter.weight)  # or vectors along bonds would turn
    found = equivariance_error(model, [alloy, molecule], rotations=500)["forces"]
    assert found["rms"] / found["size"] == pytest.approx(2**0.5, rel=0.05)


@FORCE_CENTRIC
def test_the_error_is_rounding_where_rotation_is_a_law(make: Any, structures: list[Atoms]) -> None:
    torch.manual_seed(0)
    outputs = {"energy": tm.EnergyHead(8), "forces": tm.Gradient("energy"), "stress": tm.Strain("energy")}
    outputs |= {"classes": tm.AtomHead(8, classes=3), "vector": tm.VectorHead(8), "tensor": tm.TensorHead(8)}
    for build, exact in ((egnn, True), (make, False)):
        errors = equivariance_error(tm.Model(build(), outputs).double(), structures)
        assert errors.keys() == outputs.keys()
        assert {name for name in errors if "size" in errors[name]} == {"forces", "stress", "vector", "tensor"}
        for name, found in errors.items():
            assert found["rms"] < 1e-10 if exact else found["rms"] > 1e-6, name
    assert told_of_equivariance({"forces": {"rms": 0.01, "size": 0.4, "unit": "eV/Å"}}) == (
        "forces 10 meV/Å (2.5% of their size)"
    )


def test_it_is_said_and_kept_after_training(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    options: dict[str, Any] = {**QUICK, "steps": 3, "verbose": True}
    model = tm.pretrain(alloys(6), tm.Potential(conservative=False), gns(), out=tmp_path, **options)
    error = tm.load(tmp_path / "model.safetensors").card["equivariance error"]
    assert error.keys() == {"energy", "forces", "stress"}
    assert (error["energy"]["unit"], error["forces"]["unit"]) == ("eV/atom", "eV/Å")
    assert 0 < error["forces"]["rms"] < 2 * error["forces"]["size"]
    assert f"GNS: {told_of_equivariance(error)}"[:40] in " ".join(capsys.readouterr().err.split())

    moved = tm.finetune(model, alloys(6), tm.Potential(), **{**options, "verbose": False})  # direct to conservative
    assert moved.card["equivariance error"]["forces"] != error["forces"]
    assert "equivariance error" not in tm.pretrain(alloys(4), tm.Potential(), egnn(), **{**options, "steps": 1}).card


def test_objectives_show_the_structure_whose_error_is_measured(alloy: Atoms) -> None:
    """A model that is told something cannot be asked without."""
    objective = Telling()
    model = tm.Model(gns(inputs=("charge",)), objective.outputs(8))
    with pytest.raises(tm.InputError, match="has to be told 'charge'"):
        equivariance_error(model, [alloy])
    assert equivariance_error(model, [alloy], objective)["forces"]["rms"] > 0
    assert objective.seeds == [rng_of(0, VALIDATION, 0, 0).integers(100)]


class Telling(Objective):
    def __init__(self) -> None:
        self.seeds: list[int] = []

    def outputs(self, width: int) -> dict[str, Any]:
        return {"forces": tm.VectorHead(width)}

    def prepare(self, atoms: Atoms, rng: np.random.Generator) -> Sample:
        self.seeds.append(int(rng.integers(100)))
        return Sample(atoms, {}, {"charge": np.array([1.0])})

    def loss(self, outputs: Any, batch: Batch) -> Any:
        return {}

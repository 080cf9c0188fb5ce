"""Forces that are no derivative: how much of their Jacobian is not symmetric, and what fine-tuning makes of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

import transfermium as tm
from tests.alloys import QUICK, alloys, painn, potential, weights_of
from tests.test_backbones_force import egnn, gns
from transfermium import cli
from transfermium.graph import AtomGraph, Cutoff, Sample
from transfermium.heads import Head
from transfermium.jacobian import _forward, direct_forces, jacobian_asymmetry
from transfermium.transfer import stage
from transfermium.transfer.learn import weights_fingerprint


def tensornet() -> tm.TensorNet:
    return tm.TensorNet(width=8, depth=1, cutoff=4.0, radial=6)


def model_of(backbone: tm.Backbone, conservative: bool) -> tm.Model:
    torch.manual_seed(0)
    return tm.Model(backbone, tm.Potential(conservative=conservative).outputs(backbone.width))


# ------------------------------------------------------------------------------------------------------ the asymmetry


class Blind(tm.Backbone):
    """Sees nothing."""

    laws: ClassVar[frozenset[str]] = frozenset({"derivatives", "vectors"})

    def __init__(self) -> None:
        super().__init__()
        self.width = 1
        self.edges = Cutoff(3.0)
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, graph: AtomGraph) -> tm.Features:
        return tm.Features(graph.positions[:, :1] * self.nothing)


class Matrix(Head):
    """Forces that are a matrix times the positions of all atoms."""

    per_atom = True

    def __init__(self, matrix: np.ndarray):
        super().__init__()
        self.matrix = torch.as_tensor(matrix)

    def forward(self, features: Any, graph: AtomGraph) -> Tensor:
        x = graph.positions.reshape(graph.n_systems, -1)
        return (x @ self.matrix.mT).reshape(-1, 3)


def gas(n: int) -> Atoms:
    return Atoms(f"Cu{n}", np.random.default_rng(0).normal(size=(n, 3)) * 9)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_asymmetry_of_a_known_matrix_is_found(share: float) -> None:
    matrix = np.random.default_rng(1).normal(size=(30, 30))
    matrix = (matrix + matrix.T) / 2 + share * (matrix - matrix.T) / 2
    known = np.linalg.norm(matrix - matrix.T) / 2 / np.linalg.norm(matrix)
    model = tm.Model(Blind(), {"forces": Matrix(matrix)})
    assert jacobian_asymmetry(model, [gas(10)]) == pytest.approx(known, abs=1e-9)
    assert jacobian_asymmetry(model, [gas(10)], probes=3) == pytest.approx(known, rel=0.3, abs=1e-9)
    assert jacobian_asymmetry(model, [gas(10)] * 20, most=20, probes=20) == pytest.approx(known, rel=0.05, abs=1e-9)


def test_forces_that_only_turn_around_an_axis_have_no_symmetric_part() -> None:
    axis = np.cross(np.eye(3), [0.3, -0.2, 0.9])
    model = tm.Model(Blind(), {"forces": Matrix(np.kron(np.eye(4), axis))})
    assert jacobian_asymmetry(model, [gas(4)]) == pytest.approx(1.0, abs=1e-9)
    nothing = tm.Model(Blind(), {"forces": Matrix(np.zeros((12, 12)))})
    assert np.isnan(jacobian_asymmetry(nothing, [gas(4)]))


@pytest.mark.parametrize("make", [egnn, gns, painn], ids=lambda make: make.__name__)
def test_derivatives_have_none_and_direct_forces_do(make: Any) -> None:
    structures = [*alloys(2), Atoms("CuAu2", [[0, 0, 0], [2.5, 0, 0], [0.6, 2.4, 0.3]])]
    conservative, direct = (model_of(make(), conservative) for conservative in (True, False))
    assert jacobian_asymmetry(conservative, structures) < 1e-5
    assert 0.05 < jacobian_asymmetry(direct, structures) < 1
    assert (direct_forces(conservative), direct_forces(direct)) == (False, True)


def test_the_model_is_left_as_it_was() -> None:
    model = model_of(gns(), conservative=False).eval()
    before = weights_fingerprint(model)
    jacobian_asymmetry(model, alloys(1))
    assert weights_fingerprint(model) == before
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_it_is_said_and_kept_where_forces_are_direct(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    options: dict[str, Any] = {**QUICK, "steps": 2}
    tm.pretrain(alloys(6), tm.Potential(conservative=False), gns(), out=tmp_path, **{**options, "verbose": True})
    asymmetry = tm.load(tmp_path / "model.safetensors").card["jacobian asymmetry"]
    assert 0 < asymmetry < 1
    assert f"Asymmetry of the Jacobian of direct forces: {asymmetry:.2g}" in " ".join(capsys.readouterr().err.split())
    noise = tm.pretrain(alloys(6), tm.Denoise(conservative=False), painn(), **options)
    assert "jacobian asymmetry" not in potential().card and "jacobian asymmetry" not in noise.card


def test_differences_keep_nothing_for_a_backward_pass() -> None:
    """Or a structure that memory had room for in training would have none here."""
    model, atoms = model_of(painn(), conservative=False).double().train(), alloys(1)[0]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _forward(model, Sample(atoms, {}), model.backbone.edges.neighbors(atoms), np.ones((len(atoms), 3)))
    assert not kept


@pytest.mark.parametrize(("said", "ends"), [("DefaultCPUAllocator: can't allocate memory", False), ("else", True)])
def test_without_memory_for_it_a_run_ends_without_it(monkeypatch: pytest.MonkeyPatch, said: str, ends: bool) -> None:
    def fail(*arguments: Any, **options: Any) -> float:
        raise RuntimeError(said)

    monkeypatch.setattr(stage, "jacobian_asymmetry", fail)
    with pytest.raises(RuntimeError) if ends else nullcontext():
        model = tm.pretrain(alloys(6), tm.Potential(conservative=False), painn(), steps=1, **QUICK)
        assert "jacobian asymmetry" not in model.card


def test_models_without_forces_are_refused() -> None:
    with pytest.raises(tm.InputError, match="no forces"):
        jacobian_asymmetry(tm.Model(painn(), {"energy": tm.EnergyHead(8)}), alloys(1))


# --------------------------------------------------------------------------------- direct first, then conservative


@pytest.mark.parametrize("make", [painn, tensornet], ids=lambda make: make.__name__)
def test_a_direct_base_gives_backbone_and_energy_to_a_conservative_model(make: Any) -> None:
    base = tm.pretrain(alloys(8), tm.Potential(conservative=False), make(), steps=3, lr=0.01, **QUICK)
    tuned = tm.finetune(base, alloys(8), tm.Potential(), steps=0, align=False, **QUICK)
    assert not direct_forces(tuned) and "jacobian asymmetry" not in tuned.card
    assert jacobian_asymmetry(tuned, alloys(1)) < 1e-5
    for part in ("backbone.", "heads.energy."):
        theirs, given = weights_of(tuned, part), weights_of(base, part)
        assert theirs.keys() == given.keys() and theirs
        assert all(torch.equal(theirs[name], given[name]) for name in given)
    assert set(tuned.heads) == {"energy"} and set(base.heads) == {"energy", "forces", "stress"}

    trained = tm.finetune(base, alloys(8), tm.Potential(), steps=2, **QUICK)
    assert any(not torch.equal(v, weights_of(base)[name]) for name, v in weights_of(trained, "backbone.").items())


def test_the_recipe_on_the_command_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ase.io.write("a.extxyz", alloys(8))
    quick = "--edges 400 --device cpu --split-by random"
    direct = "--objective Potential --objective.conservative false --backbone PaiNN --backbone.width 8"
    cli.main(f"pretrain a.extxyz {direct} --steps 2 --out direct {quick}".split())
    cli.main(f"finetune direct a.extxyz --objective Potential --steps 2 --out tuned {quick}".split())
    base, tuned = tm.load("direct"), tm.load("tuned")
    assert direct_forces(base) and not direct_forces(tuned)
    assert [stage["verb"] for stage in tuned.card["history"]] == ["pretrain", "finetune"]

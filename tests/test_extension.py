"""A new objective or backbone is a class in one's own file: nothing of ours has to know it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list
from torch import Tensor, nn

import transfermium as tm
from transfermium.graph import AtomGraph, Batch, Cutoff, Sample, to_graph
from transfermium.model import Output
from transfermium.nn import Gaussians, NodeInputs
from transfermium.objectives import Quantity
from transfermium.objectives.base import Loss, absolute_errors
from transfermium.testing import check_backbone, check_objective


class SumOfNeighbors(tm.Backbone):
    """One smooth sum over neighbours."""

    def __init__(self, width: int = 8, cutoff: float = 4.0):
        super().__init__()
        self.width = width
        self.cutoff = cutoff
        self.edges = Cutoff(cutoff)
        self.node_inputs = NodeInputs(width)
        self.basis = Gaussians(8, cutoff)
        self.filter = nn.Linear(8, width)

    def forward(self, graph: AtomGraph) -> tm.Features:
        lengths = graph.edge_vectors().norm(dim=1)
        weights = self.edges.envelope(lengths).unsqueeze(1) * self.filter(self.basis(lengths))
        x = self.node_inputs(graph)
        return tm.Features(x + graph.sum_over_neighbors(weights * x.index_select(0, graph.senders)))


class CountNeighbors(tm.Objective):
    """Count the neighbours of each atom within a radius, in structures that are rattled a little: no labels needed."""

    def __init__(self, radius: float = 3.0, rattle: float = 0.05):
        self.radius = radius
        self.rattle = rattle

    def outputs(self, width: int) -> dict[str, Output]:
        return {"neighbors": tm.AtomHead(width)}

    def quantities(self) -> dict[str, Quantity]:
        return {"neighbors": Quantity("number of neighbours", "")}

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        rattled = atoms.copy()
        rattled.positions += self.rattle * rng.normal(size=atoms.positions.shape)
        counts = np.bincount(neighbor_list("i", rattled, self.radius), minlength=len(atoms))
        return Sample(rattled, {"neighbors": counts.astype(float)})

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        return {"neighbors": absolute_errors(outputs["neighbors"], batch.targets["neighbors"], 1.0)}


@pytest.fixture
def crystals() -> list[Atoms]:
    """Sixteen elemental crystals with 6 to 14 neighbours, and a made-up property."""
    structures = []
    for n in range(16):
        lattice, element = [("fcc", "Cu"), ("bcc", "Fe"), ("sc", "Po"), ("diamond", "Si")][n % 4]
        atoms = bulk(element, lattice, a=[3.6, 2.9, 2.8, 5.4][n % 4] * (1 + 0.002 * n))
        atoms.info["hardness"] = float(n % 4)
        structures.append(atoms)
    return structures


def test_they_keep_the_contracts() -> None:
    check_backbone(SumOfNeighbors())
    check_objective(CountNeighbors())
    check_objective(CountNeighbors(), SumOfNeighbors())


def test_they_train_and_are_saved_and_transferred(crystals: list[Atoms], tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"verbose": False, "valid_fraction": 0.25, "split_by": "random"}
    start, trained = (
        tm.pretrain(
            crystals, CountNeighbors(), SumOfNeighbors(), steps=steps, lr=0.02, out=tmp_path / str(steps), **quiet
        )
        for steps in (0, 60)
    )
    assert validation_loss(trained) < 0.5 * validation_loss(start)

    loaded = tm.load(tmp_path / "60" / "model.safetensors")
    assert isinstance(loaded.backbone, SumOfNeighbors)
    assert loaded.card["quantities"] == {"neighbors": ["number of neighbours", ""]}
    graph = to_graph(crystals, loaded.backbone.edges)
    assert torch.equal(loaded(graph)["neighbors"], trained(graph)["neighbors"])

    moved = tm.finetune(loaded, crystals, tm.Property("hardness"), steps=10, backbone_lr=0.0, **quiet)
    assert isinstance(moved.backbone, SumOfNeighbors)
    assert [stage["verb"] for stage in moved.card["history"]] == ["pretrain", "finetune"]
    for name, weight in moved.backbone.state_dict().items():
        assert torch.equal(weight, loaded.backbone.state_dict()[name])


@pytest.mark.parametrize("backbone", [tm.PaiNN(8, depth=1, cutoff=4.0), tm.TensorNet(8, depth=1, cutoff=4.0)])
def test_a_new_objective_works_on_our_backbones(crystals: list[Atoms], backbone: tm.Backbone) -> None:
    model = tm.pretrain(crystals, CountNeighbors(), backbone, steps=3, verbose=False)
    assert model(to_graph(crystals, backbone.edges))["neighbors"].shape == (sum(map(len, crystals)),)


def test_our_objectives_work_on_a_new_backbone(crystals: list[Atoms]) -> None:
    for objective in (tm.Denoise(), tm.Denoise(conservative=False), tm.Property("hardness")):
        model = tm.pretrain(crystals, objective, SumOfNeighbors(), steps=3, verbose=False)
        outputs = model(to_graph(crystals, model.backbone.edges))
        assert outputs.keys() == objective.outputs(8).keys()
        assert all(bool(value.isfinite().all()) for value in outputs.values())


def validation_loss(model: tm.Model) -> float:
    return float(model.card["metrics"]["validation loss"])

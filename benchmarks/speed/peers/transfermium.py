"""transfermium: TensorNet, PaiNN and CGCNN through `Model`, as plain torch code would train them."""

from collections.abc import Sequence
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from torch import Tensor

import transfermium as tm
from peers import Setting
from transfermium.graph import AtomGraph, to_graph


class Peer:
    def __init__(self, setting: Setting):
        common: dict[str, Any] = {"depth": setting.layers, "cutoff": setting.cutoff}
        backbones = {
            "TensorNet": lambda: tm.TensorNet(setting.width, **common),
            "PaiNN": lambda: tm.PaiNN(setting.width, **common),
            "ET": lambda: tm.ET(setting.width, **common),
            "CGCNN": lambda: tm.CGCNN(setting.width, channels=setting.width, gaussians=50, **common),
        }
        backbone = backbones[setting.backbone]()
        self.model = tm.Model(backbone, tm.Potential().outputs(backbone.width))
        self.edges = backbone.edges
        self.outputs = setting.outputs

    def prepare(self, atoms: Atoms) -> AtomGraph:
        return to_graph([atoms], self.edges)

    def collate(self, graphs: Sequence[AtomGraph]) -> AtomGraph:
        """Side by side, in single precision."""
        sizes = [graph.n_atoms for graph in graphs]
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        joined = AtomGraph(
            positions=torch.cat([graph.positions for graph in graphs]),
            atomic_numbers=torch.cat([graph.atomic_numbers for graph in graphs]),
            cell=torch.cat([graph.cell for graph in graphs]),
            system_idx=torch.cat([graph.system_idx + k for k, graph in enumerate(graphs)]),
            senders=torch.cat([graph.senders + start for graph, start in zip(graphs, starts, strict=True)]),
            receivers=torch.cat([graph.receivers + start for graph, start in zip(graphs, starts, strict=True)]),
            cell_shifts=torch.cat([graph.cell_shifts for graph in graphs]),
            shells=torch.cat([graph.shells for graph in graphs]),
            inputs={},
        )
        return joined.to("cpu", torch.float32)

    def __call__(self, batch: AtomGraph) -> dict[str, Tensor]:
        return self.model(batch, self.outputs)

    def calculator(self) -> Calculator:
        return tm.Calculator(self.model, device="cpu", allow_unseen=True)

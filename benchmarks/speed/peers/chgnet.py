"""CHGNet, untrained, without its linear composition model: its converter and calculator."""

from collections.abc import Sequence
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.units import GPa
from chgnet.model import CHGNet
from chgnet.model.dynamics import CHGNetCalculator
from pymatgen.io.ase import AseAtomsAdaptor
from torch import Tensor

from peers import Setting

EMPTY = 6.0  # Å around a molecule, because it knows crystals only


class Peer:
    def __init__(self, setting: Setting):
        self.model = CHGNet(
            atom_fea_dim=setting.width,
            bond_fea_dim=setting.width,
            angle_fea_dim=setting.width,
            n_conv=setting.layers,
            atom_graph_cutoff=setting.cutoff,
            bond_graph_cutoff=3.0,
            composition_model=None,
        )
        self.convert = self.model.graph_converter
        self.outputs = setting.outputs

    def prepare(self, atoms: Atoms) -> Any:
        if not atoms.pbc.all():
            atoms = Atoms(atoms.numbers, atoms.positions, pbc=True)
            atoms.center(vacuum=EMPTY)
        return self.convert(AseAtomsAdaptor.get_structure(atoms))

    def collate(self, graphs: Sequence[Any]) -> list[Any]:
        return list(graphs)

    def __call__(self, batch: list[Any]) -> dict[str, Tensor]:
        task = "".join(name[0] for name in self.outputs)  # e, ef, efs
        found = self.model(batch, task=task)
        sizes = torch.tensor([len(graph.atomic_number) for graph in batch])
        outputs = {"energy": found["e"].flatten() * sizes}
        if "forces" in self.outputs:
            outputs["forces"] = torch.cat(found["f"])
        if "stress" in self.outputs:
            outputs["stress"] = torch.stack(found["s"]) * GPa
        return outputs

    def calculator(self) -> Calculator:
        return CHGNetCalculator(self.model, use_device="cpu")

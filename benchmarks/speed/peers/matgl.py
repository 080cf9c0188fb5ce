"""matgl (its PyG models): TensorNet through `Potential`, its converter and its calculator."""

from collections.abc import Sequence

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import chemical_symbols
from ase.units import GPa
from matgl.apps.pes import Potential
from matgl.ext.ase import Atoms2Graph, PESCalculator
from matgl.models import TensorNet
from torch import Tensor
from torch_geometric.data import Batch, Data

from peers import Setting


class Peer:
    def __init__(self, setting: Setting):
        symbols = tuple(chemical_symbols[z] for z in setting.elements)
        net = TensorNet(
            element_types=symbols,
            units=setting.width,
            nblocks=setting.layers,
            num_rbf=32,
            cutoff=setting.cutoff,
            is_intensive=False,
            readout_type="weighted_atom",
        )
        self.outputs = setting.outputs
        self.model = Potential(net, calc_forces="forces" in self.outputs, calc_stresses="stress" in self.outputs)
        self.convert = Atoms2Graph(symbols, setting.cutoff)

    def prepare(self, atoms: Atoms) -> Data:
        graph, lattice, _ = self.convert.get_graph(atoms)
        graph.lattice = torch.as_tensor(lattice, dtype=torch.float32).reshape(1, 3, 3)
        return graph

    def collate(self, graphs: Sequence[Data]) -> Batch:
        return Batch.from_data_list(list(graphs))

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        if self.outputs == ("energy",):  # for which `Potential` makes no gradients of parameters
            return {"energy": self.model.model(g=placed(batch))}
        energy, forces, stress, *_ = self.model(batch, batch.lattice)
        found = {"energy": energy, "forces": forces}
        if "stress" in self.outputs:
            found["stress"] = stress.reshape(-1, 3, 3) * GPa
        return {name: found[name] for name in self.outputs}

    def calculator(self) -> Calculator:
        return PESCalculator(self.model)


def placed(batch: Batch) -> Batch:
    """With the Cartesian coordinates that its models read."""
    batch = batch.clone()
    cells = batch.lattice.index_select(0, batch.batch)  # (n_atoms, 3, 3)
    batch.pos = (batch.frac_coords.unsqueeze(1) @ cells).squeeze(1)
    of_edges = cells.index_select(0, batch.edge_index[0])
    batch.pbc_offshift = (batch.pbc_offset.unsqueeze(1).float() @ of_edges).squeeze(1)
    return batch

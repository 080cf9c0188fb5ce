"""CGCNN from PyG's CGConv, as MatDeepLearn builds it: Gaussians, four convolutions with batch normalisation, mean pool.

PyG has no periodic neighbour list and no forces: vesin finds the neighbours, autograd differentiates.
"""

from collections.abc import Sequence
from typing import NoReturn

import torch
from ase import Atoms
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import CGConv, global_mean_pool
from vesin import NeighborList

from peers import Setting


class Net(nn.Module):
    """Mean energy per atom of each structure: (n_systems,)."""

    centres: Tensor

    def __init__(self, width: int, layers: int, gaussians: int, cutoff: float):
        super().__init__()
        self.embedding = nn.Embedding(100, width)
        self.convolutions = nn.ModuleList([CGConv(width, gaussians, aggr="mean") for _ in range(layers)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for _ in range(layers)])
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.register_buffer("centres", torch.linspace(0, cutoff, gaussians))
        self.sharpness = 0.5 * (gaussians / cutoff) ** 2

    def forward(self, batch: Batch, vectors: Tensor) -> Tensor:
        basis = torch.exp(-self.sharpness * (vectors.norm(dim=1, keepdim=True) - self.centres) ** 2)
        x = self.embedding(batch.z)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.functional.silu(norm(convolution(x, batch.edge_index, basis)))
        return self.head(global_mean_pool(x, batch.batch, batch.num_graphs)).squeeze(1)


class Peer:
    def __init__(self, setting: Setting):
        self.model = Net(setting.width, setting.layers, 50, setting.cutoff)
        self.search = NeighborList(cutoff=setting.cutoff, full_list=True)
        self.outputs = setting.outputs

    def prepare(self, atoms: Atoms) -> Data:
        i, j, shifts = self.search.compute(atoms.positions, atoms.cell.array, atoms.pbc, "ijS")
        return Data(
            z=torch.tensor(atoms.numbers),
            pos=torch.tensor(atoms.positions, dtype=torch.float32),
            edge_index=torch.stack([torch.from_numpy(i.astype("int64")), torch.from_numpy(j.astype("int64"))]),
            between=torch.tensor(shifts @ atoms.cell.array, dtype=torch.float32).reshape(-1, 3),
            volume=torch.tensor([atoms.cell.volume], dtype=torch.float32),
        )

    def collate(self, graphs: Sequence[Data]) -> Batch:
        return Batch.from_data_list(list(graphs))

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        derived = "forces" in self.outputs
        with torch.set_grad_enabled(derived or self.model.training):
            positions = batch.pos.detach().requires_grad_(derived)
            strain = positions.new_zeros(batch.num_graphs, 3, 3).requires_grad_("stress" in self.outputs)
            i, j = batch.edge_index
            vectors = positions.index_select(0, j) - positions.index_select(0, i) + batch.between
            if "stress" in self.outputs:
                of_edge = strain.index_select(0, batch.batch.index_select(0, i))
                vectors = vectors + (vectors.unsqueeze(1) @ of_edge).squeeze(1)
            energy = self.model(batch, vectors) * (batch.ptr[1:] - batch.ptr[:-1])
        if not derived:
            return {"energy": energy}

        leaves = [positions, strain] if "stress" in self.outputs else [positions]
        gradients = torch.autograd.grad(energy.sum(), leaves, create_graph=self.model.training)
        found = {"energy": energy, "forces": -gradients[0]}
        if "stress" in self.outputs:
            found["stress"] = gradients[1] / batch.volume.view(-1, 1, 1)
        return found

    def calculator(self) -> NoReturn:
        raise NotImplementedError("PyG has no ASE calculator")

"""TorchMD-Net: TensorNet, or the equivariant transformer (ET).

Its neighbour search lives inside of the model and needs cells of at least two cutoffs. So that small crystals can be
done, and nobody's search is part of a step, periodic neighbours are found beforehand here too.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from ase import Atoms
from torch import Tensor, nn
from torchmdnet.models.model import create_model
from vesin import NeighborList

from peers import Setting

KINDS = {"TensorNet": "tensornet", "ET": "equivariant-transformer"}


class Given(nn.Module):
    """In the place of the neighbour search: edges from outside, then the loop of each atom to itself."""

    edges: tuple[Tensor, Tensor, Tensor]  # two atoms, and the vector between their cells

    def forward(self, pos: Tensor, batch: Tensor, box: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        i, j, between = self.edges
        atoms = torch.arange(len(pos))
        vectors = pos.index_select(0, i) - pos.index_select(0, j) + between
        lengths = torch.cat([vectors.norm(dim=1), pos.new_zeros(len(pos))])
        return torch.stack([torch.cat([i, atoms]), torch.cat([j, atoms])]), lengths, torch.cat([vectors, 0 * pos])


class Peer:
    def __init__(self, setting: Setting):
        arguments = {
            "model": KINDS[setting.backbone],
            "embedding_dimension": setting.width,
            "num_layers": setting.layers,
            "precision": 32,
            "num_rbf": 32,
            "rbf_type": "expnorm",
            "trainable_rbf": False,
            "activation": "silu",
            "attn_activation": "silu",
            "num_heads": 8,
            "distance_influence": "both",
            "neighbor_embedding": True,
            "equivariance_invariance_group": "O(3)",
            "cutoff_lower": 0.0,
            "cutoff_upper": setting.cutoff,
            "max_num_neighbors": 128,
            "max_z": 119,
            "derivative": "forces" in setting.outputs,
            "atom_filter": -1,
            "prior_model": None,
            "output_model": "Scalar",
            "reduce_op": "sum",
        }
        self.model = create_model(arguments)
        self.search = NeighborList(cutoff=setting.cutoff, full_list=True, sorted=True)
        self.given = self.model.representation_model.distance = Given()
        self.forces = "forces" in setting.outputs

    def prepare(self, atoms: Atoms) -> tuple[Tensor, ...]:
        i, j, shifts = self.search.compute(atoms.positions, atoms.cell.array, atoms.pbc, "ijS")
        indices = torch.from_numpy(i.astype("int64")), torch.from_numpy(j.astype("int64"))
        between = torch.tensor(-shifts @ atoms.cell.array, dtype=torch.float32).reshape(-1, 3)
        return torch.tensor(atoms.numbers), torch.tensor(atoms.positions, dtype=torch.float32), *indices, between

    def collate(self, graphs: Sequence[tuple[Tensor, ...]]) -> dict[str, Any]:
        numbers, positions, i, j, between = zip(*graphs, strict=True)
        sizes = torch.tensor([len(z) for z in numbers])
        starts = (sizes.cumsum(0) - sizes).tolist()
        edges = [torch.cat([x + start for x, start in zip(index, starts, strict=True)]) for index in (i, j)]
        return {
            "z": torch.cat(numbers),
            "pos": torch.cat(positions),
            "batch": torch.repeat_interleave(torch.arange(len(graphs)), sizes),
            "edges": (*edges, torch.cat(between)),
        }

    def __call__(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        self.given.edges = batch["edges"]
        with torch.set_grad_enabled(self.forces or self.model.training):
            energy, forces = self.model(batch["z"], batch["pos"].clone(), batch["batch"])
        return {"energy": energy, "forces": forces} if self.forces else {"energy": energy}

    def calculator(self) -> NoReturn:
        raise NotImplementedError("torchmd-net has no ASE calculator")

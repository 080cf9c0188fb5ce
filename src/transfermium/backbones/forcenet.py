"""ForceNet: filters of atoms and spherical harmonics (Hu et al., arXiv:2103.01436), made smooth at the cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from ase.data import covalent_radii
from torch import Tensor, nn
from torch.nn import functional as F

from ..graph import AtomGraph, Cutoff
from ..nn import LAST_ELEMENT, NodeInputs, VectorInputs, lengths_and_directions, plus
from .base import Backbone, Features

GROWTH = 1.1  # from each frequency to the next


class ForceNet(Backbone):
    """Convolutions whose filters depend on the direction and length of the edge, and on both atoms.

    Force-centric: it sees directions as numbers, so that nothing turns with the structure but what training on turned
    structures teaches it; vectors are decoded from its scalars by the model. This is the published "sphallmul" basis.
    Ours differs where outputs must be smooth or not depend on their company: messages fall to zero at the cutoff with
    their derivatives, and layers are normalised over channels, not over the batch. Elements are learned embeddings
    rather than tables of properties; radii are covalent ones.

    Args:
        width: of atoms and filters.
        depth: number of interactions.
        cutoff: in Å.
        frequencies: number of sines of each distance; the highest of 50 has a wave of 0.35 Å at a cutoff of 6 Å.
        elements: highest atomic number.
        inputs: names of additional scalar inputs per atom.
        vector_inputs: names of vectors per atom that the model may be told, such as forces.
    """

    laws: ClassVar[frozenset[str]] = frozenset({"smooth", "derivatives"})

    edges: Cutoff

    def __init__(
        self,
        width: int = 128,
        depth: int = 5,
        cutoff: float = 6.0,
        frequencies: int = 50,
        elements: int = 118,
        inputs: Sequence[str] = (),
        vector_inputs: Sequence[str] = (),
    ):
        super().__init__()
        self.width = width
        self.depth = depth
        self.cutoff = cutoff
        self.frequencies = frequencies
        self.elements = elements
        self.inputs = tuple(inputs)
        self.vector_inputs = tuple(vector_inputs)
        self.edges = Cutoff(cutoff)

        self.node_inputs = NodeInputs(width, elements, inputs)
        self.told = VectorInputs(width, vector_inputs, components=True)
        self.basis = SphericalBasis(frequencies, cutoff)
        self.interactions = nn.ModuleList([Interaction(width) for _ in range(depth)])
        self.output = nn.Linear(width, width)

    def forward(self, graph: AtomGraph) -> Features:
        lengths, directions = lengths_and_directions(graph.edge_vectors())
        basis = self.basis(lengths, directions, graph)
        weights = self.edges.envelope(lengths).unsqueeze(1)
        told, _ = self.told(graph)
        h = plus(self.node_inputs(graph), told)
        for interaction in self.interactions:
            h = h + interaction(h, graph, basis, weights)
        return Features(F.silu(self.output(h)))


class SphericalBasis(nn.Module):
    """Spherical harmonics up to l = 2 times learned functions of the distance, also of that between surfaces.

    The result is (n_edges, 36): nine harmonics of the direction, times four sums of sines of the distance between the
    atoms, of that from the surface of one or the other, and of that between both surfaces, over the cutoff.
    """

    radii: Tensor
    frequencies: Tensor

    def __init__(self, frequencies: int, cutoff: float):
        super().__init__()
        self.cutoff = cutoff
        self.mix = nn.Linear(4 * frequencies, 4)
        radii = torch.tensor(covalent_radii[: LAST_ELEMENT + 1], dtype=torch.get_default_dtype())
        self.register_buffer("radii", radii, persistent=False)
        self.register_buffer("frequencies", GROWTH ** torch.arange(frequencies), persistent=False)

    def forward(self, lengths: Tensor, directions: Tensor, graph: AtomGraph) -> Tensor:
        radii = self.radii.index_select(0, graph.atomic_numbers)
        one, other = radii.index_select(0, graph.receivers), radii.index_select(0, graph.senders)
        apart = torch.stack([lengths, lengths - one, lengths - other, lengths - one - other], dim=1) / self.cutoff
        waves = torch.sin(apart.unsqueeze(2) * self.frequencies).flatten(1)  # (n_edges, 4 · frequencies)
        return (harmonics(directions).unsqueeze(2) * self.mix(waves).unsqueeze(1)).flatten(1)


class Interaction(nn.Module):
    """Neighbours times filters, and the atom times one of its own; what the filter reads has a matrix for each part."""

    def __init__(self, width: int):
        super().__init__()
        self.basis = nn.Linear(36, width)
        self.receiver = nn.Linear(width, width, bias=False)
        self.sender = nn.Linear(width, width, bias=False)
        self.filter = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.value = nn.Linear(width, width)
        self.own = nn.Parameter(torch.ones(width))
        self.update = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, graph: AtomGraph, basis: Tensor, weights: Tensor) -> Tensor:
        atoms = self.receiver(h).index_select(0, graph.receivers) + self.sender(h).index_select(0, graph.senders)
        filters = self.filter(self.basis(basis) + atoms) * weights  # (n_edges, width)
        x = self.value(h)
        heard = graph.sum_over_neighbors(filters * x.index_select(0, graph.senders))
        return self.update(heard + self.own * x)


def harmonics(directions: Tensor) -> Tensor:
    """Real spherical harmonics of unit vectors up to l = 2, the squares of each l adding up to 2l + 1: (n_edges, 9)."""
    x, y, z = directions.unbind(1)
    first = 3**0.5 * directions
    second = 15**0.5 * torch.stack([x * y, y * z, z * x, (x * x - y * y) / 2, (3 * z * z - 1) / 12**0.5], dim=1)
    return torch.cat([torch.ones_like(x).unsqueeze(1), first, second], dim=1)

"""EGNN: graph networks of distances (Satorras, Hoogeboom, Welling, arXiv:2102.09844), made smooth at the cutoff."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..graph import AtomGraph, Cutoff
from ..nn import Bessel, NodeInputs, VectorInputs, mlp, plus
from .base import Backbone, Features


class EGNN(Backbone):
    """Messages by a perceptron of both atoms and their distance, each weighted by how much of an edge it is.

    Energy-centric: forces are derivatives, and the atoms stay where they are (Eq. 4 moves them, which a potential must
    not do). Ours differs where the energy must be smooth and bonds be told apart: messages fall to zero at the cutoff,
    and the distance enters by Bessel functions rather than as its square alone.

    Args:
        width: of atoms and messages.
        depth: number of layers.
        cutoff: in Å.
        radial: number of Bessel functions.
        elements: highest atomic number.
        inputs: names of additional scalar inputs per atom.
        vector_inputs: names of vectors per atom that the model may be told, such as forces; it sees their lengths.
    """

    edges: Cutoff

    def __init__(
        self,
        width: int = 128,
        depth: int = 5,
        cutoff: float = 5.0,
        radial: int = 20,
        elements: int = 118,
        inputs: Sequence[str] = (),
        vector_inputs: Sequence[str] = (),
    ):
        super().__init__()
        self.width = width
        self.depth = depth
        self.cutoff = cutoff
        self.radial = radial
        self.elements = elements
        self.inputs = tuple(inputs)
        self.vector_inputs = tuple(vector_inputs)
        self.edges = Cutoff(cutoff)

        self.node_inputs = NodeInputs(width, elements, inputs)
        self.told = VectorInputs(width, vector_inputs, directed=False)
        self.basis = Bessel(radial, cutoff)
        self.layers = nn.ModuleList([Layer(width, radial) for _ in range(depth)])

    def forward(self, graph: AtomGraph) -> Features:
        lengths = torch.linalg.vector_norm(graph.edge_vectors(), dim=1)
        basis = self.basis(lengths)  # (n_edges, radial)
        weights = self.edges.envelope(lengths).unsqueeze(1)
        told, _ = self.told(graph)
        h = plus(self.node_inputs(graph), told)
        for layer in self.layers:
            h = layer(h, graph, basis, weights)
        return Features(h)


class Layer(nn.Module):
    """Eqs. 3, 5, 6 and 8; each part of what the edge perceptron reads has its own matrix."""

    def __init__(self, width: int, radial: int):
        super().__init__()
        self.receiver = nn.Linear(width, width)
        self.sender = nn.Linear(width, width, bias=False)
        self.radial = nn.Linear(radial, width, bias=False)
        self.message = nn.Linear(width, width)
        self.edge = nn.Linear(width, 1)
        self.update = mlp(2 * width, width, width)

    def forward(self, h: Tensor, graph: AtomGraph, basis: Tensor, weights: Tensor) -> Tensor:
        atoms = self.receiver(h).index_select(0, graph.receivers) + self.sender(h).index_select(0, graph.senders)
        m = F.silu(self.message(F.silu(atoms + self.radial(basis))))
        m = m * (torch.sigmoid(self.edge(m)) * weights)  # (n_edges, width)
        return h + self.update(torch.cat([h, graph.sum_over_neighbors(m)], dim=1))

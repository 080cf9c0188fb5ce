"""PaiNN: polarisable atom interaction network (Schütt, Unke, Gastegger, arXiv:2102.03150)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..graph import AtomGraph, Cutoff
from ..nn import Bessel, NodeInputs, lengths_and_directions, mlp
from .base import Backbone, Features


class PaiNN(Backbone):
    """Scalars and vectors on atoms, exchanged along edges.

    Args:
        width: channels of scalars and of vectors.
        depth: number of message and update blocks.
        cutoff: in Å.
        radial: number of Bessel functions.
        elements: highest atomic number.
        inputs: names of additional scalar inputs per atom.
    """

    laws: ClassVar[frozenset[str]] = Backbone.laws | {"vectors"}

    def __init__(
        self,
        width: int = 64,
        depth: int = 3,
        cutoff: float = 5.0,
        radial: int = 20,
        elements: int = 118,
        inputs: Sequence[str] = (),
    ):
        super().__init__()
        self.width = width
        self.depth = depth
        self.cutoff = cutoff
        self.radial = radial
        self.elements = elements
        self.inputs = tuple(inputs)
        self.edges = Cutoff(cutoff)

        self.node_inputs = NodeInputs(width, elements, inputs)
        self.basis = Bessel(radial, cutoff)
        self.messages = nn.ModuleList([Message(width, radial) for _ in range(depth)])
        self.updates = nn.ModuleList([Update(width) for _ in range(depth)])

    def forward(self, graph: AtomGraph) -> Features:
        lengths, directions = lengths_and_directions(graph.edge_vectors())
        weights = self.edges.envelope(lengths).unsqueeze(1)
        basis = torch.cat([self.basis(lengths), torch.ones_like(weights)], dim=1) * weights  # the one is the bias

        s = self.node_inputs(graph)  # (n_atoms, width)
        v = s.new_zeros(graph.n_atoms, 3, self.width)
        for message, update in zip(self.messages, self.updates, strict=True):
            ds, dv = message(s, v, basis, directions, graph)
            s, v = s + ds, v + dv
            ds, dv = update(s, v)
            s, v = s + ds, v + dv
        return Features(s, v)


class Message(nn.Module):
    """Filtered neighbours, along the bond and along their own vectors (Fig. 2b)."""

    def __init__(self, width: int, radial: int):
        super().__init__()
        self.phi = mlp(width, width, 3 * width)
        self.filter = nn.Linear(radial + 1, 3 * width, bias=False)

    def forward(
        self, s: Tensor, v: Tensor, basis: Tensor, directions: Tensor, graph: AtomGraph
    ) -> tuple[Tensor, Tensor]:
        x = self.phi(s).index_select(0, graph.senders) * self.filter(basis)  # (n_edges, 3 width)
        ds, along_bond, along_vector = x.chunk(3, dim=1)
        dv = along_bond.unsqueeze(1) * directions.unsqueeze(2)
        dv = dv + along_vector.unsqueeze(1) * v.index_select(0, graph.senders)
        return graph.sum_over_neighbors(ds), graph.sum_over_neighbors(dv)


class Update(nn.Module):
    """Scalars and vectors of one atom, mixed (Fig. 2c)."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Linear(width, 2 * width, bias=False)  # U and V, on channels, never on xyz
        self.a = mlp(2 * width, width, 3 * width)

    def forward(self, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        u, w = self.mix(v).chunk(2, dim=2)  # (n_atoms, 3, width) each
        norm = (w.square().sum(dim=1) + 1e-8).sqrt()  # finite derivatives where there is no vector yet
        a_vv, a_sv, a_ss = self.a(torch.cat([s, norm], dim=1)).chunk(3, dim=1)
        return a_ss + a_sv * (u * w).sum(dim=1), a_vv.unsqueeze(1) * u

"""CGCNN (Xie and Grossman, arXiv:1710.10324), made smooth so that its derivatives mean something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..graph import AtomGraph, Cutoff
from ..messages import EdgeFormula, Neighborhood, Radii, sigmoid, softplus
from ..nn import Gaussians, NodeInputs, VectorInputs, plus
from .base import Backbone, Features


class CGCNN(Backbone):
    """Gated convolutions over distances, as derivative-based pre-training used it (doi 10.1039/d3dd00214d).

    The defaults with one energy head have the 271,501 parameters of that paper; its third dense layer is the head's.
    Ours differs where the energy must be smooth: an envelope, no batch normalisation, no cap on neighbours.

    Args:
        width: width of the dense layers after the convolutions, and of the features.
        channels: width of the convolutions.
        depth: number of convolutions.
        cutoff: in Å.
        gaussians: number of radial functions.
        elements: highest atomic number.
        inputs: names of additional scalar inputs per atom.
        vector_inputs: names of vectors per atom that the model may be told, such as forces.
    """

    edges: Cutoff

    def __init__(
        self,
        width: int = 150,
        channels: int = 100,
        depth: int = 4,
        cutoff: float = 8.0,
        gaussians: int = 50,
        elements: int = 100,
        inputs: Sequence[str] = (),
        vector_inputs: Sequence[str] = (),
    ):
        super().__init__()
        self.width = width
        self.channels = channels
        self.depth = depth
        self.cutoff = cutoff
        self.gaussians = gaussians
        self.elements = elements
        self.inputs = tuple(inputs)
        self.vector_inputs = tuple(vector_inputs)
        self.edges = Cutoff(cutoff)

        self.node_inputs = NodeInputs(channels, elements, inputs)
        self.told = VectorInputs(channels, vector_inputs, directed=False)
        self.basis = Gaussians(gaussians, cutoff)
        self.convolutions = nn.ModuleList([Convolution(channels, gaussians) for _ in range(depth)])
        self.dense = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, graph: AtomGraph) -> Features:
        edges = Neighborhood(graph, self.edges, self.basis)
        (count,) = edges.sum(COUNT, lambda at: at.envelope)
        neighbors = count + 1  # (n_atoms, 1, 1): the mean stays smooth, also without neighbours

        told, _ = self.told(graph)  # of vectors it sees the lengths
        x = plus(self.node_inputs(graph), told)
        for convolution in self.convolutions:
            x = x + (convolution(x, edges) / neighbors).squeeze(1)
        return Features(self.dense(x))


class Convolution(nn.Module):
    """σ(W_f z) · softplus(W_s z) for z = (receiver, sender, edge) (Eq. 5); each part of z has its own matrix."""

    def __init__(self, channels: int, gaussians: int):
        super().__init__()
        self.receiver = nn.Linear(channels, 2 * channels, bias=False)
        self.sender = nn.Linear(channels, 2 * channels, bias=False)
        self.edge = nn.Linear(gaussians, 2 * channels)

    def forward(self, x: Tensor, edges: Neighborhood) -> Tensor:
        receiver, sender = (linear(x).unflatten(1, (2, -1)) for linear in (self.receiver, self.sender))
        (sums,) = edges.sum(GATED, self.filters, senders=[sender], receivers=[receiver])
        return sums

    def filters(self, at: Radii) -> Tensor:
        return torch.cat([self.edge(at.basis), at.envelope.expand(-1, self.edge.out_features // 2)], dim=1)


def _gated(sender: Any, receiver: Any, filters: Any, direction: Any, length: Any) -> list[Any]:
    gate, core = (s + r + f for s, r, f in zip(sender, receiver, filters[:2], strict=True))
    return [sigmoid(gate) * softplus(core) * filters[2]]


def _count(sender: Any, receiver: Any, filters: Any, direction: Any, length: Any) -> list[Any]:
    return [filters[0]]


GATED = EdgeFormula(_gated, outputs=(1,), filters=3, senders=(2,), receivers=(2,))
COUNT = EdgeFormula(_count, outputs=(1,), filters=1)

"""GNS: encode, process, decode (Sanchez-Gonzalez et al., arXiv:2002.09405), on atoms and made smooth at the cutoff."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..graph import AtomGraph, Cutoff
from ..nn import Bessel, NodeInputs, VectorInputs, mlp, plus
from .base import Backbone, Features


class GNS(Backbone):
    """A graph network on relative positions, with normalised perceptrons and residual connections throughout.

    Force-centric: it sees directions as numbers, so that nothing turns with the structure but what training on turned
    structures teaches it; vectors are decoded from its scalars by the model. Atoms have no positions, only edges have
    relative ones. Ours differs where outputs must be smooth (SiLU instead of ReLU, messages that fall to zero at the
    cutoff), and edges are told their length by Bessel functions as well, without which it learns forces several times
    more slowly.

    Args:
        width: of atoms, edges and hidden layers.
        depth: number of message-passing steps, each with its own weights.
        cutoff: in Å.
        radial: number of Bessel functions; zero leaves the published input, relative position and distance.
        elements: highest atomic number.
        inputs: names of additional scalar inputs per atom.
        vector_inputs: names of vectors per atom that the model may be told, such as forces.
    """

    laws: ClassVar[frozenset[str]] = frozenset({"smooth", "derivatives"})

    atom_blocks: ClassVar[Sequence[str] | None] = ("updates",)

    edges: Cutoff

    def __init__(
        self,
        width: int = 128,
        depth: int = 10,
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
        self.told = VectorInputs(width, vector_inputs, components=True)
        self.encode_atoms = normed(width, width, width, width)
        self.basis = Bessel(radial, cutoff) if radial else None
        self.encode_edges = normed(4 + radial, width, width, width)
        self.messages = nn.ModuleList([Message(width) for _ in range(depth)])
        self.updates = nn.ModuleList([Update(width) for _ in range(depth)])
        for part in (self.encode_atoms, self.encode_edges, self.messages, self.updates):
            part.apply(without_bias)

    def forward(self, graph: AtomGraph) -> Features:
        vectors = graph.edge_vectors()
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        weights = self.edges.envelope(lengths).unsqueeze(1)
        relative = torch.cat([vectors, lengths.unsqueeze(1)], dim=1) / self.cutoff  # (n_edges, 4)
        told, _ = self.told(graph)
        v = self.encode_atoms(plus(self.node_inputs(graph), told))
        told = [relative] if self.basis is None else [relative, self.basis(lengths)]
        e = self.encode_edges(torch.cat(told, dim=1))
        for message, update in zip(self.messages, self.updates, strict=True):
            m = message(v, e, graph)
            e = e + m
            v = update(v, graph.sum_over_neighbors(weights * m))
        return Features(v)


class Message(nn.Module):
    """A perceptron of an edge and its two atoms; each part of what it reads has its own matrix."""

    def __init__(self, width: int):
        super().__init__()
        self.edge = nn.Linear(width, width)
        self.receiver = nn.Linear(width, width, bias=False)
        self.sender = nn.Linear(width, width, bias=False)
        self.rest = normed(width, width, width)

    def forward(self, v: Tensor, e: Tensor, graph: AtomGraph) -> Tensor:
        atoms = self.receiver(v).index_select(0, graph.receivers) + self.sender(v).index_select(0, graph.senders)
        return self.rest(F.silu(self.edge(e) + atoms))


class Update(nn.Module):
    """A perceptron of an atom and what arrived at it, added to the atom."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = normed(2 * width, width, width, width)

    def forward(self, v: Tensor, arrived: Tensor) -> Tensor:
        return v + self.mlp(torch.cat([v, arrived], dim=1))


def normed(*widths: int) -> nn.Sequential:
    """A perceptron whose result is normalised over its channels."""
    return mlp(*widths).append(nn.LayerNorm(widths[-1]))


def without_bias(module: nn.Module) -> None:
    """Start a linear layer with no bias, and results as large as what it is given (the published code's default).

    Otherwise biases are most of what reaches the first normalisation, and all atoms look alike after it.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

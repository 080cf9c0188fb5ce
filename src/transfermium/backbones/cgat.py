"""CGAT: crystal graph attention without bond lengths (doi 10.1126/sciadv.abi7948, arXiv:2303.03000), repaired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..graph import AtomGraph, Shells
from ..nn import NodeInputs, VectorInputs, mlp, plus, weighted_mean
from .base import Backbone, Features


class CGAT(Backbone):
    """Vector attention over the nearest shells of atoms; all it knows of a distance is the number of the shell.

    Structures that differ by a small displacement or by their volume are the same to it, so that it can predict relaxed
    properties of structures that are not. It has no derivatives for the same reason: no forces or stress of an energy.

    `CGAT(128, depth=5, heads=5, generated=4)` with a head of its kind, `Property(..., pooling="composition")`, is the
    published size. The public code's graph, which the published models were trained on, has `tolerance=1e-8` and
    `whole=False`.

    Args:
        width: of the features of atoms and edges.
        depth: number of message passing layers.
        heads: of the attention.
        generated: layers of the update whose weights are generated for each atom; most parameters are theirs.
        most: neighbours of an atom, in whole shells.
        radius: in Å, in which they are looked for.
        tolerance: in Å; a shell ends where the next atom is further away by more.
        whole: otherwise the last shell is cut where there are `most` neighbours.
        elements: highest atomic number.
        inputs: names of additional scalar inputs per atom.
        vector_inputs: names of vectors per atom that the model may be told, such as forces.
    """

    atom_blocks: ClassVar[Sequence[str]] = ("nodes",)
    laws: ClassVar[frozenset[str]] = frozenset({"rotation", "reflection"})

    edges: Shells

    def __init__(
        self,
        width: int = 64,
        depth: int = 3,
        heads: int = 2,
        generated: int = 2,
        most: int = 24,
        radius: float = 18.0,
        tolerance: float = 1e-2,
        whole: bool = True,
        elements: int = 118,
        inputs: Sequence[str] = (),
        vector_inputs: Sequence[str] = (),
    ):
        super().__init__()
        if heads < 2:
            raise InputError(f"CGAT with {heads} head has nothing that competes for an edge: choose two or more")
        self.width = width
        self.depth = depth
        self.heads = heads
        self.generated = generated
        self.most = most
        self.radius = radius
        self.tolerance = tolerance
        self.whole = whole
        self.elements = elements
        self.inputs = tuple(inputs)
        self.vector_inputs = tuple(vector_inputs)
        self.edges = Shells(most, radius, tolerance, whole)

        self.node_inputs = NodeInputs(width, elements, inputs)
        self.told = VectorInputs(width, vector_inputs, directed=False)
        self.shell = nn.Embedding(most, width)
        self.nodes = nn.ModuleList([NodeUpdate(width, heads, generated) for _ in range(depth)])
        self.bonds = nn.ModuleList([EdgeUpdate(width, heads) for _ in range(depth - 1)])  # nobody reads a last one

    def forward(self, graph: AtomGraph) -> Features:
        if len(graph.shells) != graph.n_edges:
            raise InputError("CGAT was given a graph without shells: build it with the `edges` of the backbone")
        told, _ = self.told(graph)  # of vectors it sees the lengths
        start = x = plus(self.node_inputs(graph), told)  # (n_atoms, width)
        edges = self.shell(graph.shells - 1)  # (n_edges, width)
        for number, node in enumerate(self.nodes):
            before, x = x, x + node(x, edges, start, graph)
            if number < len(self.bonds):
                edges = edges + self.bonds[number](before, edges, graph)
        return Features(x)


class EdgeNetworks(nn.Module):
    """Networks of one hidden layer of [x_i, e_ij, x_j], `n` side by side; each part of it has its own matrix."""

    def __init__(self, width: int, n: int):
        super().__init__()
        self.n = n
        self.receiver = nn.Linear(width, n * 2 * width)
        self.edge = nn.Linear(width, n * 2 * width, bias=False)
        self.sender = nn.Linear(width, n * 2 * width, bias=False)
        limit = (2 * width) ** -0.5
        self.weight = nn.Parameter(torch.empty(n, 2 * width, width).uniform_(-limit, limit))
        self.bias = nn.Parameter(torch.empty(n, 1, width).uniform_(-limit, limit))

    def forward(self, x: Tensor, edges: Tensor, graph: AtomGraph) -> Tensor:
        pair = self.receiver(x).index_select(0, graph.receivers) + self.sender(x).index_select(0, graph.senders)
        hidden = F.silu(pair + self.edge(edges)).unflatten(1, (self.n, -1)).transpose(0, 1)  # (n, n_edges, 2 width)
        return torch.baddbmm(self.bias, hidden, self.weight).transpose(0, 1)  # (n_edges, n, width)


class NodeUpdate(nn.Module):
    """What arrives at an atom by attention over its neighbours, a mean over heads, goes through layers of its own."""

    def __init__(self, width: int, heads: int, generated: int):
        super().__init__()
        self.networks = EdgeNetworks(width, 2 * heads)
        self.update = GeneratedLayers(width, generated)

    def forward(self, x: Tensor, edges: Tensor, start: Tensor, graph: AtomGraph) -> Tensor:
        scores, values = self.networks(x, edges, graph).chunk(2, dim=1)  # (n_edges, heads, width) each
        message = weighted_mean(values, scores, graph.receivers, graph.n_atoms).mean(dim=1)
        return self.update(start, message)


class EdgeUpdate(nn.Module):
    """The heads compete for each edge, channel by channel; what they say goes through a small network."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.networks = EdgeNetworks(width, 2 * heads)
        self.mix = mlp(width, width, width)

    def forward(self, x: Tensor, edges: Tensor, graph: AtomGraph) -> Tensor:
        scores, values = self.networks(x, edges, graph).chunk(2, dim=1)
        return self.mix((values * scores.softmax(dim=1)).sum(dim=1))


class GeneratedLayers(nn.Module):
    """A hyper-network: for each atom, d·x_0 + (1-d)·message makes the weights of layers that the message takes."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.damping = nn.Parameter(torch.zeros(1))  # d is its sigmoid, which never leaves [0, 1]
        self.generators = nn.ModuleList([mlp(width, width, (width + 1) * width) for _ in range(layers)])

    def forward(self, start: Tensor, message: Tensor) -> Tensor:
        width = message.shape[1:]
        d = torch.sigmoid(self.damping)
        source = d * start + (1 - d) * message
        x = message
        for number, generator in enumerate(self.generators):
            if number > 0:
                x = torch.tanh(F.layer_norm(x, width))
            made = generator(source).unflatten(1, (-1, *width))  # (n_atoms, width + 1, width), the last row is a bias
            x = torch.baddbmm(made[:, -1:], x.unsqueeze(1), made[:, :-1]).squeeze(1)
        return x

"""TensorNet: Cartesian tensors of rank two on atoms (Simeon and De Fabritiis, arXiv:2306.06482).

A tensor per atom and channel, X = I + A + S, is kept as its irreducible parts: a scalar a (I = a·1), a vector u
(A = [u]ₓ) and five numbers s (S, symmetric and traceless, in an orthonormal basis). Nine numbers travel along an edge
instead of the 27 of three full matrices, and products of tensors have closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..graph import AtomGraph, Cutoff
from ..nn import ExpNormal, NodeInputs, lengths_and_directions, mlp
from .base import Backbone, Features


class TensorNet(Backbone):
    """Tensors gathered from neighbours and multiplied with each other, equivariant under rotation and reflection.

    Args:
        width: channels of tensors and of the features.
        depth: number of interactions.
        cutoff: in Å.
        radial: number of radial functions.
        elements: highest atomic number.
        inputs: names of additional scalar inputs per atom.
    """

    laws: ClassVar[frozenset[str]] = Backbone.laws | {"vectors"}

    def __init__(
        self,
        width: int = 64,
        depth: int = 2,
        cutoff: float = 5.0,
        radial: int = 32,
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
        self.basis = ExpNormal(radial, cutoff)
        self.embedding = Embedding(width, radial)
        self.interactions = nn.ModuleList([Interaction(width, radial) for _ in range(depth)])
        self.norm = nn.LayerNorm(3 * width)
        self.output = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU())

    def forward(self, graph: AtomGraph) -> Features:
        lengths, directions = lengths_and_directions(graph.edge_vectors())
        basis = self.basis(lengths)  # (n_edges, radial)
        weights = self.edges.envelope(lengths).unsqueeze(1)

        x = self.embedding(self.node_inputs(graph), basis, weights, directions, graph)
        for interaction in self.interactions:
            x = interaction(x, basis, weights, graph)

        norms = torch.cat([3 * x.a.square(), 2 * x.u.square().sum(1), x.s.square().sum(1)], dim=1)
        return Features(self.output(self.norm(norms)), x.u)


class Parts(NamedTuple):
    """The irreducible parts of one tensor per atom (or edge) and channel."""

    a: Tensor  # (n, width): the tensor holds a·1
    u: Tensor  # (n, 3, width): and [u]ₓ
    s: Tensor  # (n, 5, width): and s in `basis_of_symmetric`

    def norm2(self) -> Tensor:
        """Square of the Frobenius norm: (n, width)."""
        return 3 * self.a.square() + 2 * self.u.square().sum(1) + self.s.square().sum(1)

    def over(self, divisor: Tensor) -> Parts:
        """All parts divided by one number per atom and channel."""
        return self.times(*[1 / divisor] * 3)

    def times(self, fa: Tensor, fu: Tensor, fs: Tensor) -> Parts:
        """Each part times its own number per atom and channel."""
        return Parts(self.a * fa, self.u * fu.unsqueeze(1), self.s * fs.unsqueeze(1))

    def plus(self, other: Parts) -> Parts:
        return Parts(self.a + other.a, self.u + other.u, self.s + other.s)


class Embedding(nn.Module):
    """Tensors from the directions to the neighbours (Eqs. 6-8)."""

    def __init__(self, width: int, radial: int):
        super().__init__()
        self.receiver = nn.Linear(width, width)
        self.sender = nn.Linear(width, width, bias=False)
        self.filter = nn.Linear(radial, 3 * width)
        self.norm = nn.LayerNorm(width)
        self.gates = nn.Sequential(mlp(width, 2 * width, 3 * width), nn.SiLU())
        self.mix = Mix(width)

    def forward(self, z: Tensor, basis: Tensor, weights: Tensor, directions: Tensor, graph: AtomGraph) -> Parts:
        pair = self.receiver(z).index_select(0, graph.receivers) + self.sender(z).index_select(0, graph.senders)
        fa, fu, fs = (self.filter(basis) * weights).chunk(3, dim=1)
        pair_a, pair_u, pair_s = pair * fa, pair * fu, pair * fs  # (n_edges, width)

        sym = symmetric_parts(directions)  # (n_edges, 5)
        x = Parts(
            graph.sum_over_neighbors(pair_a),
            graph.sum_over_neighbors(pair_u.unsqueeze(1) * directions.unsqueeze(2)),
            graph.sum_over_neighbors(pair_s.unsqueeze(1) * sym.unsqueeze(2)),
        )
        gates = self.gates(self.norm(x.norm2())).chunk(3, dim=1)
        return self.mix(x).times(*gates)


class Interaction(nn.Module):
    """Tensors of the neighbours, filtered, and their product with the atom's own (Eqs. 9-13)."""

    def __init__(self, width: int, radial: int):
        super().__init__()
        self.filter = nn.Sequential(mlp(radial, width, 2 * width, 3 * width), nn.SiLU())
        self.before = Mix(width)
        self.after = Mix(width)

    def forward(self, x: Parts, basis: Tensor, weights: Tensor, graph: AtomGraph) -> Parts:
        fa, fu, fs = (self.filter(basis) * weights).chunk(3, dim=1)
        x = x.over(x.norm2() + 1)
        y = self.before(x)

        a, u, s = (part.index_select(0, graph.senders) for part in y)
        messages = Parts(*map(graph.sum_over_neighbors, Parts(a, u, s).times(fa, fu, fs)))

        z = anticommutator(y, messages)  # the symmetric product keeps parity (Sec. 3.2)
        dx = self.after(z.over(z.norm2() + 1))
        half = anticommutator(dx, dx)
        return x.plus(dx).plus(Parts(half.a / 2, half.u / 2, half.s / 2))


class Mix(nn.Module):
    """One matrix on the channels of each part."""

    def __init__(self, width: int):
        super().__init__()
        self.a = nn.Linear(width, width, bias=False)
        self.u = nn.Linear(width, width, bias=False)
        self.s = nn.Linear(width, width, bias=False)

    def forward(self, x: Parts) -> Parts:
        return Parts(self.a(x.a), self.u(x.u), self.s(x.s))


def anticommutator(x: Parts, y: Parts) -> Parts:
    """X·Y + Y·X, part by part: {[u]ₓ,[w]ₓ} = uwᵀ + wuᵀ - 2(u·w)·1 and {S,[w]ₓ} = -[S·w]ₓ."""
    full_x, full_y = full_symmetric(x.s), full_symmetric(y.s)  # (n, 3, 3, width)
    dot_u = (x.u * y.u).sum(1)
    dot_s = (x.s * y.s).sum(1)

    a = 2 * x.a * y.a + (2 * dot_s - 4 * dot_u) / 3
    u = 2 * (x.a.unsqueeze(1) * y.u + y.a.unsqueeze(1) * x.u)
    u = u - (full_x * y.u.unsqueeze(1)).sum(2) - (full_y * x.u.unsqueeze(1)).sum(2)
    product = (full_x.unsqueeze(3) * full_y.unsqueeze(1)).sum(2) + x.u.unsqueeze(2) * y.u.unsqueeze(1)
    s = 2 * traceless_symmetric(product) + 2 * (x.a.unsqueeze(1) * y.s + y.a.unsqueeze(1) * x.s)
    return Parts(a, u, s)


def basis_of_symmetric() -> Tensor:
    """Five symmetric, traceless 3×3 matrices of norm one, orthogonal to each other: (5, 3, 3)."""
    r2, r6 = 1 / math.sqrt(2), 1 / math.sqrt(6)
    basis = torch.zeros(5, 3, 3, dtype=torch.float64)
    for k, (i, j) in enumerate([(0, 1), (1, 2), (0, 2)]):
        basis[k, i, j] = basis[k, j, i] = r2
    basis[3] = torch.diag(torch.tensor([r2, -r2, 0.0], dtype=torch.float64))
    basis[4] = torch.diag(torch.tensor([-r6, -r6, 2 * r6], dtype=torch.float64))
    return basis


@cache
def basis_on(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same on a device, copied there once."""
    return basis_of_symmetric().to(device, dtype)


def symmetric_parts(r: Tensor) -> Tensor:
    """Components of r·rᵀ in the basis: (n, 3) to (n, 5)."""
    return torch.einsum("ni,nj,kij->nk", r, r, basis_on(r.device, r.dtype))


def full_symmetric(s: Tensor) -> Tensor:
    """The matrices themselves: (n, 5, width) to (n, 3, 3, width)."""
    return torch.einsum("nkw,kij->nijw", s, basis_on(s.device, s.dtype))


def traceless_symmetric(m: Tensor) -> Tensor:
    """The symmetric, traceless part of matrices: (n, 3, 3, width) to (n, 5, width)."""
    return torch.einsum("nijw,kij->nkw", m, basis_on(m.device, m.dtype))

"""TensorNet: Cartesian tensors of rank two on atoms (Simeon and De Fabritiis, arXiv:2306.06482).

A tensor per atom and channel, X = I + A + S, is kept as its irreducible parts: a scalar a (I = a·1), a vector u
(A = [u]ₓ) and five numbers s (S, symmetric and traceless, in an orthonormal basis). Nine numbers travel along an edge
instead of the 27 of three full matrices, and products of tensors have closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..graph import AtomGraph, Cutoff
from ..messages import AtomFormula, EdgeFormula, Neighborhood, Radii
from ..nn import ExpNormal, NodeInputs, VectorInputs, mlp, plus
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
        vector_inputs: names of vectors per atom that the model may be told, such as forces.
    """

    laws: ClassVar[frozenset[str]] = Backbone.laws | {"vectors"}

    edges: Cutoff

    def __init__(
        self,
        width: int = 64,
        depth: int = 2,
        cutoff: float = 5.0,
        radial: int = 32,
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
        self.told = VectorInputs(width, vector_inputs)
        self.basis = ExpNormal(radial, cutoff)
        self.embedding = Embedding(width, radial)
        self.interactions = nn.ModuleList([Interaction(width, radial) for _ in range(depth)])
        self.norm = nn.LayerNorm(3 * width)
        self.output = nn.Sequential(nn.Linear(3 * width, width), nn.SiLU())

    def forward(self, graph: AtomGraph) -> Features:
        edges = Neighborhood(graph, self.edges, self.basis)
        told, vectors = self.told(graph)
        x = self.embedding(plus(self.node_inputs(graph), told), edges)
        x = x._replace(u=plus(x.u, vectors))
        for interaction in self.interactions:
            x = interaction(x, edges)
        (norms,) = NORMS(*x)
        return Features(self.output(self.norm(norms.flatten(1))), x.u)


class Parts(NamedTuple):
    """The irreducible parts of one tensor per atom and channel."""

    a: Tensor  # (n_atoms, 1, width): the tensor holds a·1
    u: Tensor  # (n_atoms, 3, width): and [u]ₓ
    s: Tensor  # (n_atoms, 5, width): and s in the basis of `matrix`


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

    def forward(self, z: Tensor, edges: Neighborhood) -> Parts:
        receiver, sender = self.receiver(z).unsqueeze(1), self.sender(z).unsqueeze(1)
        x = Parts(*edges.sum(EMBEDDING, self.filters, senders=[sender], receivers=[receiver]))
        (norm2,) = NORM2(*x)
        gates = self.gates(self.norm(norm2.squeeze(1))).unflatten(1, (3, -1))
        return Parts(*GATE(*self.mix(x), gates))

    def filters(self, at: Radii) -> Tensor:
        return self.filter(at.basis) * at.envelope


class Interaction(nn.Module):
    """Tensors of the neighbours, filtered, and their product with the atom's own (Eqs. 9-13)."""

    def __init__(self, width: int, radial: int):
        super().__init__()
        self.filter = nn.Sequential(mlp(radial, width, 2 * width, 3 * width), nn.SiLU())
        self.before = Mix(width)
        self.after = Mix(width)

    def forward(self, x: Parts, edges: Neighborhood) -> Parts:
        x = Parts(*NORMALISE(*x))
        y = self.before(x)
        messages = edges.sum(MESSAGE, self.filters, senders=y)
        dx = self.after(Parts(*PRODUCT(*y, *messages)))
        return Parts(*UPDATE(*x, *dx))

    def filters(self, at: Radii) -> Tensor:
        return self.filter(at.basis) * at.envelope


class Mix(nn.Module):
    """One matrix on the channels of each part."""

    def __init__(self, width: int):
        super().__init__()
        self.a = nn.Linear(width, width, bias=False)
        self.u = nn.Linear(width, width, bias=False)
        self.s = nn.Linear(width, width, bias=False)

    def forward(self, x: Parts) -> Parts:
        return Parts(self.a(x.a), self.u(x.u), self.s(x.s))


# A tensor in a formula is its nine components: a, u (three), s (five).


def _embedding(sender: Any, receiver: Any, filters: Any, direction: Any, length: Any) -> list[Any]:
    pair = sender[0] + receiver[0]
    a, u, s = (pair * f for f in filters)
    return [
        a,
        *(u * r for r in direction),
        *(s * r for r in components([[p * q for q in direction] for p in direction])),
    ]


def _message(sender: Any, receiver: Any, filters: Any, direction: Any, length: Any) -> list[Any]:
    return scaled(sender, *filters)


def _product(x: Sequence[Any]) -> list[Any]:
    """The symmetric product keeps parity (Sec. 3.2)."""
    return normalised(anticommutator(x[:9], x[9:]))


def _update(x: Sequence[Any]) -> list[Any]:
    old, dx = x[:9], x[9:]
    square = [p * 0.5 for p in anticommutator(dx, dx)]
    return [p + q + r for p, q, r in zip(old, dx, square, strict=True)]


def norms(x: Sequence[Any]) -> list[Any]:
    """Squares of the Frobenius norms of the three parts."""
    u2 = x[1] * x[1] + x[2] * x[2] + x[3] * x[3]
    s2 = x[4] * x[4] + x[5] * x[5] + x[6] * x[6] + x[7] * x[7] + x[8] * x[8]
    return [x[0] * x[0] * 3.0, u2 * 2.0, s2]


def norm2(x: Sequence[Any]) -> Any:
    a, u, s = norms(x)
    return a + u + s


def normalised(x: Sequence[Any]) -> list[Any]:
    factor = 1.0 / (norm2(x) + 1.0)
    return [p * factor for p in x]


def scaled(x: Sequence[Any], a: Any, u: Any, s: Any) -> list[Any]:
    """Each part times its own number."""
    return [x[0] * a, *(p * u for p in x[1:4]), *(p * s for p in x[4:9])]


def anticommutator(x: Sequence[Any], y: Sequence[Any]) -> list[Any]:
    """X·Y + Y·X, part by part: {[u]ₓ,[w]ₓ} = uwᵀ + wuᵀ - 2(u·w)·1 and {S,[w]ₓ} = -[S·w]ₓ."""
    (ax, ux, sx), (ay, uy, sy) = (x[0], x[1:4], x[4:9]), (y[0], y[1:4], y[4:9])
    full_x, full_y = matrix(sx), matrix(sy)
    a = ax * ay * 2.0 + (dot(sx, sy) * 2.0 - dot(ux, uy) * 4.0) * (1 / 3)
    u = [(ax * uy[k] + ay * ux[k]) * 2.0 - dot(full_x[k], uy) - dot(full_y[k], ux) for k in range(3)]
    columns = list(zip(*full_y, strict=True))
    product = [[dot(full_x[i], columns[j]) + ux[i] * uy[j] for j in range(3)] for i in range(3)]
    s = [(p + ax * q + ay * r) * 2.0 for p, q, r in zip(components(product), sy, sx, strict=True)]
    return [a, *u, *s]


def dot(x: Sequence[Any], y: Sequence[Any]) -> Any:
    products = [p * q for p, q in zip(x, y, strict=True)]
    return sum(products[1:], products[0])


R2, R6 = 1 / math.sqrt(2), 1 / math.sqrt(6)


def matrix(s: Sequence[Any]) -> list[list[Any]]:
    """The symmetric, traceless matrix with five components in an orthonormal basis."""
    xy, yz, xz = s[0] * R2, s[1] * R2, s[2] * R2
    xx_yy, rest = s[3] * R2, s[4] * R6
    return [[xx_yy - rest, xy, xz], [xy, -xx_yy - rest, yz], [xz, yz, rest * 2.0]]


def components(m: Sequence[Sequence[Any]]) -> list[Any]:
    """The same components of the symmetric, traceless part of any matrix."""
    off_diagonal = [(m[i][j] + m[j][i]) * R2 for i, j in ((0, 1), (1, 2), (0, 2))]
    return [*off_diagonal, (m[0][0] - m[1][1]) * R2, (m[2][2] * 2.0 - m[0][0] - m[1][1]) * R6]


TENSOR = (1, 3, 5)
EMBEDDING = EdgeFormula(_embedding, TENSOR, filters=3, senders=(1,), receivers=(1,))
MESSAGE = EdgeFormula(_message, TENSOR, filters=3, senders=TENSOR)
NORMS = AtomFormula(norms, TENSOR, outputs=(3,))
NORM2 = AtomFormula(lambda x: [norm2(x)], TENSOR, outputs=(1,))
NORMALISE = AtomFormula(normalised, TENSOR, TENSOR)
GATE = AtomFormula(lambda x: scaled(x, *x[9:]), (*TENSOR, 3), TENSOR)
PRODUCT = AtomFormula(_product, (*TENSOR, *TENSOR), TENSOR)
UPDATE = AtomFormula(_update, (*TENSOR, *TENSOR), TENSOR)

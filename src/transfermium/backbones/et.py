"""ET: the equivariant transformer of TorchMD-Net (Thölke and De Fabritiis, arXiv:2202.02541)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..graph import AtomGraph, Cutoff
from ..messages import AtomFormula, EdgeFormula, Neighborhood, Radii, head_total, sigmoid
from ..nn import ExpNormal, NodeInputs, VectorInputs, plus
from .base import Backbone, Features


class ET(Backbone):
    """Scalars and vectors on atoms, exchanged by attention whose keys and values depend on distance.

    `ET(128, depth=8, cutoff=8.0)` is the size used for derivative-based pre-training (doi 10.1039/d3dd00214d): 1.66
    million parameters here, where the 0.1 million that have no effect in the first block are left out. Ours differs
    where the energy must be smooth: values as well as weights of the attention fall to zero at the cutoff, and an atom
    does not attend to itself (its features are added anyway). Vectors are normalised at the end by a length that stays
    finite where there is none.

    Args:
        width: channels of scalars and of vectors.
        depth: number of attention blocks.
        heads: of the attention; `width` must be a multiple of it.
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
        depth: int = 4,
        heads: int = 8,
        cutoff: float = 5.0,
        radial: int = 50,
        elements: int = 100,
        inputs: Sequence[str] = (),
        vector_inputs: Sequence[str] = (),
    ):
        super().__init__()
        if depth < 1:
            raise InputError(f"a depth of {depth} leaves nothing that passes messages: choose 1 or more")
        if heads < 1:
            raise InputError(f"{heads} heads attend to nothing: choose 1 or more")
        if width % heads:
            raise InputError(f"a width of {width} cannot be divided among {heads} heads: choose a multiple of {heads}")
        self.width = width
        self.depth = depth
        self.heads = heads
        self.cutoff = cutoff
        self.radial = radial
        self.elements = elements
        self.inputs = tuple(inputs)
        self.vector_inputs = tuple(vector_inputs)
        self.edges = Cutoff(cutoff)

        self.node_inputs = NodeInputs(width, elements, inputs)
        self.told = VectorInputs(width, vector_inputs)
        self.basis = ExpNormal(radial, cutoff)
        self.neighbors = Neighbors(width, radial, elements, inputs)
        self.attention = nn.ModuleList([Attention(width, radial, heads, first=k == 0) for k in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.vector_scale = nn.Parameter(torch.ones(width))

    def forward(self, graph: AtomGraph) -> Features:
        edges = Neighborhood(graph, self.edges, self.basis)
        told, vectors = self.told(graph)
        x = self.neighbors(plus(self.node_inputs(graph), told), graph, edges)
        v: Tensor | None = None  # (n_atoms, 3, width) after the first block, when those that it is told join
        for block in self.attention:
            dx, dv = block(x, v, edges)
            x, v = x + dx, plus(dv, vectors if v is None else v)
        assert v is not None
        length2 = v.square().sum(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        return Features(self.norm(x), self.vector_scale * v / torch.sqrt(length2 + 1e-2))


class Neighbors(nn.Module):
    """Who the atom is, and who its neighbours are (Eq. 3)."""

    def __init__(self, width: int, radial: int, elements: int, inputs: Sequence[str]):
        super().__init__()
        self.node_inputs = NodeInputs(width, elements, inputs)
        self.filter = nn.Linear(radial, width)
        self.combine = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, graph: AtomGraph, edges: Neighborhood) -> Tensor:
        (sums,) = edges.sum(NEIGHBORS, self.filters, senders=[self.node_inputs(graph).unsqueeze(1)])
        return self.combine(torch.cat([x, sums.squeeze(1)], dim=1))

    def filters(self, at: Radii) -> Tensor:
        return self.filter(at.basis) * at.envelope


class Attention(nn.Module):
    """Attention over neighbours, and an update of scalars by vectors (Fig. 1, Eqs. 4-12)."""

    def __init__(self, width: int, radial: int, heads: int, first: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, 3 * width)
        self.filter = nn.Linear(radial, 4 * width)  # of the key (one) and the value (three)
        self.vectors = None if first else nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width if first else 3 * width)
        self.heads = heads

    def forward(self, x: Tensor, v: Tensor | None, edges: Neighborhood) -> tuple[Tensor, ...]:
        x = self.norm(x)
        query, key = self.query(x).unsqueeze(1), self.key(x).unsqueeze(1)
        value = self.value(x).unflatten(1, (3, -1))
        formula = attention_formulas(self.heads)[0 if v is None else 1]
        senders = [key, value] if v is None else [key, value, v]
        scalars, sums = edges.sum(formula, self.filters, senders, receivers=[query])
        if v is None or self.vectors is None:
            return self.output(scalars.squeeze(1)), sums
        o = self.output(scalars.squeeze(1)).unflatten(1, (3, -1))
        mixed = self.vectors(v).unflatten(2, (3, -1)).flatten(1, 2)  # three vectors: their x, their y, their z
        dx, dv = UPDATE(o, mixed, sums)
        return dx.squeeze(1), dv

    def filters(self, at: Radii) -> Tensor:
        """The key's, which with its envelope is that of the attention's weights, and the value's three."""
        key, value = F.silu(self.filter(at.basis)).split([self.query.out_features, 3 * self.query.out_features], dim=1)
        return torch.cat([key * at.envelope, value * at.envelope], dim=1)


def attention_formulas(heads: int) -> tuple[EdgeFormula, EdgeFormula]:
    """Of the first block, when no atom has a vector yet, and of the others; made once for each number of heads."""
    if heads not in _formulas:

        def first(sender: Any, receiver: Any, filters: Any, direction: Any, length: Any) -> list[Any]:
            product = head_total(receiver[0] * sender[0] * filters[0], heads)
            scalar, _, along_bond = (s * f for s, f in zip(sender[1:4], filters[1:], strict=True))
            return [scalar * product * sigmoid(product), *(along_bond * u for u in direction)]

        def later(sender: Any, receiver: Any, filters: Any, direction: Any, length: Any) -> list[Any]:
            product = head_total(receiver[0] * sender[0] * filters[0], heads)
            scalar, along_vector, along_bond = (s * f for s, f in zip(sender[1:4], filters[1:], strict=True))
            vectors = (along_vector * v + along_bond * u for v, u in zip(sender[4:], direction, strict=True))
            return [scalar * product * sigmoid(product), *vectors]

        _formulas[heads] = (
            EdgeFormula(first, outputs=(1, 3), filters=4, senders=(1, 3), receivers=(1,)),
            EdgeFormula(later, outputs=(1, 3), filters=4, senders=(1, 3, 3), receivers=(1,)),
        )
    return _formulas[heads]


def _update(x: Sequence[Any]) -> list[Any]:
    (o1, o2, o3), v1, v2, v3, sums = x[:3], x[3:12:3], x[4:12:3], x[5:12:3], x[12:]
    product = v1[0] * v2[0] + v1[1] * v2[1] + v1[2] * v2[2]
    return [product * o2 + o3, *(a * o1 + b for a, b in zip(v3, sums, strict=True))]


_formulas: dict[int, tuple[EdgeFormula, EdgeFormula]] = {}
NEIGHBORS = EdgeFormula(
    lambda sender, receiver, filters, direction, length: [sender[0] * filters[0]],
    outputs=(1,),
    filters=1,
    senders=(1,),
)
UPDATE = AtomFormula(_update, inputs=(3, 9, 3), outputs=(1, 3))

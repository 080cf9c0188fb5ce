"""PaiNN: polarisable atom interaction network (Schütt, Unke, Gastegger, arXiv:2102.03150)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graph import AtomGraph, Cutoff
from ..messages import AtomFormula, EdgeFormula, Neighborhood, Radii, sqrt
from ..nn import Bessel, NodeInputs, VectorInputs, mlp, plus
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
        vector_inputs: names of vectors per atom that the model may be told, such as forces.
    """

    laws: ClassVar[frozenset[str]] = Backbone.laws | {"vectors"}

    edges: Cutoff

    def __init__(
        self,
        width: int = 64,
        depth: int = 3,
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
        self.told = VectorInputs(width, vector_inputs)
        self.basis = Bessel(radial, cutoff)
        self.messages = nn.ModuleList([Message(width, radial) for _ in range(depth)])
        self.updates = nn.ModuleList([Update(width) for _ in range(depth)])

    def forward(self, graph: AtomGraph) -> Features:
        edges = Neighborhood(graph, self.edges, self.basis)
        told, v = self.told(graph)  # v: (n_atoms, 3, width), or None until the first message
        s = plus(self.node_inputs(graph), told).unsqueeze(1)  # (n_atoms, 1, width)
        for message, update in zip(self.messages, self.updates, strict=True):
            ds, dv = message(s, v, edges)
            s, v = s + ds, plus(dv, v)
            s, v = update(s, v)
        return Features(s.squeeze(1), v)


class Message(nn.Module):
    """Filtered neighbours, along the bond and along their own vectors (Fig. 2b)."""

    def __init__(self, width: int, radial: int):
        super().__init__()
        self.phi = mlp(width, width, 3 * width)
        self.filter = nn.Linear(radial + 1, 3 * width, bias=False)

    def forward(self, s: Tensor, v: Tensor | None, edges: Neighborhood) -> tuple[Tensor, ...]:
        phi = self.phi(s.squeeze(1)).unflatten(1, (3, -1))
        if v is None:
            return edges.sum(FIRST_MESSAGE, self.filters, senders=[phi])
        return edges.sum(MESSAGE, self.filters, senders=[phi, v])

    def filters(self, at: Radii) -> Tensor:
        """Linear in the basis, with a bias, all times the envelope."""
        weight, bias = self.filter.weight[:, :-1], self.filter.weight[:, -1]
        return F.linear(at.basis, weight, bias) * at.envelope


class Update(nn.Module):
    """Scalars and vectors of one atom, mixed (Fig. 2c)."""

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Linear(width, 2 * width, bias=False)  # U and V, on channels, never on xyz
        self.a = mlp(2 * width, width, 3 * width)

    def forward(self, s: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        mixed = self.mix(v).unflatten(2, (2, -1)).flatten(1, 2)  # U and V of x, of y, of z
        norm, product = NORM_AND_PRODUCT(mixed)
        a = self.a(torch.cat([s, norm], dim=2).squeeze(1)).unflatten(1, (3, -1))
        return UPDATE(s, v, mixed, product, a)


def _message(sender: Any, receiver: Any, filters: Any, direction: Any, length: Any) -> list[Any]:
    scalar, along_bond, along_vector = (x * f for x, f in zip(sender[:3], filters, strict=True))
    vector = sender[3:]
    return [scalar, *(along_bond * u + along_vector * v for u, v in zip(direction, vector, strict=True))]


def _first_message(sender: Any, receiver: Any, filters: Any, direction: Any, length: Any) -> list[Any]:
    return [sender[0] * filters[0], *(sender[1] * filters[1] * u for u in direction)]


def _norm_and_product(mixed: Sequence[Any]) -> list[Any]:
    u, w = mixed[::2], mixed[1::2]
    norm2 = w[0] * w[0] + w[1] * w[1] + w[2] * w[2]
    return [sqrt(norm2 + 1e-8), u[0] * w[0] + u[1] * w[1] + u[2] * w[2]]  # finite derivatives where there is no vector


def _update(x: Sequence[Any]) -> list[Any]:
    s, v, u, product, (a_vv, a_sv, a_ss) = x[0], x[1:4], x[4:10:2], x[10], x[11:]
    return [s + a_ss + a_sv * product, *(one + a_vv * other for one, other in zip(v, u, strict=True))]


MESSAGE = EdgeFormula(_message, outputs=(1, 3), filters=3, senders=(3, 3))
FIRST_MESSAGE = EdgeFormula(_first_message, outputs=(1, 3), filters=3, senders=(3,))  # when no atom has a vector yet
NORM_AND_PRODUCT = AtomFormula(_norm_and_product, inputs=(6,), outputs=(1, 1))
UPDATE = AtomFormula(_update, inputs=(1, 3, 6, 1, 3), outputs=(1, 3))

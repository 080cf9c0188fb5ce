"""What every backbone promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from ..graph import AtomGraph, Cutoff, Shells


class Edges(NamedTuple):
    """Geometry of the edges, for heads that look at bonds."""

    lengths: Tensor  # (n_edges,), Å
    directions: Tensor  # (n_edges, 3), unit vectors from receiver to sender
    weights: Tensor  # (n_edges,), the envelope: zero at the cutoff


class Features(NamedTuple):
    """What a backbone knows of each atom."""

    scalars: Tensor  # (n_atoms, width), unchanged when the structure turns, if that is a law of the backbone
    vectors: Tensor | None = None  # (n_atoms, 3, width), turning with the structure
    edges: Edges | None = None  # filled in by the model for heads that need it
    layers: dict[str, Tensor] | None = None  # likewise: each layer's invariants, (n_atoms, some width)


class Backbone(nn.Module):
    """An architecture: `AtomGraph` to `Features`.

    A subclass sets `width` (of its features), `edges` (how its graph is built) and keeps every constructor argument
    as an attribute of the same name. `laws` names what `transfermium.testing.check_backbone` holds it to; a backbone
    that returns vectors adds "vectors". One that does not name "rotation" is trained on turned structures, and vectors
    are decoded from its scalars.
    """

    laws: ClassVar[frozenset[str]] = frozenset({"rotation", "reflection", "smooth", "derivatives"})

    atom_blocks: ClassVar[Sequence[str] | None] = None  # lists of blocks that give a row per atom; None: all lists

    width: int
    edges: Cutoff | Shells

    def forward(self, graph: AtomGraph) -> Features:
        raise NotImplementedError

    def __call__(self, graph: AtomGraph) -> Features:
        return super().__call__(graph)

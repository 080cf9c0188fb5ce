"""Blocks that at least two backbones or heads share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .errors import InputError
from .graph import AtomGraph

LAST_ELEMENT = 118
FLAGS = frozenset({"masked"})  # inputs that are zero where a graph has none, as for a structure that is whole


def mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with SiLU between them and none after the last."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=bias), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def plus(x: Tensor, more: Tensor | None) -> Tensor:
    """The sum, where there is something to add."""
    return x if more is None else x + more


def weighted_mean(values: Tensor, scores: Tensor, index: Tensor, n: int, prior: Tensor | None = None) -> Tensor:
    """Attention: the mean of the rows that share an index, weighted by exp(scores) and `prior`, (n, ...).

    Scores are bounded to ±10, so that no weight overflows; an index without rows has a mean of zero.
    """
    weights = torch.exp(10 * torch.tanh(scores / 10))
    if prior is not None:
        weights = weights * prior

    def total(rows: Tensor) -> Tensor:
        return rows.new_zeros((n, *rows.shape[1:])).index_add(0, index, rows)

    return total(values * weights) / total(weights).clamp(min=1e-12)


class NodeInputs(nn.Module):
    """Who each atom is: its element, plus named inputs of the graph that start without any effect.

    Args:
        width: length of the result per atom.
        elements: highest atomic number that can be told apart.
        inputs: names of scalar inputs in `AtomGraph.inputs`; their weights start at zero, so that a model that
            gains an input is at first the model it was. A graph has all of them, except that `FLAGS` may be absent.
    """

    def __init__(self, width: int, elements: int = LAST_ELEMENT, inputs: Sequence[str] = ()):
        super().__init__()
        self.elements = elements
        for name, value in (("width", width), ("elements", elements)):
            if value < 1:
                raise InputError(f"{name} is {value}, but must be at least one")
        self.element = nn.Embedding(elements + 1, width)  # row 0 is the dummy atom X
        self.inputs = nn.ModuleDict({name: nn.Linear(1, width, bias=False) for name in inputs})
        for weight in self.inputs.parameters():
            nn.init.zeros_(weight)

    def forward(self, graph: AtomGraph) -> Tensor:
        """Element and inputs of each atom as one vector: (n_atoms, width)."""
        self._check(graph.atomic_numbers)
        result = self.element(graph.atomic_numbers)
        for name, linear in self.inputs.items():
            if name in FLAGS and name not in graph.inputs:
                continue
            if name not in graph.inputs:
                raise InputError(f"this model has to be told '{name}' beside the structure: give it, or choose a part")
            result = result + linear(graph.inputs[name])
        return result

    @torch.no_grad()
    def fix(self, values: Mapping[str, float]) -> None:
        """Make constants of inputs, in place: what they add to every atom becomes part of each element."""
        for name, value in values.items():
            if name in self.inputs:
                weight: Tensor = self.inputs.pop(name).weight  # type: ignore[assignment]
                self.element.weight += value * weight.squeeze(1)

    def _check(self, numbers: Tensor) -> None:
        advice = f"build the backbone with elements={LAST_ELEMENT}"
        if numbers.is_cuda:  # without waiting for the device
            torch._assert_async((numbers <= self.elements).all(), f"an element is beyond this model's table: {advice}")
        elif len(numbers) and (highest := int(numbers.max())) > self.elements:
            raise InputError(f"element {highest} is beyond this model's table of {self.elements} elements: {advice}")


class VectorInputs(nn.Module):
    """Named vectors of the graph, such as forces that a model is told: their lengths as scalars, and the vectors.

    They start without any effect, and have none where they are zero or not given, so that a model that was told forces
    in pre-training can do without later.

    Args:
        width: channels of scalars and of vectors.
        names: of the vectors in `AtomGraph.inputs`, (n_atoms, 3) each.
        directed: for backbones that have vectors; others see lengths only.
        components: for backbones that obey no rotation: they see components as well, as scalars.
    """

    def __init__(self, width: int, names: Sequence[str] = (), directed: bool = True, components: bool = False):
        super().__init__()
        self.components = components
        numbers = 8 if components else 2
        self.lengths = nn.ModuleDict({name: nn.Linear(numbers, width, bias=False) for name in names})
        vectors = names if directed and not components else ()
        self.directions = nn.ModuleDict({name: nn.Linear(2, width, bias=False) for name in vectors})
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, graph: AtomGraph) -> tuple[Tensor | None, Tensor | None]:
        """Scalars (n_atoms, width) and vectors (n_atoms, 3, width); None where the graph has none of them."""
        scalars: Tensor | None = None
        vectors: Tensor | None = None
        for name in self.lengths:
            if name in graph.inputs:
                vector = graph.inputs[name]
                length2 = vector.square().sum(dim=1, keepdim=True)
                size = torch.cat([length2 / (1 + length2), torch.log1p(length2)], dim=1)  # forces span some decades
                bounded = torch.cat([torch.ones_like(length2), size[:, 1:]], dim=1) * torch.rsqrt(1 + length2)
                if self.components:
                    size = torch.cat([size, vector * bounded[:, :1], vector * bounded[:, 1:]], dim=1)
                scalars = plus(self.lengths[name](size), scalars)
                if name in self.directions:
                    vectors = plus(vector.unsqueeze(2) * self.directions[name](bounded).unsqueeze(1), vectors)
        return scalars, vectors


class Gaussians(nn.Module):
    """Lengths smeared over Gaussians evenly spaced on [0, cutoff]: (n_edges,) to (n_edges, n)."""

    centers: Tensor

    def __init__(self, n: int, cutoff: float):
        super().__init__()
        _at_least_one(n)
        self.register_buffer("centers", torch.linspace(0, cutoff, n), persistent=False)
        self.gamma = 0.5 * ((n - 1) / cutoff) ** 2

    def forward(self, lengths: Tensor) -> Tensor:
        return torch.exp(-self.gamma * (lengths.unsqueeze(1) - self.centers) ** 2)


class Bessel(nn.Module):
    """Spherical Bessel functions of order zero, sin(nπr/r_c)/r: (n_edges,) to (n_edges, n) (arXiv:2003.03123)."""

    frequencies: Tensor

    def __init__(self, n: int, cutoff: float):
        super().__init__()
        _at_least_one(n)
        self.register_buffer("frequencies", torch.arange(1, n + 1) * math.pi / cutoff, persistent=False)
        self.scale = math.sqrt(2 / cutoff)

    def forward(self, lengths: Tensor) -> Tensor:
        r = lengths.unsqueeze(1)
        return self.scale * torch.sin(self.frequencies * r) / r


class ExpNormal(nn.Module):
    """Gaussians of exp(-r) with trainable centres and widths (PhysNet's): (n_edges,) to (n_edges, n)."""

    def __init__(self, n: int, cutoff: float):
        super().__init__()
        _at_least_one(n)
        self.rate = 5.0 / cutoff
        start = math.exp(-cutoff * self.rate)
        self.centers = nn.Parameter(torch.linspace(start, 1, n))
        self.betas = nn.Parameter(torch.full((n,), (2 / n * (1 - start)) ** -2))

    def forward(self, lengths: Tensor) -> Tensor:
        return torch.exp(-self.betas * (torch.exp(-self.rate * lengths.unsqueeze(1)) - self.centers) ** 2)


def _at_least_one(n: int) -> None:
    if n < 1:
        raise InputError(f"a basis of {n} functions says nothing of a distance: choose 1 or more")


def lengths_and_directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (n_edges,) and unit vectors (n_edges, 3)."""
    lengths = torch.linalg.vector_norm(vectors, dim=1)
    return lengths, vectors / lengths.unsqueeze(1)

"""Gradients of a loss of energies, forces and stress with respect to the weights, by four routes.

Forces are derivatives already, so the plain way differentiates twice. But only a number is wanted of that second
derivative: with v = ∂loss/∂forces and w = ∂loss/∂stress, the gradient of the loss is the change of dE/dθ along -v (and
along the strain w / V), which forward differentiation or a difference find without a second-order graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.proxy_tensor import make_fx

from transfermium import Model, Objective
from transfermium.graph import AtomGraph, Batch
from transfermium.messages import reference

Loss = Callable[[Mapping[str, Tensor], Batch], Tensor]
Gradients = dict[str, Tensor]
STEP = 2e-3  # Å, RMS displacement of the difference: less is rounded away in float32, more is no derivative


def gradient_by_double_backward(model: Model, batch: Batch, loss: Loss) -> tuple[Tensor, Gradients]:
    """Differentiate the derivatives: exact; with kernels, or in plain torch inside `reference()`."""
    model.train()
    value = loss(model(batch.graph, batch.targets), batch)
    return value.detach(), _gradients(model, value)


def gradient_by_compiled_double_backward(
    model: Model, batch: Batch, loss: Loss, compiler: Callable[..., Any] = torch.compile
) -> tuple[Tensor, Gradients]:
    """Differentiate a graph of energies and forces, traced once and then compiled; in plain torch."""
    model.train()
    graph = batch.graph.to("cpu", next(model.parameters()).dtype)
    node_inputs: Any = model.backbone.node_inputs
    embedded = node_inputs(graph)  # outside: its look at the largest element cannot be traced
    weights = dict(model.named_parameters())
    names = tuple(batch.targets)
    key = (names, graph.n_systems == 1)  # a size of one is never a symbol
    kept = _compiled.setdefault(model, {})
    # Or three structures are taken for the three directions of space.
    with fx_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        if key not in kept:
            traced = _traced(model, names, weights, embedded.detach().requires_grad_(), graph)
            kept[key] = compiler(traced, dynamic=True)
        outputs = kept[key](weights, embedded, graph)
    value = loss(dict(zip(names, outputs, strict=True)), batch)
    return value.detach(), _gradients(model, value)


def gradient_by_jvp(model: Model, batch: Batch, loss: Loss) -> tuple[Tensor, Gradients]:
    """Differentiate dE/dθ forward along the direction: exact, without a second-order graph; in plain torch."""
    along = direction(model, batch, loss)
    positions, cell = along.displacement(batch.graph)
    with reference(), forward_ad.dual_level(), mock.patch("torch.nn.functional.silu", _silu):
        moving = batch.graph._replace(
            positions=forward_ad.make_dual(batch.graph.positions, positions),
            cell=forward_ad.make_dual(batch.graph.cell, cell),
        )
        energy = model(moving, ["energy"])["energy"]
        weights = forward_ad.make_dual(torch.ones_like(along.energy), along.energy)
        gradients = _gradients(model, (weights * energy).sum())
        tangents = {name: forward_ad.unpack_dual(g).tangent for name, g in gradients.items()}
    return along.loss, {name: torch.zeros_like(gradients[name]) if t is None else t for name, t in tangents.items()}


def gradient_by_difference(model: Model, batch: Batch, loss: Loss, step: float = STEP) -> tuple[Tensor, Gradients]:
    """Subtract dE/dθ of structures moved forth and back along the direction: first-order kernels suffice.

    Each structure moves by `step` (Å): the root mean square of its displacements, plus its strain times the cutoff.
    """
    along = direction(model, batch, loss)
    graph = batch.graph
    positions, cell = along.displacement(graph)
    size = along.size(graph, model.backbone.edges.radius)
    scale = step / size.clamp(min=torch.finfo(size.dtype).tiny)
    positions, cell = positions * scale.index_select(0, graph.system_idx).unsqueeze(1), cell * scale.view(-1, 1, 1)
    sides = []
    for sign in (1, -1):
        moved = graph._replace(positions=graph.positions + sign * positions, cell=graph.cell + sign * cell)
        energy = model(moved, ["energy"])["energy"]
        sides.append(_gradients(model, ((sign * size / step + along.energy) * energy).sum() / 2))
    return along.loss, {name: g + sides[1][name] for name, g in sides[0].items()}


class Direction(NamedTuple):
    """In which energies are to be differentiated, and with which weights they count themselves."""

    loss: Tensor
    energy: Tensor  # (n_systems,), ∂loss/∂energy
    positions: Tensor  # (n_atoms, 3)
    strain: Tensor  # (n_systems, 3, 3), symmetric

    def displacement(self, graph: AtomGraph) -> tuple[Tensor, Tensor]:
        """How positions and cells move."""
        strained = graph.positions.unsqueeze(1) @ self.strain.index_select(0, graph.system_idx)
        return self.positions + strained.squeeze(1), graph.cell @ self.strain

    def size(self, graph: AtomGraph, cutoff: float) -> Tensor:
        """How far neighbours move relative to each other, about: (n_systems,)."""
        mean_square = graph.sum_over_systems(self.positions.square().sum(1)) / graph.atoms_per_system().clamp(min=1)
        return mean_square.sqrt() + cutoff * torch.linalg.matrix_norm(self.strain)


def direction(model: Model, batch: Batch, loss: Loss) -> Direction:
    """The direction of a loss, from energies and first derivatives; leaves the model in training mode."""
    model.eval()
    outputs = {name: value.requires_grad_() for name, value in model(batch.graph, batch.targets).items()}
    model.train()
    value = loss(outputs, batch)
    pulls = torch.autograd.grad(value, list(outputs.values()), materialize_grads=True)
    pull = dict(zip(outputs, pulls, strict=True))
    graph = batch.graph
    energy, positions, strain = graph.cell.new_zeros(graph.n_systems), -graph.positions * 0, graph.cell * 0
    if "energy" in pull:
        energy = pull["energy"]
    if "forces" in pull:
        positions = -pull["forces"].to(positions)
    if "stress" in pull:
        volume = torch.linalg.det(graph.cell).abs().view(-1, 1, 1)
        symmetric = (pull["stress"] + pull["stress"].mT).to(strain) / 2
        strain = torch.where(volume > 0, symmetric / volume, 0.0)
    return Direction(value.detach(), energy, positions, strain)


def mean_loss(objective: Objective) -> Loss:
    """The loss that training minimises: the mean error of each term that has labels, added up."""

    def loss(outputs: Mapping[str, Tensor], batch: Batch) -> Tensor:
        terms = objective.loss(outputs, batch)
        return torch.stack([total / count for total, count in terms.values() if count]).sum()

    return loss


def relative_error(gradients: Gradients, exact: Gradients) -> float:
    """Of the whole gradient, as one vector."""
    difference = sum(float((gradients[name].double() - g.double()).square().sum()) for name, g in exact.items())
    return (difference / sum(float(g.double().square().sum()) for g in exact.values())) ** 0.5


_compiled: WeakKeyDictionary[Model, dict[Any, Callable[..., tuple[Tensor, ...]]]] = WeakKeyDictionary()


def _traced(model: Model, names: tuple[str, ...], *arguments: object) -> torch.fx.GraphModule:
    """Outputs as one graph of elementary operations, first derivatives included, for sizes of any value."""

    def outputs(weights: dict[str, Tensor], embedded: Tensor, graph: AtomGraph) -> tuple[Tensor, ...]:
        with mock.patch.object(model.backbone.node_inputs, "forward", lambda graph: embedded):
            found = torch.func.functional_call(model, weights, (graph, names))
        return tuple(found[name] for name in names)

    # len(x) must be an integer and would fix the number of atoms; backbones only ask it whether there is anything
    any_rows = mock.patch.object(Tensor, "__len__", lambda x: x.shape[0] if isinstance(x.shape[0], int) else 1)
    with reference(), any_rows:
        traced = make_fx(outputs, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*arguments)
    # What autograd had saved comes out detached. That would silently cut parts of the second derivative off.
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        traced.graph.erase_node(node)
    traced.recompile()
    return traced


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    """In two operations, because the derivative of torch's own cannot be differentiated forward."""
    return x * x.sigmoid()


def _gradients(model: Model, value: Tensor) -> Gradients:
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
    return dict(zip(weights, gradients, strict=True))

"""How far forces are from being the derivative of any energy."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import ase
import numpy as np
import torch
from torch import Tensor

from .data.load import VALIDATION, rng_of
from .errors import InputError
from .graph import AtomGraph, Neighbors, Sample, to_batch
from .heads import Head
from .model import Gradient, Model
from .objectives import Objective

STEP = 1e-4  # Å along a probe of unit components; in double precision differences are then right to seven digits
EXACT = 10  # atoms
RANDOM = 60  # atoms that are moved in all, by two probes at least: the larger a structure, the more one of them tells


def jacobian_asymmetry(
    model: Model,
    structures: Sequence[ase.Atoms],
    objective: Objective | None = None,
    *,
    most: int = 3,
    probes: int | None = None,
    seed: int = 0,
) -> float:
    """The part of the forces' Jacobian J = dF/dx that is not symmetric, ‖J - Jᵀ‖ / 2‖J‖ (Frobenius), between 0 and 1.

    This is λ of Bigi, Langer and Ceriotti (arXiv:2412.11569). The Jacobian of forces that are a derivative is a matrix
    of second derivatives, so what is found there is rounding; direct forces have more, and heat up in NVE.

    J v is a central difference and Jᵀ v a backward pass, both in double precision, for probes v: all unit vectors where
    `probes` are enough, which is exact, else as many random ones, with which the squares of both norms are right on
    average. Structures count by these squares.

    Args:
        objective: shows the structures to the model as in its validation; by default they are seen as they are.
        most: structures at most, evenly spaced among those that are given.
        probes: of each structure; by default all of up to 10 atoms, fewer of more atoms, two from 30 atoms on.

    Returns:
        NaN where no force depends on any position.

    Raises:
        InputError: when the model has no forces.
    """
    if "forces" not in model.outputs:
        raise InputError("this model has no forces: train it with the Potential objective")
    model = copy.deepcopy(model).double().train()
    chosen = np.unique(np.linspace(0, len(structures) - 1, min(most, len(structures))).astype(int))
    different = whole = 0.0
    for index in map(int, chosen):
        rng = rng_of(seed, VALIDATION, 0, index)
        atoms = structures[index]
        sample = Sample(atoms, {}) if objective is None else objective.prepare(atoms, rng)
        neighbors = model.backbone.edges.neighbors(sample.atoms)
        directions, weight = _directions(len(sample.atoms), probes, rng)
        for v in directions:
            forward, backward = _forward(model, sample, neighbors, v), _backward(model, sample, neighbors, v)
            different += weight * float((forward - backward).square().sum())
            whole += weight * float(forward.square().sum() + backward.square().sum()) / 2
    return float(np.sqrt(different / whole) / 2) if whole > 0 else float("nan")


def direct_forces(model: Model) -> bool:
    """Whether the model has forces that are an output of their own, which nothing keeps from creating energy."""
    meaning = model.card.get("quantities", {}).get("forces", ["forces"])[0]
    return isinstance(model.outputs.get("forces"), Head) and meaning == "forces"


def _directions(n_atoms: int, probes: int | None, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Probes (n, n_atoms, 3), and the weight with which |A v|² of all of them is ‖A‖²."""
    if probes is None:
        probes = 3 * n_atoms if n_atoms <= EXACT else max(2, RANDOM // n_atoms)
    if 3 * n_atoms <= probes:
        return np.eye(3 * n_atoms).reshape(-1, n_atoms, 3), 1.0
    return rng.choice([-1.0, 1.0], size=(probes, n_atoms, 3)), 1 / probes


def _forward(model: Model, sample: Sample, neighbors: Neighbors, v: np.ndarray) -> Tensor:
    """J v: (n_atoms, 3)."""

    def forces(step: float) -> Tensor:
        atoms = sample.atoms.copy()
        atoms.positions += step * v
        graph = to_batch([Sample(atoms, {}, sample.inputs)], model.backbone.edges, [neighbors]).graph
        with torch.no_grad():  # which forces that are a derivative turn on again
            return model(graph, ["forces"])["forces"].detach()

    return (forces(STEP) - forces(-STEP)) / (2 * STEP)


def _backward(model: Model, sample: Sample, neighbors: Neighbors, v: np.ndarray) -> Tensor:
    """Jᵀ v: (n_atoms, 3)."""
    graph = to_batch([sample._replace(targets={})], model.backbone.edges, [neighbors]).graph
    graph = graph.to(next(model.parameters()).device)
    graph = graph._replace(positions=graph.positions.requires_grad_())
    with torch.enable_grad():
        pushed = (_differentiable_forces(model, graph) * torch.as_tensor(v, device=graph.positions.device)).sum()
    if not pushed.requires_grad:
        return torch.zeros_like(graph.positions)
    (gradient,) = torch.autograd.grad(pushed, graph.positions, materialize_grads=True)
    return gradient


def _differentiable_forces(model: Model, graph: AtomGraph) -> Tensor:
    output = model.outputs["forces"]
    if not isinstance(output, Gradient):
        return model(graph, ["forces"])["forces"]
    energy = model(graph, [output.of])[output.of].sum()
    return -torch.autograd.grad(energy, graph.positions, create_graph=True, materialize_grads=True)[0]

"""Probes of potentials: a linear correction of the energy, fitted to energies, forces and stress in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ase
import numpy as np
import torch
from torch import Tensor, nn

from .align import align_references
from .backbones.base import Features
from .console import track
from .data.split import materials
from .errors import InputError
from .evaluate import parts
from .features import features, layers_of
from .graph import AtomGraph, Sample, is_isolated_atom, to_batch
from .heads import EnergyHead
from .model import Gradient, Model, Strain, differentiable, per_volume
from .objectives import Potential

MOST_DIRECTIONS = 128  # of the features: each is one backward pass over the structures
MOST_ATOMS = 2_000  # whose forces are fitted, and their structures' stress: a hundred numbers need no more
FOLDS = 10  # at most, each left out once
PENALTIES = np.logspace(-7, 2, 19)  # relative to the mean square of what a direction does
ANCHOR = 1e-4  # penalty of the references, which move with the correction
UNITS = {"energy": "eV/atom", "forces": "eV/Å", "stress": "eV/Å^3"}


class EnergyProbeHead(EnergyHead):
    """An energy (eV) with a correction that is linear in the invariants of all layers of each atom.

    Forces and stress are its derivatives, as those of any energy.

    Args:
        width: of the backbone.
        features: numbers per atom, of all layers together.
    """

    needs = frozenset({"layers"})
    correction: Tensor

    def __init__(self, width: int, features: int):
        super().__init__(width)
        self.features = features
        self.register_buffer("correction", torch.zeros(features, dtype=torch.float64))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        assert features.layers is not None
        added = _joined(features.layers) @ self.correction
        return super().forward(features, graph) + graph.sum_over_systems(added)


def probed_energy(
    model: Model,
    objective: Potential,
    samples: Sequence[Sample],
    was: Mapping[str, Any],
    kept: Sequence[str],
    align: bool,
    edges: int,
    quiet: bool,
) -> tuple[Model, dict[str, Any]]:
    """The model with a probe on top of its energy, and how well that went.

    What is left of energies, forces and stress is linear in sums over atoms of their features, along principal
    directions of these, in derivatives of such sums, and in reference energies: a ridge regression, weighted as the
    objective weights errors. Its penalty is the one with the smallest errors on what is left out, a tenth at a time,
    materials whole; the base without a correction competes too.

    Args:
        model: with the outputs of the objective; an energy that is not among the `kept` heads begins with references.
        objective: with its weights settled.
        samples: of the structures to fit.
        was: quantities that the outputs meant before; see `align_references`.
        align: whether references are fitted, before and after.
        edges: most edges in a batch.

    Returns:
        The report of alignment from before to after, with what is said of the probe.

    Raises:
        InputError: for fewer than three structures, or atoms that all look alike.
    """
    fitted = [s for s in samples if not is_isolated_atom(s.atoms)]
    if len(fitted) < 3:
        raise InputError(f"a probe needs at least three structures with labels, but there are {len(fitted)}")
    before = _references(model).clone() if "energy" in kept else torch.zeros_like(_references(model))
    report = align_references(model, objective, samples, was, kept) if align and kept else {}
    after = _references(model).clone()
    head = _corrected(model, "energy" in kept, fitted[0])
    probe = Model(model.backbone, {**model.outputs, "energy": head}, model.card)
    probe.to(next(model.parameters()).device).eval()

    directions = _directions(probe, fitted, edges)
    elements = np.unique(np.concatenate([s.atoms.numbers for s in fitted])) if align else np.zeros(0, int)
    if align:  # or references would know the labels that are left out
        head.references.copy_(before)
    grams = _grams(probe, objective, fitted, directions, elements, edges, quiet)
    head.references.copy_(after)
    plain, best = _chosen(grams, directions.shape[1])
    weights = _solved(grams, directions.shape[1], best.penalty)[: directions.shape[1]]
    head.correction.copy_(torch.from_numpy(directions @ weights))
    found: dict[str, Any] = {
        "probe": "linear correction of the energy" if best is not plain else "no correction of the energy",
        "features": directions.shape[1],
        "errors of what is left out": {
            name: {"before": plain.errors[name], "after": best.errors[name], "unit": UNITS[name]} for name in grams
        },
    }
    if align:
        report = _both(report, align_references(probe, objective, samples, {}, ["energy"]))
    return probe, report | found


def _references(model: Model) -> Tensor:
    head = model.heads["energy"]
    assert isinstance(head, EnergyHead)
    return head.references


def _both(first: dict[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """One alignment after the other, as if it were one."""
    shifts = "reference shift (eV)"
    joined = {**then, **{name: found for name, found in first.items() if name not in then}}
    if shifts in first and shifts in then:
        joined[shifts] = {symbol: first[shifts][symbol] + shift for symbol, shift in then[shifts].items()}
    for name, found in first.get("residual", {}).items():
        joined["residual"][name] = {**then["residual"][name], "before": found["before"]}
    return joined


def _corrected(model: Model, kept: bool, sample: Sample) -> EnergyProbeHead:
    """A head that says what the energy of the model does; where the base had none, nothing beyond references."""
    old = model.heads["energy"]
    assert isinstance(old, EnergyHead)
    width = sum(x.shape[1] for x in layers_of(model, [sample.atoms]).values())
    head = EnergyProbeHead(old.width, width).to(next(old.parameters()).dtype)
    head.load_state_dict({**head.state_dict(), **old.state_dict()})
    if not kept:
        for parameter in head.readout[-1].parameters():
            nn.init.zeros_(parameter)
    return head


def _joined(layers: Mapping[str, Tensor]) -> Tensor:
    return torch.cat(list(layers.values()), dim=1).double()


def _directions(model: Model, samples: Sequence[Sample], edges: int) -> np.ndarray:
    """Principal directions of the features of atoms, (features, directions); the largest has a spread of one."""
    atoms = [samples[i].atoms for i in _some(samples)]
    device = str(next(model.parameters()).device)
    x = features(model, atoms, per_atom=True, edges=edges, device=device, verbose=False).values
    _, sizes, basis = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    n = min(int((sizes > 1e-6 * sizes[0]).sum()), MOST_DIRECTIONS) if sizes[0] > 1e-9 else 0
    if not n:
        raise InputError("all atoms look the same to this model: there is nothing to probe")
    return np.asarray(basis[:n].T / (sizes[0] / np.sqrt(len(x))))


def _some(samples: Sequence[Sample]) -> np.ndarray:
    """Samples that have `MOST_ATOMS` together, or all of them: always the same, and as if by chance."""
    order = np.random.default_rng(0).permutation(len(samples))
    before = np.cumsum([0, *(len(samples[i].atoms) for i in order[:-1])])
    return np.sort(order[before < MOST_ATOMS])


class Gram(NamedTuple):
    """Sums over equations of products of what is known: (folds, n, n), labels in the last row and column."""

    sums: np.ndarray
    counts: np.ndarray  # of equations, (folds,)
    weight: float  # of an error in the units of the quantity


def _grams(
    model: Model,
    objective: Potential,
    samples: Sequence[Sample],
    directions: np.ndarray,
    elements: np.ndarray,
    edges: int,
    quiet: bool,
) -> dict[str, Gram]:
    """All that a fit needs, of each quantity: of energies of all structures, of derivatives of some."""
    structures = [s.atoms for s in samples]
    folds = _folds(structures)
    n = directions.shape[1] + _unknown(elements) + 1
    weights = {name: weight for name, weight in objective.weights.items() if weight}
    grams = {
        name: Gram(np.zeros((folds.max() + 1, n, n)), np.zeros(folds.max() + 1), weights[name]) for name in weights
    }
    along = torch.from_numpy(directions).to(next(model.parameters()).device)
    some = _some(samples)
    others = np.setdiff1d(np.arange(len(samples)), some if "energy" in weights else np.arange(len(samples)))
    work = [
        (indices[members], names)
        for indices, names in ((some, list(weights)), (others, ["energy"]))
        for members in (parts(model, [structures[i] for i in indices], edges) if len(indices) else ())
    ]
    for members, names in track(work, "probe", quiet=quiet):
        for name, rows in _equations(model, [samples[i] for i in members], names, along, elements).items():
            for i, own in zip(members, rows, strict=True):
                known = own[np.isfinite(own).all(axis=1)]
                grams[name].sums[folds[i]] += known.T @ known
                grams[name].counts[folds[i]] += len(known)
    return {name: gram for name, gram in grams.items() if gram.counts.any()}


def _unknown(elements: np.ndarray) -> int:
    """How many numbers references are: one for each element, beside what is added to all of them; none without any."""
    return len(elements) + 1 if len(elements) else 0


def _folds(structures: Sequence[ase.Atoms]) -> np.ndarray:
    """The part with which each structure is left out: materials stay whole, unless all are of one."""
    groups = np.unique(materials(structures), return_inverse=True)[1]
    if groups.max() == 0:
        groups = np.arange(len(structures))
    order = np.random.default_rng(0).permutation(groups.max() + 1)
    return np.asarray((order % FOLDS)[groups])


def _equations(
    model: Model, samples: Sequence[Sample], names: Sequence[str], directions: Tensor, elements: np.ndarray
) -> dict[str, list[np.ndarray]]:
    """Of each quantity and structure: rows of what a correction along each direction, and each reference, would add,
    and last of what is left of the label."""
    weight = next(model.parameters())
    batch = to_batch(samples, model.backbone.edges).to(weight.device, weight.dtype)
    found = model(batch.graph, names)
    left = {name: batch.targets[name] - found[name].double() for name in names}
    slopes = {"forces", "stress"} & set(names)
    with torch.set_grad_enabled(bool(slopes)):
        graph, leaves = differentiable(batch.graph, {Gradient, Strain} if "stress" in slopes else {Gradient})
        layers = model.features(graph, ("layers",)).layers
        assert layers is not None
        along = _joined(layers) @ directions  # (n_atoms, directions)
        pushes = [
            torch.autograd.grad(whole, list(leaves.values()), retain_graph=True, materialize_grads=True)
            for whole in (along.sum(dim=0) if slopes else ())
        ]
    by_kind = {kind: [push[k] for push in pushes] for k, kind in enumerate(leaves)}

    rows: dict[str, list[np.ndarray]] = {}
    if "energy" in names:
        sizes = np.array([len(s.atoms) for s in samples])[:, None]
        counts = [np.array([(s.atoms.numbers == z).sum() for s in samples])[:, None] for z in elements]
        totals = graph.sum_over_systems(along.detach()).cpu().numpy()
        every = np.hstack([totals, *counts, *([sizes] if len(elements) else []), left["energy"].cpu().numpy()[:, None]])
        rows["energy"] = list((every / sizes)[:, None])
    if "forces" in names:
        slope = -torch.stack(by_kind[Gradient], dim=2)  # (n_atoms, 3, directions)
        rows["forces"] = _rows(slope, left["forces"], [len(s.atoms) for s in samples], _unknown(elements))
    if "stress" in names:
        slope = torch.stack([per_volume(one, batch.graph.cell) for one in by_kind[Strain]], dim=3).flatten(1, 2)
        rows["stress"] = _rows(slope, left["stress"].flatten(1), [1] * len(samples), _unknown(elements))
    return rows


def _rows(slopes: Tensor, left: Tensor, sizes: Sequence[int], unknown: int) -> list[np.ndarray]:
    """Of each structure, one row per component, (components, directions + references + 1)."""
    slopes = slopes.double()
    none = slopes.new_zeros(*slopes.shape[:2], unknown)
    rows = torch.cat([slopes, none, left.unsqueeze(2)], dim=2).cpu()
    return [part.flatten(0, 1).numpy() for part in torch.split(rows, list(sizes))]


class Fit(NamedTuple):
    """Settings of a fit, and its root-mean-square errors on what was left out."""

    penalty: float  # infinite for no correction
    errors: dict[str, float]

    @property
    def error(self) -> float:
        """Geometric mean over quantities, which have no unit in common."""
        return float(np.exp(np.mean(np.log([max(error, 1e-300) for error in self.errors.values()]))))


def _chosen(grams: Mapping[str, Gram], n: int) -> tuple[Fit, Fit]:
    """References alone, and the fit with the smallest errors on what is left out, which may be the same."""
    folds = np.flatnonzero(sum(gram.counts for gram in grams.values()))

    def tried(penalty: float) -> Fit:
        return Fit(penalty, _errors(grams, [_solved(grams, n, penalty, int(k)) for k in folds], folds))

    plain = tried(np.inf)
    return plain, min([plain, *map(tried, PENALTIES)], key=lambda fit: fit.error)


def _solved(grams: Mapping[str, Gram], n: int, penalty: float, without: int | None = None) -> np.ndarray:
    """Weights of directions and references, from all folds but one."""
    normal = np.zeros(next(iter(grams.values())).sums.shape[1:])
    for gram in grams.values():
        kept = np.arange(len(gram.counts)) != without
        if count := gram.counts[kept].sum():
            normal += gram.weight**2 / count * gram.sums[kept].sum(axis=0)
    a, b = normal[:-1, :-1], normal[:-1, -1]
    size = np.diag(a)
    ridge = np.full(len(a), penalty * size[:n].mean())
    if len(a) > n:
        ridge[n:-1] = ANCHOR * (size[n:-1].mean() or 1.0)
        ridge[-1] = 1e-9 * (size[-1] or 1.0)
    free = slice(n if np.isinf(penalty) else 0, None)
    weights = np.zeros(len(a))
    weights[free] = np.linalg.solve(a[free, free] + np.diag(ridge[free]), b[free])
    return weights


def _errors(grams: Mapping[str, Gram], weights: Sequence[np.ndarray], folds: np.ndarray) -> dict[str, float]:
    """Root-mean-square error of each quantity, each fold by the weights that were found without it."""
    found = {}
    for name, gram in grams.items():
        squares = 0.0
        for w, k in zip(weights, folds, strict=True):
            both = np.append(-w, 1.0)
            squares += both @ gram.sums[k] @ both
        found[name] = float(np.sqrt(max(squares, 0.0) / gram.counts.sum()))
    return found

"""Probes of potentials: a linear correction of the energy, fitted to energies, forces and stress in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product
from types import MappingProxyType
from typing import Any, NamedTuple

import ase
import numpy as np
import torch
from torch import Tensor, nn

from ..align import align_references
from ..backbones.base import Features
from ..console import track
from ..data.split import materials
from ..errors import InputError
from ..evaluate import parts
from ..features import features, layers_of
from ..graph import AtomGraph, Sample, is_isolated_atom, to_batch
from ..heads import EnergyHead
from ..model import Gradient, Model, Strain, differentiable, per_volume
from ..nn import LAST_ELEMENT
from ..objectives import Potential
from ..references import PENALTIES as ANCHORS
from ..references import chosen_penalty

MOST_DIRECTIONS = 128  # of the features: each is one backward pass over the structures
MOST_ATOMS = 2_000  # whose forces are fitted, and their structures' stress: a hundred numbers need no more
FOLDS = 10  # at most, each left out once
LEAST = 3  # structures, or folds that have a quantity which is to choose the penalty
PENALTIES = np.logspace(-7, 2, 19)  # relative to the mean square of what a direction does
FREE = 1e-4  # relative penalty of moving references that have none
BALANCES = (1.0, 0.3, 0.1, 0.03, 0.01)  # of the weight of energies, which rules a fit that forces know more of
TINY = 1e-12  # eV and so on, below which nothing is off
HUBER = (8.0, 2.0)  # medians of what is left, beyond which a row counts by its error rather than its square
STEP = 100.0  # eV: references of what is left out are known to that, which tells nothing and keeps digits
FLOOR = 1e-3  # of the typical size of a label, below which smaller errors count no more
UNITS = {"energy": "eV/atom", "forces": "eV/Å", "stress": "eV/Å^3"}
LINEAR, NONE = "linear correction of the energy", "no correction of the energy"


class EnergyProbeHead(EnergyHead):
    """An energy (eV) with a correction that is linear in the invariants of all layers of each atom.

    Forces and stress are its derivatives, as those of any energy. On average over the atoms of an element that it was
    fitted to, the correction is zero.

    Args:
        width: of the backbone.
        features: numbers per atom, of all layers together.
    """

    needs = frozenset({"layers"})
    correction: Tensor
    center: Tensor

    def __init__(self, width: int, features: int):
        super().__init__(width)
        self.features = features
        self.register_buffer("correction", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("center", torch.zeros(LAST_ELEMENT + 1, dtype=torch.float64))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        assert features.layers is not None
        added = _joined(features.layers) @ self.correction - self.center.index_select(0, graph.atomic_numbers)
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
    objective weights errors, or energies less; errors far beyond the median may count themselves rather than their
    squares (Huber), or single frames with large forces would rule the fit. Its penalty, the weight of energies and
    where far begins are those with the smallest errors on what is left out, a tenth at a time, materials whole, by the
    geometric mean over quantities; references without a correction compete too.

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
        InputError: for fewer than three structures with a label, or atoms that all look alike.
    """
    names = [name for name, weight in objective.weights.items() if weight]
    fitted = [s for s in samples if not is_isolated_atom(s.atoms) and any(_has(s, name) for name in names)]
    if (most := max(sum(_has(s, name) for s in fitted) for name in names)) < LEAST:
        raise InputError(f"a probe needs at least three structures with the same label, but there are {most}")
    before = _references(model).clone() if "energy" in kept else torch.zeros_like(_references(model))
    report = align_references(model, objective, samples, was, kept) if align and kept else {}
    after = _references(model).clone()
    head = _corrected(model, "energy" in kept, fitted[0])
    probe = Model(model.backbone, {**model.outputs, "energy": head}, model.card)
    probe.to(next(model.parameters()).device).eval()

    directions = _directions(probe, fitted, edges)
    elements = np.zeros(0, int)
    if align or "energy" not in kept:  # references that were fitted to all labels would know those that are left out
        elements = np.unique(np.concatenate([s.atoms.numbers for s in fitted]))
        head.references.copy_(before + STEP * torch.round((after - before) / STEP))
    known = _known(probe, objective, fitted, directions, elements, edges, quiet)
    head.references.copy_(after)
    n = directions.vectors.shape[1]
    plain, best = _chosen(known, n)
    fits = [(best, known)]
    for medians in HUBER:
        known = _trusted(known, fits[-1][0], n, medians)
        fits.append((_chosen(known, n)[1], known))
    best, known = min(fits, key=lambda fit: fit[0].score)
    known = _settled(known, best.balance, best.held)
    correction = directions.vectors @ _solved(_normal(known), n, best.penalty, _anchor(known))[:n]
    head.correction += torch.from_numpy(correction).to(head.correction.device)
    head.center += torch.from_numpy(directions.centers @ correction).to(head.center.device)
    found: dict[str, Any] = {
        "probe": LINEAR if np.isfinite(best.penalty) else NONE,
        "features": n,
        "errors of what is left out": {
            name: {"before": plain.errors[name], "after": best.errors[name], "unit": UNITS[name]}
            for name in plain.errors
        },
    }
    if align:
        report = _both(report, align_references(probe, objective, samples, {}, ["energy"]))
    return probe, report | found


def _has(sample: Sample, name: str) -> bool:
    return bool(np.isfinite(sample.targets[name]).any())


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


class Directions(NamedTuple):
    """Principal directions of what features are beside their mean over the atoms of an element."""

    vectors: np.ndarray  # (features, directions); the largest has a spread of one
    centers: np.ndarray  # (elements + 1, features); of elements that no structure has, the mean of all atoms


def _directions(model: Model, samples: Sequence[Sample], edges: int) -> Directions:
    atoms = [samples[i].atoms for i in _some(samples)]
    numbers = np.concatenate([a.numbers for a in atoms])
    device = str(next(model.parameters()).device)
    x = features(model, atoms, per_atom=True, edges=edges, device=device, verbose=False).values
    centers = np.tile(x.mean(axis=0), (LAST_ELEMENT + 1, 1))
    for z in np.unique(numbers):
        centers[z] = x[numbers == z].mean(axis=0)
    _, sizes, basis = np.linalg.svd(x - centers[numbers], full_matrices=False)
    n = min(int((sizes > 1e-6 * np.linalg.norm(x)).sum()), MOST_DIRECTIONS)
    if not n:
        raise InputError("all atoms of an element look the same to this model: there is nothing to probe")
    return Directions(basis[:n].T / (sizes[0] / np.sqrt(len(x))), centers)


def _some(samples: Sequence[Sample]) -> np.ndarray:
    """Samples that have `MOST_ATOMS` together, or all of them: always the same, and as if by chance."""
    order = np.random.default_rng(0).permutation(len(samples))
    before = np.cumsum([0, *(len(samples[i].atoms) for i in order[:-1])])
    return np.sort(order[before < MOST_ATOMS])


class Equations(NamedTuple):
    """What is known of a quantity, (n, directions + references + 1): what each unknown adds, and last what is left."""

    rows: np.ndarray
    folds: np.ndarray  # the part with which each row is left out, (n,)
    judged: np.ndarray  # whether the other parts can be asked about it, (n,)
    weight: float  # of an error in the units of the quantity
    anchor: float = 0.0  # how many labels of an element alone its old reference counts as
    trust: Mapping[int | None, np.ndarray] = MappingProxyType({})  # in each row, (n,), by the part that is left out

    def normal(self, without: int | None) -> np.ndarray:
        """Means of products, over all parts but one."""
        here = self.folds != without
        kept = self.rows[here]
        trusted = kept * self.trust[without][here, None] if self.trust else kept
        return np.asarray(trusted.T @ kept / max(len(kept), 1))

    def off(self, weights: np.ndarray) -> np.ndarray:
        """Absolute errors of each row, (n,)."""
        return np.abs(self.rows[:, -1] - self.rows[:, :-1] @ weights)


def _known(
    model: Model,
    objective: Potential,
    samples: Sequence[Sample],
    directions: Directions,
    elements: np.ndarray,
    edges: int,
    quiet: bool,
) -> dict[str, Equations]:
    """All that a fit needs, of each quantity: of energies of all structures, of derivatives of some."""
    structures = [s.atoms for s in samples]
    folds = _folds(structures)
    weights = {name: weight for name, weight in objective.weights.items() if weight}
    energetic = np.array(["energy" in weights and _has(s, "energy") for s in samples])
    sloped = np.flatnonzero([any(_has(s, name) for name in weights if name != "energy") for s in samples])
    some = sloped[_some([samples[int(i)] for i in sloped])] if len(sloped) else sloped
    others = np.setdiff1d(np.flatnonzero(energetic), some)
    elsewhere = _elements_elsewhere(structures, folds, energetic)
    work = [
        (indices[members], names)
        for indices, names in ((some, list(weights)), (others, ["energy"]))
        for members in (parts(model, [structures[int(i)] for i in indices], edges) if len(indices) else ())
    ]
    found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {name: [] for name in weights}
    for members, names in track(work, "probe", quiet=quiet):
        for name, rows in _equations(model, [samples[i] for i in members], names, directions, elements).items():
            for i, own in zip(members, rows, strict=True):
                known = own[np.isfinite(own).all(axis=1)]
                numbers = structures[i].numbers.tolist()
                judged = name != "energy" or not len(elements) or elsewhere[folds[i]].issuperset(numbers)
                found[name].append((known, np.full(len(known), folds[i]), np.full(len(known), judged)))
    joined = {name: [np.concatenate(each) for each in zip(*own, strict=True)] for name, own in found.items() if own}
    equations = {name: Equations(own[0], own[1], own[2], weights[name]) for name, own in joined.items() if len(own[0])}
    if "energy" in equations and len(elements):
        energies = equations["energy"]
        fractions, left = energies.rows[:, -2 - len(elements) : -2], energies.rows[:, -1]
        equations["energy"] = energies._replace(anchor=chosen_penalty(fractions, left))
    return equations


def _elements_elsewhere(structures: Sequence[ase.Atoms], folds: np.ndarray, energetic: np.ndarray) -> list[set[int]]:
    """Of each fold, the elements of energies in the others: without these, references could only be guessed."""
    own: list[set[int]] = [set() for _ in range(folds.max() + 1)]
    for i in np.flatnonzero(energetic).tolist():
        own[folds[i]].update(structures[i].numbers.tolist())
    return [set().union(*(other for j, other in enumerate(own) if j != k)) for k in range(len(own))]


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
    model: Model, samples: Sequence[Sample], names: Sequence[str], directions: Directions, elements: np.ndarray
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
        center = torch.from_numpy(directions.centers).to(weight.device).index_select(0, graph.atomic_numbers)
        along = (_joined(layers) - center) @ torch.from_numpy(directions.vectors).to(weight.device)
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
    """The penalty of a fit, and its mean absolute errors on what was left out."""

    penalty: float  # infinite for no correction
    errors: dict[str, float]
    score: float  # the logarithm of their geometric mean
    balance: float = 1.0
    held: bool = True  # whether references are


def _chosen(known: Mapping[str, Equations], n: int) -> tuple[Fit, Fit]:
    """References alone, and the fit with the smallest errors on what is left out, which may be the same.

    Quantities count by the geometric mean, as they have no unit in common; none where hardly anything was left out.
    """
    folds = np.unique(np.concatenate([own.folds for own in known.values()]))
    judged = {name: own.folds[own.judged] for name, own in known.items() if own.judged.any()}
    voting = [name for name, parts in judged.items() if len(np.unique(parts)) >= min(LEAST, len(folds))]

    def tried(penalties: Sequence[float], balance: float, held: bool) -> Iterator[Fit]:
        settled = _settled(known, balance, held)
        normal = {int(k): (_normal(settled, int(k)), _anchor(settled, int(k))) for k in folds}
        for penalty in penalties:
            weights = {k: _solved(each, n, penalty, anchor) for k, (each, anchor) in normal.items()}
            errors = {name: _error(known[name], weights) for name in judged}
            voted = [np.log(max(errors[name], FLOOR / known[name].weight)) for name in voting]
            yield Fit(penalty, errors, float(np.mean(voted)) if voted else np.inf, balance, held)

    plain = next(tried([np.inf], 1.0, held=True))
    if not voting:
        return plain, plain
    balances = BALANCES if len(known) > 1 and "energy" in known else BALANCES[:1]
    holds = (True, False) if _anchor(known) else (True,)
    fits = (tried(PENALTIES.tolist(), *settings) for settings in product(balances, holds))
    return plain, min([plain, *chain.from_iterable(fits)], key=lambda fit: fit.score)


def _trusted(known: Mapping[str, Equations], fit: Fit, n: int, medians: float) -> dict[str, Equations]:
    """With less trust in rows that a fit is far off, as Huber's loss has it; nothing that is left out has a say."""
    settled = _settled(known, fit.balance, fit.held)
    parts = [None, *np.unique(np.concatenate([own.folds for own in known.values()])).tolist()]
    weights = {k: _solved(_normal(settled, k), n, fit.penalty, _anchor(settled, k)) for k in parts}
    found = {}
    for name, own in known.items():
        trust: dict[int | None, np.ndarray] = {}
        for k, each in weights.items():
            off = own.off(each)
            here = own.folds != k
            most = max(medians * float(np.median(off[here])), TINY) if here.any() else TINY
            trust[k] = np.minimum(most / np.maximum(off, TINY), 1.0)
        found[name] = own._replace(trust=trust)
    return found


def _settled(known: Mapping[str, Equations], balance: float, held: bool) -> dict[str, Equations]:
    """With this part of the weight of energies, and references that are held to what they were, or free."""
    return {
        name: own._replace(weight=own.weight * balance, anchor=own.anchor if held else 0.0) if name == "energy" else own
        for name, own in known.items()
    }


def _anchor(known: Mapping[str, Equations], without: int | None = None) -> float:
    """The penalty of moving a reference, in the units of `_normal`; zero where the smallest of all does."""
    own = known.get("energy")
    if not own or own.anchor <= ANCHORS[0]:
        return 0.0
    return own.anchor * own.weight**2 / max(int(np.count_nonzero(own.folds != without)), 1)


def _normal(known: Mapping[str, Equations], without: int | None = None) -> np.ndarray:
    """Products of all equations, weighted, from all folds but one."""
    return np.asarray(sum(own.weight**2 * own.normal(without) for own in known.values()))


def _solved(normal: np.ndarray, n: int, penalty: float, anchor: float = 0.0) -> np.ndarray:
    """Weights of directions and references."""
    from scipy.linalg import lu_factor, lu_solve  # it takes a while to import

    a, b = normal[:-1, :-1], normal[:-1, -1]
    size = np.diag(a)
    ridge = np.full(len(a), penalty * size[:n].mean())
    if len(a) > n:
        ridge[n:-1] = anchor or FREE * (size[n:-1].mean() or 1.0)
        ridge[-1] = 1e-9 * (size[-1] or 1.0)
    free = slice(n if np.isinf(penalty) else 0, None)
    moved = np.zeros(len(a))  # by which what has no penalty is refined, so that the small ridge leaves no trace
    moved[-1 if anchor else n :] = ridge[-1 if anchor else n :]
    weights = np.zeros(len(a))
    if len(a[free]):
        factors = lu_factor(a[free, free] + np.diag(ridge[free]))
        for _ in range(4 if len(a) > n else 1):
            weights[free] = lu_solve(factors, (b + moved * weights)[free])
    return weights


def _error(known: Equations, weights: Mapping[int, np.ndarray]) -> float:
    """Mean absolute error, each fold by the weights that were found without it."""
    errors = [known.off(found)[known.judged & (known.folds == k)] for k, found in weights.items()]
    return float(np.concatenate(errors).mean())

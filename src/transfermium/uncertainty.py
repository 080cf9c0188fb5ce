"""How far a model may be off: conformal intervals from its validation structures, and the distance from its training.

An interval that holds a new label with probability 1 - α is as wide as the ⌈(n + 1)(1 - α)⌉-th smallest of n scores,
errors of structures that the model has not seen and that did not choose it (Vovk et al., Algorithmic Learning in a
Random World; Angelopoulos and Bates, arXiv:2107.07511).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ase
import numpy as np
import torch
from torch import Tensor

from . import distributed
from .data.split import materials
from .errors import InputError
from .graph import AtomGraph, Batch
from .heads import Head, TensorHead, is_extensive, pooled
from .model import Gradient, Model, Output, Strain, stored_as
from .objectives import Objective
from .objectives.together import Parts

LEAST = 20  # labelled validation structures, below which there is no interval
HALVED = 200  # structures from which on halves judge each other; fewer are judged in `FOLDS` parts
FOLDS = 10
OF_ATOMS = 0.9  # quantile over the atoms of a structure that is its score
COMPONENTS = 64  # directions of features in which training structures differ that are kept one by one
FLOOR = 1e-2  # least spread of a feature, of the typical size of all: or what never varied would count for ever
RIDGE = 1e-4  # added to all variances, of the largest one
WORTH = 0.99  # of the mean score, below which intervals are scaled


class Judged(NamedTuple):
    """A label that is compared with an output: one of the `KINDS`."""

    output: str
    kind: str


KINDS = {  # what the score of a structure is
    "number": "error",
    "sum": "error per atom",
    "tensor": "largest error of a component",
    "atoms": f"error that {OF_ATOMS:.0%} of the atoms of a structure stay below",
}


def judged(model: Model, objective: Objective) -> dict[str, Judged]:
    """Targets of an objective that are labels with a unit of their own, rather than classes or noise."""
    if isinstance(objective, Parts):
        return {
            f"{name} {own}": found._replace(output=objective.names[name][own])
            for name, part in objective.parts.items()
            for own, found in judged(model, part).items()
            if objective.names[name][own] in model.outputs
        }
    wanted = objective.labels()
    found = {}
    with torch.random.fork_rng(devices=[]):
        outputs = objective.outputs(2)
    for name, output in outputs.items():
        quantity = objective.quantities().get(name, (name, ""))[0]
        if quantity in wanted and not getattr(output, "classes", 0):
            found[name] = Judged(name, _kind(output))
    return found


def _kind(output: Output) -> str:
    if isinstance(output, Gradient) or getattr(output, "per_atom", False):
        return "atoms"
    if isinstance(output, Strain | TensorHead):
        return "tensor"
    return "sum" if isinstance(output, Head) and is_extensive(output) else "number"


def scores(label: Judged, output: Tensor, target: Tensor, graph: AtomGraph) -> np.ndarray:
    """One error for each structure, NaN where it has no label: (n_systems,).

    The largest over the components of what there is once per structure, energies and other sums per atom. Of what there
    is for each atom, the lengths of the errors of all atoms have one, the `OF_ATOMS` quantile: whole structures are
    exchangeable, atoms of one are not.
    """
    difference = (output.detach().double() - target.double()).cpu()
    sizes = graph.atoms_per_system().cpu().numpy()
    if label.kind == "atoms":
        return np.array([of_atoms(part) for part in np.split(difference.numpy(), np.cumsum(sizes)[:-1])])
    found: np.ndarray = (
        difference.abs().flatten(1).amax(dim=1).numpy() if difference.dim() > 1 else difference.abs().numpy()
    )
    return found / np.maximum(sizes, 1) if label.kind == "sum" else found


def of_atoms(errors: np.ndarray) -> float:
    """The score of a structure from errors of its atoms, (n_atoms, ...): a quantile of their lengths."""
    lengths = np.sqrt(np.square(errors.reshape(len(errors), -1)).sum(axis=1))
    known = lengths[np.isfinite(lengths)]
    return float(np.quantile(known, OF_ATOMS)) if len(known) else math.nan


class CrossChoice:
    """Which checkpoint validation structures would have chosen without a part of them, and its scores on that part.

    Structures that chose a checkpoint flatter it. So they are dealt into folds, materials whole, and each fold is
    judged by the checkpoint with the lowest loss on all others: cross-conformal prediction (Vovk, arXiv:1208.0806) over
    the choice of the checkpoint, for which nothing is trained again. What is returned is chosen by all of them, as
    ever.

    Attributes:
        scores: of each judged target by structure, NaN without a label: (n_structures,).
        whole: whether it has seen all validations of the run.
    """

    def __init__(self, model: Model, objective: Objective, structures: Sequence[ase.Atoms]):
        n = len(structures)
        self.objective = objective
        self.judged = judged(model, objective) if n >= LEAST else {}
        self.folds = folds(structures) if self.judged else np.zeros(n, int)
        self.best = np.full(int(self.folds.max(initial=-1)) + 1, np.nan)
        self.scores = {name: np.full(n, np.nan) for name in self.judged}
        self.whole = True
        self._sums: dict[str, float] = {}
        self._seen: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    def see(self, members: np.ndarray, outputs: Mapping[str, Tensor], batch: Batch) -> None:
        """Take note of some validation structures as a checkpoint predicts them."""
        if not self.judged:
            return
        own = {
            name: scores(label, outputs[label.output], batch.targets[name], batch.graph)
            for name, label in self.judged.items()
            if name in batch.targets and label.output in outputs
        }
        self._seen.append((np.asarray(members), own))
        fold_of = torch.from_numpy(self.folds[np.asarray(members)]).to(batch.graph.system_idx.device)
        for fold in torch.unique(fold_of).tolist():
            targets = {name: _only(fold_of == fold, target, batch.graph) for name, target in batch.targets.items()}
            for term, (total, count) in self.objective.loss(outputs, batch._replace(targets=targets)).items():
                for kind, value in (("total", total), ("count", count)):
                    key = f"{fold} {kind} {term}"
                    self._sums[key] = self._sums.get(key, 0.0) + float(value.detach())

    def settle(self) -> None:
        """Judge folds whose others find this checkpoint better than those before; all processes together."""
        if not self.judged:
            return
        sums = distributed.sum_counts(self._sums)
        seen = [one for part in distributed.gathered(self._seen) for one in part]
        self._sums, self._seen = {}, []
        terms = {key.split(" ", 2)[2] for key in sums}
        for fold in range(len(self.best)):
            loss = sum(_without(fold, term, sums, len(self.best)) for term in terms)
            loss = loss if math.isfinite(loss) else math.inf
            if loss >= self.best[fold]:  # and not where this is the first
                continue
            self.best[fold] = loss
            for members, own in seen:
                here = self.folds[members] == fold
                for name, values in own.items():
                    self.scores[name][members[here]] = values[here]

    def state(self) -> dict[str, Tensor]:
        """What a run that is stopped has to keep."""
        if not self.judged:
            return {}
        kept = {"cross best": self.best} | {f"cross scores {name}": found for name, found in self.scores.items()}
        return {name: torch.from_numpy(values.copy()) for name, values in kept.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what was kept; a run that kept nothing has no scores."""
        own = self.state()
        self.whole = all(name in tensors and tensors[name].shape == own[name].shape for name in own)
        if self.whole and self.judged:
            self.best = tensors["cross best"].numpy().copy()
            self.scores = {name: tensors[f"cross scores {name}"].numpy().copy() for name in self.scores}


def folds(structures: Sequence[ase.Atoms]) -> np.ndarray:
    """Two folds of many structures, up to ten of few, materials whole where there are several: (n_structures,)."""
    n = len(structures)
    groups = np.unique(materials(structures), return_inverse=True)[1]
    n_groups = int(groups.max(initial=-1)) + 1
    wanted = 2 if n >= HALVED else FOLDS
    if n_groups < 2:
        groups, n_groups = np.arange(n), n
    dealt = np.random.default_rng(0).permutation(n_groups) % min(wanted, max(n_groups, 1))
    return np.asarray(dealt[groups])


def _only(chosen: Tensor, target: Tensor, graph: AtomGraph) -> Tensor:
    """A target without the labels of all structures but those chosen."""
    rows = chosen if len(target) == len(chosen) else chosen.index_select(0, graph.system_idx)
    return torch.where(rows.view(-1, *[1] * (target.dim() - 1)), target, torch.nan)


def _without(fold: int, term: str, sums: Mapping[str, float], n: int) -> float:
    """The mean of a term over all folds but one."""
    totals, counts = (
        sum(sums.get(f"{k} {kind} {term}", 0.0) for k in range(n) if k != fold) for kind in ("total", "count")
    )
    return totals / counts if counts else 0.0


# ---------------------------------------------------------------------------------------------- distance, intervals


class Spread(NamedTuple):
    """Where training structures lie in the space of what the layers of a backbone see, averaged over atoms.

    A normal distribution by principal components (Tipping and Bishop, 1999), after each feature has been divided by its
    spread: the first variances one by one, and one for all other directions.
    """

    center: np.ndarray  # (n_features,)
    stretch: np.ndarray  # (n_features,), one over the spread of each
    directions: np.ndarray  # (n_features, at most COMPONENTS)
    precisions: np.ndarray  # one over each variance; the last is that of all other directions

    @classmethod
    def of(cls, features: np.ndarray) -> Spread:
        """That of features (n_structures, n_features)."""
        x = np.asarray(features, float)
        center = x.mean(axis=0)
        floor = FLOOR * math.sqrt(np.square(center).mean()) or 1.0
        stretch = 1 / np.maximum(x.std(axis=0), floor)
        z = (x - center) * stretch
        _, singular, rows = np.linalg.svd(z, full_matrices=False)
        variances = singular**2 / len(x)
        k = min(COMPONENTS, len(variances))
        ridge = RIDGE * max(float(variances[0]), RIDGE)
        rest = (np.square(z).sum() / len(x) - variances[:k].sum()) / max(x.shape[1] - k, 1)
        precisions = 1 / (np.append(variances[:k], max(rest, 0.0)) + ridge)
        return cls(center, stretch, rows[:k].T, precisions)

    def checked(self) -> Spread:
        """Itself, where its arrays fit together; else raises `ValueError`."""
        n, k = self.directions.shape
        if self.center.shape != (n,) or self.stretch.shape != (n,) or self.precisions.shape != (k + 1,):
            raise ValueError("its arrays do not fit together")
        return self

    def distance2(self, features: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distances of features (n, n_features) from the centre: (n,)."""
        z = (np.asarray(features, float) - self.center) * self.stretch
        along = z @ self.directions
        beside = np.maximum(np.square(z).sum(axis=1) - np.square(along).sum(axis=1), 0.0)
        return np.asarray(np.square(along) @ self.precisions[:-1] + beside * self.precisions[-1])


class Interval(NamedTuple):
    """What is known of the errors of one target."""

    label: Judged
    quantity: str  # under which predictions are stored
    unit: str  # of the score
    scores: np.ndarray  # of calibration structures over their scale, ascending
    scaled: str  # "distance", an output that is a standard deviation, or "" for one width for all

    def width(self, level: float) -> float:
        """The score that a new structure stays below with this probability, before it is scaled."""
        n = len(self.scores)
        k = math.ceil((n + 1) * level - 1e-9)
        if k > n:
            most = math.floor(1e3 * n / (n + 1)) / 1e3
            raise InputError(
                f"an interval of level {level:g} needs more than {n} calibration structures: ask for {most:g} at most"
            )
        return float(self.scores[k - 1])


class Uncertainty:
    """What a model's file knows of its errors.

    Attributes:
        intervals: target to `Interval`.
        typical: the median squared distance of validation structures.
        edge: the distance that 99 % of them stay below.
        materials: how many materials they are of, if that is known.
    """

    def __init__(
        self, spread: Spread, intervals: Mapping[str, Interval], typical: float, edge: float, materials: int | None
    ):
        self.spread = spread
        self.intervals = dict(intervals)
        self.typical = typical
        self.edge = edge
        self.materials = materials

    @classmethod
    def of(cls, model: Model) -> Uncertainty | None:
        """That of a model; None where it has none (see `why_not`)."""
        known = model.card.get("uncertainty")
        if not isinstance(known, Mapping) or "targets" not in known:
            return None
        try:
            kept = {name: tensor.double().numpy() for name, tensor in model.attached.items()}
            spread = Spread(*(kept[name] for name in Spread._fields))
            intervals = {
                name: Interval(
                    Judged(found["output"], found["kind"]),
                    stored_as(model, found["output"]),
                    str(found["unit"]),
                    _ascending(kept[found["scores"]] / _scales(kept, found["scaled by"])),
                    found["scaled by"],
                )
                for name, found in known["targets"].items()
                if "scores" in found and found["output"] in model.outputs
            }
            if not all(one.scaled in ("", "distance", *model.outputs) for one in intervals.values()):
                raise ValueError("an unknown scale")
            few = int(known["materials"]) if "materials" in known else None
            return cls(spread.checked(), intervals, float(known["typical"]), float(known["edge"]), few)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the model's record of its uncertainty is damaged: {error}; train it again") from None

    def bounds(
        self, model: Model, graph: AtomGraph, outputs: Mapping[str, Sequence[np.ndarray]], level: float
    ) -> dict[str, np.ndarray]:
        """What to store of each structure by key: ends of intervals or bounds of errors, and distances.

        Args:
            outputs: some of those of the model, cut by structure; what was learned as a difference is the quantity
                itself.
            level: probability that a new label is within.
        """
        features = seen(model, graph)
        if features.shape[1] != len(self.spread.center):
            raise InputError("the model's record of its uncertainty is of another model: train it again")
        distance = np.sqrt(self.spread.distance2(features)) / self.edge
        sizes = graph.atoms_per_system().cpu().numpy()
        found: dict[str, np.ndarray] = {}
        for interval in self.intervals.values():
            if interval.label.output not in outputs:
                continue
            values = outputs[interval.label.output]
            said = np.array([np.ravel(v)[0] for v in outputs[interval.scaled]]) if interval.scaled in outputs else None
            half = interval.width(level) * scale(interval.scaled, (distance * self.edge) ** 2 / self.typical, said)
            half = half * sizes if interval.label.kind == "sum" else half
            key = f"{interval.quantity}_{{}}{percent(level)}"
            if interval.label.kind in ("tensor", "atoms"):
                found[key.format("error")] = half
            else:
                center = np.array([np.ravel(value)[0] for value in values])
                found |= {key.format("low"): center - half, key.format("high"): center + half}
        return {**found, "training_distance": distance, "far": distance > 1}


def percent(level: float) -> str:
    """A probability as keys spell it: 90 for 0.9."""
    return f"{100 * level:.6g}"


def why_not(model: Model) -> str:
    """Why a model has no intervals, in one clause."""
    known = model.card.get("uncertainty")
    if not isinstance(known, Mapping):
        return "it was saved without a calibration"
    return str(known.get("none", "it has no labels to be compared with"))


@torch.no_grad()
def seen(model: Model, graph: AtomGraph) -> np.ndarray:
    """Means over atoms of what each layer of the backbone sees: (n_systems, n_features)."""
    weight = next(model.parameters())
    graph = graph.to(weight.device, weight.dtype)
    layers = model.features(graph, ("layers",)).layers
    assert layers is not None
    return np.asarray(pooled(torch.cat(list(layers.values()), dim=1), graph).double().cpu().numpy())


def scale(scaled: str, distance2: np.ndarray, said: np.ndarray | None = None) -> np.ndarray:
    """By what scores are divided, and widths multiplied: (n_systems,).

    By the name of an output it is what the model has `said`. By "distance" (squared, one for a typical structure) it is
    the deviation that a linear model on the features predicts: noise, plus what the training structures do not
    determine (as the prediction rigidity of arXiv:2403.02251), of equal size for a typical structure.
    """
    if scaled == "distance":
        return np.asarray(np.sqrt(0.5 + 0.5 * distance2))
    if scaled:
        assert said is not None
        return np.maximum(said, 1e-12)
    return np.ones(len(distance2))


def _scales(kept: Mapping[str, np.ndarray], scaled: str) -> np.ndarray | float:
    return kept[f"scale {scaled}"] if scaled else 1.0


def _ascending(values: np.ndarray) -> np.ndarray:
    return np.sort(values[np.isfinite(values)])

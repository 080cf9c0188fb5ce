"""From features of atoms to physical quantities."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones.base import Features
from .errors import InputError
from .graph import AtomGraph, Sample, is_isolated_atom
from .nn import LAST_ELEMENT, mlp, weighted_mean
from .references import fit_references, fit_shifts

MISSING = "missing"  # input of AskedHead


class Head(nn.Module):
    """`(features, graph)` to a tensor in physical units.

    `needs` names what of `Features` must be there: the model supplies "edges", and "vectors" for backbones without.
    `per_atom` says that there is one row per atom, rather than one per structure.
    """

    needs: frozenset[str] = frozenset()
    per_atom = False

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        raise NotImplementedError

    def __call__(self, features: Features, graph: AtomGraph) -> Tensor:
        return super().__call__(features, graph)

    def calibrate(self, name: str, samples: Sequence[Sample]) -> None:
        """Set references and scale from the labels called `name`; without labels nothing changes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Head:
        """Move or convert; references and scale stay in double precision whatever the type of the weights."""
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class EnergyHead(Head):
    """Energy (eV): atomic contributions times a scale, plus a reference energy per element.

    Contributions are added up in double precision, so that float32 models keep their digits in large systems.
    """

    scale: Tensor
    references: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.readout = mlp(width, width, 1)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("references", torch.zeros(LAST_ELEMENT + 1, dtype=torch.float64))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        atom_energies = self.readout(features.scalars).squeeze(1).double() * self.scale
        return graph.sum_over_systems(atom_energies + self.references.index_select(0, graph.atomic_numbers))

    def calibrate(self, name: str, samples: Sequence[Sample]) -> None:
        """Fit references by least squares; the scale is the RMS force, or else the RMS residual per atom."""
        numbers, energies = labelled_totals(name, samples)
        if len(energies):
            references = fit_references(numbers, energies, isolated_energies(name, samples))
            self.references.copy_(torch.from_numpy(references))
        forces = values("forces", samples)
        self.scale.fill_(rms(forces) if len(forces) else spread_of_energies(name, samples))


class ScalarHead(Head):
    """One number per structure: the mean over its atoms ("mean", "attention") or their sum ("sum").

    Means are for intensive properties such as band gaps, sums for extensive ones such as polarisabilities. What an atom
    adds to a sum begins with that of its element, which is most of an atomization energy.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, width: int, pooling: str = "mean"):
        super().__init__()
        _one_of("pooling", pooling, ("mean", "attention", "sum"))
        self.width = width
        self.pooling = pooling
        self.readout = mlp(width, width, 1)
        if pooling == "attention":
            self.score = mlp(width, width, 1)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        elements = (LAST_ELEMENT + 1,) if pooling == "sum" else ()
        self.register_buffer("shift", torch.zeros(elements, dtype=torch.float64))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        score = self.score(features.scalars) if self.pooling == "attention" else None
        contributions = self.readout(features.scalars).double() * self.scale
        if self.pooling == "sum":
            shift = self.shift.index_select(0, graph.atomic_numbers)
            return graph.sum_over_systems(contributions.squeeze(1) + shift)
        return pooled(contributions + self.shift, graph, score).squeeze(1)

    def calibrate(self, name: str, samples: Sequence[Sample]) -> None:
        """Shift and scale become mean and standard deviation; of sums, those per element and what is left per atom."""
        numbers, labels = labelled_totals(name, samples)
        if not len(labels):
            return
        if self.pooling == "sum":
            self.shift.copy_(torch.from_numpy(fit_shifts(numbers, labels)))
            self.scale.fill_(spread_of_energies(name, samples))
        else:
            self.shift.fill_(labels.mean())
            self.scale.fill_(rms(labels - labels.mean(), labels))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        """Also of models whose sums had one shift for all elements."""
        spread_over_elements(state, f"{prefix}shift", self.shift)
        super()._load_from_state_dict(state, prefix, *others)


class ClassHead(Head):
    """Scores (logits) of classes per structure: (n_systems, classes)."""

    def __init__(self, width: int, classes: int = 2):
        super().__init__()
        self.width = width
        self.classes = classes
        self.readout = mlp(width, width, classes)

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        return self.readout(pooled(features.scalars, graph))


class AtomHead(Head):
    """One number per atom: (n_atoms,); with `classes`, their scores: (n_atoms, classes)."""

    per_atom = True
    scale: Tensor
    shift: Tensor

    def __init__(self, width: int, classes: int = 0):
        super().__init__()
        self.width = width
        self.classes = classes
        self.readout = mlp(width, width, classes or 1)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        result = self.readout(features.scalars)
        return result if self.classes else result.squeeze(1).double() * self.scale + self.shift

    def calibrate(self, name: str, samples: Sequence[Sample]) -> None:
        labels = values(name, samples)
        if len(labels) and not self.classes:
            self.shift.fill_(labels.mean())
            self.scale.fill_(rms(labels - labels.mean(), labels))


class VectorHead(Head):
    """One vector per atom, turning with the structure: (n_atoms, 3)."""

    needs = frozenset({"vectors"})
    per_atom = True
    scale: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.gate = mlp(width, width, width)
        self.mix = nn.Linear(width, width, bias=False)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        assert features.vectors is not None
        gates = self.gate(features.scalars).unsqueeze(1)
        return (self.mix(features.vectors) * gates).mean(dim=2).double() * self.scale

    def calibrate(self, name: str, samples: Sequence[Sample]) -> None:
        self.scale.fill_(rms(values(name, samples)))


class TensorHead(Head):
    """One symmetric 3×3 tensor per structure, such as a stress or a dielectric tensor: (n_systems, 3, 3).

    An isotropic part from the atoms plus a mean over bonds of learned scalars times r̂⊗r̂.
    """

    needs = frozenset({"edges"})
    scale: Tensor
    shift: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.isotropic = mlp(width, width, 1)
        self.receiver = nn.Linear(width, width)
        self.sender = nn.Linear(width, width, bias=False)
        self.radial = nn.Linear(4, width, bias=False)
        self.bond = nn.Sequential(nn.SiLU(), nn.Linear(width, 1))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        assert features.edges is not None
        s, (lengths, directions, weights) = features.scalars, features.edges
        powers = torch.stack([torch.exp(-lengths / k) for k in (0.5, 1.0, 2.0, 4.0)], dim=1)
        pair = self.receiver(s).index_select(0, graph.receivers) + self.sender(s).index_select(0, graph.senders)
        strength = self.bond(pair + self.radial(powers)).squeeze(1) * weights  # (n_edges,)

        outer = directions.unsqueeze(2) * directions.unsqueeze(1)
        bonds = graph.sum_over_neighbors(strength.view(-1, 1, 1) * outer)
        bonds = bonds / (graph.sum_over_neighbors(weights) + 1).view(-1, 1, 1)  # (n_atoms, 3, 3)
        one = torch.eye(3, dtype=torch.float64, device=s.device)
        tensor = bonds.double() + self.isotropic(s).double().unsqueeze(2) * one
        return pooled(tensor.flatten(1), graph).view(-1, 3, 3) * self.scale + self.shift * one

    def calibrate(self, name: str, samples: Sequence[Sample]) -> None:
        labels = values(name, samples).reshape(-1, 3, 3)
        if len(labels):
            self.shift.fill_(np.trace(labels, axis1=1, axis2=2).mean() / 3)
            self.scale.fill_(rms(labels - float(self.shift) * np.eye(3), labels))


class CompositionHead(Head):
    """One number per structure, by attention over its atoms that knows the composition (CGAT's, arXiv:2303.03000).

    An intensive property; an extensive one is that of an atom times their number. With a width of 128 the residual
    network has the published layers of 1024, 1024, 512, 512, 256, 256 and 128.

    Args:
        kind: "intensive" or "extensive".
        heads: of the attention, side by side in what the residual network gets.
        layers: widths of the residual network as multiples of `width`.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, width: int, kind: str = "intensive", heads: int = 5, layers: Sequence[int] = (8, 8, 4, 4, 2, 2, 1)
    ):
        super().__init__()
        _one_of("kind", kind, ("intensive", "extensive"))
        self.width = width
        self.kind = kind
        self.heads = heads
        self.layers = tuple(layers)
        self.composition = Composition(width)
        self.score = mlp(2 * width, 2 * width, heads)
        self.value = mlp(width, 2 * width, heads * width)
        widths = [heads * width, *(factor * width for factor in layers)]
        self.residual = nn.Sequential(*[ReZero(n_in, n_out) for n_in, n_out in pairwise(widths)])
        self.readout = nn.Linear(widths[-1], 1)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        s, system = features.scalars, graph.system_idx
        told = torch.cat([s, self.composition(graph).index_select(0, system)], dim=1)
        values = self.value(s).unflatten(1, (self.heads, self.width))
        scores = self.score(told).unsqueeze(2)
        found = weighted_mean(values, scores, system, graph.n_systems).flatten(1)  # (n_systems, heads · width)
        result = self.readout(self.residual(found)).squeeze(1).double() * self.scale + self.shift
        return result * graph.atoms_per_system() if self.kind == "extensive" else result

    def calibrate(self, name: str, samples: Sequence[Sample]) -> None:
        """Shift and scale become mean and standard deviation (per atom for extensive properties)."""
        sizes, labels = _sizes_and_labels(name, samples)
        if self.kind == "extensive":
            labels = labels / sizes
        if len(labels):
            self.shift.fill_(labels.mean())
            self.scale.fill_(rms(labels - labels.mean(), labels))


class Composition(nn.Module):
    """What a structure is made of, without regard to where: Roost (arXiv:1910.00617), (n_systems, width).

    The distinct elements of a structure are a fully connected graph, each heard by its fraction of the atoms.
    """

    def __init__(self, width: int, depth: int = 3):
        super().__init__()
        self.element = nn.Embedding(LAST_ELEMENT + 1, width)
        self.fraction = nn.Linear(1, width, bias=False)
        self.scores = nn.ModuleList([mlp(2 * width, 2 * width, 1) for _ in range(depth)])
        self.messages = nn.ModuleList([mlp(2 * width, 2 * width, width) for _ in range(depth)])
        self.score = mlp(width, 2 * width, 1)

    def forward(self, graph: AtomGraph) -> Tensor:
        key = graph.system_idx * (LAST_ELEMENT + 1) + graph.atomic_numbers
        members, atoms = torch.unique(key, return_counts=True)  # an element in a structure each: (n_members,)
        system, element = members // (LAST_ELEMENT + 1), members % (LAST_ELEMENT + 1)
        total = graph.atoms_per_system().index_select(0, system)
        fraction = (atoms.to(self.fraction.weight.dtype) / total).unsqueeze(1)

        receivers, senders = _pairs(system, graph.n_systems)
        heard = fraction.index_select(0, senders)
        x = self.element(element) + self.fraction(fraction)
        for score, message in zip(self.scores, self.messages, strict=True):
            pair = torch.cat([x.index_select(0, receivers), x.index_select(0, senders)], dim=1)
            x = x + weighted_mean(message(pair), score(pair), receivers, len(x), heard)
        return weighted_mean(x, self.score(x), system, graph.n_systems, fraction)


class ReZero(nn.Module):
    """A layer that starts as the identity, or as a linear map to another width (arXiv:2003.04887)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.layer = nn.Linear(n_in, n_out)
        self.skip = nn.Identity() if n_in == n_out else nn.Linear(n_in, n_out, bias=False)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.strength * F.silu(self.layer(x))


class DeviationHead(Head):
    """How far labels are expected to lie from another output, as a standard deviation in their unit.

    Args:
        kind: of that output: "intensive", "extensive" (grows with the number of atoms) or "per-atom".
    """

    scale: Tensor

    def __init__(self, width: int, kind: str = "intensive"):
        super().__init__()
        _one_of("kind", kind, ("intensive", "extensive", "per-atom"))
        self.width = width
        self.kind = kind
        self.per_atom = kind == "per-atom"
        self.readout = mlp(width, width, 1)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        log = self.readout(features.scalars).double()
        if not self.per_atom:
            log = pooled(log, graph)
        deviation = torch.exp(6 * torch.tanh(log.squeeze(1) / 6)) * self.scale  # never nothing, not even by heart
        return deviation * graph.atoms_per_system() if self.kind == "extensive" else deviation

    def calibrate(self, name: str, samples: Sequence[Sample]) -> None:
        """The scale is the standard deviation of the labels (per atom for extensive properties)."""
        labels = values(name, samples)
        if self.kind == "extensive":
            sizes, labels = _sizes_and_labels(name, samples)
            labels = labels / sizes
        if len(labels):
            self.scale.fill_(rms(labels - labels.mean(), labels))


class LevelHead(Head):
    """A head that levels of theory share, each with references (an energy), or scale and shift, of its own.

    The level of a structure is an input of its graph: one under `level_input` of its level, zero under the others.

    Args:
        head: what they share; of its arguments only, and with neutral references.
        levels: their names.
    """

    references: Tensor  # (n_levels, elements + 1) of an energy; else:
    scale: Tensor  # (n_levels,)
    shift: Tensor  # (n_levels,), or (n_levels, elements + 1) of sums

    def __init__(self, head: Head, levels: Sequence[str]):
        super().__init__()
        self.head = copy.deepcopy(head)
        self.levels = tuple(levels)
        self.needs, self.per_atom = head.needs, head.per_atom
        names = ("references",) if isinstance(head, EnergyHead) else ("scale", "shift")
        self.own = [name for name in names if name in dict(head.named_buffers(recurse=False))]
        for name in self.own:
            self.register_buffer(name, torch.stack([getattr(head, name)] * len(self.levels)))

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        told = [graph.inputs[level_input(name)] for name in self.levels]
        level = torch.cat(told, dim=1).double()  # (n_atoms, n_levels)
        result = self.head(features, graph)
        if isinstance(self.head, EnergyHead):
            references = self.references.index_select(1, graph.atomic_numbers).mT
            return result + graph.sum_over_systems((level * references).sum(dim=1))
        of_each = level if self.per_atom else pooled(level, graph)
        result = result * (of_each @ self.scale)
        if "shift" not in self.own:
            return result
        if self.shift.dim() == 2:
            shifts = self.shift.index_select(1, graph.atomic_numbers).mT
            return result + graph.sum_over_systems((level * shifts).sum(dim=1))
        shift = of_each @ self.shift
        return result + (shift * graph.atoms_per_system() if is_extensive(self.head) else shift)

    def calibrate(self, name: str, samples: Sequence[Sample]) -> None:
        """Calibrate each level on its own samples; levels of an energy share the scale, found after references."""
        for k, level in enumerate(self.levels):
            one, some = copy.deepcopy(self.head), self.of_level(level, samples)
            if not len(values(name, some)):
                continue
            one.calibrate(name, some)
            for own in self.own:
                getattr(self, own)[k] = getattr(one, own)
        if isinstance(self.head, EnergyHead):
            self.head.calibrate(name, [self._without_references(name, sample) for sample in samples])
            self.head.references.zero_()

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *others: Any) -> None:
        """Also of models whose sums had one shift for all elements."""
        if "shift" in self.own:
            spread_over_elements(state, f"{prefix}shift", self.shift)
        super()._load_from_state_dict(state, prefix, *others)

    def of_level(self, level: str, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that are of this level."""
        return [sample for sample in samples if np.any(sample.inputs.get(level_input(level), 0.0))]

    def at(self, level: str) -> Head:
        """What the head is at one level: a plain one, with weights of its own."""
        head = copy.deepcopy(self.head)
        for name in self.own:
            getattr(head, name).copy_(getattr(self, name)[self.levels.index(level)])
        return head

    def start_from(self, other: Head) -> None:
        """Go on from a head of the kind that is shared, or from one of levels; a new level is as the first one is."""
        levels = other.levels if isinstance(other, LevelHead) else ()
        begin = {level: level if level in levels else next(iter(levels), "") for level in self.levels}
        plain = {start: other.at(start) if isinstance(other, LevelHead) else other for start in begin.values()}
        neutral = {name: getattr(self.head, name).clone() for name in self.own}
        self.head.load_state_dict({**next(iter(plain.values())).state_dict(), **neutral})
        for k, level in enumerate(self.levels):
            for name in self.own:
                getattr(self, name)[k] = getattr(plain[begin[level]], name)

    def _without_references(self, name: str, sample: Sample) -> Sample:
        if name not in sample.targets:
            return sample
        known = [k for k, level in enumerate(self.levels) if self.of_level(level, [sample])]
        references = self.references[known].sum(dim=0).numpy(force=True)[sample.atoms.numbers].sum()
        return sample._replace(targets={**sample.targets, name: sample.targets[name] - references})


class AskedHead(Head):
    """A head per atom, for atoms near which another one is missing, and that are told its element.

    That element is an input of the graph, its atomic number; zero where nothing is asked, as where a graph has none.

    Args:
        head: what sees an atom's scalars plus an embedding of that element.
    """

    per_atom = True

    def __init__(self, head: Head):
        super().__init__()
        self.head = copy.deepcopy(head)
        self.needs = head.needs
        self.width: int = head.width  # type: ignore[assignment]
        self.element = nn.Embedding(LAST_ELEMENT + 1, self.width)  # row 0 is of atoms that are not asked

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        given = graph.inputs.get(MISSING)
        missing = torch.zeros_like(graph.atomic_numbers) if given is None else given.squeeze(1).long()
        return self.head(features._replace(scalars=features.scalars + self.element(missing)), graph)


def level_input(level: str) -> str:
    """The name of the input of a graph that says whether a structure is of this level of theory."""
    return f"level_{level}"


def with_levels(head: Head, levels: Sequence[str]) -> Head:
    """The head as levels share it; itself where it has no references, scale or shift that would differ."""
    scaled = isinstance(head, ScalarHead | CompositionHead | AtomHead | DeviationHead)
    if isinstance(head, EnergyHead) or (scaled and not getattr(head, "classes", 0)):
        return LevelHead(head, levels)
    return head


def is_extensive(head: Head) -> bool:
    """Whether what a head gives is a sum over the atoms of a structure."""
    sums = isinstance(head, EnergyHead) or getattr(head, "pooling", "") == "sum"
    return sums or getattr(head, "kind", "") == "extensive"


def pooled(per_atom: Tensor, graph: AtomGraph, score: Tensor | None = None) -> Tensor:
    """Mean over the atoms of each structure, or the attention-weighted mean for `score` (n_atoms, 1)."""
    if score is None:
        counts = graph.atoms_per_system().clamp(min=1).to(per_atom.dtype)
        return graph.sum_over_systems(per_atom) / counts.view(-1, *[1] * (per_atom.dim() - 1))
    return weighted_mean(per_atom, score, graph.system_idx, graph.n_systems)


def spread_over_elements(state: dict[str, Tensor], name: str, wanted: Tensor) -> None:
    """Turn one shift for all elements, as it was saved, into one for each."""
    if name in state and state[name].dim() == wanted.dim() - 1:
        state[name] = state[name].unsqueeze(-1).expand_as(wanted).clone()


def spread_of_energies(name: str, samples: Sequence[Sample]) -> float:
    """RMS of energies per atom (eV/atom) after references; one where there are no labels.

    With less than two labels to a reference it is counted per degree of freedom that the references leave. Where they
    leave less than three, a fit says nothing of the spread: then it is what the RMS force does over 0.1 Å, or, without
    forces, the spread of the energies per atom themselves.
    """
    numbers, energies = labelled_totals(name, samples)
    if len(energies) == 0:
        return 1.0
    fixed = isolated_energies(name, samples)
    references = fit_references(numbers, energies, fixed)
    counts = np.array([len(z) for z in numbers])
    residuals = (energies - [references[z].sum() for z in numbers]) / counts
    composition = np.stack([np.bincount(z, minlength=LAST_ELEMENT + 1) for z in numbers])
    composition[:, list(fixed)] = 0
    freedom = len(energies) - np.linalg.matrix_rank(composition)
    if 2 * freedom >= len(energies):
        return rms(residuals, energies)
    if freedom >= 3:
        return rms(residuals * np.sqrt(len(energies) / freedom), energies)
    forces = values("forces", samples)
    return 0.1 * rms(forces) if len(forces) else rms(energies / counts - (energies / counts).mean(), energies)


def isolated_energies(name: str, samples: Sequence[Sample]) -> dict[int, float]:
    """Energies of the structures marked `config_type=IsolatedAtom`, by atomic number."""
    lone = [s for s in samples if is_isolated_atom(s.atoms) and np.isfinite(s.targets.get(name, [np.nan])[0])]
    return {int(s.atoms.numbers[0]): float(s.targets[name][0]) for s in lone}


def labelled_totals(name: str, samples: Sequence[Sample]) -> tuple[list[np.ndarray], np.ndarray]:
    """Atomic numbers and labels of the samples that have a finite label per structure."""
    found = [(s.atoms.numbers, float(s.targets[name][0])) for s in samples if name in s.targets]
    found = [(z, e) for z, e in found if np.isfinite(e) and len(z)]
    return [z for z, _ in found], np.array([e for _, e in found])


def values(name: str, samples: Sequence[Sample]) -> np.ndarray:
    """All finite labels of this name, joined along the leading axis."""
    rows = [np.asarray(s.targets[name], float) for s in samples if name in s.targets]
    rows = [r[np.isfinite(r).reshape(len(r), -1).all(axis=1)] for r in rows]
    return np.concatenate(rows) if rows else np.zeros(0)


def _sizes_and_labels(name: str, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    numbers, labels = labelled_totals(name, samples)
    return np.array([len(z) for z in numbers]), labels


def rms(x: np.ndarray, differences_of: np.ndarray | float = 0.0) -> float:
    """Root mean square; one where there is nothing to scale by (no labels, or all of them equal).

    Given the numbers that `x` are differences of, what their rounding leaves counts as nothing.
    """
    nothing = 1e-12 * max(1.0, float(np.abs(differences_of).max(initial=0.0)))
    rms = float(np.sqrt(np.mean(np.square(x)))) if np.size(x) else 0.0
    return rms if rms > nothing else 1.0


def _pairs(system: Tensor, n_systems: int) -> tuple[Tensor, Tensor]:
    """Receivers and senders of all ordered pairs, oneself included, of members that follow each other by system."""
    sizes = torch.bincount(system, minlength=n_systems)
    partners = sizes.index_select(0, system)  # (n_members,)
    receivers = torch.repeat_interleave(partners)
    place = torch.arange(len(receivers), device=system.device)
    begins = (partners.cumsum(0) - partners).index_select(0, receivers)  # where the pairs of the receiver begin
    first = (sizes.cumsum(0) - sizes).index_select(0, system).index_select(0, receivers)
    return receivers, first + place - begins


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} is '{value}', but must be one of {', '.join(choices)}")

"""Masking as a well-posed question: each neighbour of a removed atom gives a distribution (after arXiv:2502.08209)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import ase
import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from ..errors import InputError
from ..graph import Batch, Cutoff, Neighbors, Sample
from ..heads import MISSING, AskedHead, AtomHead, VectorHead
from ..model import Output
from ..molecules import molecules
from .base import Loss, Quantity
from .mask import MASKED, Removal

NUMBERS = 5  # of a ring, beside its axis
SMALL = 1e-2  # of an output called axis: a shorter one has little direction, and its ring becomes a sphere
MOST_CLUES = 3_000  # atoms that the floor of the loss is computed from, and at most as many more


class MaskPositions(Removal):
    """Atoms are removed; each atom near one says where it was, by a distribution over space, and which element is told.

    At every access atoms are chosen afresh and taken away with their images. What is left within `radius` of such a
    place is flagged and asked for it; an atom near several is asked for one of them, drawn at random. Where nobody is
    near, the structure stays whole. The error is -ln p of the vector from there to the removed atom, with p per Å^3.

    p is a mixture of rings: each is symmetric about an axis, which is a vector output ("axis_1" and on), with scalars
    (output "rings") that say what angle to it and what distance are likely,

        p(x) = Σ w exp(α t - β t²) / Z · N(ln r; m, s²) / r³,    t = x · axis / r,

    so that p turns with the structure, and its integral is one. α alone is a von Mises-Fisher distribution; with β
    there are rings proper, as where the other bonds of an atom tell the angle only. Neither a sphere nor distances are
    cut into bins.

    Args:
        fraction: of the atoms that may be removed; at least one of them, and two are left.
        atoms: which may be removed: "any", an element, or "leaf" for those with a single bond.
        radius: in Å, how far from a removed atom others are asked for it.
        rings: number of them in the mixture.
        resolution: width of the sharpest ring, in cosines and relative to the distance; sharper ones teach little.
        flag: the backbone is told which atoms are asked.
    """

    target: ClassVar[str] = "position"

    def __init__(
        self,
        fraction: float = 0.05,
        atoms: str = "any",
        radius: float = 3.5,
        rings: int = 4,
        resolution: float = 0.05,
        flag: bool = True,
    ):
        if not 0 < fraction < 1:
            raise InputError(
                f"fraction is {fraction}, but must be above 0 and below 1 of the atoms, or nothing is left to be asked"
            )
        if atoms not in ("any", "leaf", *chemical_symbols[1:]):
            raise InputError(f"atoms is '{atoms}', but must be any, an element such as H, or leaf for one bond")
        if not 0 < radius < 20:
            raise InputError(f"radius is {radius} Å, but must be above 0 and below 20 Å; 3 to 5 is usual")
        if not 1 <= rings <= 100:
            raise InputError(f"{rings} rings make no distribution: choose between 1 and 16")
        if not 0.02 <= resolution <= 0.5:
            raise InputError(f"resolution is {resolution}, but must be between 0.02 and 0.5; 0.05 is usual")
        self.fraction = fraction
        self.atoms = atoms
        self.radius = radius
        self.rings = rings
        self.resolution = resolution
        self.flag = flag

    @property
    def axes(self) -> list[str]:
        """Names of the outputs that are axes."""
        return [f"axis_{k}" for k in range(1, self.rings + 1)]

    def outputs(self, width: int) -> dict[str, Output]:
        rings = AskedHead(AtomHead(width, classes=NUMBERS * self.rings))
        return {**{name: AskedHead(VectorHead(width)) for name in self.axes}, "rings": rings}

    def quantities(self) -> dict[str, Quantity]:
        return {name: Quantity(f"masking {name.replace('_', ' ')}", "") for name in [*self.axes, "rings"]}

    def _told(self, structures: Sequence[ase.Atoms]) -> str:
        return (
            f"a loss of {self.floor(structures, nearest=False):.3f} needs no directions, and one of "
            f"{self.floor(structures):.3f} only that to the nearest atom: a model that does not get clearly below that "
            "has learned little of what surrounds a place"
        )

    def floor(self, structures: Sequence[ase.Atoms], nearest: bool = True) -> float:
        """Loss of the best guess from the two elements, and from the direction to the nearest atom that is left.

        The guess is the best mixture, of any size, of the sharpest rings about that direction, or else of spheres; NaN
        where nothing can be masked. It is fitted to these structures, so that few of them make it too low.
        """
        clues: dict[tuple[int, int], list[tuple[float, float]]] = {}
        order = np.random.default_rng(0).permutation(len(structures))
        for k in order.tolist():
            rng = np.random.default_rng((0, k))
            some = _clues(self.prepare(structures[k], rng))
            if len(some) > MOST_CLUES:  # the work grows with their square
                some = [some[i] for i in rng.choice(len(some), MOST_CLUES, replace=False)]
            for pair, distance, cosine in some:
                clues.setdefault(pair, []).append((math.log(distance), cosine))
            if sum(map(len, clues.values())) >= MOST_CLUES:
                break
        logs = [_best(np.array(rows), self.resolution, nearest) for rows in clues.values()]
        return -float(np.concatenate(logs).mean()) if logs else float("nan")

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        candidates = self._candidates(atoms)
        wanted = max(1, int(self.fraction * len(candidates) + rng.random()))  # on average the fraction
        n = min(wanted, len(candidates), max(len(atoms) - 2, 0))
        kept = ~np.isin(np.arange(len(atoms)), rng.choice(candidates, n, replace=False))

        found = Cutoff(self.radius).neighbors(atoms)
        near = rng.permutation(np.flatnonzero(kept[found.receivers] & ~kept[found.senders]))
        if not len(near):
            kept[:] = True
        asked, first = np.unique(found.receivers[near], return_index=True)  # of several places one, all alike likely
        positions, missing = np.full((len(atoms), 3), np.nan), np.zeros((len(atoms), 1))
        positions[asked] = _vectors(atoms, found)[near[first]]
        missing[asked, 0] = atoms.numbers[found.senders[near[first]]]

        targets = {"position": positions[kept]}
        inputs = {MISSING: missing[kept]} | ({MASKED: np.sign(missing[kept])} if self.flag else {})
        if kept.all():
            return Sample(atoms, targets, inputs)
        seen = ase.Atoms(atoms.numbers[kept], atoms.positions[kept], cell=atoms.cell, pbc=atoms.pbc)
        return Sample(seen, targets, inputs)

    def wanted(self, targets: Mapping[str, Any]) -> list[str]:
        return [*self.axes, "rings"]

    def distribution(self, outputs: Mapping[str, Tensor]) -> Rings:
        """What outputs mean: the distribution of the removed atom about each atom."""
        axes = torch.stack([outputs[name] for name in self.axes], dim=1).double()
        axes = axes * torch.rsqrt(axes.square().sum(dim=2, keepdim=True) + SMALL**2)
        weights, slope, curvature, center, width = outputs["rings"].double().unflatten(1, (NUMBERS, -1)).unbind(dim=1)
        begin = self.radius * (torch.arange(self.rings, device=axes.device, dtype=axes.dtype) + 0.5) / self.rings
        return Rings(
            log_weights=torch.log_softmax(weights, dim=1),
            axes=axes,
            slope=torch.sinh(_bounded(slope, math.asinh(self.resolution**-2))),
            curvature=torch.exp(_bounded(curvature, math.log(self.resolution**-2 / 2))),
            center=torch.log(begin) + center,
            width=torch.sqrt(self.resolution**2 + torch.exp(2 * _bounded(width - 1, 5.0))),
        )

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        position = batch.targets["position"]
        present = torch.isfinite(position).all(dim=1)
        position = torch.where(present.unsqueeze(1), position, 1.0)  # a selection would wait for the GPU
        log = self.distribution(outputs).log_density(position, points=math.ceil(4 / self.resolution) + 8)
        return {"position": (torch.where(present, -log, 0.0).sum(), present.sum())}

    def _candidates(self, atoms: ase.Atoms) -> np.ndarray:
        """Atoms that may be removed."""
        if self.atoms == "any":
            return np.arange(len(atoms))
        if self.atoms == "leaf":
            return np.flatnonzero(np.bincount(molecules(atoms).bonds[:, 0], minlength=len(atoms)) == 1)
        return np.flatnonzero(atoms.numbers == atomic_numbers[self.atoms])

    def _hindrance(self, atoms: ase.Atoms) -> str | None:
        """Why nothing of a structure can be removed, or nobody is near enough to be asked."""
        far, small, none = self._advice()
        candidates = self._candidates(atoms)
        if not len(candidates):
            return none
        if len(atoms) < 3:
            return small
        found = Cutoff(self.radius).neighbors(atoms)
        near = np.isin(found.senders, candidates) & (found.senders != found.receivers)
        return None if near.any() else far

    def _advice(self) -> dict[str, str]:
        """Hindrances, and what to do about each; those first that lie nearest to success."""
        name = {"leaf": "leaf (atom with one bond)", "any": "atom"}.get(self.atoms, self.atoms)
        return {
            f"no other atom is within {self.radius:g} Å of any {name}": "give a larger radius",
            "structures have less than three atoms": "choose others, or repeat cells, as atoms.repeat(2) does",
            f"there is no {name}": "choose atoms='any' or another element, or other structures",
        }


class Rings(NamedTuple):
    """For each atom a distribution over the space around it, as a mixture: (n_atoms, n_rings) each, axes with xyz."""

    log_weights: Tensor
    axes: Tensor  # (n_atoms, n_rings, 3), not longer than one; the shorter, the nearer to a sphere
    slope: Tensor  # α, of the logarithm in the cosine
    curvature: Tensor  # β, not negative
    center: Tensor  # m, of the logarithm of the distance in Å
    width: Tensor  # s

    def log_density(self, x: Tensor, points: int = 88) -> Tensor:
        """ln p, with p in Å^-3, of a vector from each atom: (n_atoms, 3) to (n_atoms,).

        Z is a Gauss-Legendre sum over the cosine: with 4 / resolution + 8 points its error is below 1e-8 for the
        sharpest rings, and it has no small differences of large numbers, as its closed forms have for flat ones.
        """
        log_r = 0.5 * torch.log(x.square().sum(dim=1, keepdim=True))  # (n_atoms, 1)
        cosine = (self.axes @ (x * torch.exp(-log_r)).unsqueeze(2)).squeeze(2)
        length = torch.sqrt(self.axes.square().sum(dim=2) + 1e-12)  # without a kink where an axis vanishes
        nodes, weights = (x.new_tensor(values) for values in _legendre(points))
        along = length.unsqueeze(2) * nodes  # (n_atoms, n_rings, points)
        around = self.slope.unsqueeze(2) * along - self.curvature.unsqueeze(2) * along**2
        log_z = math.log(2 * math.pi) + torch.logsumexp(around + torch.log(weights), dim=2)

        angle = self.slope * cosine - self.curvature * cosine**2 - log_z
        distance = -0.5 * ((log_r - self.center) / self.width) ** 2 - torch.log(self.width) - math.log(2 * math.pi) / 2
        return torch.logsumexp(self.log_weights + angle + distance, dim=1) - 3 * log_r.squeeze(1)


@lru_cache(maxsize=16)
def _legendre(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return nodes, weights


def _bounded(x: Tensor, bound: float) -> Tensor:
    """As it is near zero, and never beyond ± bound."""
    return bound * torch.tanh(x / bound)


def _vectors(atoms: ase.Atoms, found: Neighbors) -> np.ndarray:
    """From receivers to senders, in Å: (n_edges, 3)."""
    images = found.shifts @ np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)
    vectors: np.ndarray = atoms.positions[found.senders] - atoms.positions[found.receivers] + images
    return vectors


def _clues(sample: Sample) -> list[tuple[tuple[int, int], float, float]]:
    """Of each asked atom: the two elements, the distance, and the cosine with the direction to the nearest atom."""
    atoms, target, missing = sample.atoms, sample.targets["position"], sample.inputs[MISSING][:, 0]
    asked = np.isfinite(target).all(axis=1)
    if not asked.any():
        return []
    found = Cutoff(6.0).neighbors(atoms)
    vectors, lengths = _vectors(atoms, found), found.lengths(atoms)
    order = np.lexsort((lengths, found.receivers))
    receivers, first = np.unique(found.receivers[order], return_index=True)
    clues = []
    for atom, edge in zip(receivers.tolist(), order[first].tolist(), strict=True):
        if asked[atom]:
            distance = float(np.linalg.norm(target[atom]))
            cosine = float(target[atom] @ vectors[edge]) / (distance * lengths[edge])
            clues.append(((int(atoms.numbers[atom]), int(missing[atom])), distance, cosine))
    return clues


def _best(rows: np.ndarray, resolution: float, angles: bool) -> np.ndarray:
    """ln p of rows (ln r, cosine) in the mixture of the sharpest rings that makes their product largest: (n_rows,).

    That mixture has no more rings than rows, and its weights are found by expectation and maximisation.
    """
    from scipy.special import ndtr  # it takes half a second

    log_r, cosines = rows.T
    apart = (log_r[:, None] - log_r) ** 2
    total = np.full(len(rows), math.sqrt(2 * math.pi) * resolution * 4 * math.pi)
    if angles:
        apart += (cosines[:, None] - cosines) ** 2
        within = ndtr((1 - cosines) / resolution) - ndtr((-1 - cosines) / resolution)
        total *= math.sqrt(2 * math.pi) * resolution * within / 2
    kernels = np.exp(-0.5 * apart / resolution**2) / total
    weights = np.full(len(rows), 1 / len(rows))
    for _ in range(50):
        weights *= (kernels / (kernels @ weights)[:, None]).mean(axis=0)
    logs: np.ndarray = np.log(kernels @ weights) - 3 * log_r
    return logs

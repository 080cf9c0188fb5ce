"""Probes: what a frozen backbone already knows, read off by a ridge regression or a Gaussian process in seconds."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import ase
import numpy as np
import torch
from torch import Tensor

from ..backbones.base import Features
from ..data.split import materials
from ..errors import InputError
from ..evaluate import PRINTED
from ..features import features
from ..graph import AtomGraph
from ..heads import Head, pooled
from ..model import SMOOTH, Model
from ..objectives import Objective, Potential, Property

MOST_POINTS = 2_000  # that a Gaussian process is fitted to: time grows with their cube
MOST_TRIED = 400  # and that its length and noise are chosen on
PENALTIES = np.logspace(-2, 5, 22)
NOISIER = (1, 10, 100)  # times the noise that frames ask for, tried where a material has several of them


class ProbeHead(Head):
    """A property from means and standard deviations, over atoms, of all layers' invariants: a fit, not a training.

    The value is linear in them (ridge regression), or a sum over the structures it was fitted to of how alike they are
    (a Gaussian process with a squared-exponential kernel); both are fitted in closed form.

    Args:
        features: numbers per atom, of all layers together.
        support: structures that a Gaussian process was fitted to; zero for a ridge regression.
        kind: "intensive", or "extensive" for the value of an atom times the number of atoms.
    """

    needs = frozenset({"layers"})
    center: Tensor
    stretch: Tensor
    weights: Tensor
    points: Tensor
    length: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, features: int, support: int = 0, kind: str = "intensive"):
        super().__init__()
        if kind not in ("intensive", "extensive"):
            raise InputError(f"kind is '{kind}', but a probe gives one number per structure: intensive or extensive")
        self.features = features
        self.support = support
        self.kind = kind
        n = 2 * features
        exact = {"dtype": torch.float64}
        self.register_buffer("center", torch.zeros(n, **exact))  # type: ignore[call-overload]
        self.register_buffer("stretch", torch.ones(n, **exact))  # type: ignore[call-overload]
        self.register_buffer("weights", torch.zeros(support or n, **exact))  # type: ignore[call-overload]
        self.register_buffer("points", torch.zeros(support, n, **exact))  # type: ignore[call-overload]
        self.register_buffer("length", torch.ones((), **exact))  # type: ignore[call-overload]
        self.register_buffer("shift", torch.zeros((), **exact))  # type: ignore[call-overload]
        self.register_buffer("scale", torch.ones((), **exact))  # type: ignore[call-overload]

    def forward(self, features: Features, graph: AtomGraph) -> Tensor:
        assert features.layers is not None
        z = (summary(features.layers, graph).double() - self.center) * self.stretch
        if self.support:
            distance2 = (z.unsqueeze(1) - self.points).square().sum(dim=2)
            values = torch.exp(-0.5 * distance2 / self.length**2) @ self.weights
        else:
            values = z @ self.weights
        values = values * self.scale + self.shift
        return values * graph.atoms_per_system() if self.kind == "extensive" else values


def probes(objective: Objective) -> bool:
    """Whether a probe can learn this: one number per structure, or an energy and its derivatives."""
    if isinstance(objective, Potential):
        return objective.conservative
    return isinstance(objective, Property) and objective.task == "regression" and objective.kind != "per-atom"


def probed(
    model: Model, objective: Property, structures: Sequence[ase.Atoms], edges: int
) -> tuple[Model, dict[str, Any]]:
    """The model with a probe as its only output, fitted to the labels of the structures, and how well that went."""
    rng = np.random.default_rng(0)  # no property looks at it
    labels = np.array([float(objective.prepare(atoms, rng).targets[objective.output][0]) for atoms in structures])
    known = np.flatnonzero(np.isfinite(labels))
    if not len(known):
        raise InputError(f"no training structure has '{objective.name}': split the data in another way")
    chosen = [structures[int(i)] for i in known]
    sizes = np.array([len(atoms) for atoms in chosen]) if objective.kind == "extensive" else 1.0
    table = features(model, chosen, edges=edges, device=str(next(model.parameters()).device), verbose=False)
    head, report = fitted(table.values, labels[known] / sizes, objective.kind, materials(chosen))
    probe = Model(model.backbone, {objective.output: head}, model.card)
    return probe.to(next(model.parameters()).device).eval(), report


def told_of_probe(report: Mapping[str, Any]) -> str:
    """What was fitted and how well, in one sentence."""
    if "errors of what is left out" in report:  # an energy
        errors = ", ".join(_told_of_errors(*each) for each in report["errors of what is left out"].items())
        along = f"along {report['features']} directions of the features of the frozen backbone"
        return f"{report['probe']}, {along} (mean errors of what is left out, before and after: {errors})"
    errors = ", ".join(f"{name} {error:.4g}" for name, error in report["leave-one-out errors"].items())
    one = f"one of {report['materials']} materials" if "materials" in report else "one structure"
    return f"{report['probe']} on {report['features']} features of the frozen backbone (errors without {one}: {errors})"


def _told_of_errors(name: str, found: Mapping[str, Any]) -> str:
    unit, factor = PRINTED.get(found["unit"], (found["unit"], 1.0))
    return f"{name} {factor * found['before']:.4g} to {factor * found['after']:.4g} {unit}"


def summary(layers: Mapping[str, Tensor], graph: AtomGraph) -> Tensor:
    """Means, then standard deviations, over the atoms of each structure: (n_systems, twice the numbers per atom)."""
    x = torch.cat(list(layers.values()), dim=1)
    mean = pooled(x, graph)
    spread = pooled((x - mean.index_select(0, graph.system_idx)).square(), graph)
    return torch.cat([mean, torch.sqrt(spread + SMOOTH)], dim=1)


def fitted(
    x: np.ndarray, y: np.ndarray, kind: str = "intensive", groups: np.ndarray | None = None
) -> tuple[ProbeHead, dict[str, Any]]:
    """The probe with the smaller leave-one-out error, and what was tried.

    A whole material is left out at a time, or its frames would vouch for each other: the errors are those on new
    materials. Where no material has two structures, or all are of one, a structure is left out at a time. No fit is
    repeated for that: what is left out changes the fit by a known amount.

    Args:
        x: `summary` of each structure, (n_structures, n).
        y: labels, (n_structures,); of an extensive property per atom.
        groups: the material of each structure, (n_structures,); without it, each is one of its own.

    Raises:
        InputError: for fewer than three labels, or structures that all look alike.
    """
    if len(y) < 3:
        raise InputError(f"a probe needs at least three labels, but there are {len(y)}")
    shift, scale = float(y.mean()), float(y.std()) or 1.0
    center, spread = x.mean(axis=0), x.std(axis=0)
    known = spread > 1e-6 * np.abs(center).max(initial=1.0)
    if not known.any():
        raise InputError("all structures look the same to this model: there is nothing to probe")
    stretch = np.where(known, 1 / np.where(known, spread, 1.0), 0.0) / np.sqrt(known.sum())
    z, target = (x - center) * stretch, (y - shift) / scale

    left = _left_out(groups, len(y))
    linear, linear_error = _ridge(z, target, PENALTIES / known.sum(), left)
    errors = {"ridge": linear_error * scale}
    process = _process(z, target, left) if len(y) <= MOST_POINTS else None
    if process is not None:
        errors["Gaussian process"] = process[2] * scale
    best = min(errors, key=errors.__getitem__)
    report = {"probe": best, "leave-one-out errors": errors, "features": int(known.sum())}
    if len(left) < len(y):
        report["materials"] = len(left)

    if best == "ridge" or process is None:
        head = ProbeHead(x.shape[1] // 2, kind=kind)
        weights = linear
    else:
        weights, length, _ = process
        head = ProbeHead(x.shape[1] // 2, len(y), kind)
        head.points.copy_(torch.from_numpy(z))
        head.length.fill_(length)
    head.weights.copy_(torch.from_numpy(weights))
    head.center.copy_(torch.from_numpy(center))
    head.stretch.copy_(torch.from_numpy(stretch))
    head.scale.fill_(scale)
    head.shift.fill_(shift)
    return head, report


def _left_out(groups: np.ndarray | None, n: int) -> list[np.ndarray]:
    """Indices of what is left out at a time: of each material, or of each structure where materials tell nothing."""
    if groups is None or len(np.unique(groups)) in (1, n):
        return list(np.arange(n)[:, None])
    order = np.argsort(groups, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _ridge(z: np.ndarray, y: np.ndarray, penalties: np.ndarray, left: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Weights with the penalty of the least leave-one-out error, and that error (mean absolute); z and y are centred.

    With the hat matrix H, labels y and predictions Hy, what is left out is missed by (1 - H_gg)^-1 (y - Hy)_g.
    """
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    constant = np.full((len(y), 1), len(y) ** -0.5)  # the offset, which is not penalised
    found = []
    for penalty in penalties:
        half = np.hstack([u * (s / np.sqrt(s**2 + penalty)), constant])  # H = half halfᵀ
        missed = y - half @ (half.T @ y)
        found.append(sum(np.abs(_without(half[own], missed[own])).sum() for own in left) / len(y))
    best = int(np.argmin(found))
    return vt.T @ (s / (s**2 + penalties[best]) * (u.T @ y)), float(found[best])


def _without(half: np.ndarray, missed: np.ndarray) -> np.ndarray:
    """(1 - half halfᵀ)^-1 missed, on the shorter side of half."""
    n, k = half.shape
    if n <= k:
        return np.asarray(np.linalg.solve(np.eye(n) - half @ half.T, missed))
    return np.asarray(missed + half @ np.linalg.solve(np.eye(k) - half.T @ half, half.T @ missed))


def _process(z: np.ndarray, y: np.ndarray, left: Sequence[np.ndarray]) -> tuple[np.ndarray, float, float]:
    """Weights of the points, length and leave-one-out error (mean absolute) of a Gaussian process.

    Length and noise are the likeliest. Frames of one material agree better than materials do, so where these are left
    out, more noise is tried too.
    """
    from sklearn.exceptions import ConvergenceWarning  # these take a second to import
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    some = np.unique(np.linspace(0, len(y) - 1, min(len(y), MOST_TRIED)).astype(int))
    kernel = ConstantKernel(1.0, (1e-2, 1e4)) * RBF(1.0, (1e-1, 1e2)) + WhiteKernel(0.1, (1e-6, 1e1))
    with warnings.catch_warnings():  # a bound that is reached is no harm: the leave-one-out error judges what is found
        warnings.simplefilter("ignore", ConvergenceWarning)
        likely = GaussianProcessRegressor(kernel, random_state=0).fit(z[some], y[some]).kernel_
    amplitude, length, noise = likely.k1.k1.constant_value, likely.k1.k2.length_scale, likely.k2.noise_level
    alike = amplitude * RBF(length)(z)
    found = []
    for noisier in NOISIER if len(left) < len(y) else (1,):
        inverse = np.linalg.inv(alike + noisier * noise * np.eye(len(y)))
        alpha = inverse @ y
        error = sum(np.abs(_missed(inverse, alpha, own)).sum() for own in left) / len(y)
        found.append((amplitude * alpha, float(length), float(error)))
    return min(found, key=lambda each: each[2])


def _missed(inverse: np.ndarray, alpha: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Labels minus what the others say of them: (K^-1)_gg^-1 (K^-1 y)_g (Rasmussen and Williams, Eq. 5.12)."""
    return np.asarray(np.linalg.solve(inverse[np.ix_(own, own)], alpha[own]))

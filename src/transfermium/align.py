"""Alignment: the references and scales of kept heads, fitted again to new labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from .console import and_, console, table
from .data.load import count_edges, plan
from .graph import Sample, is_isolated_atom, to_batch
from .heads import (
    EnergyHead,
    Head,
    LevelHead,
    TensorHead,
    VectorHead,
    is_extensive,
    labelled_totals,
    values,
)
from .model import Model
from .objectives import Objective
from .references import fit_references, fit_shifts


def align_references(
    model: Model,
    objective: Objective,
    samples: Sequence[Sample],
    was: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """Fit the references of heads to the residuals of labels, in place, and say what changed.

    An energy's references move per element, by least squares with a ridge towards the old ones, all moved by the
    mean residual per atom (see `references.per_element`); so do the shifts of a sum, of elements without labels by that
    mean; other heads move by one constant. The scale of a head that was trained on another quantity
    (noise, say) is fitted first. The report has mean absolute residuals before and after, in eV/atom for energies.

    Args:
        samples: with targets in the units of `objective`.
        was: quantities that the outputs meant before: name to [name, unit].
        names: of the heads.
    """
    report: dict[str, Any] = {}
    meaning = objective.quantities()
    for name in names:
        head: Head = model.heads[name]  # type: ignore[assignment]
        own, seen = objective.calibration(name, samples)
        before, now = was.get(name), meaning.get(name)
        kind = head.head if isinstance(head, LevelHead) else head
        if isinstance(kind, EnergyHead | VectorHead) and before and now and before[0] != now.name:
            report.setdefault("scale", {})[name] = _fit_scale(model, kind, head, name, own, seen)
        if isinstance(kind, EnergyHead):
            for of, references, some in by_level(head, "references", name, seen):
                shifts = _shift_elements(model, references, name, own, some)
                if "residual" in shifts:
                    report.setdefault("residual", {})[of] = shifts.pop("residual")
                report |= {key if of == "energy" else f"{key} of {of}": found for key, found in shifts.items()}
        elif hasattr(kind, "shift") and not isinstance(kind, TensorHead) and not getattr(kind, "classes", 0):
            for of, shifted, some in by_level(head, "shift", name, seen):
                move = _shift_sums if getattr(kind, "pooling", "") == "sum" else _shift_all
                for key, found in move(model, kind, shifted, name, own, some).items():
                    report.setdefault(key, {})[of] = found
    return report


def by_level(
    head: Head, buffer: str, name: str, samples: Sequence[Sample]
) -> Iterator[tuple[str, Tensor, Sequence[Sample]]]:
    """Of a head, or of each level that has it: the name, a buffer to be changed in place, and the samples."""
    if not isinstance(head, LevelHead):
        yield name, getattr(head, buffer), samples
        return
    for level, row in zip(head.levels, getattr(head, buffer), strict=True):
        yield f"{level} {name}", row, head.of_level(level, samples)


def _residuals(model: Model, extensive: bool, name: str, own: str, samples: Sequence[Sample]) -> np.ndarray:
    """What is left of known targets called `own`, per atom if `extensive`."""
    if not samples:
        return np.zeros(0)
    targets = np.concatenate([np.asarray(s.targets[own], float) for s in samples])
    sizes = np.array([len(s.atoms) for s in samples]) if extensive else 1
    residuals = (targets - _predictions(model, samples, name)) / sizes
    return residuals[np.isfinite(residuals)]


def _left_of_totals(
    model: Model, name: str, own: str, samples: Sequence[Sample]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Atomic numbers of the structures that have a target called `own`, and what is left of it."""
    labelled = [s for s in samples if np.isfinite(s.targets.get(own, [np.nan])[0])]
    if not labelled:
        return [], np.zeros(0)
    predicted = _predictions(model, labelled, name)
    left = [s._replace(targets={own: s.targets[own] - p}) for s, p in zip(labelled, predicted, strict=True)]
    return labelled_totals(own, left)


def _before_and_after(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    return {"before": float(np.abs(before).mean()), "after": float(np.abs(after).mean()), "labels": len(before)}


def _shift_elements(model: Model, references: Tensor, name: str, own: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Fit references of the head called `name`, in place, to what is left of targets called `own`."""
    # no model is trained on lone atoms
    numbers, energies = _left_of_totals(model, name, own, [s for s in samples if not is_isolated_atom(s.atoms)])
    if not numbers:
        return {}
    shift = fit_references(numbers, energies)
    references += torch.from_numpy(shift).to(references.device)

    composition = np.stack([np.bincount(z, minlength=len(shift)) for z in numbers])
    present = np.flatnonzero(composition.any(axis=0))
    symbols = [chemical_symbols[z] for z in present]
    labels = (composition[:, present] > 0).sum(axis=0)
    together = confounded(composition[:, present], symbols)
    sizes = composition.sum(axis=1)
    return {
        "reference shift (eV)": {chemical_symbols[z]: float(shift[z]) for z in present},
        "elements told apart": f"{np.linalg.matrix_rank(composition[:, present])} of {len(present)}",
        "labels per element": dict(zip(symbols, labels.tolist(), strict=True)),
        "residual": _before_and_after(energies / sizes, (energies - composition @ shift) / sizes) | {"unit": "eV/atom"},
        **({"not told apart": together} if together else {}),
    }


def _shift_all(
    model: Model, head: Head, shifted: Tensor, name: str, own: str, samples: Sequence[Sample]
) -> dict[str, Any]:
    """Move one number, in place, to the mean of what is left of the targets."""
    residuals = _residuals(model, is_extensive(head), name, own, samples)
    if not len(residuals):
        return {}
    shift = float(residuals.mean())
    shifted += shift
    return {"shift": shift, "residual": _before_and_after(residuals, residuals - shift)}


def _shift_sums(
    model: Model, head: Head, shifted: Tensor, name: str, own: str, samples: Sequence[Sample]
) -> dict[str, Any]:
    """Fit the shifts of the elements of a sum, in place, to what is left of the targets; residuals are per atom."""
    numbers, totals = _left_of_totals(model, name, own, samples)
    if not numbers:
        return {}
    shift = fit_shifts(numbers, totals)
    shifted += torch.from_numpy(shift).to(shifted.device)
    sizes = np.array([len(z) for z in numbers])
    after = (totals - [shift[z].sum() for z in numbers]) / sizes
    present = np.unique(np.concatenate(numbers))
    return {
        "shift": float((totals / sizes).mean()),
        "shift per element": {chemical_symbols[z]: float(shift[z]) for z in present},
        "residual": _before_and_after(totals / sizes, after),
    }


def confounded(composition: np.ndarray, symbols: Sequence[str]) -> list[str]:
    """Groups of elements whose energies compositions leave open, in words: "H and O (only as H2O)".

    Args:
        composition: atoms of each element, (n_structures, n_elements).
        symbols: of these elements.
    """
    rows = np.unique(composition, axis=0)
    _, sizes, basis = np.linalg.svd(rows.astype(float), full_matrices=False)
    known = basis[sizes > sizes.max() * max(rows.shape) * np.finfo(float).eps]
    free = np.eye(len(symbols)) - known.T @ known  # projects on what no composition can see

    groups: list[list[int]] = []
    for element in np.flatnonzero(free.diagonal() > 1e-9).tolist():
        linked = [group for group in groups if np.abs(free[element, group]).max() > 1e-9]
        groups = [group for group in groups if group not in linked] + [[*chain(*linked), element]]
    return [_spelled(sorted(group), free, rows, symbols) for group in groups]


def _spelled(group: list[int], free: np.ndarray, rows: np.ndarray, symbols: Sequence[str]) -> str:
    names = [symbols[k] for k in group]
    ways = round(len(group) - free[group, group].sum())
    if ways > 1:
        return f"{and_(names)} (in {ways} ways of {len(group)})"
    ratio = next(row for row in rows[:, group] if row.any())
    ratio = ratio // np.gcd.reduce(ratio)
    formula = "".join(f"{name}{n}" if n > 1 else name for name, n in zip(names, ratio.tolist(), strict=True))
    return f"{and_(names)} (only as {formula})"


def _fit_scale(
    model: Model, head: EnergyHead | VectorHead, whole: Head, name: str, own: str, samples: Sequence[Sample]
) -> float:
    """Give the head the scale at which its vectors best fit the labelled forces; at least a tenth of their RMS.

    `whole` is the head, or that of several levels which share it.
    """
    old = float(head.scale)
    vectors = "forces" if isinstance(head, EnergyHead) else own
    labels = values(vectors, samples)
    output = name.removesuffix(own) + vectors
    if len(labels) and output in model.outputs:
        samples = [s for s in samples if vectors in s.targets]
        predicted = _predictions(model, samples, output)
        targets = np.concatenate([s.targets[vectors] for s in samples])
        known = np.isfinite(targets).all(axis=1)
        p, t = predicted[known], targets[known]
        spread = float(np.square(p).mean()) or 1.0
        slope = float((p * t).mean()) / spread
        head.scale.fill_(old * max(slope, 0.1 * math.sqrt(float(np.square(t).mean()) / spread)))
    else:
        whole.calibrate(own, samples)
    return float(head.scale) / old


@torch.no_grad()
def _predictions(model: Model, samples: Sequence[Sample], name: str, budget: int = 10_000) -> np.ndarray:
    model.eval()
    counts = count_edges([s.atoms for s in samples], model.backbone.edges)
    parts = []
    for members in plan(counts, budget, np.arange(len(samples))):
        graph = to_batch([samples[i] for i in members], model.backbone.edges).graph
        parts.append(model(graph, [name])[name].double().cpu().numpy())
    return np.concatenate(parts)


def show_alignment(report: Mapping[str, Any]) -> None:
    for name, factor in report.get("scale", {}).items():
        console.print(f"Alignment: the scale of '{name}' was fitted to the labels (×{factor:.3g})")
    for name, shift in report.get("shift", {}).items():
        console.print(f"Alignment: '{name}' was shifted by {shift:.4g}{shifts_in_words(report, name)}")
    for of, shifts in reference_shifts(report).items():
        labels = report.get(f"labels per element{of}", {})
        rows = [
            {"element": symbol, "labels": str(labels.get(symbol, 0)), "shift (eV)": f"{value:+.3f}"}
            for symbol, value in shifts.items()
        ]
        told_apart = f"{report[f'elements told apart{of}']} elements told apart"
        console.print(table(f"Alignment: reference energies{of}, {told_apart}", rows))
        if together := report.get(f"not told apart{of}"):
            console.print(f"Alignment: {not_told_apart(together)}")
    for name, found in report.get("residual", {}).items():
        console.print(f"Alignment: {residual(name, found)}")


def shifts_in_words(report: Mapping[str, Any], name: str) -> str:
    """What the elements of a sum were shifted by, to follow its mean; nothing of other quantities."""
    shifts = report.get("shift per element", {}).get(name, {})
    said = ", ".join(f"{symbol} {shift:+.4g}" for symbol, shift in shifts.items())
    return f" per atom on average ({said})" if shifts else ""


def not_told_apart(groups: Sequence[str]) -> str:
    """What `confounded` found, in one sentence."""
    return f"these compositions do not tell apart {'; '.join(groups)}: only sums of their shifts have a meaning"


def residual(name: str, found: Mapping[str, Any]) -> str:
    """Mean absolute residuals of labels, in one sentence."""
    before, after = (f"{found[when]:.4g}" for when in ("before", "after"))
    unit = f" {found['unit']}" if "unit" in found else ""
    return f"the mean absolute residual of '{name}' on {found['labels']:,} labels goes from {before} to {after}{unit}"


def reference_shifts(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Shifts per element of what `align_references` says, by " of " and the head; the only energy goes without."""
    start = "reference shift (eV)"
    return {key.removeprefix(start): found for key, found in report.items() if key.startswith(start) and found}

"""Alignment: the references and scales of kept heads, fitted again to new labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols

from .console import console, table
from .data.load import count_edges, plan
from .graph import Sample, is_isolated_atom, to_batch
from .heads import (
    AtomHead,
    CompositionHead,
    EnergyHead,
    ScalarHead,
    VectorHead,
    fit_references,
    labelled_totals,
    values,
)
from .model import Model
from .objectives import Objective


def align_references(
    model: Model,
    objective: Objective,
    samples: Sequence[Sample],
    was: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """Fit the references of heads to the residuals of labels, in place, and say what changed.

    An energy's references move per element, by ridge-regularised least squares; other heads move by one constant. The
    scale of a head that was trained on another quantity (noise, say) is fitted first.

    Args:
        samples: with targets in the units of `objective`.
        was: quantities that the outputs meant before: name to [name, unit].
        names: of the heads.
    """
    report: dict[str, Any] = {}
    meaning = objective.quantities()
    for name in names:
        head = model.heads[name]
        own, seen = objective.calibration(name, samples)
        before, now = was.get(name), meaning.get(name)
        if isinstance(head, EnergyHead | VectorHead) and before and now and before[0] != now.name:
            report.setdefault("scale", {})[name] = _fit_scale(model, head, name, own, seen)
        if isinstance(head, EnergyHead):
            shifts = _shift_elements(model, head, name, own, seen)
            report |= {key if name == "energy" else f"{key} of {name}": found for key, found in shifts.items()}
        elif isinstance(head, ScalarHead | CompositionHead | AtomHead) and not getattr(head, "classes", 0) and seen:
            predictions = _predictions(model, seen, name)
            targets = np.concatenate([np.asarray(s.targets[own], float) for s in seen])
            extensive = getattr(head, "pooling", "") == "sum" or getattr(head, "kind", "") == "extensive"
            sizes = np.array([len(s.atoms) for s in seen]) if extensive else 1
            residuals = (targets - predictions) / sizes
            if np.isfinite(residuals).any():
                shift = float(np.nanmean(residuals))
                head.shift += shift
                report.setdefault("shift", {})[name] = shift
    return report


def _shift_elements(model: Model, head: EnergyHead, name: str, own: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Fit the references of the head called `name` to what is left of targets called `own`."""
    labelled = [s for s in samples if np.isfinite(s.targets.get(own, [np.nan])[0])]
    labelled = [s for s in labelled if not is_isolated_atom(s.atoms)]  # no model is trained on lone atoms
    if not labelled:
        return {}
    predicted = _predictions(model, labelled, name)
    residuals = [s._replace(targets={own: s.targets[own] - p}) for s, p in zip(labelled, predicted, strict=True)]
    numbers, energies = labelled_totals(own, residuals)
    shift = fit_references(numbers, energies, ridge=1e-4)
    head.references += torch.from_numpy(shift).to(head.references.device)

    composition = np.stack([np.bincount(z, minlength=len(shift)) for z in numbers])
    present = np.flatnonzero(composition.any(axis=0))
    return {
        "reference shift (eV)": {chemical_symbols[z]: float(shift[z]) for z in present},
        "elements told apart": f"{np.linalg.matrix_rank(composition[:, present])} of {len(present)}",
    }


def _fit_scale(model: Model, head: EnergyHead | VectorHead, name: str, own: str, samples: Sequence[Sample]) -> float:
    """Give the head the scale at which its vectors best fit the labelled forces; at least a tenth of their RMS."""
    old = float(head.scale)
    vectors = "forces" if isinstance(head, EnergyHead) else own
    labels = values(vectors, samples)
    output = name.removesuffix(own) + vectors
    if len(labels) and output in model.outputs:
        predicted = _predictions(model, samples, output)
        targets = np.concatenate([s.targets[vectors] for s in samples])
        known = np.isfinite(targets).all(axis=1)
        p, t = predicted[known], targets[known]
        spread = float(np.square(p).mean()) or 1.0
        slope = float((p * t).mean()) / spread
        head.scale.fill_(old * max(slope, 0.1 * math.sqrt(float(np.square(t).mean()) / spread)))
    else:
        head.calibrate(own, samples)
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
        console.print(f"Alignment: '{name}' was shifted by {shift:.4g}")
    for of, shifts in reference_shifts(report).items():
        rows = [{"element": symbol, "shift (eV)": f"{value:+.3f}"} for symbol, value in shifts.items()]
        told_apart = f"{report[f'elements told apart{of}']} elements told apart"
        console.print(table(f"Alignment: reference energies{of}, {told_apart}", rows))


def reference_shifts(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Shifts per element of what `align_references` says, by " of " and the head; the only energy goes without."""
    start = "reference shift (eV)"
    return {key.removeprefix(start): found for key, found in report.items() if key.startswith(start) and found}

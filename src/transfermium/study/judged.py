"""Errors of a model on test structures, one by one, as studies count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from torch import Tensor, zeros_like

from ..data import Labelled, resolve
from ..data.columns import count_elements
from ..dataset import subtractable
from ..evaluate import Pairs, compared, objective_of, output_of, without_reference
from ..model import Model
from ..objectives import Objective
from ..unseen import WITHOUT
from .ranking import WRONG


def errors_of(
    model: Model, structures: Sequence[Atoms], label: Mapping[str, str], unit: Mapping[str, str]
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Of each quantity the mean absolute error of each structure (of classes 0 or 1), and its unit."""
    return absolute(model, tested(model, structures, label, unit))


def tested(model: Model, structures: Sequence[Atoms], label: Mapping[str, str], unit: Mapping[str, str]) -> Pairs:
    """Labels and predictions of every test structure."""
    objective = objective_of(model).comparable()
    return compared(model, objective, labelled_for(objective, structures, label, unit), 10_000)


def absolute(model: Model, pairs: Pairs) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Errors of each structure, and units, from labels and predictions; quantities that some structures lack are left
    out."""
    errors: dict[str, list[float]] = {}
    units: dict[str, str] = {}
    for name, rows in pairs.items():
        if rows[0][1].shape != np.shape(rows[0][0]):
            errors[name] = [_wrong(np.asarray(target), output) for target, output in rows]
            units[name] = WRONG
            continue
        found = [np.abs(output - target) for target, output in rows]
        if not all(np.isfinite(each).any() for each in found):
            continue
        errors[name] = [float(np.nanmean(each)) for each in found]
        output = output_of(model, name.removesuffix("_per_atom"))
        unit = model.card["quantities"].get(output, ["", ""])[1]
        units[name] = f"{unit}/atom" if name == "energy_per_atom" else unit
    return errors, units


def _wrong(target: np.ndarray, output: np.ndarray) -> float:
    """Part of the classes, of those that are known, that are not the likeliest one."""
    known = np.isfinite(target)
    return float(np.mean(output.argmax(axis=-1)[known] != target[known]))


def labelled_for(
    objective: Objective, structures: Sequence[Atoms], label: Mapping[str, str], unit: Mapping[str, str]
) -> Labelled:
    """Structures with all labels that they have of an objective, in the units that are learned."""
    wanted = objective.labels()
    optional = list(wanted) if len(wanted) > 1 else []
    labels = resolve(structures, list(wanted), labels=label, units=unit, optional=optional)
    return Labelled(structures, subtractable(structures, labels, objective))


def guess_references(model: Model, structures: Sequence[Atoms], prior: Tensor | None = None) -> list[str]:
    """Give elements of the structures that no label had the mean reference of the others, or of a cheap level's
    references the mean shift, in place: a reference of zero would be an error of electronvolts per atom. Their symbols.
    """
    lacking = without_reference(model, np.flatnonzero(count_elements(structures)))
    known = [atomic_numbers[s] for s in model.card["elements"] if s not in model.card.get(WITHOUT, ())]
    if not (lacking and known):
        return lacking
    references: Tensor = model.heads["energy"].references  # type: ignore[assignment]
    before = zeros_like(references) if prior is None else prior.to(references)
    new = [atomic_numbers[s] for s in lacking]
    references[new] = before[new] + (references - before)[known].mean()
    return lacking

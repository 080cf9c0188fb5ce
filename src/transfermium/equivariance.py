"""How far outputs of a model are from turning with the structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ase
import numpy as np

from .data.load import VALIDATION, random_rotation, rng_of, turned, turned_rows
from .evaluate import PRINTED
from .graph import Neighbors, Sample, to_batch
from .heads import EnergyHead, LevelHead
from .model import Model
from .objectives import Objective


def equivariance_error(
    model: Model,
    structures: Sequence[ase.Atoms],
    objective: Objective | None = None,
    *,
    most: int = 10,
    rotations: int = 2,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Root mean square of f(Rx) - R f(x) over random rotations R of structures x, for every output f.

    Vectors and tensors have to turn with the structure, all else has to stay: where the backbone obeys rotation, what
    is found is rounding.

    Args:
        objective: shows the structures to the model as in its validation; by default they are seen as they are.
        most: structures at most, evenly spaced among those that are given.
        rotations: of each.

    Returns:
        `{output: {"rms", "unit", "size"}}`: energies per atom; "size", of vectors and tensors, is the RMS of f(x).
    """
    model.eval()
    chosen = np.unique(np.linspace(0, len(structures) - 1, min(most, len(structures))).astype(int))
    errors: dict[str, list[np.ndarray]] = {}
    sizes: dict[str, list[np.ndarray]] = {}
    for index in map(int, chosen):
        atoms = structures[index]
        rng = rng_of(seed, VALIDATION, 0, index)
        sample = Sample(atoms, {}) if objective is None else objective.prepare(atoms, rng)
        neighbors = model.backbone.edges.neighbors(sample.atoms)
        before = _outputs(model, sample, neighbors)
        for name, value in before.items():
            sizes.setdefault(name, []).append(value)
        for _ in range(rotations):
            rotation = random_rotation(rng)
            for name, value in _outputs(model, turned(sample, rotation), neighbors).items():
                due = turned_rows(before[name], rotation) if _turns(model, name) else before[name]
                errors.setdefault(name, []).append(value - due)

    quantities = model.card.get("quantities", {})
    found = {}
    for name, rows in errors.items():
        per_atom = "/atom" if isinstance(_head(model, name), EnergyHead) else ""
        entry = {"rms": _rms(rows), "unit": quantities.get(name, ["", ""])[1] + per_atom}
        found[name] = {**entry, "size": _rms(sizes[name])} if rows[0].ndim > 1 and _turns(model, name) else entry
    return {name: entry for name, entry in found.items() if np.isfinite(entry["rms"])}


def told_of_equivariance(errors: Mapping[str, Mapping[str, Any]]) -> str:
    """Those errors in words, in the units of tables."""
    words = []
    for name, found in errors.items():
        unit, factor = PRINTED.get(found["unit"], (found["unit"], 1.0))
        relative = f" ({found['rms'] / found['size']:.1%} of their size)" if found.get("size") else ""
        words.append(f"{name} {found['rms'] * factor:.3g} {unit}".rstrip() + relative)
    return ", ".join(words)


def _outputs(model: Model, sample: Sample, neighbors: Neighbors) -> dict[str, np.ndarray]:
    """Of one structure, energies per atom."""
    graph = to_batch([sample._replace(targets={})], model.backbone.edges, [neighbors]).graph
    found = {name: value.detach().double().cpu().numpy() for name, value in model(graph).items()}
    energies = [name for name in found if isinstance(_head(model, name), EnergyHead)]
    return found | {name: found[name] / len(sample.atoms) for name in energies}


def _head(model: Model, name: str) -> Any:
    output: Any = model.outputs[name]
    return output.head if isinstance(output, LevelHead) else output


def _turns(model: Model, name: str) -> bool:
    """Whether rows of three numbers are vectors, rather than scores of classes."""
    return not getattr(_head(model, name), "classes", 0)


def _rms(rows: Sequence[np.ndarray]) -> float:
    """Over all that is finite, as the stress of a molecule is not; NaN where nothing is."""
    values = np.concatenate([np.ravel(one) for one in rows])
    known = values[np.isfinite(values)]
    return float(np.sqrt(np.square(known).mean())) if len(known) else float("nan")

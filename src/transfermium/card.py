"""The card of a trained model: what it learned from what, and how well."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ase
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from .data.columns import codes, count_elements
from .data.labels import Labels
from .data.provenance import Comparison, listed
from .data.sequences import Subset
from .dataset import TrainingData, belonging_to
from .evaluate import compared, losses, scores
from .heads import (
    EnergyHead,
)
from .model import Model, described, of_level
from .objectives import Objective
from .objectives.together import Parts
from .train import TrainConfig
from .unseen import WITHOUT

MOST_POINTS = 2_000  # of a parity plot
MOST_STRUCTURES, MOST_ATOMS = 500, 50_000  # that are kept to be looked at


class Validation(NamedTuple):
    """What a model makes of structures that it was not trained on, by output."""

    errors: dict[str, Any]
    parity: dict[str, Any]  # "label", "prediction" and "unit", of components
    by_structure: dict[str, Any]  # the same of every structure, or "rmse" of what has several components; may be NaN


def validated(model: Model, objective: Objective, structures: Sequence[ase.Atoms], config: TrainConfig) -> Validation:
    """Errors and points of parity plots; of several objectives, each on the structures that are for it.

    Where outputs have no values to be compared with, "errors" has the terms of the loss.
    """
    if isinstance(objective, Parts):
        together = Validation({}, {}, {})
        meant = [objective.meant_for(structures[i]) for i in range(len(structures))]
        for name, part in objective.parts.items():
            places = [i for i, other in enumerate(meant) if other in (None, name)]
            if places:
                found = validated(model.part(name), part, Subset(structures, places), config)
                spread = {key: _spread(one, places, len(structures)) for key, one in found.by_structure.items()}
                for all_of_them, one in zip(together, found._replace(by_structure=spread), strict=True):
                    all_of_them.update({f"{name} {key}": value for key, value in one.items()})
        return together
    pairs = compared(model, objective, structures, config.edges, config.seed)
    if not pairs:
        return Validation(losses(model, objective, structures, config.edges, config.seed), {}, {})
    errors = scores(model, objective, pairs, [atoms.numbers for atoms in structures])
    return Validation(errors, _parity(pairs, errors), _by_structure(pairs, errors))


def some_of(structures: Sequence[ase.Atoms]) -> list[int]:
    """Indices of at most `MOST_STRUCTURES` structures, evenly spaced; of fewer where they are large."""
    most = min(len(structures), MOST_STRUCTURES)
    atoms = sum(len(structures[i]) for i in _evenly(len(structures), most))
    return _evenly(len(structures), max(1, most * MOST_ATOMS // atoms) if atoms > MOST_ATOMS else most)


def examples(structures: Sequence[ase.Atoms], by_structure: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Some of the validation structures as extended XYZ, without labels, and what is known of each of them."""
    from ase.io import write  # it takes half a second

    index = some_of(structures)
    text = io.StringIO()
    bare = [Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in (structures[i] for i in index)]
    write(text, bare, format="extxyz")
    known = {
        name: {key: value if key == "unit" else [_or_none(value[i]) for i in index] for key, value in found.items()}
        for name, found in by_structure.items()
    }
    return text.getvalue().encode(), {"index": index, "of": len(structures), "known": known}


def _evenly(n: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)).tolist() if n else []


def _spread(found: Mapping[str, Any], places: Sequence[int], n: int) -> dict[str, Any]:
    """Values of the structures at `places` as values of all `n`."""
    where = {place: k for k, place in enumerate(places)}
    return {
        key: value if key == "unit" else [value[where[i]] if i in where else math.nan for i in range(n)]
        for key, value in found.items()
    }


def _by_structure(pairs: Mapping[str, Any], errors: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for name, rows in pairs.items():
        if name not in errors or any(np.size(target) != np.size(output) for target, output in rows):
            continue  # no label at all, or classes
        unit = errors[name].get("unit", "")
        if all(np.size(target) == 1 for target, _ in rows):
            label, prediction = ([float(np.ravel(row[k])[0]) for row in rows] for k in (0, 1))
            result[name] = {"label": label, "prediction": prediction, "unit": unit}
        else:
            square = [np.square(np.ravel(output) - np.ravel(target)) for target, output in rows]
            known = [part[np.isfinite(part)] for part in square]
            result[name] = {"rmse": [math.sqrt(p.mean()) if len(p) else math.nan for p in known], "unit": unit}
    return result


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _parity(pairs: Mapping[str, Any], errors: Mapping[str, Any]) -> dict[str, Any]:
    """Labels and predictions, component by component, of at most `MOST_POINTS` per quantity."""
    result = {}
    for name, rows in pairs.items():
        label = np.concatenate([np.ravel(target) for target, _ in rows])
        prediction = np.concatenate([np.ravel(output) for _, output in rows])
        if label.shape == prediction.shape:
            known = np.flatnonzero(np.isfinite(label) & np.isfinite(prediction))
            chosen = known[np.unique(np.linspace(0, len(known) - 1, min(len(known), MOST_POINTS)).astype(int))]
            unit = errors.get(name, {}).get("unit", "")
            result[name] = {"label": label[chosen].tolist(), "prediction": prediction[chosen].tolist(), "unit": unit}
    return result


def card_of(
    model: Model, objective: Objective, data: TrainingData, history: list[Any], base: Model | None
) -> dict[str, Any]:
    earlier = base.card.get("elements", {}) if base is not None else {}
    missing = history[-1]["alignment"].get(WITHOUT, {})
    parts = _parts_of(model, objective, data, earlier, missing) if isinstance(objective, Parts) else ()
    quantities = quantities_of(model.outputs, objective, data.labels)
    return {
        "objective": described(objective),
        "quantities": quantities,
        "labels": data.labels.to_json(),
        **_seen((data.unlabelled, data.isolated), earlier),
        "references (eV)": _references(model.heads.values()),
        **({WITHOUT: missing.get("energy", [])} if missing else {}),
        **known_of(data),
        "history": history,
        "metrics": {"validation loss": history[-1]["best validation loss"]},
        **({"parts": dict(parts)} if parts else {}),
    }


def known_of(data: TrainingData) -> dict[str, Any]:
    """What is known of the labels beside their level; of several parts, by part."""
    found = {part: record for part, comparison in data.provenance.items() if (record := comparison.record())}
    return {"provenance": found.get("", found)} if found else {}


def theory(card: Mapping[str, Any]) -> str:
    """Levels of theory and provenance of a card in words; empty where nothing is known."""
    words = [listed(card["levels"])] if card.get("levels") else []
    for field, value in card.get("provenance", {}).items():
        if isinstance(value, Mapping):
            counts = all(isinstance(n, int) for n in value.values())
            value = listed(value) if counts else f"({theory({'provenance': value})})"  # of a part
        words.append(f"{field} {value}")
    return ", ".join(words)


def theory_in(known: Comparison) -> str:
    """The same of the labels that were compared."""
    return theory({"levels": known.total("level") if known.named else {}, "provenance": known.record()})


def theory_of(data: TrainingData) -> str:
    """The same of labels to be learned."""
    found = {part: theory_in(known) for part, known in data.provenance.items()}
    return "; ".join(f"{part}: {words}" if part else words for part, words in found.items() if words)


def _seen(structures: Sequence[Sequence[ase.Atoms]], earlier: Mapping[str, int]) -> dict[str, Any]:
    """Levels of theory and elements in structures, with the atoms of each that were seen `earlier`."""
    counts = np.sum([count_elements(some) for some in structures], axis=0)
    seen = Counter({chemical_symbols[z]: int(counts[z]) for z in np.flatnonzero(counts)})
    levels: Counter[str] = Counter()
    for some in structures:
        level_of, names = codes(some, "level", str)
        levels.update({str(name): int((level_of == i).sum()) for i, name in enumerate(names)})
    return {
        "levels": dict(levels),
        "elements": {symbol: int(n) for symbol, n in (Counter(earlier) + seen).items()},
        "elements in last stage": sorted(seen),
    }


def _references(heads: Iterable[Any]) -> dict[str, float]:
    """Of the first of these heads that is an energy."""
    energies = [head for head in heads if isinstance(head, EnergyHead)]
    references = energies[0].references.tolist() if energies else []
    return {chemical_symbols[z]: energy for z, energy in enumerate(references) if energy}


def quantities_of(names: Container[str], objective: Objective, labels: Labels) -> dict[str, list[str]]:
    """What outputs mean, as [quantity, unit], with the units of labels of the same meaning."""
    quantities = {name: list(quantity) for name, quantity in objective.quantities().items() if name in names}
    for entry in labels.entries:
        for meaning in quantities.values():
            if entry.unit and meaning[0] in (entry.quantity, f"{entry.quantity}_std"):
                meaning[1] = entry.unit
    return quantities


def _parts_of(
    model: Model,
    objective: Parts,
    data: TrainingData,
    earlier: Mapping[str, int],
    missing: Mapping[str, Sequence[str]],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a model needs to know to be used as one of its parts."""
    for name, outputs in objective.names.items():
        part = objective.parts[name]
        named = [e for e in data.labels.entries if e.quantity.startswith(f"{name}.") or e.quantity in part.labels()]
        own = Labels(tuple(replace(e, quantity=e.quantity.removeprefix(f"{name}.")) for e in named))
        card = {
            "objective": described(part),
            "labels": own.to_json(),
            "quantities": quantities_of(outputs, part, own),
            **_seen([belonging_to(name, some, objective.marks) for some in (data.unlabelled, data.isolated)], earlier),
            "references (eV)": _references(
                of_level(head, name) for full, head in model.heads.items() if full in outputs.values()
            ),
        }
        energy = outputs.get("energy", "")
        if missing:
            card[WITHOUT] = missing.get(energy, missing.get(f"{name} {energy}", []))
        if record := known_of(data).get("provenance"):
            card["provenance"] = record.get(name, {})
        inputs = objective.constants(name)
        yield name, {"outputs": outputs, **({"inputs": inputs} if inputs else {}), "card": card}

"""The card of a trained model: what it learned from what, and how well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ase
import numpy as np
from ase.data import chemical_symbols

from .data.columns import codes, count_elements
from .data.labels import Labels
from .data.sequences import Joined, Subset
from .dataset import TrainingData
from .evaluate import compared, scores
from .heads import (
    EnergyHead,
)
from .model import Model, described
from .objectives import Objective, Together
from .train import TrainConfig

MOST_POINTS = 2_000  # of a parity plot


def validated(
    model: Model, objective: Objective, structures: Sequence[ase.Atoms], config: TrainConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Errors, and points of parity plots, by output; of several objectives, each on the structures that are for it."""
    if isinstance(objective, Together):
        errors: dict[str, Any] = {}
        parity: dict[str, Any] = {}
        meant = [structures[i].info.get("part") for i in range(len(structures))]
        for name, part in objective.parts.items():
            own = Subset(structures, [i for i, other in enumerate(meant) if other in (None, name)])
            if len(own):
                found = validated(model.part(name), part, own, config)
                for all_of_them, one in zip((errors, parity), found, strict=True):
                    all_of_them.update({f"{name} {key}": value for key, value in one.items()})
        return errors, parity
    pairs = compared(model, objective, structures, config.edges, config.seed)
    errors = scores(model, objective, pairs, [atoms.numbers for atoms in structures])
    return errors, _parity(pairs, errors)


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
    quantities = _quantities(model.outputs, objective, data.labels)
    return {
        "objective": described(objective),
        "quantities": quantities,
        "labels": data.labels.to_json(),
        **_seen((data.unlabelled, data.isolated), earlier),
        "references (eV)": _references(model, list(model.heads)),
        "history": history,
        "metrics": {"validation loss": history[-1]["best validation loss"]},
        **({"parts": dict(_parts_of(model, objective, data, earlier))} if isinstance(objective, Together) else {}),
    }


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


def _belonging_to(part: str, structures: Sequence[ase.Atoms]) -> Subset:
    """The structures that were given for one part, or for all."""
    joined = structures.structures if isinstance(structures, Subset) else None
    if isinstance(structures, Subset) and isinstance(joined, Joined) and part in joined.names:
        given_for = np.searchsorted(joined.ends, np.asarray(structures.indices), side="right")
        return Subset(structures, np.flatnonzero(given_for == list(joined.names).index(part)))
    part_of, names = codes(structures, "part", str)
    others = [i for i, name in enumerate(names) if name != part]
    return Subset(structures, np.flatnonzero(~np.isin(part_of, others)))


def _references(model: Model, names: Sequence[str]) -> dict[str, float]:
    """Of the first of these heads that is an energy."""
    heads = [head for name in names if isinstance(head := model.heads[name], EnergyHead)]
    references = heads[0].references.tolist() if heads else []
    return {chemical_symbols[z]: energy for z, energy in enumerate(references) if energy}


def _quantities(names: Container[str], objective: Objective, labels: Labels) -> dict[str, list[str]]:
    """What outputs mean, with the units of labels of the same meaning."""
    quantities = {name: list(quantity) for name, quantity in objective.quantities().items() if name in names}
    for entry in labels.entries:
        if entry.unit and quantities.get(entry.quantity, [""])[0] == entry.quantity:
            quantities[entry.quantity][1] = entry.unit
    return quantities


def _parts_of(
    model: Model, objective: Together, data: TrainingData, earlier: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a model needs to know to be used as one of its parts."""
    for name, outputs in objective.names.items():
        part = objective.parts[name]
        named = [e for e in data.labels.entries if e.quantity.startswith(f"{name}.") or e.quantity in part.labels()]
        own = Labels(tuple(replace(e, quantity=e.quantity.removeprefix(f"{name}.")) for e in named))
        card = {
            "objective": described(part),
            "labels": own.to_json(),
            "quantities": _quantities(outputs, part, own),
            **_seen([_belonging_to(name, some) for some in (data.unlabelled, data.isolated)], earlier),
            "references (eV)": _references(model, [full for full in outputs.values() if full in model.heads]),
        }
        yield name, {"outputs": outputs, "card": card}

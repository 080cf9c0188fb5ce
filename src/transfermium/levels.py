"""Levels of theory: whether labels are at one that a model learned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ase
import numpy as np

from .data.columns import Key, has
from .data.labels import Labels
from .data.provenance import RULED, Origin, by_rule, listed, origins
from .objectives import Objective

VAGUE = {"dft", "gga", "gga+u", "gga_u", "meta-gga"}  # families of levels
TAUGHT = "teacher:"  # in front of the name of a model that made labels, whose level is not known


class Apart(NamedTuple):
    """Levels of labels that a model did not learn, with the number of structures, and those that it did."""

    given: dict[str, int]
    learned: list[str]
    wholly: bool  # whether no label is at a level that it learned

    def told(self, who: str) -> str:
        return f"labels are at {listed(self.given)}, but the {who} learned {', '.join(self.learned)}"


def apart(
    card: Mapping[str, Any], objective: Objective, structures: Sequence[ase.Atoms], labels: Labels
) -> Apart | None:
    """What labels are at other levels than those of the card of a model; None where there are none.

    Levels are compared where both are named; those of differences, which have two, are not. PBE and PBE+U count as one
    where the Materials Project would choose them so.
    """
    learned = learned_levels(card)
    keys: set[Key] = {at[:2] for entry in labels.entries for at in entry.keys}
    if not learned or not keys or objective.differences():
        return None
    numbers, found = origins(structures)
    often = np.bincount(numbers[has(structures, keys)], minlength=len(found)).tolist()
    known = {i: names for i, origin in enumerate(found) if often[i] and (names := _names(origin))}
    others = [i for i, names in known.items() if not any(agree(a, b) for a in names for b in learned)]
    ruled = others and any(agree(level, name) for level in RULED for name in learned)
    if ruled and by_rule(structures, numbers, found):
        others = [i for i in others if not RULED & set(known[i])]
    if not others:
        return None
    given = sum((Counter({known[i][0]: often[i]}) for i in others), Counter[str]())
    return Apart(dict(given), learned, len(others) == len(known))


def learned_levels(card: Mapping[str, Any]) -> list[str]:
    """Levels of theory that a model learned in its last stage; none where that is not known, or where it learned
    nothing."""
    stages = card.get("history", [])
    report = stages[-1].get("alignment", {}) if stages else {}
    if len(stages) > 1 and not stages[-1].get("steps") and report.get("kept heads") and report.keys() == {"kept heads"}:
        return []  # "zero-shot" looks at labels, and stays what it was
    functional = card.get("provenance", {}).get("functional", ())
    names = [functional] if isinstance(functional, str) else list(functional)
    names = list(dict.fromkeys([*card.get("levels", {}), *names]))
    return names if all(map(_clear, names)) else []


def _names(origin: Origin) -> list[str]:
    """Levels that structures name; none where one of them says too little."""
    names = [origin[field] for field in ("level", "functional") if field in origin]
    return names if all(map(_clear, names)) else []


def _clear(name: str) -> bool:
    return name.lower() not in VAGUE and not name.startswith(TAUGHT)


def agree(one: str, other: str) -> bool:
    """Whether one of two levels names the other: "PBE, VASP" is PBE, but neither PBEsol nor PBE+U is."""
    one, other = sorted((one.lower(), other.lower()), key=len)
    return re.search(rf"(?<![\w+-]){re.escape(one)}(?![\w+-])", other) is not None

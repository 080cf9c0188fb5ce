"""Levels of theory of a study: one of all labels that a head learns and is tested by, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from ase import Atoms

from ..card import theory_in
from ..data.provenance import Group, at_level, compared
from ..data.sequences import Subset
from ..errors import InputError
from ..objectives import Objective
from .judged import labelled_for

LEVEL = "curve: --level or --base-level NAME; else leave structures out"


def at(level: str | None, structures: Sequence[Atoms], of: str) -> Sequence[Atoms]:
    """The structures at a level of theory; all where none is named."""
    if level is None:
        return structures
    try:
        return Subset(structures, np.asarray(at_level(structures, level)))
    except InputError as error:
        raise InputError(f"{of}: {error}") from None


def only_level(
    sides: Mapping[str, Sequence[Atoms]],
    objective: Objective,
    label: Mapping[str, str],
    unit: Mapping[str, str],
    given: Mapping[str, str] | None = None,
) -> str:
    """What is known of the labels of an objective in words, on all sides together.

    Args:
        sides: what structures are for, such as "to train on" and "to test on", to the structures.
        given: what is said of their provenance.

    Raises:
        InputError: for several levels of theory, or structures that say otherwise than what was given.
    """
    groups: dict[str, Group] = {}
    for side, structures in sides.items():
        entries = labelled_for(objective, structures, label, unit).labels.entries
        groups[side] = structures, {key[:2] for entry in entries for key in entry.keys}
    found = compared(groups, dict(given or {}))
    if found.mixed:
        raise InputError(f"labels {' and '.join(sides)} are of {found.mixed}: keep one of them ({LEVEL})")
    return theory_in(found)

"""Provenance: how labels were computed, so that no two levels of theory share a head unnoticed."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from ..errors import InputError
from .columns import Key, blocks, elements, has, is_missing
from .public import HUBBARD

FIELDS = ("functional", "u", "pseudopotentials", "code", "corrections")
NAMES = ("level", "functional", "xc", "provenance")  # in `atoms.info`
RULED = {"PBE", "PBE+U"}  # levels that the Materials Project chooses between by composition

Origin = dict[str, str]  # "level" and fields to what is known of them
Group = tuple[Sequence[Atoms], set[Key]]  # structures as they were read, and where their labels are


class Comparison(NamedTuple):
    """What is known of the labels that one head is to learn.

    Attributes:
        counts: field to group ("to train on", "to validate") to value to the number of labelled structures.
        ruled: whether PBE and PBE+U are where the rule of the Materials Project has them, which is one level.
        named: whether any structure names its level itself; elsewhere the functional stands for it.
    """

    counts: dict[str, dict[str, dict[str, int]]]
    ruled: bool
    named: bool

    @property
    def differing(self) -> str | None:
        """A field that has several values, the level first; None where all that is known agrees."""
        for field, groups in self.counts.items():
            values = {value for found in groups.values() for value in found}
            if len(values) - (self.ruled and values >= RULED) > 1:
                return field
        return None

    @property
    def mixed(self) -> str:
        """What is of several levels of theory, in words; empty where all that is known agrees."""
        field = self.differing
        if field is None:
            return ""
        what = "levels of theory" if field == "level" else f"values of '{field}'"
        return f"several {what}, {self.spelled(field)}"

    def spelled(self, field: str) -> str:
        """Values and counts; those of each group where the groups differ."""
        groups = self.counts[field]
        if len({frozenset(found) for found in groups.values()}) == 1:
            return listed(self.total(field))
        return "; ".join(f"{group}: {listed(found)}" for group, found in groups.items())

    def total(self, field: str) -> dict[str, int]:
        """Values of all groups together, with their counts."""
        return sum((Counter(found) for found in self.counts.get(field, {}).values()), Counter[str]())

    def record(self) -> dict[str, Any]:
        """What is known, as field to value, or to the counts of several; levels that `info` names are not repeated."""
        record: dict[str, Any] = {}
        for field in self.counts:
            values = self.total(field)
            if field != "level" or not self.named:
                name = "functional" if field == "level" else field
                record[name] = next(iter(values)) if len(values) == 1 else dict(values)
        return record


def checked(provenance: Mapping[str, str] | None, parts: Iterable[str] = ()) -> dict[str, Origin]:
    """What was said of labels by part, and under "" of all; `PART.FIELD` is about one part.

    Raises:
        InputError: for a field that there is not.
    """
    known = [*FIELDS, *(f"{part}.{field}" for part in parts for field in FIELDS)]
    found: dict[str, Origin] = {}
    for name, value in (provenance or {}).items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"there is no provenance '{name}', only {', '.join(FIELDS)}{hint}")
        part, _, field = name.rpartition(".")
        found.setdefault(part, {})[field] = str(value)
    return found


def as_text(provenance: Mapping[str, str]) -> str:
    """Fields in one line, as `atoms.info["provenance"]` has them: "code=VASP; pseudopotentials=PBE_54"."""
    return "; ".join(f"{field}={value}" for field, value in provenance.items())


def origins(structures: Sequence[Atoms]) -> tuple[np.ndarray, list[Origin]]:
    """The number of the origin of each structure, and these origins.

    `info["level"]` names a level of theory, as do `functional` and `xc` where it is missing; `info["provenance"]` has
    fields, as text or as a mapping.
    """
    numbers: dict[tuple[str | None, ...], int] = {}
    found = np.zeros(len(structures), np.int64)
    start = 0
    for block in blocks(structures):
        rows = list(zip(*(_words(block.info(name)) for name in NAMES), strict=True))
        for row in dict.fromkeys(rows):
            numbers.setdefault(row, len(numbers))
        found[start : start + len(block)] = [numbers[row] for row in rows]
        start += len(block)
    return found, [_origin(*row) for row in numbers]


def at_level(structures: Sequence[Atoms], level: str) -> np.ndarray:
    """Indices of the structures at a level of theory.

    Raises:
        InputError: when none is, naming the levels that there are.
    """
    numbers, found = origins(structures)
    wanted = [i for i, origin in enumerate(found) if level in (origin.get("level"), origin.get("functional"))]
    indices = np.flatnonzero(np.isin(numbers, wanted))
    if not len(indices):
        there = Counter(_level(found[i]) or "unstated" for i in numbers.tolist())
        raise InputError(f"no structure is at the level '{level}': there are {listed(there)}")
    return indices


def compared(groups: Mapping[str, Group], given: Origin) -> Comparison:
    """What is known of the labels in groups of structures, of which `given` was said.

    Raises:
        InputError: where structures say otherwise than `given`.
    """
    found: dict[str, tuple[np.ndarray, list[Origin]]] = {}
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for name, (structures, keys) in groups.items():
        numbers, some = origins(structures)
        found[name] = numbers, [_completed(origin, given) for origin in some]
        labelled = has(structures, keys) if len(some) > 1 else np.ones(len(numbers), bool)
        often = np.bincount(numbers[labelled], minlength=len(some)).tolist()
        for origin, n in zip(found[name][1], often, strict=True):
            for field, value in _compared_by(origin).items() if n else ():
                values = counts.setdefault(field, {}).setdefault(name, {})
                values[value] = values.get(value, 0) + n
    levels = {value for values in counts.get("level", {}).values() for value in values}
    ruled = levels >= RULED and all(by_rule(groups[name][0], *found[name]) for name in groups)
    named = any("level" in origin for _, some in found.values() for origin in some)
    return Comparison({field: counts[field] for field in sorted(counts, key="level".__ne__)}, ruled, named)


def listed(counts: Mapping[str, int]) -> str:
    """Values with their counts, most frequent first: "PBE (900), r2SCAN (350)"; of many values the first six."""
    often = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{value} ({n:,})" for value, n in often[:6])
    return f"{shown} and {len(often) - 6} more" if len(often) > 6 else shown


def _level(origin: Origin) -> str | None:
    return origin.get("level") or origin.get("functional")


def _compared_by(origin: Origin) -> Origin:
    """Fields with the level, which a functional is where nothing else names one."""
    level = _level(origin)
    fields = {"level": level, **origin} if level else origin
    return {field: value for field, value in fields.items() if field != "functional" or value != level}


def _completed(origin: Origin, given: Origin) -> Origin:
    for field, value in given.items():
        if origin.get(field, value) != value:
            raise InputError(
                f"provenance says {field}={value}, but structures have {field}={origin[field]}: correct one of them"
            )
    return {**origin, **given}


def by_rule(structures: Sequence[Atoms], numbers: np.ndarray, found: Sequence[Origin]) -> bool:
    """Whether all structures at PBE or PBE+U are at the one that the Materials Project would choose."""
    levels = np.array([_level(origin) or "" for origin in found])
    chosen = np.isin(levels, list(RULED))[numbers]
    if not chosen.any():
        return True
    present = np.unpackbits(elements(structures), axis=1).astype(bool)
    with_u = present[:, [8, 9]].any(axis=1) & present[:, HUBBARD].any(axis=1)
    return bool((with_u == (levels == "PBE+U")[numbers])[chosen].all())


def _origin(level: str | None, functional: str | None, xc: str | None, provenance: str | None) -> Origin:
    origin: Origin = {"level": level} if level else {}
    for piece in (provenance or "").split(";"):
        field, equals, value = piece.strip().partition("=")
        if field:
            origin[field.strip() if equals else "provenance"] = value.strip() if equals else field
    named = functional or xc
    return {"functional": named, **origin} if named else origin


def _words(column: Sequence[Any]) -> list[str | None]:
    """Values of info as words; numbers with a fraction and arrays are no names of anything."""
    try:
        known = {value: _word(value) for value in set(column)}
        return [known[value] for value in column]
    except TypeError:  # mappings and lists cannot be looked up
        return [_word(value) for value in column]


def _word(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return as_text(value) or None
    if isinstance(value, str):
        return None if is_missing(value) else value.strip()
    return str(value) if isinstance(value, int | np.integer) and not isinstance(value, bool) else None

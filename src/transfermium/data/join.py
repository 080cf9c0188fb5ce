"""Join: values of one set of structures put beside those of another, material by material."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from ase import Atoms

from ..errors import InputError
from .columns import is_missing
from .labels import KEYS, RESERVED, available, word
from .read import Source, read
from .sequences import spoken

ENERGY = "energy"
SHOWN = 5  # ids in an error


class _Partner(NamedTuple):
    """What is known under one id."""

    where: str
    formula: str
    values: dict[str, Any]  # by the key in the cheap structures


def joined(
    structures: Source,
    cheap: Source,
    labels: Mapping[str, str],
    by: str = "material_id",
    missing: Literal["refuse", "drop"] = "refuse",
) -> list[Atoms]:
    """Copies of structures with values of those in `cheap` that have the same id, as `Property(minus=...)` wants them.

    Values are taken as they are, in the unit of their file: energies in hartree stay in hartree, which `unit` says in
    training. They are those of the geometry in `cheap`, also where that of `structures` is another one.

    Args:
        labels: names in `info` of the copies, to keys in `info` of the cheap structures, or "energy".
        by: the key of the id in `info` of both; 3 and "3" are one id.
        missing: what to do with structures for which there is no value: "refuse" or "drop" them.

    Raises:
        InputError: for a structure without id; a name that is taken; several values, or cells of other atoms, under
            one id; and for a missing value, unless such structures are dropped.
    """
    given, others = read(structures), read(cheap)
    if missing not in ("refuse", "drop"):
        raise InputError(f"missing is '{missing}', but must be 'refuse' or 'drop'")
    if not labels:
        raise InputError("there is nothing to join: give labels={NAME: KEY}")
    _check_names(given, labels)
    ids = list(_ids(given, by, "structures"))
    partners = _partners(others, set(ids), list(dict.fromkeys(labels.values())), by)
    _check_keys(others, partners, labels)

    found, lacking = [], []
    for index, (atoms, own) in enumerate(zip(given, ids, strict=True)):
        partner = partners.get(own)
        if partner is None or any(key not in partner.values for key in labels.values()):
            lacking.append(own)
            continue
        _check_cell(spoken(given, index), _formula(atoms), partner, f"{by} {own}")
        copy = atoms.copy()
        copy.calc = atoms.calc
        copy.info |= {name: partner.values[key] for name, key in labels.items()}
        found.append(copy)
    if lacking and (missing == "refuse" or not found):
        raise InputError(
            f"{len(lacking)} of {len(ids)} structures have no {' and '.join(dict.fromkeys(labels.values()))} in the "
            f"cheap ones under their {by} ({_some(lacking)}): give these, or leave such structures out with "
            "missing='drop'"
        )
    return found


def _ids(structures: Sequence[Atoms], by: str, what: str) -> Iterator[str]:
    for index, atoms in enumerate(structures):
        raw = atoms.info.get(by)
        if isinstance(raw, np.ndarray | list | tuple | dict):
            raise InputError(f"info {by!r} is no id but a {type(raw).__name__}: join by another key")
        if is_missing(raw):
            raise InputError(
                f"{spoken(structures, index)} of the {what} has no {by!r}: give it one, or join by another key (by=KEY)"
            )
        yield word(raw)


def _partners(structures: Sequence[Atoms], wanted: set[str], keys: Sequence[str], by: str) -> dict[str, _Partner]:
    """What the cheap structures have under each of the ids that are wanted."""
    found: dict[str, _Partner] = {}
    for index, (atoms, own) in enumerate(zip(structures, _ids(structures, by, "cheap ones"), strict=True)):
        if own not in wanted:
            continue
        where = f"{spoken(structures, index)} of the cheap ones"
        values = {key: value for key in keys if not is_missing(value := _value(atoms, key))}
        known = found.setdefault(own, _Partner(where, _formula(atoms), {}))
        _check_cell(where, _formula(atoms), known, f"{by} {own}")
        for key, value in values.items():
            if not _same(known.values.setdefault(key, value), value):
                raise InputError(
                    f"{by} {own} has several values of '{key}' in the cheap structures, {known.values[key]} and "
                    f"{value}: leave one, or join by an id that tells them apart (by=KEY)"
                )
    return found


def _value(atoms: Atoms, key: str) -> Any:
    results = atoms.calc.results if key == ENERGY and atoms.calc is not None else {}
    return atoms.info.get(key, results.get(key))


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(np.shape(one) == np.shape(other) and np.allclose(one, other, rtol=1e-9, atol=0))
    except TypeError:  # words
        return bool(np.array_equal(one, other))


def _formula(atoms: Atoms) -> str:
    return str(atoms.get_chemical_formula())


def _check_names(structures: Sequence[Atoms], labels: Mapping[str, str]) -> None:
    for name in labels:
        standard = next((quantity for quantity, keys in KEYS.items() if name in keys), None)
        if standard is not None:
            raise InputError(f"'{name}' cannot be a new name, as it stands for the {standard} itself: choose another")
        if name in RESERVED:
            raise InputError(f"'{name}' cannot be a new name, as it is part of every structure: choose another")
    for index, atoms in enumerate(structures):
        results = atoms.calc.results if atoms.calc is not None else {}
        if taken := [name for name in labels if name in atoms.info or name in atoms.arrays or name in results]:
            raise InputError(f"{spoken(structures, index)} has a '{taken[0]}' already: choose another name")


def _check_keys(structures: Sequence[Atoms], partners: Mapping[str, _Partner], labels: Mapping[str, str]) -> None:
    """Refuse keys that no cheap structure has."""
    for key in labels.values():
        if not any(key in partner.values for partner in partners.values()) and all(
            is_missing(_value(atoms, key)) for atoms in structures
        ):
            there = ", ".join(available(structures)) or "none"
            raise InputError(f"no cheap structure has '{key}' in info; there are {there}")


def _check_cell(where: str, formula: str, partner: _Partner, own: str) -> None:
    if formula != partner.formula:
        raise InputError(
            f"{where} is {formula}, but {partner.where} is {partner.formula}, both under {own}: give the same material "
            "in a cell of as many atoms, as energies are per cell"
        )


def _some(ids: Sequence[str]) -> str:
    often = list(Counter(ids))
    return ", ".join(often[:SHOWN]) + (f" and {len(often) - SHOWN} more" if len(often) > SHOWN else "")

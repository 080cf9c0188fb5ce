"""Levels of theory: several under one label."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import numpy as np

from ..card import theory
from ..data.provenance import compared, origins
from ..levels import agree
from .base import Case, Finding, some


def check(case: Case) -> Iterator[Finding]:
    """What structures say of how their labels were computed."""
    keys = {
        at[:2] for entry in case.labels.entries if entry.quantity in ("energy", "forces", "stress") for at in entry.keys
    }
    if not keys:
        return
    found = compared({"all": (case.atoms, {(str(place), key) for place, key in keys})}, {})
    field = found.differing
    numbers, origin = origins(case.atoms)
    if field is not None:
        values = found.total(field)
        most = max(values, key=lambda value: values[value])
        shown = field if field != "level" else "levels of theory"
        named = [o.get("level") or o.get("functional") if field == "level" else o.get(field) for o in origin]
        others = [i for i, value in enumerate(named) if value not in (most, None)]
        yield Finding(
            "levels",
            "error",
            f"Labels of several {shown} are mixed: {found.spelled(field)}",
            "sets of different origin were put together; their energies differ by electronvolts, their "
            "forces by percents",
            case.train(f"--level {shlex.quote(most)}") if field == "level" else case.drop("levels"),
            some(np.flatnonzero(np.isin(numbers, others))),
        )
    if (
        case.base is not None
        and (known := theory(case.base.card))
        and (values := found.total("level"))
        and not any(agree(known, value) for value in values)
    ):
        yield Finding(
            "levels-base",
            "note",
            f"The data is {', '.join(values)}, the base {known}",
            "energies of the two have different zeros, which fine-tuning aligns first",
            case.train("--strategy aligned", f"finetune {case.name('base')}", "aligned"),
        )

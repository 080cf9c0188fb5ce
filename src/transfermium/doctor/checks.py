"""All checks, in the order in which they are made; one more is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import duplicates, energies, forces, geometry, labels, leakage, levels, mixtures, stresses, units
from .base import Case, Finding

CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    labels.check,
    geometry.check,
    mixtures.check,
    units.check,
    energies.check,
    forces.check,
    stresses.check,
    levels.check,
    duplicates.check,
    leakage.check,
)

"""`doctor`: what is wrong with this data, before any training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ase import Atoms

from ..console import console
from ..data.labels import Labels
from ..data.provenance import origins
from ..data.read import Source, read
from ..data.sequences import Subset
from ..errors import InputError
from ..model import Model, load
from .base import SEVERITIES, Case, Finding, remaining

__all__ = ["Case", "Diagnosis", "Finding", "doctor"]


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found; errors first.

    Attributes:
        structures: as they were read.
        labels: the manifest of labels.
        findings: errors, warnings and notes.
        summary: numbers of structures, atoms, elements and seconds, and levels of theory.
    """

    structures: Sequence[Atoms]
    labels: Labels
    findings: tuple[Finding, ...]
    summary: Mapping[str, Any]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if one.severity == "error")

    def __getitem__(self, kind: str) -> Finding:
        for one in self.findings:
            if one.kind == kind:
                return one
        kinds = ", ".join(one.kind for one in self.findings) or "nothing"
        raise InputError(f"doctor found no '{kind}' here, but {kinds}")

    def without(self, *kinds: str) -> Subset:
        """All structures but those of these findings."""
        found = [one for kind in kinds if self[kind] for one in self.findings if one.kind == kind]
        return remaining(self.structures, {i for one in found for i in one.structures})

    def to_json(self) -> dict[str, Any]:
        """Everything but the structures, in plain values."""
        return {**self.summary, **self.labels.to_json(), "findings": [asdict(one) for one in self.findings]}


def doctor(
    structures: Source,
    base: str | Path | Model | None = None,
    *,
    base_data: Source | None = None,
    held_out: Source | None = None,
    split_key: str | None = None,
    label: Mapping[str, str] | None = None,
    unit: Mapping[str, str] | None = None,
    shortest: float = 0.5,
    out: str | Path | None = None,
    device: str = "auto",
    verbose: bool = False,
) -> Diagnosis:
    """Look for what is wrong with structures and their labels, before any training.

    Units and signs are told from what energies, forces, stresses and distances must have to do with each other, and
    from a potential: `base`, or the model that ships with the package, which need only get orders of magnitude right.

    Args:
        base: a model that is to be fine-tuned: elements that it never saw and data that it was trained on are told.
        base_data: structures that the base was trained on, among which test structures are looked for.
        held_out: test structures, which are looked for among `structures`.
        split_key: a key of info that splits the data, as in training; by default all that look like one.
        label, unit: keys and units of labels, as in training.
        shortest: distances below this fraction of the sum of covalent radii are too short.
        out: a folder for the page `doctor.html` and its numbers, `doctor.json`.
        verbose: print what was found.

    Raises:
        InputError: when structures or models cannot be read at all.
    """
    from .checks import CHECKS  # a dozen modules

    if not 0 < shortest < 1:
        raise InputError(
            f"shortest is {shortest}, but must lie between 0 and 1: a fraction of the sum of covalent radii"
        )
    if out is not None and Path(out).is_file():
        raise InputError(f"{out} is a file: choose a folder for the page")
    start = time.perf_counter()
    given = read(structures)
    reading = time.perf_counter() - start
    model = load(base) if isinstance(base, str | Path) else base
    potential = model if model is not None and _is_potential(model) else load("small")
    also = {
        "base": None if base is None else _sources(base, "BASE"),
        "base_data": None if base_data is None else _sources(base_data, "BASE_DATA"),
        "held_out": None if held_out is None else _sources(held_out, "TEST"),
        "split_key": split_key,
        "shortest": shortest if shortest != 0.5 else None,
    }
    case = Case(
        given,
        _sources(structures, "DATA"),
        dict(label or {}),
        dict(unit or {}),
        model,
        potential,
        None if held_out is None else read(held_out),
        None if base_data is None else read(base_data),
        split_key,
        shortest,
        device,
        also,
    )
    found: list[Finding] = []
    for check in CHECKS:
        found += check(case)
        if any(one.kind == "length-unit" for one in found):
            break  # whatever else could be said relies on lengths
    found.sort(key=lambda one: SEVERITIES.index(one.severity))
    levels_found = {
        name for origin in origins(case.atoms)[1] if (name := origin.get("level") or origin.get("functional"))
    }
    summary = {
        "sources": list(case.sources),
        "structures": len(case),
        "atoms": int(case.n_atoms.sum()),
        "elements": int(case.composition.any(axis=0).sum()),
        "levels": sorted(levels_found),
        "seconds to read": round(reading, 3),
        "seconds": round(time.perf_counter() - start - reading, 3),
    }
    diagnosis = Diagnosis(given, case.labels, tuple(found), summary)
    from ..report.doctor import doctor_page, show  # figures take a second to load

    if verbose:
        show(diagnosis.to_json(), case.labels, console)
    if out is not None:
        doctor_page(diagnosis.to_json(), case.labels).write(Path(out) / "doctor.html")
    return diagnosis


def _is_potential(model: Model) -> bool:
    meaning = model.card.get("quantities", {}).get("forces", ["forces"])
    return "energy" in model.outputs and "forces" in model.outputs and meaning[0] == "forces"


def _sources(structures: Source | Model, otherwise: str) -> tuple[str, ...]:
    """Paths as they were given, or a name for what is in memory."""
    if isinstance(structures, str | Path):
        return (str(structures),)
    if isinstance(structures, list | tuple) and structures and all(isinstance(one, str | Path) for one in structures):
        return tuple(map(str, structures))
    return (otherwise,)

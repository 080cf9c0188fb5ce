"""References of elements that no labelled energy determines: refused, guessed or kept, but never in silence."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from .align import by_level
from .console import and_
from .errors import InputError
from .graph import Sample, is_isolated_atom
from .heads import EnergyHead, LevelHead, isolated_energies, labelled_totals
from .model import Model
from .objectives import Objective

WITHOUT = "elements without reference"  # in cards and reports
VALIDATED = "validated without reference"
SETTLED = "elements without labels"


class Energy(NamedTuple):
    """An energy, or one level of it, and what is known of its references; elements by atomic number."""

    name: str
    references: Tensor  # (elements + 1,), to be changed in place
    fitted: Mapping[int, float]  # how far the references of elements with labels moved
    lone: Mapping[int, float]  # energies of isolated atoms
    missing: frozenset[int]  # elements whose reference nothing determines
    old: frozenset[int]  # those among them that the base has a reference for


def settle_unseen(
    model: Model,
    objective: Objective,
    samples: Sequence[Sample],
    report: Mapping[str, Any],
    policy: str = "refuse",
    base: Model | None = None,
    align: bool = True,
    validated: Collection[int] = (),
) -> dict[str, Any]:
    """Decide on references of elements that no labelled energy has, in place, and say how.

    These are elements that the base, the samples or the validation structures have. "refuse" leaves their references as
    they are and lists the elements, so that energies with them are refused; "isolated" takes energies of isolated atoms
    among the samples, moved by as much as references of labelled elements lie from theirs on average; "group" moves
    references by the mean shift of the labelled elements; "keep" lets those of the base stand.

    Args:
        report: of alignment; its shifts of references come back with those that were decided here.
        align: whether references of heads that the base had were fitted again.
        validated: atomic numbers in the validation structures.

    Raises:
        InputError: for "isolated" without an isolated atom of any of these elements.
    """
    found: dict[str, Any] = {}
    fitted: set[str] = set()
    before = _known_to(base)
    everything = before | {int(z) for s in samples for z in np.unique(s.atoms.numbers)} | set(validated)
    for energy in _energies(model, objective, samples, report, align, everything, before):
        settled = POLICIES[policy](energy)
        for z, shift in settled.items():
            energy.references[z] += shift
        symbols = [chemical_symbols[z] for z in sorted(settled)]
        if settled:
            found.setdefault(SETTLED, {})[energy.name] = {"unseen": policy, "elements": symbols}
        if settled and policy != "keep":
            key = "reference shift (eV)" + ("" if energy.name == "energy" else f" of {energy.name}")
            moved = {chemical_symbols[z]: settled[z] for z in sorted(settled)}
            found[key] = {**report.get(key, {}), **moved}
        if left := sorted(energy.missing - settled.keys()):
            found.setdefault(WITHOUT, {})[energy.name] = [chemical_symbols[z] for z in left]
            if seen := [chemical_symbols[z] for z in left if z in validated]:
                found.setdefault(VALIDATED, {})[energy.name] = seen
        fitted.add(energy.name)
    if base is not None and base.card.get(WITHOUT):  # references that stay are known as little as before
        stay = [name for name in report.get("kept heads", []) if isinstance(model.heads[name], EnergyHead)]
        carried = {name: base.card[WITHOUT] for name in stay if name not in fitted}
        found |= {WITHOUT: {**found.get(WITHOUT, {}), **carried}} if carried else {}
    return found


def unseen_in_words(report: Mapping[str, Any]) -> list[str]:
    """What `settle_unseen` decided, in sentences."""
    settled = [
        f"no label of '{name}' has {and_(found['elements'])}: {HOW[found['unseen']]} (unseen='{found['unseen']}')"
        for name, found in report.get(SETTLED, {}).items()
    ]
    refused = [
        f"no label of '{name}' has {_some(symbols)}: energies with these elements will be refused, forces will not; "
        "label such structures, or choose unseen='isolated', 'group' or 'keep' (--unseen)"
        for name, symbols in report.get(WITHOUT, {}).items()
    ]
    validated = [
        f"{_some(symbols)} validate '{name}' all the same: such energies mean little"
        for name, symbols in report.get(VALIDATED, {}).items()
    ]
    return [*settled, *refused, *validated]


def _energies(
    model: Model,
    objective: Objective,
    samples: Sequence[Sample],
    report: Mapping[str, Any],
    align: bool,
    everything: set[int],
    before: set[int],
) -> Iterator[Energy]:
    """Every energy of the model whose references were fitted to labels."""
    for name, head in model.heads.items():
        new = name not in report.get("kept heads", [])
        if not isinstance(head.head if isinstance(head, LevelHead) else head, EnergyHead) or not (new or align):
            continue
        own, seen = objective.calibration(name, samples)
        for of, references, some in by_level(head, "references", name, seen):  # type: ignore[arg-type]
            labelled, _ = labelled_totals(own, [s for s in some if not is_isolated_atom(s.atoms)])
            lone = isolated_energies(own, some)
            fitted = {int(z) for numbers in labelled for z in np.unique(numbers)}
            if not fitted:
                continue
            shifts = report.get("reference shift (eV)" + ("" if of == "energy" else f" of {of}"), {})
            moved = {z: float(references[z]) if new else shifts[chemical_symbols[z]] for z in sorted(fitted)}
            missing = frozenset(everything - fitted - (set(lone) if new else set()))  # new heads begin with lone atoms
            yield Energy(of, references, moved, lone, missing, missing & before if not new else frozenset())


def _known_to(base: Model | None) -> set[int]:
    return set() if base is None else {atomic_numbers[symbol] for symbol in base.card.get("elements", {})}


def _from_isolated_atoms(energy: Energy) -> dict[int, float]:
    settled = sorted(energy.missing & energy.lone.keys())
    if energy.missing and not settled:
        missing = _some([chemical_symbols[z] for z in sorted(energy.missing)])
        raise InputError(
            f"unseen='isolated' needs isolated atoms of elements without labels ({missing}): add structures of one "
            "atom with config_type=IsolatedAtom and an energy, or choose group, keep or refuse"
        )
    anchors = [energy.lone[z] - float(energy.references[z]) for z in energy.fitted.keys() & energy.lone.keys()]
    offset = float(np.mean(anchors)) if anchors else 0.0
    return {z: energy.lone[z] - offset - float(energy.references[z]) for z in settled}


def _from_the_others(energy: Energy) -> dict[int, float]:
    return dict.fromkeys(sorted(energy.old), float(np.mean(list(energy.fitted.values()))))


POLICIES: dict[str, Callable[[Energy], dict[int, float]]] = {  # to shifts of references
    "refuse": lambda energy: {},
    "isolated": _from_isolated_atoms,
    "group": _from_the_others,
    "keep": lambda energy: dict.fromkeys(sorted(energy.old), 0.0),
}
HOW = {
    "isolated": "references from isolated atoms",
    "group": "references moved by the mean shift of the labelled elements",
    "keep": "references of the base are kept",
}


def check_policy(policy: str, align: bool) -> None:
    """Refuse a policy that there is not, or that moves references that are to stay."""
    if policy not in POLICIES:
        raise InputError(f"unseen is '{policy}', but must be one of {', '.join(POLICIES)}")
    if not align and policy in ("isolated", "group"):
        raise InputError(f"unseen='{policy}' moves references, which are to stay without align: leave one of them out")


def _some(symbols: Sequence[str]) -> str:
    return and_(symbols) if len(symbols) <= 6 else f"{', '.join(symbols[:6])} and {len(symbols) - 6} more elements"

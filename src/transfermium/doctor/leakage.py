"""Leaks: what test structures share with those to train on, or with those of a base; elements without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ..console import and_
from ..data.columns import codes
from ..data.labels import Labelled, Labels, word
from ..data.leakage import FRAMES, Leak, leaks, tolerance_for
from ..data.sequences import Subset
from ..data.split import IDS, TEST, TRAIN, VALID, formulas, found_split_keys
from ..errors import InputError
from ..model import Model
from ..run import fingerprint
from ..seen import copies_of_seen, which_seen
from .base import Case, Finding, Severity, counted, some
from .duplicates import copies

FEW_IDS = 5  # of one or two substances nothing else can be expected
MANY = 0.1  # of the test structures


def check(case: Case) -> Iterator[Finding]:
    """Splits inside the data, test structures and data of the base that were given, and elements."""
    for key, sides in _splits(case).items():
        yield from _between(case, key, sides)
    yield from _held_out(case)
    yield from _base(case)


def _splits(case: Case) -> dict[str, np.ndarray]:
    """Keys that split the data → the side of each structure, -1 for none; folds are sides too."""
    found = {}
    keys = [case.split_key.partition("=")[0]] if case.split_key else list(found_split_keys(case.atoms))
    for key in keys:
        sides, values = codes(case.atoms, key, word)
        if not values:
            raise InputError(f"no structure has {key!r} in its info: choose another split key")
        words = {str(value).lower() for value in values}
        if 1 < len(values) <= 20 and (case.split_key or words <= TRAIN | VALID | TEST or key.lower().endswith("fold")):
            found[key] = sides
    return found


def _between(case: Case, key: str, sides: np.ndarray) -> Iterator[Finding]:
    values = codes(case.atoms, key, word)[1]
    train = [i for i, value in enumerate(values) if str(value).lower() in TRAIN]
    rest = np.isin(sides, train, invert=True) & (sides >= 0) if train else sides >= 0
    shared = sorted(
        i for group in copies(case).same if len({int(sides[j]) for j in group} - {-1}) > 1 for i in group if rest[i]
    )
    if shared:
        few = len(shared) < max(2, MANY * rest.sum())
        yield Finding(
            "leak",
            "warning" if few else "error",
            f"Of {int(rest.sum()):,} structures to validate or test on, {len(shared):,} are also on another "
            f"side of '{key}'",
            "copies of a structure were split at random; errors on them say nothing",
            case.split("duplicates"),
            some(shared),
        )
    for name in (name for name in IDS if name in case.keys):
        ids, _ = codes(case.atoms, name, word)
        seen_on = _sides_of(ids, sides)
        both = [int(i) for i in np.flatnonzero(rest & (ids >= 0)) if len(seen_on.get(int(ids[i]), ())) > 1]
        if both and len(seen_on) > FEW_IDS:
            yield Finding(
                "leak-by-id",
                "warning",
                f"Of structures to validate or test on, {len(both):,} share '{name}' with another side of '{key}'",
                "frames of one material or trajectory were split at random; errors on them are too small",
                case.train(f"--split-by {name}"),
                some(both),
            )
            break
    if train:
        yield from _elements(case, key, np.isin(sides, train), rest)


def _sides_of(ids: np.ndarray, sides: np.ndarray) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for one, side in zip(ids.tolist(), sides.tolist(), strict=True):
        if one >= 0 and side >= 0:
            found.setdefault(one, set()).add(side)
    return found


def _elements(case: Case, key: str, train: np.ndarray, rest: np.ndarray) -> Iterator[Finding]:
    missing = np.flatnonzero(case.composition[rest].any(axis=0) & ~case.composition[train].any(axis=0))
    if len(missing):
        names = [chemical_symbols[z] for z in missing]
        members = np.flatnonzero(rest & case.composition[:, missing].any(axis=1))
        yield Finding(
            "elements-untrained",
            "warning",
            f"No structure to train on has {and_(names)}, which {counted(len(members))} to validate or test on need",
            "elements that are rare fell on one side; energies with them mean nothing",
            case.train("--split-by auto"),
            some(members),
            (f"by '{key}'",),
        )


def _held_out(case: Case) -> Iterator[Finding]:
    if case.held_out is None:
        return
    found, severity = _leaks(case, case.everything, case.held_out)
    if found:
        what = "Held out too, or of a material that is" if severity == "error" else "Much like held-out structures"
        same = sum(leak.by == "structure" for leak in found)
        yield Finding(
            "leak",
            severity,
            f"{what}: {counted(len(found))} ({same:,} by their geometry)",
            "the test set was drawn from the same source",
            case.train(f"--held-out {case.name('held_out')}"),
            some(leak.index for leak in found),
            tuple(leak.why for leak in found[:3]),
        )
    held = np.zeros(119, bool)
    for atoms in case.held_out:
        held[atoms.numbers] = True
    missing = np.flatnonzero(held & ~case.composition.any(axis=0))
    if len(missing):
        yield Finding(
            "elements-untrained",
            "warning",
            f"Held-out structures have {and_([chemical_symbols[z] for z in missing])}, which no structure here has",
            "the test set is of other chemistry; energies with these elements mean nothing",
            case.train("--unseen keep", "finetune small"),
        )


def _base(case: Case) -> Iterator[Finding]:
    if case.base is None:
        return
    card = case.base.card
    seen = np.zeros(119, bool)
    seen[[chemical_symbols.index(symbol) for symbol in card.get("elements", {})]] = True
    new = np.flatnonzero(case.composition.any(axis=0) & ~seen)
    if len(new):
        members = np.flatnonzero(case.composition[:, new].any(axis=1))
        counts = ", ".join(f"{chemical_symbols[z]} in {int((case.composition[:, z] > 0).sum()):,}" for z in new)
        yield Finding(
            "elements-unseen",
            "warning",
            f"The base never saw {and_([chemical_symbols[z] for z in new])} ({counts})",
            "its embedding of these elements is untrained; forces on them are learned from your labels alone",
            case.train("--unseen group", f"finetune {case.name('base')}"),
            some(members),
        )
    stages = {stage["data"] for stage in card.get("history", []) if "data" in stage}
    labels = Labels.from_json(card["labels"]) if "labels" in card else Labels(())
    try:
        trained = {fingerprint(case.atoms), fingerprint(Labelled(case.atoms, labels))} & stages
    except InputError:
        trained = set()
    if trained:
        yield Finding(
            "base-trained-on",
            "error",
            "The base was trained on these very structures",
            "the fingerprint of the data is in the card of the base: errors on it say nothing about new structures",
            f"transfermium info {case.name('base')}",
            (),
            (f"fingerprint {min(trained)}",),
        )
    yield from _seen(case, case.base)
    if case.base_data is not None:
        test = _to_test_on(case)
        found, severity = _leaks(case, test if len(test) else case.everything, case.base_data)
        if found:
            sure = severity == "error"
            what = "In the data of the base, or of a material that is" if sure else "Much like data of the base"
            yield Finding(
                "base-leak",
                severity,
                f"{what}: {counted(len(found))}",
                "the base has seen them: errors on them are too small, and savings by pre-training too large",
                case.drop("base-leak"),
                some(leak.index for leak in found),
                tuple(leak.why for leak in found[:3]),
            )


def _to_test_on(case: Case) -> np.ndarray:
    """Structures that a split sets apart for tests; none without such a split."""
    for key, sides in _splits(case).items():
        values = codes(case.atoms, key, word)[1]
        return np.flatnonzero(np.isin(sides, [i for i, value in enumerate(values) if str(value).lower() in TEST]))
    return np.zeros(0, int)


def _seen(case: Case, base: Model) -> Iterator[Finding]:
    """Tests that the file of the base has marks of."""
    members = np.setdiff1d(_to_test_on(case), list(case.contacts.unusable))
    why = "the base has seen them: errors on them are too small, and savings by pre-training too large"
    evidence = ("by marks of structures in the file of the base",)
    if len(members) and (seen := which_seen(base, Subset(case.atoms, members))) is not None and (seen > 0).any():
        title = f"The base has seen {int((seen > 0).sum()):,} of {counted(len(members))} to test on"
        fix = case.drop("base-seen")
        yield Finding("base-seen", "error", title, why, fix, some(members[seen > 0]), evidence)
    if case.held_out is not None and (found := copies_of_seen(base, case.held_out)) is not None and found.found:
        title = f"The base has seen {found.found:,} of {counted(found.of, 'held-out structure')}"
        fix = f"transfermium info {case.name('base')}"
        yield Finding("base-seen-held-out", "error", title, why, fix, (), evidence)


def _leaks(case: Case, members: np.ndarray, others: Sequence[Atoms]) -> tuple[list[Leak], Severity]:
    """What leaks of some structures, and how bad that is: frames of one substance that are only alike are no copies."""
    members = np.setdiff1d(members, list(case.contacts.unusable))
    own = Subset(case.atoms, members)
    tolerance = tolerance_for(own, others)
    found = leaks(own, others, tolerance=tolerance, ids=tolerance > FRAMES, quiet=True)
    severity: Severity = "error"
    if found and tolerance > FRAMES and len(np.unique(np.concatenate([formulas(own), formulas(others)]))) == 1:
        alike = Subset(own, np.array([leak.index for leak in found]))
        sure = any(leak.by != "structure" for leak in found) or leaks(
            alike, others, tolerance=FRAMES, ids=False, quiet=True
        )
        severity = "error" if sure else "warning"
    return [replace(leak, index=int(members[leak.index])) for leak in found], severity

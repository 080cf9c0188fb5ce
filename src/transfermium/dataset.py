"""What a run trains on: structures read, labelled, checked and split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property

import ase
import numpy as np

from . import distributed
from .console import console
from .data.columns import Key, codes, elements, has, isolated_atoms, listed
from .data.labels import Label, Labelled, Labels, available, resolve
from .data.leakage import Leak, leaks, summary
from .data.load import CALIBRATION, rng_of
from .data.provenance import Comparison, Group, Origin, at_level, checked, compared
from .data.read import Source, read
from .data.sequences import Joined, Subset, spoken
from .data.split import Split, by_key, found_split_keys, split
from .errors import InputError
from .graph import Sample
from .model import described
from .objectives import Objective
from .objectives.together import Parts
from .run import fingerprint

MOST_SAMPLES = 10_000  # structures that references and scales are fitted on
MOST_WARNED = 500  # that are looked at for what a user should know


class TrainingData:
    """Structures read, labelled, checked and split."""

    def __init__(
        self,
        structures: Source | Mapping[str, Source],
        objective: Objective,
        valid: Source | Mapping[str, Source] | None,
        valid_fraction: float,
        split_by: str,
        split_key: str | None,
        label: Mapping[str, str] | None,
        unit: Mapping[str, str] | None,
        held_out: Source | None,
        seed: int,
        verbose: bool,
        provenance: Mapping[str, str] | None = None,
        level: str | None = None,
        allow_mixed: bool = False,
    ):
        stated = checked(provenance, objective.parts if isinstance(objective, Parts) else ())
        if not 0 <= valid_fraction < 1:
            raise InputError(f"valid_fraction is {valid_fraction}, but must be zero or more and below one")
        everything, labelled, self.labels = _labelled(structures, objective, label, unit, level)
        if verbose and self.labels.entries:
            console.print(self.labels.table())
        lone = distributed.from_first(lambda: isolated_atoms(everything))
        if len(lone) == len(everything):
            raise InputError("all structures are isolated atoms: there is nothing else to train on")
        self.isolated = [labelled[i] for i in lone]

        self.split = distributed.from_first(
            lambda: self._split(everything, valid is not None, valid_fraction, split_by, split_key, seed)
        )
        found: list[Leak] = []
        if held_out is not None:
            found = distributed.from_first(lambda: leaks(everything, read(held_out), quiet=not verbose))
        away = np.union1d(lone, [leak.index for leak in found]).astype(int)
        kept = np.setdiff1d(self.split.train, away) if len(away) else self.split.train
        if not len(kept):
            raise InputError("every structure to train on is also held out: there is nothing to learn from")
        self.train: Sequence[ase.Atoms] = Subset(labelled, kept)
        self.unlabelled = Subset(everything, kept)  # the same, as they were read
        self.valid: Sequence[ase.Atoms] = Subset(labelled, np.setdiff1d(self.split.valid, away))
        self.unlabelled_valid = Subset(everything, np.setdiff1d(self.split.valid, away))
        labels_of_valid = self.labels
        if verbose and held_out is not None:
            console.print(f"Held out: {summary(found, len(everything))}{'; they are left out' if found else ''}")
        if valid is not None:
            try:
                others, others_labelled, labels_of_valid = _labelled(valid, objective, label, unit, level, some=True)
            except InputError as error:
                raise InputError(f"validation structures: {error}") from None
            kept = np.setdiff1d(np.arange(len(others)), isolated_atoms(others))
            if held_out is not None:
                kept = np.setdiff1d(kept, [leak.index for leak in leaks(others, read(held_out), quiet=True)])
            self.valid = Subset(others_labelled, kept)
            self.unlabelled_valid = Subset(others, kept)
        sets: dict[str, tuple[Sequence[ase.Atoms], Labels]] = {
            "to train on": (self.unlabelled, self.labels),
            "isolated atoms": (Subset(everything, lone), self.labels),
            "to validate": (self.unlabelled_valid, labels_of_valid),
        }
        self.provenance = distributed.from_first(lambda: dict(_provenance(objective, sets, stated)))
        _check_levels(self.provenance, allow_mixed, verbose)
        if verbose:
            distributed.from_first(lambda: self._tell(everything, valid is None, split_key, objective))
        own = {"fraction": valid_fraction, "by": split_by, "key": split_key}
        self.asked = {
            "objective": described(objective),
            "data": distributed.from_first(lambda: fingerprint(labelled)),
            "valid": own if valid is None else distributed.from_first(lambda: fingerprint(self.valid)),
            "labels": self.labels.to_json(),
            **({} if held_out is None else {"leaks": [leak.index for leak in found]}),
            **({} if level is None else {"level": level}),
            **({} if not provenance else {"provenance": dict(provenance)}),
        }

    @cached_property
    def validated(self) -> frozenset[int]:
        """Atomic numbers in the validation structures."""
        return listed(elements(self.unlabelled_valid)) if len(self.valid) else frozenset()

    def samples(self, objective: Objective) -> list[Sample]:
        """What the objective sees of the training structures, for fitting references and scales."""
        chosen = [self.train[i] for i in self._representative(objective)] + self.isolated
        return [objective.prepare(atoms, rng_of(0, CALIBRATION, 0, i)) for i, atoms in enumerate(chosen)]

    def _representative(self, objective: Objective) -> list[int]:
        """At most about `MOST_SAMPLES` labelled training structures, with every element that occurs among them."""
        if len(self.train) <= MOST_SAMPLES:
            return list(range(len(self.train)))
        subtracted = {minus for _, minus in objective.differences().values()}
        keys = set().union(*(_keys(label) for label in self.labels.entries if label.quantity not in subtracted))
        labelled = np.flatnonzero(has(self.unlabelled, keys)) if objective.labels() else np.arange(len(self.train))
        if not len(labelled):
            return []
        present = elements(self.unlabelled)[labelled]
        picked = np.unique(np.linspace(0, len(labelled) - 1, MOST_SAMPLES).astype(int))
        missing = listed(present) - listed(present[picked])
        first = [int(np.argmax(present[:, z // 8] & (128 >> z % 8) > 0)) for z in missing]
        return sorted({int(i) for i in labelled[[*picked, *first]]})

    def _split(
        self,
        structures: Sequence[ase.Atoms],
        given: bool,
        fraction: float,
        by: str,
        key: str | None,
        seed: int,
    ) -> Split:
        everyone, nobody = np.arange(len(structures)), np.zeros(0, int)
        if given:
            if key is not None or by != "auto":
                raise InputError(
                    "validation structures were given, so nothing is split: leave out split_key and split_by"
                )
            return Split(everyone, nobody, by="given", reason="validation structures were given", total=len(everyone))
        if key is not None:
            name, _, value = key.partition("=")
            return by_key(structures, name, value or None, fraction=fraction, by=by, seed=seed)
        if by.endswith(".json"):
            return _again(Split.load(by), by, len(structures))
        if fraction == 0 or len(structures) == 1:
            return Split(everyone, nobody, by="none", reason="nothing is validated", total=len(everyone))
        return split(structures, fraction, by=by, seed=seed)

    def _tell(self, structures: Sequence[ase.Atoms], own: bool, split_key: str | None, objective: Objective) -> None:
        parts = f"{len(self.train)} to train on, {len(self.valid)} to validate"
        lone = f", {len(self.isolated)} isolated atoms as references" if self.isolated else ""
        console.print(f"{parts}{lone} ({self.split.reason})" if own else f"{parts}{lone}")
        if own and "only validation has" in self.split.reason:
            console.print(
                "[yellow]Some elements are in validation only, so its energies mean little: keep the groups, or choose "
                "another split, such as --split-by random[/yellow]"
            )
        if isinstance(objective, Parts) and len(self.valid):
            meant = {objective.meant_for(self.valid[i]) for i in range(len(self.valid))}
            for part in objective.parts:
                if not meant & {None, part}:
                    console.print(
                        f"[yellow]Nothing of the part {part} validates, so it does not choose the checkpoint[/yellow]"
                    )
        found = found_split_keys(structures)
        if found and split_key is None:
            keys = ", ".join(found)
            console.print(f"[dim]The data has split keys that are not used: {keys} (use one with --split-key)[/dim]")
        some = np.unique(np.linspace(0, len(self.train) - 1, min(len(self.train), MOST_WARNED)).astype(int))
        for text in objective.warnings([_with_forces(self.train[int(i)], self.unlabelled[int(i)]) for i in some]):
            console.print(f"[yellow]{text[0].upper()}{text[1:]}[/yellow]")


def _with_forces(labelled: ase.Atoms, given: ase.Atoms) -> ase.Atoms:
    """A structure with its forces, also where nothing learns them: they say how far from equilibrium it is."""
    with suppress(InputError):  # of forces that are of no use to anyone else
        found = resolve([given], ["forces"], optional=["forces"])
        if "forces" in found and "forces" not in labelled.arrays:
            labelled = labelled.copy()
            labelled.arrays["forces"] = found.apply(given).arrays["forces"]
    return labelled


def belonging_to(part: str, structures: Sequence[ase.Atoms], marks: Sequence[str]) -> Subset:
    """The structures that were given for one part, or for all; `marks` are entries of `info` that name a part."""
    joined = structures.structures if isinstance(structures, Subset) else None
    if isinstance(structures, Subset) and isinstance(joined, Joined) and part in joined.names:
        given_for = np.searchsorted(joined.ends, np.asarray(structures.indices), side="right")
        return Subset(structures, np.flatnonzero(given_for == list(joined.names).index(part)))
    elsewhere = np.zeros(len(structures), bool)
    for mark in reversed(marks):  # the first that a structure has counts
        named, names = codes(structures, mark, str)
        others = [i for i, name in enumerate(names) if str(name) != part]
        elsewhere = np.where(named >= 0, np.isin(named, others), elsewhere)
    return Subset(structures, np.flatnonzero(~elsewhere))


def _provenance(
    objective: Objective, sets: Mapping[str, tuple[Sequence[ase.Atoms], Labels]], stated: Mapping[str, Origin]
) -> Iterator[tuple[str, Comparison]]:
    """What is known of the labels of each part, or under "" of the only one; of those that want labels."""
    parts = objective.parts if isinstance(objective, Parts) else {"": objective}
    marks = objective.marks if isinstance(objective, Parts) else ()
    for part, own in parts.items():
        groups: dict[str, Group] = {}
        for name, (structures, labels) in sets.items():
            wanted = {*own.labels(), *(f"{part}.{quantity}" for quantity in own.labels())}
            keys = {at[:2] for entry in labels.entries if entry.quantity in wanted for at in entry.keys}
            some = belonging_to(part, structures, marks) if part and len(structures) else structures
            if len(some) and keys:
                groups[name] = some, set[Key](keys)
        if groups:
            yield part, compared(groups, {**stated.get("", {}), **stated.get(part, {})})


def _check_levels(provenance: Mapping[str, Comparison], allow_mixed: bool, verbose: bool) -> None:
    """Refuse labels of several levels of theory for one head, unless that is wanted."""
    for part, comparison in provenance.items():
        of = f"part {part}: " if part else ""
        if not comparison.mixed:
            if comparison.ruled and verbose:
                shown = comparison.spelled("level")
                console.print(f"{of}PBE and PBE+U by the rule of the Materials Project count as one level: {shown}")
            continue
        mixed = f"{of}labels for one head are of {comparison.mixed}"
        if not allow_mixed:
            choose = "choose one with level=NAME (--level NAME), " if comparison.differing == "level" else ""
            raise InputError(
                f"{mixed}: {choose}make each a part of Together or Fidelities (PART=FILE), or mix them knowingly with "
                "allow_mixed=True (--allow-mixed)"
            )
        if verbose:
            console.print(f"[yellow]{mixed[0].upper()}{mixed[1:]}, as was allowed[/yellow]")


def _labelled(
    structures: Source | Mapping[str, Source],
    objective: Objective,
    label: Mapping[str, str] | None,
    unit: Mapping[str, str] | None,
    level: str | None = None,
    some: bool = False,
) -> tuple[Sequence[ase.Atoms], Sequence[ase.Atoms], Labels]:
    """Structures as they were read, the same with labels at their canonical places, and those labels.

    Of several parts, labels are called PART.QUANTITY; all must be there, unless `some` are enough.
    """
    if not isinstance(structures, Mapping):
        everything = _at(level, _some(read(structures)))
        labels = distributed.from_first(
            lambda: subtractable(everything, _resolved(everything, objective.labels(), label, unit), objective)
        )
        return everything, _ready(Labelled(everything, labels)), labels
    if not isinstance(objective, Parts):
        raise InputError(
            f"structures have the names {', '.join(structures)}: only Together has parts, and Fidelities levels, to "
            "give them to"
        )
    for name in [*structures, *(key.partition(".")[0] for key in {**(label or {}), **(unit or {})})]:
        if name not in objective.parts:
            raise InputError(
                f"'{name}' is not a part of this objective, which has {', '.join(objective.parts)}; labels and "
                f"units of a part are named {next(iter(objective.parts))}.LABEL=..."
            )
    if not some and (lacking := [name for name in objective.parts if name not in structures]):
        raise InputError(f"the part '{lacking[0]}' has no structures: give them as {lacking[0]}=FILE, or leave it out")
    parts, labelled, entries = [], [], []
    for name, source in structures.items():
        own = _at(level, _some(read(source)), name)
        labels = distributed.from_first(
            lambda own=own, name=name: subtractable(  # type: ignore[misc]
                own,
                _resolved(own, objective.parts[name].labels(), _of(name, label), _of(name, unit), name),
                objective.parts[name],
            )
        )
        parts.append(own)
        labelled.append(_ready(Labelled(own, labels, name)))
        entries += [replace(entry, quantity=f"{name}.{entry.quantity}") for entry in labels.entries]
    return Joined(parts, list(structures)), Joined(labelled, list(structures)), Labels(tuple(entries))


def subtractable(structures: Sequence[ase.Atoms], labels: Labels, objective: Objective) -> Labels:
    """The labels, each that is subtracted from another in the unit of that one.

    Raises:
        InputError: for units that do not fit, and for a structure that has a label and lacks what is subtracted from it
            (of several objectives it may teach another one).
    """
    known = {entry.quantity: entry for entry in labels.entries}
    for quantity, minus in set(objective.differences().values()):
        quantity = quantity.rpartition(" ")[2]  # of a part
        if quantity in known and minus in known:
            known[minus] = known[minus].in_unit_of(known[quantity])
            lacking = has(structures, _keys(known[quantity])) & ~has(structures, _keys(known[minus]))
            if lacking.any() and not isinstance(objective, Parts):
                first, *others = np.flatnonzero(lacking)
                raise InputError(
                    f"{spoken(structures, int(first))} has '{quantity}' but no '{minus}', which is to be subtracted"
                    f"{f' (and {len(others)} more)' if others else ''}: give both, or leave such structures out"
                )
    return Labels(tuple(known.values()))


def _keys(label: Label) -> set[tuple[str, str]]:
    return {(place, key) for place, key, _ in label.keys}


def _some(structures: Sequence[ase.Atoms]) -> Sequence[ase.Atoms]:
    if len(structures) == 0:
        raise InputError("there is no structure to train on")
    return structures


def _at(level: str | None, structures: Sequence[ase.Atoms], part: str | None = None) -> Sequence[ase.Atoms]:
    """The structures at a level of theory; all where none is named."""
    if level is None:
        return structures
    try:
        chosen = distributed.from_first(lambda: at_level(structures, level))
    except InputError as error:
        raise InputError(f"part {part}: {error}" if part else str(error)) from None
    return [structures[i] for i in chosen] if isinstance(structures, list) else Subset(structures, chosen)


def _of(part: str, named: Mapping[str, str] | None) -> dict[str, str]:
    """What is said of the labels of one part."""
    return {key[len(part) + 1 :]: value for key, value in (named or {}).items() if key.startswith(f"{part}.")}


def _resolved(
    structures: Sequence[ase.Atoms],
    wanted: Mapping[str, bool],
    label: Mapping[str, str] | None,
    unit: Mapping[str, str] | None,
    part: str | None = None,
) -> Labels:
    named = {**(label or {}), **(unit or {})}
    for name in named:
        if name not in wanted:
            raise InputError(f"'{name}' is not a label of this objective, which has {', '.join(wanted) or 'none'}")
    optional = [name for name, needed in wanted.items() if not needed and name not in named]
    try:
        labels = resolve(structures, list(wanted), labels=label, units=unit, optional=optional)
    except InputError as error:
        if part is None:
            raise
        raise InputError(f"part {part}: {error}".replace("--label ", f"--label {part}.")) from None
    if wanted and not labels.entries:
        keys = ", ".join(available(structures)) or "no labels at all"
        of, prefix = ("", "") if part is None else (f"part {part}: ", f"{part}.")
        raise InputError(
            f"{of}no structure has any of {', '.join(wanted)}; there are {keys}; name keys with "
            f"--label {prefix}{next(iter(wanted))}=KEY"
        )
    return labels


def _ready(labelled: Labelled) -> Sequence[ase.Atoms]:
    """Structures that are in memory get their labels once; those on disk, whenever they are read."""
    return list(labelled) if isinstance(labelled.structures, list) else labelled


def _again(found: Split, path: str, total: int) -> Split:
    """A split of an earlier run, on the same structures."""
    if found.total != total:
        raise InputError(f"{path} splits {found.total} structures, but there are {total}: is it of other data?")
    used = np.concatenate([found.train, found.valid, *([] if found.test is None else [found.test])])
    if len(np.unique(used)) < len(used) or (len(used) and not 0 <= used.min() <= used.max() < total):
        raise InputError(f"{path} names a structure twice, or one that is not there: it is damaged, split anew")
    if not len(found.train):
        raise InputError(f"{path} leaves no structure to train on: split anew")
    return replace(found, reason=f"as in {path}")

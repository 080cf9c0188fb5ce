"""The data of a comparison, divided without leaks and packed, and the cells that work on it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from ..backbones import Backbone
from ..console import console
from ..data import pack, read, resolve, split
from ..data.labels import KEYS
from ..data.leakage import FRAMES, TOLERANCE, Leak, summary, tolerance_for, without
from ..data.read import Source
from ..data.sequences import Joined, Subset
from ..data.split import materials
from ..errors import InputError
from ..objectives import Denoise, Objective, Potential, Property, Together
from ..objectives.together import Parts
from ..run import fingerprint
from ..transfer.learn import check_together
from .bounds import both, bound_of, plain
from .cells import Cell, cut
from .judged import labelled_for
from .levels import only_level
from .manifest import WHAT_FOR
from .ranking import LONG, SCRATCH
from .stages import pretrained, tuned

ARMS: dict[str, Objective] = {
    "denoise_direct": Denoise(conservative=False),
    "denoise_derivative": Denoise(),
    "dens_derivative": Denoise(told_forces=True),
    "e_derivative": Potential(forces=0.0, stress=0.0),
    "f_derivative": Potential(energy=0.0, stress=0.0),
    "fs_derivative": Potential(energy=0.0),
    "ef_direct": Potential(stress=0.0, conservative=False),
    "ef_derivative": Potential(stress=0.0),
    "efs_direct": Potential(conservative=False),
    "efs_derivative": Potential(),
}


class Target(NamedTuple):
    """What is fine-tuned on: labelled structures and an objective with one output that is judged."""

    structures: Source
    objective: Objective
    test: Source | None = None  # by default a fifth of the structures, with no material on both sides
    label: Mapping[str, str] = {}
    unit: Mapping[str, str] = {}


class Arm(NamedTuple):
    """A way of pre-training on structures of its own, such as unlabelled ones of the domain of a target."""

    objective: Objective
    structures: Source


class Divided(NamedTuple):
    """Labelled structures of a target to fine-tune on, and those to test on."""

    pool: Sequence[Atoms]
    test: Sequence[Atoms]
    left_out: str  # what was, of the first, for being in the second too
    tolerance: float  # within which structures are the same


class Plan:
    """The data of a study, to be packed into its folder, and the cells that work on it."""

    def __init__(
        self,
        levels: Mapping[str, Sequence[Atoms]],
        own: Mapping[str, Arm],
        targets: Mapping[str, Target],
        out: Path,
        label: Mapping[str, str],
        unit: Mapping[str, str],
        sizes: Sequence[int] | None,
        quiet: bool,
    ):
        self.packs, self.targets, self.label, self.unit = Packs(out), targets, dict(label), dict(unit)
        known = [resolve(level, [], labels=label, units=unit, optional=list(KEYS)) for level in levels.values()]
        self.labels = {name for name in KEYS if all(name in labels for labels in known)}
        self.pools: dict[str, str] = {}  # names of packed sets
        self.tests: dict[str, str] = {}
        self.sizes: dict[str, list[int]] = {}
        self.ids: dict[str, str] = {}
        tests: list[Divided] = []
        for name, target in targets.items():
            if isinstance(target.objective, Potential) and len(levels) > 1:
                raise InputError(
                    f"the target {name} has energies, and {', '.join(levels)} each have their own: choose one level"
                )
            tests.append(divided(name, target))
            pool, test = tests[-1].pool, tests[-1].test
            self.pools[name] = self.packs.add(f"{name}-pool", pool)
            self.tests[name] = self.packs.add(f"{name}-test", test)
            self.ids[name] = fingerprint(test)
            self.sizes[name] = sorted(set(map(_whole, sizes))) if sizes else [min(len(pool), 500)]
            if self.sizes[name][0] < 1:
                raise InputError(f"{self.sizes[name][0]} is no number of labels: ask for some")
            if self.sizes[name][-1] > len(pool):
                raise InputError(
                    f"{name} has {len(pool)} structures to train on, not {self.sizes[name][-1]}: ask for fewer"
                )
        sides = {name: _untested(level, tests, quiet) for name, level in levels.items()}
        self.leaks = summary([leak for _, found in sides.values() for leak in found], sum(map(len, levels.values())))
        near = []
        self.levels: dict[str, str] = {}
        self.shared: dict[str, Sequence[Atoms]] = {}
        for name, (kept, _) in sides.items():
            if not len(kept):
                raise InputError(
                    "every structure to pre-train on is also in a test set: there is nothing to learn from"
                )
            near.append(Subset(kept, nearest_equilibrium(kept, label, unit)))
            self.levels[name] = self.packs.add(f"pretraining{name and '-'}{name}", kept)
            self.shared[name] = kept
        relaxed = Joined(near) if len(near) > 1 else near[0]
        self.relaxed = self.packs.add("relaxed", relaxed)
        self.own_counts: dict[str, str] = {}
        self.own = {name: self._own(name, arm, tests, quiet) for name, arm in own.items()}
        self.counts = {"structures": sum(len(kept) for kept, _ in sides.values()), "relaxed": len(relaxed)}
        if not quiet:
            for text in Denoise().warnings(
                [relaxed[i] for i in np.unique(np.linspace(0, len(relaxed) - 1, 500).astype(int))]
            ):
                console.print(f"Noise: {text}", style="yellow", markup=False)
            counts = self.counts
            console.print(
                f"Pre-training on {counts['structures']} structures, {counts['relaxed']} for noise; {self.leaks}"
            )

    def _own(self, name: str, arm: Arm, tests: Sequence[Divided], quiet: bool) -> str:
        """Structures of one arm alone, all that match no test structure."""
        everything = read(arm.structures)
        kept, found = _untested(everything, tests, quiet)
        self.own_counts[name] = f"{len(kept)} structures of its own; {summary(found, len(everything))}"
        if not quiet:
            console.print(f"{name}: {self.own_counts[name]}", markup=False)
            some = np.unique(np.linspace(0, len(kept) - 1, 500).astype(int))
            for text in arm.objective.warnings([kept[int(i)] for i in some] if len(kept) else []):
                console.print(f"{name}: {text}", style="yellow", markup=False)
        if not len(kept):
            raise InputError(f"every structure of the arm {name} is also in a test set: there is nothing to learn from")
        self._check_labels(name, arm.objective, kept)
        return self.packs.add(f"own-{name}", kept)

    def _check_labels(self, name: str, objective: Objective, structures: Sequence[Atoms]) -> None:
        """Refuse an arm whose structures have nothing of what it learns from."""
        wanted = objective.labels()
        if not wanted:
            return
        labels, units = ({k: v for k, v in one.items() if k in wanted} for one in (self.label, self.unit))
        optional = [quantity for quantity, needed in wanted.items() if not needed or len(wanted) > 1]
        if not resolve(structures, list(wanted), labels=labels, units=units, optional=optional).entries:
            raise InputError(f"the arm {name} learns {' or '.join(wanted)}, but its structures have none")

    def objectives(
        self, arms: Sequence[str] | Mapping[str, Objective | Arm] | None, backbones: Mapping[str, Backbone]
    ) -> dict[str, Objective | None]:
        """Arms and their objectives of pre-training, None where there is no such stage; none that a backbone cannot
        learn, which those of one's own choice are refused for."""
        found = self._named(arms)
        for backbone, architecture in backbones.items():
            for target in self.targets.values():
                check_together(architecture, target.objective)
            for arm, objective in [(arm, objective) for arm, objective in found.items() if objective is not None]:
                try:
                    check_together(architecture, objective)
                except InputError as error:
                    if arms is not None:
                        raise InputError(f"the arm {arm} with {backbone}: {error}") from None
                    console.print(f"{arm} is left out: {error}", markup=False)
                    del found[arm]
        return found

    def _named(self, arms: Sequence[str] | Mapping[str, Objective | Arm] | None) -> dict[str, Objective | None]:
        """Before it is known what the backbones can learn."""
        controls = {SCRATCH: None, LONG: None}
        if isinstance(arms, Mapping):
            if taken := controls.keys() & arms.keys():
                raise InputError(f"'{min(taken)}' is the name of a control: choose another one for your arm")
            for name, own in arms.items():
                if not isinstance(own, Arm):
                    self._check_own(name, own)
            return {**controls, **{name: arm.objective if isinstance(arm, Arm) else arm for name, arm in arms.items()}}
        known: dict[str, Objective | None] = {**controls, **ARMS}
        for arm in arms or []:
            if arm not in known:
                raise InputError(f"there is no arm '{arm}': choose among {', '.join(known)}")
        possible = {name: o for name, o in known.items() if o is None or self._possible(name, o)}
        if missing := [arm for arm in arms or [] if arm not in possible]:
            raise InputError(
                f"the arm '{missing[0]}' needs labels that the structures lack: they have {self._listed()}"
            )
        usual = [name for name in possible if "stress" not in self.labels or not name.startswith("ef_")]
        return {name: possible[name] for name in possible if name in {SCRATCH, *(usual if arms is None else arms)}}

    def _check_own(self, name: str, objective: Objective) -> None:
        """Refuse what an objective of one's own cannot learn of the structures that all arms share."""
        if not isinstance(objective, Objective):
            raise InputError(
                f"the arm {name} is {objective!r}, but must be an objective, or Arm(objective, structures)"
            )
        energies = isinstance(objective, Parts) and any(isinstance(p, Potential) for p in objective.parts.values())
        if energies and len(self.levels) > 1:
            raise InputError(
                f"the arm {name} learns energies together with something else, but {', '.join(self.levels)} each have "
                "their own: choose one level, or compare a Potential alone, which learns each with an energy of its own"
            )
        for structures in self.shared.values():
            self._check_labels(name, objective, structures)

    def _possible(self, name: str, objective: Objective) -> bool:
        letters = {"e": "energy", "f": "forces", "s": "stress"}
        needed = (
            {letters[c] for c in name.split("_")[0]} if isinstance(objective, Potential) else set(objective.labels())
        )
        return needed <= self.labels

    def _listed(self) -> str:
        return ", ".join(sorted(self.labels)) or "none"

    def cell(
        self,
        objectives: Mapping[str, Objective | None],
        backbones: Mapping[str, Backbone],
        settings: Mapping[str, Any],
        target: str,
        backbone: str,
        arm: str,
        n_train: int,
        seed: int,
        rate: float,
    ) -> Cell:
        """One fine-tuning, and the pre-training that it needs."""
        objective = objectives[arm]
        needs: dict[str, Cell] = {}
        bound = bound_of(settings["tuning"])
        if objective is not None:
            relaxed = isinstance(objective, Denoise) and not objective.told_forces
            data: Any = self.relaxed if relaxed else list(self.levels.values())
            if arm in self.own:
                data = self.own[arm]
            elif isinstance(objective, Potential) and len(self.levels) > 1:
                data, objective = self.levels, Together(dict.fromkeys(self.levels, objective))
            arguments: dict[str, Any] = {
                "data": data,
                "objective": objective,
                "architecture": backbones[backbone],
                "time": plain(bound_of(settings["pretraining"])),
                "edges": settings["edges"],
                "label": self.label,
                "unit": self.unit,
            }
            needs["base"] = Cell({"backbone": backbone, "arm": arm, "seed": seed}, pretrained, arguments)
        elif arm == LONG:
            bound = both(bound, bound_of(settings["pretraining"]))
        goal = self.targets[target]
        key = {"target": target, "backbone": backbone, "arm": arm, "n_train": n_train, "seed": seed, "lr": rate}
        arguments = {
            "pool": self.pools[target],
            "test": self.tests[target],
            "ids": self.ids[target],
            "objective": goal.objective,
            "architecture": backbones[backbone],
            "time": plain(bound),
            "edges": settings["edges"],
            "label": dict(goal.label),
            "unit": dict(goal.unit),
        }
        return Cell(key, tuned, arguments, needs, version=2)


def _whole(size: object) -> int:
    try:
        return operator.index(size)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"{size!r} is no number of labels: give whole numbers") from None


def divided(name: str, target: Target) -> Divided:
    """Those of a target that have the label that is judged, none on both sides: no material, or of potentials of a
    single system no frame."""
    if isinstance(target.objective, Parts):
        raise InputError(f"the target {name} is {target.objective!r}, but only one objective can be judged")
    everything = _labelled(name, read(target.structures), target)
    if target.test is not None:
        pool, test = everything, _labelled(f"{name} (test)", read(target.test), target)
    else:
        parts = split(everything, 0.2, seed=0)
        pool, test = Subset(everything, parts.train), Subset(everything, parts.valid)
    tolerance = tolerance_for(pool, test) if isinstance(target.objective, Potential) else TOLERANCE
    pool, found = without(pool, test, tolerance=tolerance, quiet=True)
    said = f"{summary(found, len(pool) + len(found))} into its test set; they are left out" if found else ""
    if tolerance == FRAMES:
        said = f"train and test are frames of one system, {said or 'and none is in both'}"
    if said:
        console.print(f"{name}: {said}", markup=False)
    if len(pool) < 5 or not len(test):
        left = f" ({said})" if said else ""
        raise InputError(
            f"{name} has {len(pool)} labelled structures to train on and {len(test)} to test on: too few{left}"
        )
    try:
        only_level({WHAT_FOR["labels"]: pool, WHAT_FOR["test"]: test}, target.objective, target.label, target.unit)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return Divided(pool, test, said, tolerance)


def _untested(structures: Sequence[Atoms], tests: Sequence[Divided], quiet: bool) -> tuple[Sequence[Atoms], list[Leak]]:
    """Those that no target is tested on, and the others."""
    kept, found = structures, []
    for tolerance in sorted({test.tolerance for test in tests}):
        held_out = [atoms for test in tests if test.tolerance == tolerance for atoms in test.test]
        kept, leaking = without(kept, held_out, tolerance=tolerance, quiet=quiet)
        found += leaking
    return kept, found


class Packs:
    """Packed sets in the folder of a study; their names there are part of what makes a cell another one."""

    def __init__(self, out: Path):
        self.folder = out / "data"
        self.missing: dict[str, Sequence[Atoms]] = {}

    def add(self, name: str, structures: Sequence[Atoms]) -> str:
        """The name that they will have when they are written, which is a file's name in all file systems."""
        name = f"{cut(name, 80)}-{fingerprint(structures)}"
        self.missing[name] = structures
        return name

    def write(self) -> None:
        """Pack what is missing, once nothing is left to be refused."""
        while self.missing:
            name, structures = self.missing.popitem()
            pack(structures, self.folder / name, progress=False)


def _labelled(name: str, structures: Sequence[Atoms], target: Target) -> Subset:
    """Those that have what is judged: the property, or the forces, or else the energy."""
    wanted = target.objective.labels()
    optional = [quantity for quantity, needed in wanted.items() if not needed]
    labels = resolve(structures, list(wanted), labels=target.label, units=target.unit, optional=optional)
    judged = next((quantity for quantity in ("forces", *wanted) if quantity in labels), None)
    if judged is None:
        raise InputError(f"no structure of {name} has any of {', '.join(wanted)}")
    has = [labels[judged].value(atoms) is not None for atoms in structures]
    if not all(has):
        said = f"{name}: {has.count(False)} of {len(has)} structures have no {judged} and are left out"
        console.print(said, markup=False)
    kept = Subset(structures, np.flatnonzero(has))
    if isinstance(target.objective, Property):  # or it would fail later, once something was learned
        labelled, rng = labelled_for(target.objective, kept, target.label, target.unit), np.random.default_rng(0)
        target.objective.settled([target.objective.prepare(labelled[i], rng) for i in range(len(labelled))])
    return kept


def nearest_equilibrium(structures: Sequence[Atoms], label: Mapping[str, str], unit: Mapping[str, str]) -> np.ndarray:
    """Of each material the structure with the smallest RMS force, to 0.01 eV/Å, and then the smallest stress.

    Forces may vanish by symmetry where the volume is wrong. The first one where neither is known.
    """
    names = ["forces", "stress"]
    named = [{k: v for k, v in one.items() if k in names} for one in (label, unit)]
    labels = resolve(structures, [], labels=named[0], units=named[1], optional=names)
    group = materials(structures)
    sizes = np.full((2, len(structures)), np.inf)
    for row, name in enumerate(names):
        if name in labels:
            for i, atoms in enumerate(structures):
                value = labels[name].value(atoms)
                if value is not None:
                    sizes[row, i] = float(np.sqrt(np.square(value).mean()))
    order = np.lexsort((np.arange(len(group)), sizes[1], np.round(sizes[0], 2), group))
    first = np.r_[True, group[order][1:] != group[order][:-1]]
    return np.sort(order[first])

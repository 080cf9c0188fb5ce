"""What every check sees, a `Case`, and what it says, a `Finding`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from ..data.columns import is_missing
from ..data.labels import KEYS, Label, Labels, available, resolve
from ..data.sequences import Joined, Subset
from ..data.split import IDS, formulas
from ..errors import InputError
from ..graph import Cutoff
from ..model import Model

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
REACH, FURTHER = Cutoff(4.0), Cutoff(7.0)  # Å, of the neighbours that checks look at
DENSEST, LOOSEST = 1.0, 35.0  # Å³ for an atom, in any matter, and in what is taken for a solid or liquid
SMALL = 1.25  # Å, covalent radius
NOBLE = [2, 10, 18, 36, 54, 86]  # elements that have no bonds
NO_LABELS = {*IDS, "id", "index", "file", "spacegroup", "charge", "spin", "ionic_step", "config_weight", "total_charge"}
STATES = ("charge", "total_charge", "spin", "total_spin", "level", "functional", "xc", "config_type")  # in info
CENTRES = np.linspace(0.8, 3.8, 6)  # Å, of the bells that distances fall under


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes:
        kind: its short name, by which `Diagnosis` finds it.
        severity: an error makes results wrong, a warning may, a note is worth knowing.
        title: what was found, in one sentence.
        structures: indices of those concerned, in the order of the data; empty where it is the whole set.
        cause: the likely cause.
        fix: what to type, in a shell where it begins with "transfermium", else in Python.
        evidence: what was measured.
    """

    kind: str
    severity: Severity
    title: str
    cause: str
    fix: str
    structures: tuple[int, ...] = ()
    evidence: tuple[str, ...] = ()


@dataclass
class Case:
    """Structures and their labels in our units, as arrays; missing labels are NaN.

    Attributes:
        structures: as they were read.
        sources: what the user named, for commands.
        labels: as found; those that could not be read are in `unreadable`, with the structures and the reason.
        base: the model that the data is for.
        yardstick: a potential that labels are compared with; None for none.
        held_out, base_data: test structures, and those that the base was trained on.
        shortest: distances below this fraction of the sum of covalent radii are too short.
        given: what else `doctor` was given, in words, for commands.
    """

    structures: Sequence[Atoms]
    sources: tuple[str, ...] = ("DATA",)
    label: dict[str, str] = field(default_factory=dict)
    unit: dict[str, str] = field(default_factory=dict)
    base: Model | None = None
    yardstick: Model | None = None
    held_out: Sequence[Atoms] | None = None
    base_data: Sequence[Atoms] | None = None
    split_key: str | None = None
    shortest: float = 0.5
    device: str = "auto"
    given: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.atoms: list[Atoms] = [self.structures[i] for i in range(len(self.structures))]
        self.keys = available(self.atoms)
        self.unreadable: dict[str, dict[int, str]] = {}
        self.kept: dict[Any, Any] = {}  # what several checks need
        self.told: dict[str, set[int]] = {}  # structures whose label was found to be unlike the others'
        self.labels = Labels(tuple(entry for name in self._names() if (entry := self._resolved(name)) is not None))

    def __len__(self) -> int:
        return len(self.atoms)

    # ------------------------------------------------------------------------------------------------- geometry

    @cached_property
    def n_atoms(self) -> np.ndarray:
        """(n_structures,)."""
        return np.array([len(atoms) for atoms in self.atoms])

    @cached_property
    def first(self) -> np.ndarray:
        """Where the atoms of each structure begin among all atoms: (n_structures + 1,)."""
        return np.concatenate([[0], np.cumsum(self.n_atoms)])

    @cached_property
    def owner(self) -> np.ndarray:
        """The structure of each atom: (n_atoms,)."""
        return np.repeat(np.arange(len(self)), self.n_atoms)

    @cached_property
    def composition(self) -> np.ndarray:
        """Atoms of each element: (n_structures, 119)."""
        numbers = np.concatenate([atoms.numbers for atoms in self.atoms])
        return np.bincount(self.owner * 119 + numbers, minlength=119 * len(self)).reshape(-1, 119)

    @cached_property
    def periodic(self) -> np.ndarray:
        """Whether a structure repeats in all three directions: (n_structures,)."""
        return np.array([atoms.pbc.all() for atoms in self.atoms])

    @cached_property
    def volume(self) -> np.ndarray:
        """Å³, NaN without three directions: (n_structures,)."""
        cells = np.array([atoms.cell.array for atoms in self.atoms])
        return np.where(self.periodic, np.abs(np.linalg.det(cells)), np.nan)

    @cached_property
    def forgotten(self) -> np.ndarray:
        """Whether a structure fills a cell that does not repeat: (n_structures,)."""
        return np.array([_is_forgotten(atoms) for atoms in self.atoms], bool)

    @cached_property
    def contacts(self) -> Contacts:
        return Contacts.of(self)

    # --------------------------------------------------------------------------------------------------- labels

    @cached_property
    def energy(self) -> np.ndarray:
        """eV: (n_structures,)."""
        return np.array([np.nan if value is None else value for value in self._values("energy")], float)

    @cached_property
    def forces(self) -> np.ndarray:
        """eV/Å: (n_atoms, 3)."""
        values = zip(self._values("forces"), self.n_atoms, strict=True)
        return np.concatenate([np.full((n, 3), np.nan) if value is None else value for value, n in values])

    @cached_property
    def stress(self) -> np.ndarray:
        """eV/Å³: (n_structures, 3, 3)."""
        return np.array([np.full((3, 3), np.nan) if value is None else value for value in self._values("stress")])

    @property
    def everything(self) -> np.ndarray:
        """All indices."""
        return np.arange(len(self))

    @cached_property
    def has_forces(self) -> np.ndarray:
        """(n_structures,)."""
        return np.isfinite(self.forces[self.first[:-1], 0])

    def values(self, entry: Label) -> list[Any]:
        """A label of each structure, None where it has none."""
        bad = self.unreadable.get(entry.quantity, {})
        return [None if i in bad else entry.value(atoms, f"structure {i}") for i, atoms in enumerate(self.atoms)]

    def untold(self, indices: np.ndarray, *quantities: str) -> np.ndarray:
        """These structures, without those whose label is known to be unlike the others'."""
        return np.setdiff1d(indices, [i for name in quantities for i in self.told.get(name, ())])

    def info(self, *names: str) -> list[Any]:
        """What each structure has in `info` under the first of these names that it has."""
        found = ([atoms.info[name] for name in names if name in atoms.info] for atoms in self.atoms)
        return [next((value for value in values if not is_missing(value)), None) for values in found]

    def per_atom(self, totals: np.ndarray) -> np.ndarray:
        return totals / self.n_atoms

    def rms_force(self) -> np.ndarray:
        """Of each structure, eV/Å: (n_structures,)."""
        return np.sqrt(np.bincount(self.owner, (self.forces**2).sum(1), len(self)) / (3 * self.n_atoms))

    # ------------------------------------------------------------------------------------------------- commands

    @property
    def files(self) -> str:
        """The sources, as in a shell."""
        return " ".join(map(shlex.quote, self.sources))

    def name(self, option: str) -> str:
        """What was given as base or held-out structures, as in a shell."""
        return " ".join(map(shlex.quote, self.given[option]))

    def convert(self, units: Mapping[str, str]) -> str:
        """The command that brings labels to our units once and for all."""
        options = _pairs("label", self.label) + _pairs("unit", {**self.unit, **units})
        return f"transfermium pack {self.files}{options} --out {unused('repaired')}"

    def train(self, options: str, start: str = "pretrain", out: str = "run") -> str:
        """The command that trains on this data with these options."""
        entries = self.labels.entries
        found = [one.quantity for one in entries if one.quantity in KEYS or (one.per == "structure" and not one.shape)]
        names = [*self.label, *found]
        wanted = [name for name in names if name in KEYS]
        label, objective = self.label, "Potential" if wanted else "Denoise"
        if names and not wanted:
            wanted = names[:1] if names[0].isidentifier() else ["target"]
            label, objective = {"target": names[0], **label}, f"Property --objective.name {wanted[0]}"
        said = [
            _pairs(option, {name: value for name, value in pairs.items() if name in wanted})
            for option, pairs in (("label", label), ("unit", self.unit))
        ]
        return f"transfermium {start} {self.files} --objective {objective}{''.join(said)} {options} --out {unused(out)}"

    def split(self, kind: str) -> str:
        """The command that keeps similar structures on one side; or what leaves those of a finding out."""
        several = len(np.unique(formulas([atoms for atoms in self.atoms if len(atoms)]))) > 1
        return self.train("--split-by composition") if several else self.drop(kind)

    def drop(self, kind: str) -> str:
        """Lines of Python that leave the structures of a finding out."""
        return self._packed(f"structures = {self._again()}.without({kind!r})")

    def change(self, *lines: str, of: str = "") -> str:
        """Lines of Python that change each structure, called `atoms`; or each structure of a finding."""
        chosen = f"(structures[i] for i in {self._again()}[{of!r}].structures)" if of else "structures"
        return self._packed(
            f"structures = list(tm.read({', '.join(map(repr, self.sources))}))",
            f"for atoms in {chosen}:",
            *(f"    {line}" for line in lines),
        )

    def reshape(self, *lines: str) -> str:
        """Lines of Python that change the geometry of each structure, and leave it its labels."""
        return self.change(*lines, "if atoms.calc is not None:", "    atoms.calc.atoms = atoms.copy()")

    def relabel(self, quantity: str, *lines: str) -> list[str]:
        """Lines of Python that change a label, called LABEL in `lines`, of `atoms` that have it."""
        changed = []
        for k, (place, key, _) in enumerate(self.labels[quantity].keys):
            where = "atoms.calc.results" if place == "calc" else f"atoms.{place}"
            there = f"{'atoms.calc is not None and ' if place == 'calc' else ''}{key!r} in {where}"
            changed.append(f"{'elif' if k else 'if'} {there}:")
            changed += [f"    {line.replace('LABEL', f'{where}[{key!r}]')}" for line in lines]
        return changed

    def _again(self) -> str:
        """The call of `doctor` that finds the same."""
        options = {"label": self.label, "unit": self.unit, **self.given}
        words = "".join(f", {name}={_single(value)!r}" for name, value in options.items() if value)
        return f"tm.doctor({_single(self.sources)!r}{words})"

    def _packed(self, *lines: str) -> str:
        """Lines that make `structures`, with those before and after them; labels that were named are found there."""
        named = list(dict.fromkeys([*self.label, *self.unit]))
        labels = f"resolve(structures, {named!r}, labels={self.label!r}, units={self.unit!r})"
        return "\n".join(
            [
                *(["import numpy as np"] if any("np." in line for line in lines) else []),
                "import transfermium as tm",
                *(["from transfermium.data import resolve"] if named else []),
                *lines,
                f"tm.pack(structures, {unused('repaired')!r}{f', labels={labels}' if named else ''})",
            ]
        )

    # --------------------------------------------------------------------------------------------------- inside

    def _names(self) -> list[str]:
        """Energy, forces, stress, and other names under which there are numbers."""
        known = {key for keys in KEYS.values() for key in keys} | {*self.label.values(), "free_energy"}
        named = [name for name in self.keys if name not in known and not _is_no_label(name)]
        numeric = [name for name in named if self._is_numeric(name)]
        return list(dict.fromkeys([*KEYS, *(name for name in self.label if name not in KEYS), *numeric]))

    def _is_numeric(self, name: str) -> bool:
        for atoms in self.atoms:
            values = (held(atoms, place).get(name) for place in ("info", "arrays", "calc"))
            value = next((one for one in values if one is not None), None)
            if value is not None and not isinstance(value, str):
                try:
                    return np.asarray(value).dtype.kind in "iufb"
                except ValueError:  # lists of different lengths
                    return False
            if value is not None and not is_missing(value):
                return False
        return False

    def _resolved(self, name: str) -> Label | None:
        """The label, from the structures in which it can be read."""
        named = {
            option: {k: v for k, v in pairs.items() if k == name}
            for option, pairs in (("l", self.label), ("u", self.unit))
        }
        options: dict[str, Any] = {"labels": named["l"], "units": named["u"], "optional": [name]}
        try:
            found = resolve(self.atoms, [], **options)
        except InputError as error:
            key = self.label.get(name)
            having = [i for i, atoms in enumerate(self.atoms) if key is None or key in available([atoms])]
            bad: dict[int, str] = {}
            for i in having:
                try:
                    resolve([self.atoms[i]], [], **options)
                except InputError as one:
                    bad[i] = str(one).replace("structure 0: ", "").replace("structure 0 ", "")
            if not bad and name not in {*KEYS, *self.label, *self.unit}:
                return None  # information that was not meant as a label
            if not bad:
                raise error
            self.unreadable[name] = bad
            if len(bad) == len(having):
                return None
            found = resolve([atoms for i, atoms in enumerate(self.atoms) if i not in bad], [], **options)
        return found.entries[0] if found.entries else None

    def _values(self, quantity: str) -> list[Any]:
        return self.values(self.labels[quantity]) if quantity in self.labels else [None] * len(self)


@dataclass(frozen=True)
class Contacts:
    """What neighbours tell of each structure.

    Attributes:
        unusable: structures in which no neighbours can be searched, and why.
        distance: the shortest, Å; infinite where there is none: (n_structures,).
        fraction: the shortest in units of the sum of covalent radii: (n_structures,).
        typical: the median over atoms of the distance to the nearest neighbour in these units: (n_structures,).
        pair: the atoms of `fraction`: (n_structures, 2).
        alone: whether some atom has no neighbour: (n_structures,).
        moments: equal for equal structures, however turned, and changing smoothly: (n_structures, 2 n_bells).
        peaks: likewise, of the atoms that have most neighbours at some distance: (n_structures, n_bells).
        repulsion: forces apart, less those together, of pairs of which `fraction` is below 0.8, and the sum of both:
            (n_structures, 2), eV/Å.
    """

    unusable: dict[int, str]
    distance: np.ndarray
    fraction: np.ndarray
    typical: np.ndarray
    pair: np.ndarray
    alone: np.ndarray
    moments: np.ndarray
    peaks: np.ndarray
    repulsion: np.ndarray

    @classmethod
    def of(cls, case: Case) -> Contacts:
        n = len(case)
        unusable: dict[int, str] = {}
        distance, fraction, typical = np.full((3, n), np.inf)
        pair, alone = np.zeros((n, 2), int), np.zeros(n, bool)
        moments, peaks, repulsion = np.zeros((n, 2 * len(CENTRES))), np.zeros((n, len(CENTRES))), np.zeros((n, 2))
        weights = np.random.default_rng(0).uniform(0.5, 1.5, 119)  # of elements in moments
        forces = case.forces if "forces" in case.labels else None
        for i, atoms in enumerate(case.atoms):
            if atoms.pbc.all() and atoms.get_volume() < DENSEST * len(atoms):
                unusable[i] = f"{len(atoms)} atoms in {atoms.get_volume():.3g} Å^3, denser than any matter"
                continue
            try:
                found = Around.of(atoms)
            except InputError as error:
                unusable[i] = str(error)
                continue
            alone[i] = len(atoms) > 2 and _has_lost(atoms, found.receivers)
            if not len(found.senders):
                continue
            scaled, starts = found.scaled(atoms), found.starts()
            least = int(scaled.argmin())
            distance[i], fraction[i] = found.lengths.min(), scaled[least]
            pair[i] = found.receivers[least], found.senders[least]
            typical[i] = np.median(np.minimum.reduceat(scaled, starts))
            own = weights[atoms.numbers]
            sums = np.add.reduceat(found.bells() * own[found.senders, None], starts, axis=0)
            sums *= own[found.receivers[starts], None]
            moments[i] = np.concatenate([sums.sum(0), (sums**2).sum(0)]) / len(atoms)
            peaks[i] = sums.max(0)
            close = scaled < 0.8
            if forces is not None and close.any():
                own_forces = forces[case.first[i] : case.first[i + 1]]
                relative = own_forces[found.senders[close]] - own_forces[found.receivers[close]]
                apart = np.einsum("ij,ij->i", relative, found.away[close]) / found.lengths[close]
                repulsion[i] = np.nansum(apart), np.nansum(np.abs(apart))
        return cls(unusable, distance, fraction, typical, pair, alone, moments, peaks, repulsion)


class Around(NamedTuple):
    """Neighbours of each atom of a structure, sorted by atom.

    Attributes:
        away: from the atom to its neighbour, Å: (n_edges, 3).
        lengths: of these: (n_edges,).
        radius: within which they were looked for, Å.
    """

    receivers: np.ndarray
    senders: np.ndarray
    away: np.ndarray
    lengths: np.ndarray
    radius: float

    @classmethod
    def of(cls, atoms: Atoms) -> Around:
        """Within `REACH`; within `FURTHER` where most atoms have none there, as in alkali metals."""
        near = cls.within(REACH, atoms)
        return near if 2 * len(near.starts()) > len(atoms) else cls.within(FURTHER, atoms)

    @classmethod
    def within(cls, reach: Cutoff, atoms: Atoms) -> Around:
        found = reach.neighbors(atoms)
        shifts = found.shifts @ np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)
        away = atoms.positions[found.senders] - atoms.positions[found.receivers] + shifts
        return cls(found.receivers, found.senders, away, np.sqrt(np.einsum("ij,ij->i", away, away)), reach.radius)

    def starts(self) -> np.ndarray:
        """Where the neighbours of each atom begin, of those that have any."""
        return np.flatnonzero(np.diff(self.receivers, prepend=-1))

    def scaled(self, atoms: Atoms) -> np.ndarray:
        """Lengths in sums of covalent radii: (n_edges,)."""
        radii = covalent_radii[atoms.numbers]
        return np.asarray(self.lengths / (radii[self.senders] + radii[self.receivers]))

    def bells(self) -> np.ndarray:
        """How far each length lies under each bell, which are as wide as the radius: (n_edges, n_bells)."""
        lengths = self.lengths[:, None] * (REACH.radius / self.radius)
        return np.asarray(np.exp(-(((lengths - CENTRES) / 0.45) ** 2)) * self.fading()[:, None])

    def fading(self) -> np.ndarray:
        """From one to zero at the radius: (n_edges,)."""
        return np.asarray((1 - (self.lengths / self.radius) ** 2) ** 2)


def held(atoms: Atoms, place: str) -> Mapping[str, Any]:
    """What a structure has in a place: info, arrays or calc."""
    if place == "calc":
        return {} if atoms.calc is None else atoms.calc.results
    return atoms.info if place == "info" else atoms.arrays


def unused(name: str) -> str:
    """This name, or with a number where something has it."""
    names = (name if k == 1 else f"{name}-{k}" for k in count(1))
    return next(one for one in names if not Path(one).exists())


def some(indices: Iterable[Any]) -> tuple[int, ...]:
    """Indices as a finding holds them."""
    return tuple(int(i) for i in indices)


def counted(n: int, what: str = "structure") -> str:
    """ "1 structure", "1,200 structures"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def parts(structures: Sequence[Atoms], sources: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """The indices that came from each source, where there are several; else all, called ""."""
    if isinstance(structures, Joined) and len(structures.parts) == len(sources) > 1:
        ends = structures.ends
        return [(name, np.arange(begin, end)) for name, begin, end in zip(sources, [0, *ends[:-1]], ends, strict=True)]
    return [("", np.arange(len(structures)))]


def remaining(structures: Sequence[Atoms], bad: Iterable[int]) -> Subset:
    """All structures but these."""
    return Subset(structures, np.setdiff1d(np.arange(len(structures)), np.array(sorted(bad), int)))


def _has_lost(atoms: Atoms, receivers: np.ndarray) -> bool:
    """Whether an atom has nobody near it; larger atoms may have their neighbours further away."""
    lonely = np.setdiff1d(np.arange(len(atoms)), receivers)
    small = (covalent_radii[atoms.numbers[lonely]] < SMALL) & np.isin(atoms.numbers[lonely], NOBLE, invert=True)
    if not len(lonely) or small.any():
        return bool(len(lonely))
    return bool(np.setdiff1d(lonely, FURTHER.neighbors(atoms).receivers).size)


def _is_forgotten(atoms: Atoms) -> bool:
    if atoms.pbc.any() or atoms.cell.rank < 3 or len(atoms) < 2 or atoms.get_volume() > LOOSEST * len(atoms):
        return False
    inside = atoms.positions @ np.linalg.inv(atoms.cell.array)
    return len(atoms) < 5 or bool(np.ptp(inside, axis=0).min() > 0.6)


def _pairs(option: str, pairs: Mapping[str, str]) -> str:
    """An option of names and values, as in a shell."""
    return f" --{option} {' '.join(shlex.quote(f'{name}={value}') for name, value in pairs.items())}" if pairs else ""


def _single(value: Any) -> Any:
    """One path as it is, several as a list."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len(value) == 1 else list(value)


def _is_no_label(name: str) -> bool:
    lower = name.lower()
    return (
        lower in NO_LABELS
        or lower.endswith(("_id", "split", "fold", "_index", "_weight"))
        or lower.startswith("converged")
    )

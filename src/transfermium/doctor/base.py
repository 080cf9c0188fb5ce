"""What every check sees, a `Case`, and what it says, a `Finding`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from ..data.columns import is_missing
from ..data.labels import KEYS, Label, Labels, available, resolve
from ..data.sequences import Joined, Subset
from ..data.split import IDS
from ..errors import InputError
from ..graph import Cutoff
from ..model import Model

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
REACH, FURTHER = Cutoff(4.0), Cutoff(7.0)  # Å, of the neighbours that checks look at
DENSEST, LOOSEST = 1.0, 35.0  # Å³ for an atom, in any matter, and in what is taken for a solid or liquid
SMALL = 1.25  # Å, covalent radius
N_MOMENTS = 12  # of distances, by which structures are recognised
NO_LABELS = {*IDS, "id", "index", "file", "spacegroup", "charge", "spin", "ionic_step", "config_weight", "total_charge"}
CENTRES = np.linspace(0.8, 3.8, N_MOMENTS // 2)  # Å, of the bells that distances fall under


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

    def __post_init__(self) -> None:
        self.atoms: list[Atoms] = [self.structures[i] for i in range(len(self.structures))]
        self.keys = available(self.atoms)
        self.unreadable: dict[str, dict[int, str]] = {}
        self.kept: dict[Any, Any] = {}  # what several checks need
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

    @property
    def arguments(self) -> str:
        """The sources, as arguments in Python."""
        return ", ".join(map(repr, self.sources))

    def convert(self, quantity: str, unit: str) -> str:
        """The command that brings a label to our units once and for all."""
        wanted = [f"{name}={value}" for name, value in {**self.unit, quantity: unit}.items()]
        label = f" --label {' '.join(f'{k}={shlex.quote(v)}' for k, v in self.label.items())}" if self.label else ""
        return f"transfermium pack {self.files}{label} --unit {' '.join(map(shlex.quote, wanted))} --out repaired"

    def drop(self, kind: str) -> str:
        """The line that leaves the structures of a finding out."""
        named = "".join(f", {name}={value!r}" for name, value in (("label", self.label), ("unit", self.unit)) if value)
        given = self.arguments if len(self.sources) == 1 else f"[{self.arguments}]"
        return f"import transfermium as tm\ntm.pack(tm.doctor({given}{named}).without({kind!r}), 'repaired')"

    def change(self, *lines: str) -> str:
        """Lines of Python that change each structure, called `atoms`."""
        body = "\n".join(f"    {line}" for line in lines)
        return (
            "import numpy as np\nimport transfermium as tm\n"
            f"structures = list(tm.read({self.arguments}))\nfor atoms in structures:\n{body}\n"
            "tm.pack(structures, 'repaired')"
        )

    def place(self, quantity: str) -> str:
        """Where a label is, in Python, in most structures that have it."""
        place, key, _ = max(self.labels[quantity].keys, key=lambda at: at[2])
        return f"atoms.calc.results[{key!r}]" if place == "calc" else f"atoms.{place}[{key!r}]"

    # --------------------------------------------------------------------------------------------------- inside

    def _names(self) -> list[str]:
        """Energy, forces, stress, and other names under which there are numbers."""
        known = {key for keys in KEYS.values() for key in keys} | {*self.label.values(), "free_energy"}
        named = [name for name in self.keys if name not in known and not _is_no_label(name)]
        numeric = [name for name in named if self._is_numeric(name)]
        return list(dict.fromkeys([*KEYS, *(name for name in self.label if name not in KEYS), *numeric]))

    def _is_numeric(self, name: str) -> bool:
        for atoms in self.atoms:
            value = atoms.info.get(name, atoms.arrays.get(name))
            if value is None and atoms.calc is not None:
                value = atoms.calc.results.get(name)
            if value is not None and not isinstance(value, str):
                return np.asarray(value).dtype.kind in "iufb"
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
            bad: dict[int, str] = {}
            for i, atoms in enumerate(self.atoms):
                try:
                    resolve([atoms], [], **{**options, "labels": {}})
                except InputError as one:
                    bad[i] = str(one).replace("structure 0: ", "").replace("structure 0 ", "")
            if not bad:
                raise error
            self.unreadable[name] = bad
            rest = [atoms for i, atoms in enumerate(self.atoms) if i not in bad]
            if not rest:
                return None
            found = resolve(rest, [], **options)
        return found.entries[0] if found.entries else None

    def _values(self, quantity: str) -> list[Any]:
        return self.values(self.labels[quantity]) if quantity in self.labels else [None] * len(self)


@dataclass(frozen=True)
class Contacts:
    """What neighbours within `REACH` tell of each structure.

    Attributes:
        unusable: structures in which no neighbours can be searched, and why.
        distance: the shortest, Å; infinite where there is none: (n_structures,).
        fraction: the shortest in units of the sum of covalent radii: (n_structures,).
        typical: the median over atoms of the distance to the nearest neighbour in these units: (n_structures,).
        pair: the atoms of `fraction`: (n_structures, 2).
        alone: whether some atom has no neighbour: (n_structures,).
        moments: equal for equal structures, however turned, and changing smoothly: (n_structures, N_MOMENTS).
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
    repulsion: np.ndarray

    @classmethod
    def of(cls, case: Case) -> Contacts:
        n = len(case)
        unusable: dict[int, str] = {}
        distance, fraction, typical = np.full((3, n), np.inf)
        pair, alone = np.zeros((n, 2), int), np.zeros(n, bool)
        moments, repulsion = np.zeros((n, N_MOMENTS)), np.zeros((n, 2))
        weights = np.random.default_rng(0).uniform(0.5, 1.5, 119)  # of elements in moments
        forces = case.forces if "forces" in case.labels else None
        for i, atoms in enumerate(case.atoms):
            if atoms.pbc.all() and atoms.get_volume() < DENSEST * len(atoms):
                unusable[i] = f"{len(atoms)} atoms in {atoms.get_volume():.3g} Å^3, denser than any matter"
                continue
            try:
                found = REACH.neighbors(atoms)
            except InputError as error:
                unusable[i] = str(error)
                continue
            alone[i] = len(atoms) > 2 and _has_lost(atoms, found.receivers)
            if not len(found.senders):
                continue
            shifts = found.shifts @ np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)
            away = atoms.positions[found.senders] - atoms.positions[found.receivers] + shifts
            lengths = np.sqrt(np.einsum("ij,ij->i", away, away))
            radii = covalent_radii[atoms.numbers]
            scaled = lengths / (radii[found.senders] + radii[found.receivers])
            starts = np.flatnonzero(np.diff(found.receivers, prepend=-1))
            least = int(scaled.argmin())
            distance[i], fraction[i] = lengths.min(), scaled[least]
            pair[i] = found.receivers[least], found.senders[least]
            typical[i] = np.median(np.minimum.reduceat(scaled, starts))
            own = weights[atoms.numbers]
            bells = (
                np.exp(-(((lengths[:, None] - CENTRES) / 0.45) ** 2))
                * (1 - (lengths / REACH.radius) ** 2)[:, None] ** 2
            )
            sums = (
                np.add.reduceat(bells * own[found.senders, None], starts, axis=0) * own[found.receivers[starts], None]
            )
            moments[i] = np.concatenate([sums.sum(0), (sums**2).sum(0)]) / len(atoms)
            close = scaled < 0.8
            if forces is not None and close.any():
                own_forces = forces[case.first[i] : case.first[i + 1]]
                relative = own_forces[found.senders[close]] - own_forces[found.receivers[close]]
                apart = np.einsum("ij,ij->i", relative, away[close]) / lengths[close]
                repulsion[i] = np.nansum(apart), np.nansum(np.abs(apart))
        return cls(unusable, distance, fraction, typical, pair, alone, moments, repulsion)


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
    if not len(lonely) or (covalent_radii[atoms.numbers[lonely]] < SMALL).any():
        return bool(len(lonely))
    return bool(np.setdiff1d(lonely, FURTHER.neighbors(atoms).receivers).size)


def _is_forgotten(atoms: Atoms) -> bool:
    if atoms.pbc.any() or atoms.cell.rank < 3 or len(atoms) < 2 or atoms.get_volume() > LOOSEST * len(atoms):
        return False
    inside = atoms.positions @ np.linalg.inv(atoms.cell.array)
    return len(atoms) < 5 or bool(np.ptp(inside, axis=0).min() > 0.6)


def _is_no_label(name: str) -> bool:
    lower = name.lower()
    return (
        lower in NO_LABELS
        or lower.endswith(("_id", "split", "fold", "_index", "_weight"))
        or lower.startswith("converged")
    )

"""Labels: found once under their many names, converted to our units, and shown in one table."""

import difflib
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ase import Atoms
from ase import units as ase_units
from ase.stress import voigt_6_to_full_3x3_stress

from ..errors import InputError
from .columns import Block, BlockOfAtoms, Plain, blocks, is_missing
from .sequences import Joined, Lazy, Subset, spoken

if TYPE_CHECKING:
    from rich.table import Table

Place = Literal["info", "arrays", "calc"]
Found = tuple[Place, str, Any]

PREFIXES = ("REF_", "", "dft_", "DFT_")
VIRIALS = tuple(f"{prefix}{name}" for prefix in PREFIXES for name in ("virials", "virial"))
KEYS = {  # in order of preference
    "energy": (*(f"{prefix}energy" for prefix in PREFIXES), "free_energy"),
    "forces": tuple(f"{prefix}{name}" for prefix in PREFIXES for name in ("forces", "force")),
    "stress": (*(f"{prefix}stress" for prefix in PREFIXES), *VIRIALS),
}
PLACES: dict[str, tuple[Place, ...]] = {
    "energy": ("info", "calc"),
    "forces": ("arrays", "calc", "info"),
    "stress": ("info", "calc"),
}
UNITS = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3"}
PER_ATOM_RESULTS = {"forces", "stresses", "energies", "charges", "magmoms"}
RESERVED = {"numbers", "positions"}

ENERGIES = {
    "eV": 1.0,
    "meV": 1e-3,
    "Ha": ase_units.Hartree,
    "hartree": ase_units.Hartree,
    "Ry": ase_units.Rydberg,
    "rydberg": ase_units.Rydberg,
    "kcal/mol": ase_units.kcal / ase_units.mol,
    "kJ/mol": ase_units.kJ / ase_units.mol,
}
LENGTHS = {"Å": 1.0, "bohr": ase_units.Bohr, "nm": ase_units.nm}
PRESSURES = {
    **{f"{e}/{a}^3": x / y**3 for (e, x), (a, y) in product(ENERGIES.items(), LENGTHS.items())},
    **{"GPa": ase_units.GPa, "MPa": 1e-3 * ase_units.GPa, "Pa": ase_units.Pascal, "kbar": 0.1 * ase_units.GPa},
}
FACTORS = {
    "energy": ENERGIES | {f"{e}/atom": x for e, x in ENERGIES.items()},
    "forces": {f"{e}/{a}": x / y for (e, x), (a, y) in product(ENERGIES.items(), LENGTHS.items())},
    "stress": PRESSURES | ENERGIES,  # energies are for virials
}


@dataclass(frozen=True)
class Label:
    """One quantity: under which keys it was found, what it means, and its range in our units.

    Attributes:
        keys: (place, key, number of structures), in the order in which they are looked for.
        per: "structure" or "atom".
        unit: ours for energy, forces and stress; as declared, or empty, for any other property.
        given_unit: the declared unit of the data; None means that nothing was declared, so `unit`.
        factor: from the given unit to ours; an energy per atom is multiplied by the number of atoms, too.
        count: of the `total` structures so many have this label.
        minimum, maximum, rms: over all components; None for classes.
        shape: of a value (per structure) or of a row (per atom).
        classes: the words found, when the label is a word; such values stay words.
        also_found: other accepted keys that were passed over because a preferred one was there.
    """

    quantity: str
    keys: tuple[tuple[Place, str, int], ...]
    per: Literal["structure", "atom"]
    unit: str
    given_unit: str | None
    factor: float
    count: int
    total: int
    minimum: float | None
    maximum: float | None
    rms: float | None
    shape: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    also_found: tuple[str, ...] = ()

    def value(self, atoms: Atoms, where: str = "structure") -> Any:
        """The label of a structure in our units: a float, an array or a word; None when it has none."""
        for place, key, _ in self.keys:
            raw = _get(atoms, place, key)
            if not is_missing(raw, nan=self.quantity not in KEYS):
                if self.classes:
                    return word(raw)
                value = _converted(atoms, self.quantity, (place, key, raw), self.given_unit, where)
                return value if self.quantity in KEYS or self.factor == 1.0 else value * self.factor
        return None

    def in_unit_of(self, other: "Label") -> "Label":
        """The same label in the unit of another one, in which it is taken to be given where no unit was declared.

        Raises `InputError` when one unit cannot be converted to the other.
        """
        if self.quantity in KEYS and (_plain(other.unit) in ("", _plain(self.unit))):
            return self
        per_atom = other.quantity in KEYS and _plain(other.given_unit or "").endswith("/atom")
        same = self.given_unit in (None, other.given_unit) and not per_atom
        factor = other.factor if same else ratio_of_units(self.given_unit or "", other.unit)
        if self.quantity in KEYS or factor is None:
            own, its = self.given_unit or self.unit or other.given_unit, other.unit or "none was declared"
            raise InputError(
                f"'{self.quantity}' in {own} cannot be brought to the unit of '{other.quantity}' ({its}): declare "
                "units of energy for both"
            )
        return replace(self.times(factor, other.unit), given_unit=self.given_unit or other.given_unit)

    def times(self, factor: float, unit: str) -> "Label":
        """The same label of a property in another unit."""
        low, high, rms = (None if x is None else x * factor for x in (self.minimum, self.maximum, self.rms))
        return replace(self, unit=unit, factor=factor, minimum=low, maximum=high, rms=rms)

    def passed_over(self, atoms: Atoms) -> list[tuple[Place, str]]:
        """Where a structure has other values under a name of this quantity, from which `value` is not taken."""
        own = [(place, key) for place, key, _ in self.keys]
        names = (self.quantity, *KEYS.get(self.quantity, ()))
        known = dict.fromkeys([*own, *((place, key) for key in names for place in _places(self.quantity))])
        there = [at for at in known if not is_missing(_get(atoms, *at), nan=self.quantity not in KEYS)]
        return there[1:] if there and there[0] in own else there


@dataclass(frozen=True)
class Labels:
    """Which labels a set of structures has and how to bring them to one place, name and unit."""

    entries: tuple[Label, ...]

    def __getitem__(self, quantity: str) -> Label:
        for entry in self.entries:
            if entry.quantity == quantity:
                return entry
        names = [entry.quantity for entry in self.entries]
        raise InputError(f"no label {quantity!r}; there are {', '.join(names)}{_hint(quantity, names)}")

    def __contains__(self, quantity: object) -> bool:
        return any(entry.quantity == quantity for entry in self.entries)

    def apply(self, atoms: Atoms, where: str = "structure") -> Atoms:
        """A copy of a structure whose labels sit at `info[quantity]` or `arrays[quantity]` in our units.

        What it lacks is absent; the calculator and the keys that were used are gone, all else is kept.
        """
        values = [(entry, entry.value(atoms, where)) for entry in self.entries]
        labelled = atoms.copy()
        for entry in self.entries:
            for key in [entry.quantity, *(key for _, key, _ in entry.keys)]:
                labelled.info.pop(key, None)
                labelled.arrays.pop(key, None)
        for entry, value in values:
            if value is not None:
                place = labelled.arrays if entry.per == "atom" else labelled.info
                place[entry.quantity] = value
        return labelled

    def table(self) -> "Table":
        """The manifest to be printed."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Labels", padding=(0, 1, 0, 0))
        for column in ("quantity", "key", "per", "unit"):
            table.add_column(column, overflow="fold")
        for column in ("structures", "range", "rms"):
            table.add_column(column, justify="right", overflow="fold")
        notes = [_note(entry) for entry in self.entries]
        if any(notes):
            table.add_column("note", overflow="fold")
        for entry, note in zip(self.entries, notes, strict=True):
            cells = (
                entry.quantity,
                "\n".join(f"{key} ({place})" for place, key, _ in entry.keys),
                entry.per,
                entry.unit if entry.given_unit in (None, entry.unit) else f"{entry.given_unit} → {entry.unit}",
                "\n".join(f"{n} of {entry.total}" for _, _, n in entry.keys),
                _range(entry),
                "" if entry.rms is None else f"{entry.rms:.4g}",
                *([note] if any(notes) else []),
            )
            table.add_row(*map(Text, cells))  # as they are: a key may look like markup
        return table

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values; `from_json` is its inverse."""
        return {"labels": [asdict(entry) for entry in self.entries]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Labels":
        entries = []
        for entry in content["labels"]:
            lists = {name: tuple(entry[name]) for name in ("shape", "classes", "also_found")}
            entries.append(Label(**{**entry, **lists, "keys": tuple(tuple(key) for key in entry["keys"])}))
        return cls(tuple(entries))


class Labelled(Lazy):
    """Structures with their labels at the canonical places, made on access.

    Those for one of several objectives have its name under "part" in `info`.
    """

    def __init__(self, structures: Sequence[Atoms], labels: Labels, part: str | None = None):
        self.structures = structures
        self.labels = labels
        self.part = part

    def __len__(self) -> int:
        return len(self.structures)

    def at(self, index: int) -> Atoms:
        labelled = self.labels.apply(self.structures[index], spoken(self.structures, index))
        if self.part is not None:
            labelled.info["part"] = self.part
        return labelled


def geometries(structures: Sequence[Atoms]) -> Sequence[Atoms]:
    """The same structures, without their labels where that is less work."""
    if isinstance(structures, Labelled):
        return geometries(structures.structures)
    if isinstance(structures, Subset):
        return Subset(geometries(structures.structures), structures.indices)
    if isinstance(structures, Joined):
        return Joined([geometries(part) for part in structures.parts], structures.names)
    bare: Sequence[Atoms] = getattr(structures, "geometries", structures)
    return bare


def resolve(
    structures: Iterable[Atoms],
    wanted: Sequence[str],
    *,
    labels: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
) -> Labels:
    """Find the wanted quantities in the structures, going through them once.

    Energy, forces and stress are known by several keys; any other name is a property under that very key in `info`,
    `arrays` or the results of a calculator. `labels` names the key of a quantity, `units` its unit in the data ("-kbar"
    for pressures that are positive under compression). Quantities in `optional` may be found nowhere.

    Raises:
        InputError: for a quantity found nowhere, an unknown unit, or a value that cannot be such a quantity.
    """
    labels, units = dict(labels or {}), dict(units or {})
    quantities = list(dict.fromkeys([*wanted, *optional]))
    for option, names in (("label", labels), ("unit", units)):
        for name in names:
            if name not in quantities:
                wants = ", ".join(quantities) or "nothing"
                raise InputError(f"{option} {name!r} is not wanted here, only {wants}{_hint(name, quantities)}")
    if RESERVED & set(quantities):
        raise InputError("'numbers' and 'positions' are the structure itself and cannot be labels")

    keys = {name: (labels[name],) if name in labels else KEYS.get(name, (name,)) for name in quantities}
    tallies = {name: _Tally(name, keys[name], units.get(name), partial(spoken, structures)) for name in quantities}
    total = 0
    there = _Available()  # complete where something is found nowhere, which is where it is needed
    for block in blocks(structures):
        plain = {} if isinstance(block, BlockOfAtoms) else {n: tally.plain(block) for n, tally in tallies.items()}
        if plain and None not in plain.values():
            whole = [tallies[name].add_plain(block, found, total) for name, found in plain.items() if found]
            if not all(whole):
                there.add_block(block)
            total += len(block)
            continue
        for atoms in block.structures():
            found = [tally.add(atoms, total) for tally in tallies.values()]
            if not all(found):
                there.add(atoms)
            total += 1

    for name, tally in tallies.items():
        if not tally.count and (name not in optional or name in labels):
            raise InputError(_not_found(there.keys(), total, name, labels.get(name)))
    return Labels(tuple(tally.label(total) for tally in tallies.values() if tally.count))


def available(structures: Iterable[Atoms]) -> dict[str, tuple[str, int]]:
    """Every key in the structures → (its place: info, arrays, calc; the number of structures that have it)."""
    there = _Available()
    for atoms in structures:
        there.add(atoms)
    return there.keys()


# ------------------------------------------------------------------------------------------------ counting


class _Available:
    """Which keys have been seen so far."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.places: dict[str, dict[str, None]] = {}

    def add(self, atoms: Atoms) -> None:
        here = _keys(atoms)
        self.counts.update({key for _, key in here})
        for place, key in here:
            self.places.setdefault(key, {})[place] = None

    def add_block(self, block: Block) -> None:
        for (place, key), n in block.present().items():
            if key not in RESERVED:
                self.counts[key] += n
                self.places.setdefault(key, {})[place] = None

    def keys(self) -> dict[str, tuple[str, int]]:
        return {key: ("+".join(self.places[key]), self.counts[key]) for key in sorted(self.counts)}


@dataclass
class _Tally:
    """What has been seen of one quantity so far."""

    quantity: str
    candidates: tuple[str, ...]
    given_unit: str | None
    spoken: Callable[[int], str]  # what a structure is called
    count: int = 0
    used: Counter[tuple[Place, str]] = field(default_factory=Counter)
    others: Counter[tuple[Place, str]] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    texts: int = 0
    first_text: str = ""  # where the first word was seen, and the first number with a fraction
    first_fraction: str = ""
    seen_as: dict[tuple[str, tuple[int, ...]], str] = field(default_factory=dict)  # (per, shape) → where first
    numbers: int = 0
    squares: float = 0.0
    minimum: float = math.inf
    maximum: float = -math.inf

    def __post_init__(self) -> None:
        self.factor = factor(self.quantity, self.given_unit)

    def add(self, atoms: Atoms, index: int) -> bool:
        """Count what a structure has of the quantity; False when it has nothing."""
        found = _find(atoms, self.quantity, self.candidates)
        if not found:
            return False
        place, key, raw = found[0]
        where = self.spoken(index)
        self.count += 1
        self.used[place, key] += 1
        self.others.update((place, key) for place, key, _ in found[1:])

        if self.quantity not in KEYS and isinstance(raw, str):
            self.texts += 1
            self.words[word(raw)] += 1
            self.first_text = self.first_text or f"{where}: {key!r} is the text {raw!r}"
            self._same("structure", (), where)
            return True

        value = np.asarray(_converted(atoms, self.quantity, found[0], self.given_unit, where))
        per = _per(self.quantity, place, key)
        self._same(per, value.shape[per == "atom" :], where)
        if self.quantity not in KEYS and value.ndim == 0:
            if float(value).is_integer():
                self.words[word(raw)] += 1
            else:
                self.first_fraction = self.first_fraction or f"{where} has {float(value):g}"
        numbers = value[np.isfinite(value)]
        self.numbers += numbers.size
        self.squares += float((numbers**2).sum())
        self.minimum = min(self.minimum, float(numbers.min()))
        self.maximum = max(self.maximum, float(numbers.max()))
        return True

    def plain(self, block: Block) -> tuple[tuple[Place, str] | None, Plain | None] | None:
        """Where a block has the quantity and its numbers, when they can be added as they are; None when they cannot."""
        present = block.present()
        keys = [(place, key) for key in self.candidates for place in _places(self.quantity) if (place, key) in present]
        if not keys:
            return None, None
        found = block.plain(keys[0]) if len(keys) == 1 else None
        if found is None or np.isinf(found.values).any():
            return None
        sizes, known = found.counts[found.counts > 0], not np.isnan(found.values).any()
        fits = {
            "energy": found.shape is None and known,
            "forces": found.shape == (3,) and known and bool((sizes == 3 * block.n_atoms[found.counts > 0]).all()),
            "stress": found.shape == () and known and bool((sizes == 6).all()) and keys[0][1] not in VIRIALS,
        }
        return (keys[0], found) if fits.get(self.quantity, found.shape is None) else None

    def add_plain(self, block: Block, place_and_numbers: tuple[Any, Any], start: int) -> bool:
        """Count what a block has, whose first structure is number `start`; False when some have nothing."""
        at, found = place_and_numbers
        if at is None:
            return False
        owners = np.flatnonzero(found.counts)
        values = found.values.astype(float) * self.factor
        if self.quantity not in KEYS:  # NaN stands for none
            owners, values = owners[~np.isnan(values)], values[~np.isnan(values)]
        if not len(owners):
            return False
        where = self.spoken(start + int(owners[0]))
        self.count += len(owners)
        self.used[at] += len(owners)
        if self.quantity == "energy" and self.given_unit is not None and _plain(self.given_unit).endswith("/atom"):
            values = values * block.n_atoms[owners]
        if self.quantity == "stress":
            values = values.reshape(-1, 6)[:, [0, 5, 4, 5, 1, 3, 4, 3, 2]]
        self._same(_per(self.quantity, *at), {"forces": (3,), "stress": (3, 3)}.get(self.quantity, ()), where)
        if self.quantity not in KEYS:
            whole = values == np.floor(values)
            for value, n in zip(*np.unique(values[whole], return_counts=True), strict=True):
                self.words[word(float(value))] += int(n)
            if not whole.all() and not self.first_fraction:
                i = int(np.argmin(whole))
                self.first_fraction = f"{self.spoken(start + int(owners[i]))} has {values[i]:g}"
        self.numbers += values.size
        self.squares += float((values**2).sum())
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        return len(owners) == len(block)

    def _same(self, per: str, shape: tuple[int, ...], where: str) -> None:
        self.seen_as.setdefault((per, shape), where)
        if len(self.seen_as) > 1:
            (first, there), (second, here) = list(self.seen_as.items())[:2]
            raise InputError(
                f"{self.quantity!r} is per {first[0]} with shape {first[1]} in {there}, "
                f"but per {second[0]} with shape {second[1]} in {here}; name one key with a label"
            )

    def label(self, total: int) -> Label:
        if self.texts and self.first_fraction:
            raise InputError(f"{self.first_text} where a number is expected ({self.first_fraction}); correct it")
        (per, shape) = next(iter(self.seen_as))
        order = [(place, key) for key in self.candidates for place in _places(self.quantity)]
        worded = self.texts > 0
        return Label(
            quantity=self.quantity,
            keys=tuple((place, key, self.used[place, key]) for place, key in order if self.used[place, key]),
            per="atom" if per == "atom" else "structure",
            unit=UNITS.get(self.quantity, self.given_unit or ""),
            given_unit=self.given_unit,
            factor=self.factor,
            count=self.count,
            total=total,
            minimum=None if worded else self.minimum,
            maximum=None if worded else self.maximum,
            rms=None if worded else math.sqrt(self.squares / self.numbers),
            shape=shape,
            classes=tuple(sorted(self.words)) if worded else (),
            also_found=tuple(f"{key} ({place}, {n})" for (place, key), n in self.others.items()),
        )


def _range(entry: Label) -> str:
    if entry.classes:
        shown = ", ".join(entry.classes[:6]) + (", ..." if len(entry.classes) > 6 else "")
        return f"{len(entry.classes)} classes: {shown}"
    return f"{entry.minimum:.4g} … {entry.maximum:.4g}"


def _note(entry: Label) -> str:
    notes = []
    if any(key in VIRIALS for _, key, _ in entry.keys):
        notes.append("stress = -virial/V")
    if entry.also_found:
        notes.append(f"also found: {', '.join(entry.also_found)}")
    return "; ".join(notes)


# ------------------------------------------------------------------------------------------------- finding


def _places(quantity: str) -> tuple[Place, ...]:
    return PLACES.get(quantity, ("info", "arrays", "calc"))


def _per(quantity: str, place: Place, key: str) -> Literal["structure", "atom"]:
    if quantity in UNITS:
        return "atom" if quantity == "forces" else "structure"
    return "atom" if place == "arrays" or (place == "calc" and key in PER_ATOM_RESULTS) else "structure"


def _get(atoms: Atoms, place: Place, key: str) -> Any:
    if place == "info":
        return atoms.info.get(key)
    if place == "arrays":
        return None if key in RESERVED else atoms.arrays.get(key)
    return atoms.calc.results.get(key) if atoms.calc is not None else None


def _find(atoms: Atoms, quantity: str, keys: Sequence[str]) -> list[Found]:
    """All values of a quantity that a structure has, the preferred one first."""
    found = [(place, key, _get(atoms, place, key)) for key in keys for place in _places(quantity)]
    return [item for item in found if not is_missing(item[2], nan=quantity not in KEYS)]


def _keys(atoms: Atoms) -> list[tuple[Place, str]]:
    results = atoms.calc.results if atoms.calc is not None else {}
    groups: list[tuple[Place, Mapping[str, Any]]] = [("info", atoms.info), ("arrays", atoms.arrays), ("calc", results)]
    return [(place, str(k)) for place, group in groups for k in group if k not in RESERVED and group[k] is not None]


def _not_found(there: Mapping[str, tuple[str, int]], total: int, quantity: str, key: str | None) -> str:
    name = key if key is not None else quantity
    shown = [
        f"{k} ({n}, {'per atom' if place == 'arrays' or k in PER_ATOM_RESULTS else 'per structure'})"
        for k, (place, n) in there.items()
    ]
    for_what = f" for {quantity!r}" if key is not None else ""
    return (
        f"no structure has {name!r}{for_what}; the {total} structures have "
        f"{', '.join(shown) or 'no labels at all'}"
        f"{'' if key is not None or not there else f'; name its key with --label {quantity}=KEY'}{_hint(name, there)}"
    )


def _hint(name: str, names: Collection[str]) -> str:
    lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(lower[match] for match in close)}?" if close else ""


# ---------------------------------------------------------------------------------------------- converting


@cache
def factor(quantity: str, unit: str | None) -> float:
    """From a unit to ours; 1 for properties, whose units are only recorded.

    A leading minus turns the sign of a stress. Raises an `InputError` that lists the units for an unknown one.
    """
    if unit is None or quantity not in FACTORS:
        return 1.0
    sign = -1.0 if quantity == "stress" and unit.strip().startswith("-") else 1.0
    known = {_plain(name): value for name, value in FACTORS[quantity].items()}
    if _plain(unit) not in known:
        names = list(FACTORS[quantity])
        shown = ", ".join(names[:12]) + ("" if len(names) <= 12 else ", ...")
        raise InputError(f"unknown unit {unit!r} of {quantity}; known are {shown}{_hint(unit, names)}")
    return sign * known[_plain(unit)]


def ratio_of_units(given: str, wanted: str) -> float | None:
    """What numbers in one unit are multiplied by in another; None where these are not two units of energy."""
    known = {_plain(name): value for name, value in FACTORS["energy"].items()}
    own, other = _plain(given), _plain(wanted)
    if own == other:
        return 1.0
    like = own.endswith("/atom") == other.endswith("/atom")
    return known[own] / known[other] if like and own in known and other in known else None


def _plain(unit: str) -> str:
    """Spelling without case, spaces, signs and powers: "eV/Ang**3", "ev/Å³" and "-eV/A^3" are one."""
    text = unicodedata.normalize("NFKC", unit).strip().removeprefix("-").lower()
    for old, new in ((" ", ""), ("**", ""), ("^", ""), ("angstrom", "a"), ("ang", "a"), ("å", "a")):
        text = text.replace(old, new)
    return text


def _converted(atoms: Atoms, quantity: str, found: Found, given_unit: str | None, where: str) -> Any:
    """A value in our units: float for a single number, else a float64 array."""
    place, key, raw = found
    name = f"{where}: {key!r} ({place})"
    if quantity in KEYS and isinstance(raw, bool | np.bool_):
        raise InputError(f"{name} is {raw}, which is no number; correct it or leave it out")
    try:
        value = np.array(raw, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} is {str(raw)[:40]!r}, which is no number; correct it or leave it out") from error

    if quantity not in KEYS:
        return _property(atoms, value, _per(quantity, place, key), name)
    if not np.isfinite(value).all():
        raise InputError(f"{name} is not finite; correct it or remove the structure")
    scale = factor(quantity, given_unit)
    if quantity == "energy":
        if value.size != 1:
            raise InputError(f"{name} has shape {value.shape}, but an energy is one number per structure")
        per_atom = given_unit is not None and _plain(given_unit).endswith("/atom")
        return value.item() * scale * (len(atoms) if per_atom else 1)
    if quantity == "forces":
        if value.shape != (len(atoms), 3):
            raise InputError(
                f"{name} has shape {value.shape}, but the forces of {len(atoms)} atoms are {len(atoms)} × 3"
            )
        return value * scale
    return _stress(atoms, value, key, given_unit, name) * scale


def _stress(atoms: Atoms, value: np.ndarray, key: str, given_unit: str | None, name: str) -> np.ndarray:
    """Symmetric 3 × 3 from Voigt order, 9 or 3 × 3 numbers; a virial becomes -virial/V."""
    if value.shape == (6,):
        value = voigt_6_to_full_3x3_stress(value)
    elif value.shape == (9,):
        value = value.reshape(3, 3)
    if value.shape != (3, 3):
        raise InputError(
            f"{name} has shape {value.shape}, but a stress is 3 × 3, 9, or 6 in the order xx yy zz yz xz xy"
        )
    if np.abs(value - value.T).max() > 1e-2 * np.abs(value).max() + 1e-6:
        raise InputError(f"{name} is not symmetric; is it really a stress, in the order xx xy xz yx ...?")
    value = (value + value.T) / 2

    is_virial = key.lower().endswith(("virial", "virials"))
    if given_unit is not None and is_virial != (_plain(given_unit) in {_plain(unit) for unit in ENERGIES}):
        kind = "a virial is an energy" if is_virial else "a stress is a pressure"
        raise InputError(f"{name} cannot be in {given_unit!r}: {kind}")
    if not is_virial:
        return value
    if atoms.cell.rank < 3:
        raise InputError(f"{name} needs the volume of a cell to become a stress; give the cell or leave the virial out")
    return -value / atoms.get_volume()


def _property(atoms: Atoms, value: np.ndarray, per: str, name: str) -> Any:
    if np.isinf(value).any():
        raise InputError(f"{name} is infinite; correct it or leave it out")
    if per == "structure":
        return value.item() if value.size == 1 else value
    if value.shape[:1] != (len(atoms),):
        raise InputError(f"{name} has shape {value.shape}, but there are {len(atoms)} atoms")
    return value[:, 0] if value.shape[1:] == (1,) else value


def word(raw: Any) -> str:
    """How a class, id or fold is written, the same for 3, 3.0 and "3"."""
    if isinstance(raw, float | np.floating) and float(raw).is_integer():
        return str(int(raw))
    return str(raw)

"""Files of RuNNer and n2p2 (`input.data`), one structure at a time.

They do not say their units. RuNNer's are Hartree and Bohr, which are taken where nothing else is declared by a line
above the first structure that names the unit of forces: `# units eV/Å`.
"""

import logging
import lzma
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers, covalent_radii

from ..errors import InputError
from ..graph import Cutoff
from .formats import COMPRESSIONS, LeftOut, open_text
from .labels import factor

log = logging.getLogger(__name__)

BEGINNING = re.compile(
    rb"\A(?:\xef\xbb\xbf)?(?:\s*(?:[#!]|comment\b)[^\n]*\n)*\s*begin[ \t]*(?:\r?\n|\Z|(?<=[ \t])position)"
)
HEAD = 1 << 14  # bytes
UNITS = "Ha/bohr"  # of forces, which has that of energies and that of lengths in it
DECLARED = re.compile(r"\s*[#!]\s*units?\b\s*[:=]?\s*(\S.*)", re.IGNORECASE)
COLUMNS = ("position(3)", "element", "charge", "atom_energy", "force(3)")  # where the line of `begin` names none
SINGULAR = {"forces": "force", "charges": "charge"}
RESERVED = {"numbers", "positions", "momenta", "masses", "tags", "initial_charges", "initial_magmoms"}  # of ase.Atoms
CLOSE = 0.65  # of the sum of covalent radii; two atoms that are nearer are so because Å were taken for Bohr
JUDGED = 10  # structures, the first ones


def is_runner(path: Path) -> bool:
    """Whether the first line of a file that is not a comment is `begin`."""
    try:
        with COMPRESSIONS.get(path.suffix.lower(), open)(path, "rb") as file:
            return BEGINNING.match(file.read(HEAD)) is not None
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error):
        return False


def stream_runner(path: str | Path, units: str | None = None) -> Iterator[Atoms]:
    """Yield the structures of a file in eV, Å and eV/Å, periodic where they have a lattice.

    Energy and forces are results of a calculator; a structure without a line `energy`, whose forces are all zero, has
    none. Forces that are zero in all structures only fill columns that have to be there, and are left out. Comments
    become `info["comment"]`, a total charge that is not zero `info["charge"]`, and columns of charges
    `arrays["charges"]`, where there are any; energies of atoms are left out.

    Args:
        units: of forces, such as "eV/Å"; None is what the file declares, and else Ha/bohr.

    Raises:
        InputError: naming the line. Also where nothing is declared, and atoms are so close that it must be Å and eV.
    """
    path = Path(path)
    file = _File(path, units, with_forces=not _forces_are_empty(path, units))
    structures = file.structures()
    first = list(islice(structures, JUDGED))
    if file.units is None:
        _check_distances(path, first)
        log.warning("%s: does not say its units; taken in Hartree and Bohr, as RuNNer has them", path)
    if not file.with_forces:
        log.warning("%s: all forces are zero, as where only energies are known; they are left out", path)
    yield from chain(first, structures)
    file.left_out.tell()


def _forces_are_empty(path: Path, units: str | None) -> bool:
    """Whether all structures of several atoms, and at least two, have forces of zero; the first other one ends it."""
    count = 0
    for atoms in _File(path, units).structures():
        forces = atoms.calc.results.get("forces") if atoms.calc and len(atoms) > 1 else None
        if forces is not None and forces.any():
            return False
        count += forces is not None
    return count > 1


@dataclass
class _Block:
    """The lines of one structure, in the units of the file."""

    line: int  # of its `begin`
    columns: dict[str, slice]  # of the words after the element
    numbers: list[int] = field(default_factory=list)
    positions: list[list[float]] = field(default_factory=list)
    others: list[list[float]] = field(default_factory=list)
    cell: list[list[float]] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)  # energy and charge

    @property
    def width(self) -> int:
        return 4 + max((columns.stop for columns in self.columns.values()), default=0)


class _File:
    """One pass through a file."""

    def __init__(self, path: Path, units: str | None, with_forces: bool = True):
        self.path = path
        self.with_forces = with_forces
        self.units = units  # None until something is declared
        self.left_out = LeftOut(path)

    def structures(self) -> Iterator[Atoms]:
        block: _Block | None = None
        begun = False
        with open_text(self.path) as lines:
            for number, line in enumerate(lines, start=1):
                words = line.split()
                if not words or words[0][0] in "#!":
                    if not begun and self.units is None and (found := DECLARED.match(line)):
                        self.units = found[1].strip()
                    continue
                keyword = words[0]
                where = f"{self.path}: line {number}"
                if keyword == "begin":
                    if block is not None:
                        raise InputError(
                            f"{where} begins a structure, but that of line {block.line} has no 'end'; complete or "
                            "remove it"
                        )
                    block, begun = _Block(number, _columns(words[1:] or list(COLUMNS), where)), True
                elif block is None:
                    if keyword != "comment":
                        raise InputError(
                            f"{where}: '{keyword}' stands outside of 'begin' and 'end'; add what is missing"
                        )
                elif keyword == "end":
                    yield self._atoms(block, where)
                    block = None
                elif not _take(block, keyword, words[1:], line, where):
                    self.left_out.add(f"lines '{keyword}', which is no keyword of RuNNer", f"line {number}")
        if block is not None:
            raise InputError(
                f"{self.path}: the structure that begins in line {block.line} is cut short, its 'end' is missing; copy "
                "the file again, or complete the structure"
            )

    def _atoms(self, block: _Block, where: str) -> Atoms:
        if not block.numbers:
            raise InputError(f"{where} ends a structure without atoms (from line {block.line}); remove it")
        if len(block.cell) not in (0, 3):
            raise InputError(
                f"{where} ends a structure with {len(block.cell)} lattice vectors (from line {block.line}); give "
                "three, or none for a molecule"
            )
        ev, ev_per_a = self._factors()
        a = ev / ev_per_a
        atoms = Atoms(block.numbers, a * np.array(block.positions))
        if block.cell:
            atoms.set_cell(a * np.array(block.cell))
            atoms.pbc = True
        if block.comments:
            atoms.info["comment"] = "\n".join(block.comments)
        if abs(block.totals.get("charge", 0.0)) > 1e-6:
            atoms.info["charge"] = block.totals["charge"]

        others = np.array(block.others)
        results: dict[str, float | np.ndarray] = {}
        if "energy" in block.totals:
            results["energy"] = ev * block.totals["energy"]
        for name, columns in block.columns.items():
            values = others[:, columns]
            if name == "force":
                if self.with_forces and (results or values.any()):
                    results["forces"] = ev_per_a * values
            elif name != "atom_energy" and values.any():
                name = "charges" if name == "charge" else name  # `charge` is that of the structure
                atoms.set_array(name, values[:, 0] if values.shape[1] == 1 else values)
        if results:
            atoms.calc = SinglePointCalculator(atoms, **results)
        return atoms

    def _factors(self) -> tuple[float, float]:
        """To eV, and to eV/Å."""
        units = self.units or UNITS
        try:
            return factor("energy", units.rpartition("/")[0]), factor("forces", units)
        except InputError:
            raise InputError(
                f"{self.path}: the units '{units}' are not an energy over a length: write eV/Å or Ha/bohr"
            ) from None


def _take(block: _Block, keyword: str, values: list[str], line: str, where: str) -> bool:
    """Add a line to a structure; False for an unknown keyword."""
    if keyword == "atom":
        if len(values) != block.width:
            raise InputError(
                f"{where}: an atom has {block.width} values here (x y z element ...), not {len(values)}; is the line "
                "complete?"
            )
        number = atomic_numbers.get(values[3], 0)
        if not number:
            raise InputError(f"{where}: {values[3]!r} is no element; correct it, or remove the structure")
        block.numbers.append(number)
        block.positions.append(_numbers(values[:3], where))
        block.others.append(_numbers(values[4:], where))
    elif keyword == "lattice":
        if len(values) != 3:
            raise InputError(f"{where}: a lattice vector has three components, not {len(values)}; correct it")
        block.cell.append(_numbers(values, where))
    elif keyword in ("energy", "charge"):
        if len(values) != 1 or keyword in block.totals:
            raise InputError(f"{where}: a structure has one '{keyword}', with one number; correct it")
        block.totals[keyword] = _numbers(values, where)[0]
    elif keyword == "comment":
        text = line.split(maxsplit=1)[1:]
        block.comments += [part.strip() for part in text]
    else:
        return False
    return True


def _numbers(words: list[str], where: str) -> list[float]:
    values = []
    for word in words:
        try:
            value = float(word.upper().replace("D", "E"))  # as Fortran writes
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError(f"{where}: {word!r} is not a finite number; correct it, or remove the structure")
        values.append(value)
    return values


def _columns(names: list[str], where: str) -> dict[str, slice]:
    """Which words after the element are what, as in `begin position(3) element force(3)` of RuNNer 2."""
    if names[:2] != list(COLUMNS[:2]):
        raise InputError(
            f"{where}: atoms begin with 'position(3) element' in what is read here, not '{' '.join(names)}'"
        )
    found: dict[str, slice] = {}
    start = 0
    for name in names[2:]:
        plain, _, size = name.rstrip(")").partition("(")
        plain = SINGULAR.get(plain, plain)
        if size and not size.isdecimal():
            raise InputError(f"{where}: {name!r} is no column such as 'charge' or 'force(3)'; correct it")
        if plain in RESERVED or plain in ("position", "element", *found):
            raise InputError(f"{where}: a column {name!r} would replace what is known otherwise; give it another name")
        found[plain] = slice(start, start := start + int(size or 1))
    return found


def _check_distances(path: Path, structures: list[Atoms]) -> None:
    """Refuse what was taken in Bohr if most structures have atoms that are far too close."""
    close = [pair for atoms in structures if len(atoms) > 1 and (pair := _closest(atoms))]
    if 2 * len(close) > sum(len(atoms) > 1 for atoms in structures):
        raise InputError(
            f"{path}: taken in Bohr, as RuNNer has them, {min(close)[1]} are only {min(close)[0]:.2f} Å apart: put the "
            f"line '# units eV/Å' at the top of the file if it is in these, or '# units {UNITS}' if all is right"
        )


def _closest(atoms: Atoms) -> tuple[float, str] | None:
    """The smallest distance (Å) that is too small for bonds, and the two elements; None where there is none."""
    radii = covalent_radii[atoms.numbers]
    try:
        found = Cutoff(2 * CLOSE * float(radii.max())).neighbors(atoms)
    except InputError:  # told by those who look at all structures
        return None
    lengths = found.lengths(atoms)
    near = np.flatnonzero(lengths < CLOSE * (radii[found.senders] + radii[found.receivers]))
    if not len(near):
        return None
    edge = near[np.argmin(lengths[near])]
    return float(lengths[edge]), " and ".join(
        atoms.symbols[int(ends[edge])] for ends in (found.senders, found.receivers)
    )

"""The big public sets for pre-training, one structure at a time, in our units and signs.

| set | file, recognised by | energy | level |
|---|---|---|---|
| MPF.2021.2.8 | JSON, lists per material | total, as of VASP | PBE or PBE+U |
| MPtrj | JSON, frames per material | `uncorrected_total_energy` | PBE or PBE+U |
| Alexandria | JSON, `entries` of pymatgen | `energy` | by the file's name |
| Alexandria, paths | JSON, runs with `steps` per material | `energy` | by the file's name |
| MatPES | JSON or JSON lines, `matpes_id` | `energy` | `functional` |
| LeMat-Bulk, LeMat-Traj | Parquet, columns of OPTIMADE | `energy` | `functional` |
| OMat24, OMol25, sAlex, OMC25 | aselmdb: the mark of LMDB | `energy` | see `stream_aselmdb` |

Stress is in kbar with the sign of VASP (positive under compression; six numbers of MatPES are xx yy zz yz xz xy),
except in aselmdb, where it is in eV/Å^3 with the sign of ASE, as here.
All energies are in eV per structure and uncorrected, all forces in eV/Å. Corrected energies (shifts per element and
oxidation state, fitted to experiments) stay in `info` under their own names. Facts are from the pages of the sets
(figshare 19470599 and 23713842, matpes.ai, the fairchem documentation, the reader of matbench-discovery) except these:
kbar and sign of Alexandria and LeMat-Bulk are what other readers of these sets use and have tested on relaxations; and
that the energies of MPF are uncorrected follows from "raw output from VASP", which its page says of the stress.

**PBE or PBE+U.** MPF, MPtrj, Alexandria, LeMat-Bulk and OMat24 do not say which of the two a structure has. They use
the rule of the Materials Project (+U for Co, Cr, Fe, Mn, Mo, Ni, V and W where there is O or F; arXiv:2601.21056 has it
for MPtrj, Alexandria and OMat24, for LeMat-Bulk it is assumed), and so does `level`. MatPES has no U.
OMat24 has other pseudopotentials than the rest, so its PBE is another energy zero. Alexandria does not name the
functional at all: it is taken from the names of the file and its folders (pbe, pbesol or ps, scan), or left out.
"""

import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers
from ase.stress import full_3x3_to_voigt_6_stress
from ase.units import GPa

from ..errors import InputError
from .formats import LeftOut, open_text, pymatgen_atoms

VASP_KBAR = -0.1 * GPa  # to eV/Å^3 and the sign of ASE

Record = dict[str, Any]
Layout = Callable[["Source", str, Any], Iterator[Atoms]]


class Source(NamedTuple):
    """A file being read, and what is left out of it."""

    path: Path
    left_out: LeftOut

    def labelled(self, atoms: Atoms, name: str, stress: Any = None, factor: float = VASP_KBAR, **per: Any) -> Atoms:
        """The structure with results in our units: `energy`, `forces`, `magmoms`, and `stress` times `factor`."""
        n = len(atoms)
        shapes = {"energy": (), "forces": (n, 3), "magmoms": (n,)}
        results: dict[str, Any] = {key: self.numbers(value, name, key, shapes[key]) for key, value in per.items()}
        voigt = np.shape(stress) == (6,)
        tensor = self.numbers(stress, name, "stress", (6,) if voigt else (3, 3))
        if tensor is not None:
            results["stress"] = factor * (tensor if voigt else full_3x3_to_voigt_6_stress(tensor))
        if results.get("energy") is not None:
            results["energy"] = float(results["energy"])
        atoms.calc = SinglePointCalculator(atoms, **{k: v for k, v in results.items() if v is not None})
        return atoms

    def numbers(self, value: Any, name: str, what: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """An array of this shape; None, counted where something is there, when numbers are missing in it."""
        if value is None or np.size(value) == 0:
            return None
        try:
            array = np.array(value, float)
        except (TypeError, ValueError):
            array = np.array(np.nan)
        if array.shape == shape and np.isfinite(array).all():
            return array
        self.left_out.add(f"labels {what!r} that are incomplete or of a wrong shape", name)
        return None


# ------------------------------------------------------------------------------------------------------------ JSON


def stream_json(path: Path) -> Iterator[Atoms] | None:
    """The structures of a public set in JSON, read as they are yielded; None when the file is none that is known."""
    with open_text(path) as file:
        layout, lines = _recognised(file, path)
    return None if layout is None else _structures(path, layout, lines)


def _recognised(file: TextIO, path: Path) -> tuple[Layout | None, bool]:
    """How the file is laid out, by its first record, and whether it has one record per line."""
    stream = JsonStream(file, path)
    if stream.peek() == "{":
        first = stream.complete()  # a whole object at the very beginning: one of many, or all there is
        if isinstance(first, dict) and _is_matpes(first):
            return _matpes, True
    if stream.peek() not in ("{", "["):
        return None, False

    key, value = next(stream.members(), ("", None))
    if isinstance(value, dict):
        if _is_matpes(value):
            return _matpes, False
        if key == "entries" and {"structure", "energy"} <= value.keys():
            return _entry, False
        if isinstance(value.get("structure"), list) and "force" in value:
            return _mpf, False
        frame = next(iter(value.values()), None)
        if isinstance(frame, dict) and "structure" in frame and frame.keys() & {"force", "uncorrected_total_energy"}:
            return _mptrj, False
    if isinstance(value, list) and value and isinstance(value[0], dict) and "steps" in value[0]:
        return _path, False
    return None, False


def _structures(path: Path, layout: Layout, lines: bool) -> Iterator[Atoms]:
    source = Source(path, LeftOut(path))
    with open_text(path) as file:
        stream = JsonStream(file, path)
        for key, value in stream.lines() if lines else stream.members():
            where = f"{path}: record {stream.count - 1}{f' ({key})' if key else ''}"
            try:
                yield from layout(source, key, value)
            except InputError:
                raise
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                kind = type(error).__name__
                raise InputError(f"{where} is not like the others of its set ({kind}: {error}); remove it") from error
    source.left_out.tell()


class JsonStream:
    """Values of a JSON file of any size, one after the other; memory holds the largest of them."""

    CHUNK = 1 << 20
    SLACK = 32  # an error farther before the end of what has been read is not for want of more

    def __init__(self, file: TextIO, path: Path):
        self.file = file
        self.path = path
        self.buffer = ""
        self.at = 0
        self.count = 0
        self.decoder = json.JSONDecoder()

    def members(self) -> Iterator[tuple[str, Any]]:
        """Members of the object or items of the list that the file is; of "entries" of an object, one by one."""
        closing = {"{": "}", "[": "]"}[self._take("{[")]
        while self.peek() != closing:
            key = ""
            if closing == "}":
                key = self.value()
                self._take(":")
            if key == "entries" and self.peek() == "[":
                yield from ((key, value) for _, value in self.members())
            else:
                value = self.value()
                self.count += 1
                yield key, value
            if self.peek() != closing:
                self._take(",")
        self._take(closing)

    def lines(self) -> Iterator[tuple[str, Any]]:
        """Values that follow each other, as in JSON lines."""
        while self.peek():
            value = self.value()
            self.count += 1
            yield "", value

    def peek(self) -> str:
        """The next character that is no space; nothing at the end of the file."""
        while True:
            while self.at < len(self.buffer):
                if not self.buffer[self.at].isspace():
                    return self.buffer[self.at]
                self.at += 1
            if not self._more():
                return ""

    def complete(self) -> Any:
        """The next value when it is complete in what has been read, without moving on."""
        try:
            return self.decoder.raw_decode(self.buffer, self.at)[0]
        except json.JSONDecodeError:
            return None

    def value(self) -> Any:
        """The next value, with everything in it."""
        while True:
            self.peek()
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.buffer) - self.SLACK or "Unterminated" in error.msg
                if not cut or not self._more():
                    raise self._broken(cut, f"{error.msg} in") from error
            else:
                if end < len(self.buffer) or not self._more():  # a number at the very end may go on
                    self.at = end
                    return value

    def _take(self, expected: str) -> str:
        character = self.peek()
        if not character or character not in expected:
            raise self._broken(not character, f"no {' or '.join(expected)} after")
        self.at += 1
        return character

    def _more(self) -> bool:
        left = self.buffer[self.at :]
        chunk = self.file.read(max(self.CHUNK, len(left)))  # twice as much each time: a long value is tried few times
        self.buffer, self.at = left + chunk, 0
        return bool(chunk)

    def _broken(self, cut: bool, what: str) -> InputError:
        how = "is cut short" if cut else "is not sound JSON"
        return InputError(f"{self.path}: the file {how} ({what} record {self.count}); copy it again")


def _mpf(source: Source, key: str, value: Any) -> Iterator[Atoms]:
    """MPF.2021.2.8: lists of snapshots per material, whose ids are material-calculation-step."""
    columns = [value.get(name) or [None] * len(value["structure"]) for name in ("energy", "force", "stress", "id")]
    for structure, energy, forces, stress, name in zip(value["structure"], *columns, strict=True):
        atoms = pymatgen_atoms(structure, f"{source.path}: {name or key}")
        atoms = source.labelled(atoms, name or key, stress, energy=energy, forces=forces)
        atoms.info |= {"material_id": key, **_step(name), "level": pbe_or_pbe_u(atoms)}
        yield atoms


def _mptrj(source: Source, key: str, value: Any) -> Iterator[Atoms]:
    """MPtrj: frames of a material, whose ids are task-calculation-step."""
    for name, frame in value.items():
        atoms = pymatgen_atoms(frame["structure"], f"{source.path}: {name}")
        energy, magmoms = frame.get("uncorrected_total_energy"), frame.get("magmom")
        atoms = source.labelled(
            atoms, name, frame.get("stress"), energy=energy, forces=frame.get("force"), magmoms=magmoms
        )
        atoms.info |= {"material_id": key, **_step(name), "level": pbe_or_pbe_u(atoms)}
        atoms.info |= _scalars(frame, skip={"mp_id", "uncorrected_total_energy"})
        yield atoms


def _step(name: str | None) -> Record:
    """The trajectory and the ionic step that a name such as mp-1234-0-7 tells."""
    trajectory, _, step = (name or "").rpartition("-")
    return {"frame_id": name, "traj_id": trajectory, "ionic_step": int(step)} if trajectory and step.isdecimal() else {}


def _entry(source: Source, _: str, value: Any) -> Iterator[Atoms]:
    """Alexandria: relaxed structures as entries of pymatgen; forces are properties of the sites."""
    data = value.get("data") or {}
    material = data.get("mat_id") or value.get("entry_id") or ""
    sites = [(site.get("properties") or {}).pop("forces", None) for site in value["structure"]["sites"]]
    forces = sites if any(force is not None for force in sites) else None
    atoms = pymatgen_atoms(value["structure"], f"{source.path}: {material}")
    magmoms = atoms.arrays.pop("magmom", None)
    atoms = source.labelled(
        atoms, material, data.get("stress"), energy=value.get("energy"), forces=forces, magmoms=magmoms
    )
    stated = (value.get("parameters") or {}).get("run_type") or data.get("functional")
    atoms.info |= _identity("material_id", material) | _scalars(data, skip={"mat_id", "nsites", "formula"})
    atoms.info |= _level(stated or _named(source.path), atoms)
    yield atoms


def _path(source: Source, key: str, value: Any) -> Iterator[Atoms]:
    """Alexandria: the runs that relaxed a material, with their steps."""
    for run, calculation in enumerate(value):
        for step, frame in enumerate(calculation.get("steps") or []):
            name = f"{key}-{run}-{step}"
            atoms = pymatgen_atoms(frame["structure"], f"{source.path}: {name}")
            atoms = source.labelled(
                atoms, name, frame.get("stress"), energy=frame.get("energy"), forces=frame.get("forces")
            )
            atoms.info |= {"material_id": key, "traj_id": f"{key}-{run}", "ionic_step": step}
            atoms.info |= _level(calculation.get("functional") or _named(source.path), atoms)
            yield atoms


def _is_matpes(record: Record) -> bool:
    return "structure" in record and "matpes_id" in record


def _matpes(source: Source, _: str, value: Any) -> Iterator[Atoms]:
    """MatPES: static calculations of snapshots; PBE without U, or r2SCAN."""
    name = value["matpes_id"]
    atoms = pymatgen_atoms(value["structure"], f"{source.path}: {name}")
    atoms = source.labelled(atoms, name, value.get("stress"), energy=value.get("energy"), forces=value.get("forces"))
    for key in ("bader_charges", "bader_magmoms", "cm5_partial_charges"):
        values = source.numbers(value.get(key), name, key, (len(atoms),))
        if values is not None:
            atoms.arrays[key] = values
    provenance = value.get("provenance") or {}
    atoms.info |= _identity("material_id", provenance.get("original_mp_id"))
    atoms.info |= _scalars(value, skip={"energy", "functional", *DERIVED}) | _level(value.get("functional"))
    yield atoms


# --------------------------------------------------------------------------------------------------------- Parquet

DERIVED = {  # what follows from the structure itself, and times of processing
    "nsites", "nelements", "formula_pretty", "formula_anonymous", "chemsys", "volume", "density", "density_atomic",
    "chemical_formula_anonymous", "chemical_formula_reduced", "chemical_formula_descriptive", "nperiodic_dimensions",
    "species", "last_modified",
}  # fmt: skip
OPTIMADE = {"species_at_sites", "lattice_vectors", "cartesian_site_positions"}
BATCH = 256  # rows of a table that are in memory


def stream_parquet(path: Path) -> Iterator[Atoms]:
    """The structures of LeMat-Bulk or LeMat-Traj; other tables are an `InputError` that names their columns."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    source = Source(path, LeftOut(path))
    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if not columns or not set(columns) >= OPTIMADE:
                raise InputError(
                    f"{path}: no structures in this table; they are read from the columns "
                    f"{', '.join(sorted(OPTIMADE))}, and it has {', '.join(columns[:12])}"
                )
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    yield _optimade(source, row)
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: the table is damaged or cut short ({error}); copy it again") from error
    source.left_out.tell()


def _optimade(source: Source, row: Record) -> Atoms:
    name = row.get("immutable_id") or row.get("id") or ""
    for key in ("species_at_sites", "cartesian_site_positions", "lattice_vectors"):
        if row[key] is None:
            raise InputError(f"{source.path}: {name or 'a row without id'} has no {key}: leave it out")
    numbers = [atomic_numbers.get(symbol, 0) for symbol in row["species_at_sites"]]
    if len(numbers) != len(row["cartesian_site_positions"]):
        counts = f"{len(numbers)} species and {len(row['cartesian_site_positions'])} positions"
        raise InputError(f"{source.path}: {name or 'a row without id'} has {counts}: it is broken, leave it out")
    atoms = Atoms(numbers, row["cartesian_site_positions"], cell=row["lattice_vectors"])
    atoms.pbc = [bool(flag) for flag in row.get("dimension_types") or (1, 1, 1)]
    atoms = source.labelled(
        atoms, name, row.get("stress_tensor"), energy=row.get("energy"), forces=row.get("forces"),
        magmoms=row.get("magnetic_moments"),
    )  # fmt: skip
    atoms.info |= _identity("material_id", name) | _scalars(
        row, skip={"immutable_id", "energy", "functional", *DERIVED}
    )
    if "relaxation_number" in row:
        atoms.info["traj_id"] = f"{name}-{row.get('functional')}-{row['relaxation_number']}"
    atoms.info |= _level(row.get("functional"), atoms)
    return atoms


# --------------------------------------------------------------------------------------------------------- aselmdb

LMDB_MAGIC = (16, bytes.fromhex("dec0efbe"))  # offset and bytes: behind the header of the first page
SETS = (  # of names of files and folders
    (re.compile(r"(?<![a-z])(omat|salex)|^rattled-|^aimd-from-pbe", re.IGNORECASE), "GGA"),
    (re.compile(r"(?<![a-z])omc", re.IGNORECASE), "PBE-D3"),
)


def stream_aselmdb(path: Path) -> Iterator[Atoms]:
    """Rows of an aselmdb file in the order of their numbers: those of an ASE database, as compressed JSON in LMDB.

    Keys of a row become `info`, such as `sid` of OMat24 and `source`, `charge` and `spin` of OMol25. An `sid` that
    begins with the id of a material gives `material_id` as well. Rows do not name their level: molecules with charge
    and spin are of OMol25 (wB97M-V/def2-TZVPD); others are PBE or PBE+U when their `sid` is one of Alexandria or the
    Materials Project or a folder is named after OMat24 or sAlex, PBE-D3 when one is named after OMC25, and without
    level otherwise.

    Raises:
        InputError: without the package lmdb, and for a file that is cut short or damaged.
    """
    from ase.db.row import AtomsRow
    from ase.io.jsonio import decode

    try:
        lmdb = importlib.import_module("lmdb")
    except ImportError as error:
        raise InputError(f"{path}: reading aselmdb needs lmdb: pip install 'transfermium[lmdb]'") from error

    try:
        database = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False, max_readers=1)
    except lmdb.Error as error:
        raise InputError(f"{path}: not a sound LMDB file ({error}); copy it again") from error
    with database, database.begin() as rows:
        size = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
        if path.stat().st_size < size:  # touching a page that is not there would end the process
            raise InputError(f"{path}: the file has {path.stat().st_size} of its {size} bytes; copy it again")
        for number in _row_numbers(rows):
            text = rows.get(str(number).encode())
            if text is None:
                raise InputError(f"{path}: row {number} is missing in the file; copy it again")
            record = decode(_inflated(text), always_array=False)
            row = AtomsRow(record | {"id": number})
            atoms = row.toatoms()
            for key, value in (row.key_value_pairs | dict(row.data)).items():
                if value is not None and not isinstance(value, dict):
                    atoms.info[key] = np.array(value) if isinstance(value, list) else value
            atoms.info |= _row_level(atoms, path) | atoms.info  # what a row says comes first
            yield atoms


def _row_numbers(rows: Any) -> Iterator[int]:
    """Numbers of the rows that were not deleted; they are keys as text, whose order is another."""
    total, deleted = rows.get(b"nextid"), rows.get(b"deleted_ids")
    if total is None:
        yield from sorted(int(key) for key in rows.cursor().iternext(values=False) if key.isdigit())
        return
    gone = set(json.loads(_inflated(deleted))) if deleted else set()
    yield from (number for number in range(1, json.loads(_inflated(total))) if number not in gone)


def _inflated(text: bytes) -> str:
    import zlib

    return zlib.decompress(text).decode()


def _row_level(atoms: Atoms, path: Path) -> Record:
    """Material and level of theory of a row, where it or the names of its folders tell."""
    parent = re.match(r"(agm|mp-|mvc-)\d+", str(atoms.info.get("sid", "")))
    material = _identity("material_id", parent[0] if parent else None)
    if {"charge", "spin"} <= atoms.info.keys() and not atoms.pbc.any():
        return material | {"level": "wB97M-V/def2-TZVPD"}
    names = path.absolute().parts[-3:]
    stated = next((level for pattern, level in SETS if any(map(pattern.search, names))), "GGA" if parent else None)
    return material | _level(stated, atoms)


# ---------------------------------------------------------------------------------------------------------- levels

FUNCTIONALS = {"pbesol": "PBEsol", "ps": "PBEsol", "scan": "SCAN", "r2scan": "r2SCAN", "gga+u": "PBE+U", "pbe": "PBE"}
HUBBARD = [atomic_numbers[symbol] for symbol in ("Co", "Cr", "Fe", "Mn", "Mo", "Ni", "V", "W")]


def pbe_or_pbe_u(atoms: Atoms) -> str:
    """The level at which the Materials Project would compute a structure: with U in some oxides and fluorides."""
    present = set(atoms.numbers.tolist())
    return "PBE+U" if present & {8, 9} and present & set(HUBBARD) else "PBE"


def _level(functional: str | None, atoms: Atoms | None = None) -> Record:
    """Our name of a functional; with `atoms`, "pbe" leaves open whether there is a U."""
    if not functional:
        return {}
    if atoms is not None and functional.lower() in ("pbe", "gga"):
        return {"level": pbe_or_pbe_u(atoms)}
    return {"level": FUNCTIONALS.get(functional.lower(), functional)}


def _named(path: Path) -> str | None:
    """The functional that a file or the folders around it are named after."""
    words = [re.split(r"[^a-z0-9]+", name.lower()) for name in reversed(path.absolute().parts[-3:])]
    plain = "pbe" if words[0][0] == "alexandria" else None  # the files of the largest part have no other name
    return next((word for name in words for word in name if word in FUNCTIONALS), plain)


def _identity(key: str, value: Any) -> Record:
    return {key: value} if value else {}


def _scalars(record: Mapping[str, Any], skip: set[str]) -> Record:
    return {k: v for k, v in record.items() if k not in skip and isinstance(v, str | int | float) and v == v}

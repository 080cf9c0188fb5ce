"""One file of any format and compression → the structures in it."""

import bz2
import contextlib
import gzip
import io
import json
import logging
import lzma
import re
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from ..errors import InputError

log = logging.getLogger(__name__)

COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
LAST_ELEMENT = 118
MOST_DIGITS = 15  # of a number of atoms
MOST_EMPTY = 100  # columns of which it is left to ASE to say that they are not there
PROPERTIES = re.compile(r'\bProperties\s*=\s*("[^"]*"|\S+)')
USUAL_PBC = re.compile(r'pbc="[TF] [TF] [TF]"')
PAGE = 1000  # rows of a database that are fetched together


def read_file(path: Path) -> list[Atoms]:
    """Read every structure of a file into memory, as `stream_file` does one by one."""
    return list(stream_file(path))


def stream_file(path: Path) -> Iterator[Atoms]:
    """Yield the structures of a file: extended XYZ, databases, JSON, public sets, outputs, or whatever `ase.io` knows.

    Extended XYZ, databases, public sets, files of RuNNer and trajectories are read as they are yielded, also when
    compressed; other formats at once.

    Empty, truncated or unparsable files and structures that make no sense (no atoms, no element, positions
    that are not finite, a periodic cell without volume) raise an `InputError` naming file and structure.
    """
    index = -1
    try:
        for index, atoms in enumerate(_parse(path)):
            _tidy(atoms, f"{path}: structure {index}")
            check(atoms, f"{path}: structure {index}")
            yield atoms
    except InputError:
        raise
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: the compressed file is damaged or cut short ({error}); copy it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: this is not text ({error}); check the format") from error
    except Exception as error:  # parsers of 80 formats raise everything there is
        kind = type(error).__name__
        raise InputError(f"{path}: cannot be read ({kind}: {error}); is it complete, is its ending right?") from error
    if index < 0:
        raise InputError(f"{path}: no structures in this file")


def check(atoms: Atoms, where: str) -> None:
    """Refuse a structure that no model can be trained on; the message starts with `where`."""
    if len(atoms) == 0:
        raise InputError(f"{where} has no atoms; remove it")
    if not (atoms.numbers > 0).all():
        raise InputError(f"{where}: atom {int(np.argmin(atoms.numbers > 0))} has no element (X); remove dummy atoms")
    if atoms.numbers.max() > LAST_ELEMENT:
        raise InputError(f"{where} has the atomic number {atoms.numbers.max()}, which is no element; correct it")
    if not np.isfinite(atoms.positions).all():
        atom = int(np.argmin(np.isfinite(atoms.positions).all(axis=1)))
        raise InputError(f"{where}: the position of atom {atom} is not finite; remove the structure")
    if not np.isfinite(atoms.cell.array).all():
        raise InputError(f"{where}: the cell is not finite; remove the structure")

    periodic = atoms.cell.array[atoms.pbc]
    if len(periodic):
        extents = np.linalg.svd(periodic, compute_uv=False)
        if extents[-1] <= 1e-8 * extents[0]:
            raise InputError(f"{where} is periodic but its cell has no volume; give a cell or set pbc to F")


class LeftOut:
    """What is left out of a source while it is read, and why; told at its end, in one line per reason."""

    def __init__(self, source: object):
        self.source = source
        self.reasons: dict[str, list[Any]] = {}  # what → [how many, where the first]

    def add(self, what: str, where: object, count: int = 1) -> None:
        """Count something; `what` is in the plural and says why, as in "steps that did not converge"."""
        self.reasons.setdefault(what, [0, where])[0] += count

    def lines(self) -> list[str]:
        return [f"{count} {what} (first: {where})" for what, (count, where) in self.reasons.items()]

    def tell(self) -> None:
        for line in self.lines():
            log.warning("%s: left out %s", self.source, line)


def plain_name(path: Path) -> str:
    """The name of a file without the ending of its compression."""
    return path.stem if path.suffix.lower() in COMPRESSIONS else path.name


def _parse(path: Path) -> Iterator[Atoms]:
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")

    from . import calculations, runner

    name = plain_name(path)
    suffix = Path(name).suffix.lower()
    if suffix in {".xyz", ".extxyz"}:
        yield from _xyz_frames(path)
    elif suffix in {".json", ".jsonl"}:
        yield from _json_structures(path)
    elif kind := calculations.kind_of(path):
        yield from calculations.stream(path.parent, [calculations.Calculation(path, kind, path.name)])
    elif runner.is_runner(path):
        yield from runner.stream_runner(path)
    elif path.suffix.lower() in COMPRESSIONS:
        with tempfile.TemporaryDirectory() as folder:  # databases and trajectories need a real file
            plain = Path(folder) / name
            with COMPRESSIONS[path.suffix.lower()](path, "rb") as source, plain.open("wb") as target:
                shutil.copyfileobj(source, target)
            yield from _parse_plain(plain, suffix)
    else:
        yield from _parse_plain(path, suffix)


def _parse_plain(path: Path, suffix: str) -> Iterator[Atoms]:
    from . import public

    offset, lmdb = public.LMDB_MAGIC
    with path.open("rb") as file:
        head = file.read(offset + len(lmdb))
    if head.startswith(b"PAR1"):
        yield from public.stream_parquet(path)
    elif head[offset:] == lmdb:
        yield from public.stream_aselmdb(path)
    elif head[:1] == b"\x80" and suffix in {".p", ".pkl", ".pickle"}:
        raise InputError(
            f"{path}: pickles run any code and are never loaded; save the structures as JSON (docs/data.md)"
        )
    elif suffix == ".db":
        yield from _database(path)
    elif suffix == ".csv":
        raise InputError(f"{path}: a table has no structures; give the folder that holds it and their files")
    else:
        from ase.io import iread

        yield from iread(path, index=":")


def _xyz_frames(path: Path) -> Iterator[Atoms]:
    """Hand ASE one frame at a time.

    Given the whole file, ASE seeks in it (quadratically slow when compressed) and stops without a word at a blank line.
    """
    from ase.io.extxyz import read_xyz

    with open_text(path) as lines:
        index = 0
        line = lines.readline()
        while line:
            if not line.strip():
                line = lines.readline()
                continue

            if not line.strip().isdecimal() or len(line.strip()) > MOST_DIGITS:
                raise InputError(
                    f"{path}: structure {index} should begin with its number of atoms, not with "
                    f"{line.strip()[:40]!r}; is the structure before it complete?"
                )
            n_atoms = int(line)
            frame = [line, *islice(lines, n_atoms + 1)]
            if len(frame) < n_atoms + 2:
                raise InputError(f"{path}: structure {index} is cut short, its {n_atoms} atoms are not all there")
            line = lines.readline()
            while line.lstrip().startswith("VEC"):  # cell vectors in the way of ADF
                frame.append(line)
                line = lines.readline()

            _check_header(frame, f"{path}: structure {index}")
            try:
                yield next(read_xyz(io.StringIO("".join(frame)), 0))
            except Exception as error:
                kind = type(error).__name__
                if str(error) in ("'D'", "'T'"):
                    raise InputError(
                        f"{path}: structure {index} has the element {error}, which is hydrogen here: write H, and its "
                        "mass into a column masses"
                    ) from error
                raise InputError(f"{path}: structure {index} cannot be read ({kind}: {error})") from error
            index += 1


def _check_header(frame: list[str], where: str) -> None:
    """Refuse more columns than there are, which ASE would make room for, and words for pbc, all true to ASE."""
    found = PROPERTIES.search(frame[1])
    columns = found[1].strip('"').split(":")[2::3] if found else []
    there = len(frame[2].split()) if len(frame) > 2 else 0
    if any(len(n) > MOST_DIGITS or (n.isdecimal() and int(n) > max(there, MOST_EMPTY)) for n in columns):
        raise InputError(f"{where} cannot be read: Properties names more columns than the {there} that there are")
    if frame[1].count("pbc") > len(USUAL_PBC.findall(frame[1])):  # else it is told without ASE's parser, which is slow
        from ase.io.extxyz import key_val_str_to_dict

        pbc = key_val_str_to_dict(frame[1]).get("pbc", True)
        if np.asarray(pbc).dtype.kind not in "bi" or not np.isin(pbc, (0, 1)).all():
            raise InputError(f"{where} has the pbc {str(pbc)!r}, which is neither T nor F; correct it")


def open_text(path: Path) -> Any:
    """A text file, decompressed."""
    return COMPRESSIONS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig")


def _database(path: Path) -> Iterator[Atoms]:
    """Rows of an ASE database; key-value pairs and data of a row become info."""
    try:
        for row in _rows(path):
            atoms = row.toatoms()
            atoms.info.update(row.key_value_pairs)
            atoms.info.update(row.data)
            yield atoms
    except sqlite3.Error as error:
        raise InputError(f"{path}: not a sound ASE database ({error})") from error


def _rows(path: Path) -> Iterator[Any]:
    from ase.db import connect

    if path.suffix.lower() == ".db":
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as tables:
            if not tables.execute("SELECT name FROM sqlite_master WHERE name = 'systems'").fetchone():
                raise InputError(f"{path}: an SQLite database, but not one of ASE; check the file")  # ASE makes it one
    database = connect(str(path), use_lock_file=False)
    if path.suffix.lower() != ".db":
        yield from database.select()
        return

    last = 0
    while rows := list(database.select(f"id>{last}", sort="id", limit=PAGE)):  # else ASE fetches all rows first
        yield from rows
        last = rows[-1].id


def _json_structures(path: Path) -> Iterator[Atoms]:
    """Public sets, pymatgen structures, MatBench tables, or an ASE database in JSON."""
    from .public import stream_json

    public = stream_json(path)
    if public is not None:
        yield from public
        return

    with open_text(path) as file:
        content = json.load(file)

    if isinstance(content, dict) and "ids" in content and "nextid" in content:
        if path.suffix.lower() in COMPRESSIONS:
            raise InputError(f"{path}: decompress this ASE database first")
        yield from _database(path)
        return

    for index, record in enumerate(_records(content, path)):
        yield _record_atoms(record, f"{path}: structure {index}")


def _records(content: Any, path: Path) -> list[dict[str, Any]]:
    """Bring every supported layout to a list of records {"structure": ..., other columns}."""
    if isinstance(content, dict):
        if "sites" in content:
            return [{"structure": content}]
        if "structure" in content:
            return [content]
        if "structures" in content:
            return _records(content["structures"], path)
        if {"index", "columns", "data"} <= content.keys():  # a table as pandas and MatBench write it
            columns = ["index" if column is None else str(column) for column in content["columns"]]
            if "structure" not in columns:
                raise InputError(f"{path}: the table has no column 'structure', only {', '.join(columns)}")
            rows = zip(content["index"], content["data"], strict=True)
            return [_identity(index) | dict(zip(columns, row, strict=True)) for index, row in rows]
    if isinstance(content, list) and all(isinstance(item, dict) for item in content):
        return [item if "structure" in item else {"structure": item} for item in content]
    raise InputError(f"{path}: no pymatgen structures, MatBench table or ASE database in this JSON file")


def _identity(index: Any) -> dict[str, Any]:
    return {"mbid": index} if isinstance(index, str) else {}  # MatBench names its index so; a bare count says nothing


def _record_atoms(record: Mapping[str, Any], where: str) -> Atoms:
    """Build the structure of a record; numbers, text and lists beside it become info."""
    structure = record["structure"]
    atoms = pymatgen_atoms(structure, where)
    extra = {key: value for key, value in record.items() if key != "structure" and not key.startswith("@")}
    for key, value in ((structure.get("properties") or {}) | extra).items():
        if value is not None and not isinstance(value, dict):
            atoms.info[key] = np.array(value) if isinstance(value, list) else value
    return atoms


def pymatgen_atoms(structure: Any, where: str) -> Atoms:
    """A structure or molecule that pymatgen wrote as JSON; properties of the sites become arrays."""
    if not isinstance(structure, dict) or "sites" not in structure:
        raise InputError(f"{where} is not a pymatgen structure: it has no 'sites'")
    try:
        return _atoms(structure, where)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is not a pymatgen structure ({type(error).__name__}: {error})") from error


def _atoms(structure: Mapping[str, Any], where: str) -> Atoms:
    sites = structure["sites"]
    lattice = structure.get("lattice")
    numbers = [_element(site, f"{where}, site {index}") for index, site in enumerate(sites)]
    if lattice is None:  # a molecule
        atoms = Atoms(numbers, positions=[site["xyz"] for site in sites])
    else:
        cell = np.array(lattice["matrix"], dtype=float)
        positions = [site["xyz"] if "abc" not in site else np.array(site["abc"]) @ cell for site in sites]
        atoms = Atoms(numbers, positions=positions, cell=cell, pbc=lattice.get("pbc", True))

    if structure.get("charge"):
        atoms.info["charge"] = structure["charge"]
    for key in sites[0].get("properties") or {}:
        values = [(site.get("properties") or {}).get(key) for site in sites]
        shapes = {np.shape(value) for value in values if value is not None}
        if key not in atoms.arrays and len(shapes) == 1 and not any(isinstance(value, str) for value in values):
            (shape,) = shapes
            rows = [np.full(shape, np.nan) if value is None else value for value in values]
            atoms.new_array(key, np.array(rows, dtype=float))
    return atoms


def _element(site: Mapping[str, Any], where: str) -> int:
    species = site["species"]
    if len(species) != 1 or abs(species[0].get("occu", 1) - 1) > 1e-3:
        raise InputError(f"{where} is disordered (partly or mixed occupied); replace it by ordered structures")
    symbol = species[0]["element"]
    symbol = {"D": "H", "T": "H"}.get(symbol, symbol)
    if symbol not in atomic_numbers:
        raise InputError(f"{where} holds {symbol!r}, which is no element")
    return atomic_numbers[symbol]


def _tidy(atoms: Atoms, where: str) -> None:
    """Turn what ASE's CIF reader leaves behind into plain values, and refuse the disorder that it hides."""
    occupancy = atoms.info.pop("occupancy", None)
    if isinstance(occupancy, dict):
        for shares in occupancy.values():
            if len(shares) != 1 or abs(sum(shares.values()) - 1) > 1e-3:
                raise InputError(f"{where} has a disordered site ({shares}); replace it by ordered structures")
    if hasattr(atoms.info.get("spacegroup"), "no"):
        atoms.info["spacegroup"] = int(atoms.info["spacegroup"].no)
        atoms.info.pop("unit_cell", None)
        atoms.arrays.pop("spacegroup_kinds", None)

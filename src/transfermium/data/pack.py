"""Structures on disk, read by memory map: Arrow shards that hold more than fits into memory."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import pyarrow as pa
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixConstraint, dict2constraint
from ase.spacegroup import Spacegroup
from rich.console import Console
from rich.progress import track

from ..errors import InputError

FORMAT = "transfermium.packed"
VERSION = 1
HEADER = "transfermium.json"

LARGEST_SHARD = 2**28  # bytes held in memory before a shard is written, whatever `shard_size` says
MOST_COLUMNS = 256  # of one shard; further keys share the column `json`
MOST_OPEN = 256  # shards; each holds a file handle

Key = tuple[str, str]  # place ("atoms", "arrays", "info" or "calc") and name there
Entries = Iterable[tuple[Key, Any]]  # what one structure is made of
LEVEL = ("info", "level")
OTHERS = ("", "json")  # the column of all values that have none of their own


class PackedSet(Sequence[Atoms]):
    """Structures that `pack` wrote to a folder, read one at a time from memory-mapped files.

    `packed[7]` is an `ase.Atoms` equal to the one packed, labels in a `SinglePointCalculator` where they came in a
    calculator. Slices and arrays of indices or booleans give another `PackedSet` on the same files and read nothing.
    The object holds a path and no data, so it pickles into worker processes, which open the files again.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], rows: range | np.ndarray) -> None:
        self.path = path
        self.header = header
        self.rows = rows
        self._starts = np.cumsum([0] + [shard["n_structures"] for shard in header["shards"]]).tolist()
        self._open: dict[int, _Shard] = {}

    @classmethod
    def open(cls, path: str | Path) -> PackedSet:
        """Open a folder written by `pack`; InputError when it is none, or a shard is missing or cut short."""
        path = Path(path).absolute()
        header = _read_header(path)
        if header is None:
            raise InputError(f"{path} is not a packed set (no readable {HEADER} in it): write one with `pack`")
        if header["version"] > VERSION:
            raise InputError(f"{path} was packed by a newer version: update transfermium, or pack it again")
        for shard in header["shards"]:
            _check_size(path / shard["file"], shard["bytes"])
        return cls(path, header, range(header["n_structures"]))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int | np.integer) -> Atoms: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> PackedSet: ...
    def __getitem__(self, index: int | np.integer | slice | Sequence[int] | np.ndarray) -> Atoms | PackedSet:
        if isinstance(index, slice):
            return PackedSet(self.path, self.header, self.rows[index])
        if isinstance(index, Sequence | np.ndarray):
            chosen = np.asarray(index)
            return PackedSet(self.path, self.header, np.asarray(self.rows)[chosen if chosen.size else slice(0)])
        shard, row = self._locate(index)
        return shard.atoms(row)

    def level(self, index: int) -> str | None:
        """The level of theory of one structure, or None when it has none."""
        shard, row = self._locate(index)
        level = shard.level(row)
        return level if isinstance(level, str) else None

    @cached_property
    def n_atoms(self) -> np.ndarray:
        """Atoms of each structure, from the offsets alone: (n_structures,)."""
        counts = [self._shard(i).n_atoms() for i in range(len(self.header["shards"]))]
        return np.concatenate(counts)[np.asarray(self.rows, dtype=int)]

    @property
    def units(self) -> dict[str, str]:
        """Units of the columns that have one, as `{"positions": "Å", "calc.energy": "eV"}`."""
        return dict(self.header["units"])

    @property
    def levels(self) -> dict[str, int]:
        """How many structures of the folder have each level of theory."""
        return dict(self.header["levels"])

    @property
    def left_out(self) -> dict[str, int]:
        """What could not be stored, with the number of structures that had it."""
        return dict(self.header["left_out"])

    def verify(self) -> None:
        """Read every byte; InputError names the first shard that differs from what was written."""
        for shard in self.header["shards"]:
            if _sha256(self.path / shard["file"]) != shard["sha256"]:
                raise InputError(f"{self.path / shard['file']} is damaged: copy it again, or pack again")

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedSet, (self.path, self.header, self.rows)

    def __repr__(self) -> str:
        return f"PackedSet({str(self.path)!r}, {len(self)} structures)"

    def _locate(self, index: Any) -> tuple[_Shard, int]:
        row = int(self.rows[index])
        shard = bisect_right(self._starts, row) - 1
        return self._shard(shard), row - self._starts[shard]

    def _shard(self, i: int) -> _Shard:
        if i not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open)))
            shard = self.header["shards"][i]
            self._open[i] = _Shard(self.path / shard["file"], shard["bytes"])
        return self._open[i]


class Labels(Protocol):
    """What `pack` needs of resolved labels."""

    @property
    def entries(self) -> Sequence[Any]: ...
    def apply(self, atoms: Atoms) -> Atoms: ...
    def to_json(self) -> Any: ...


def pack(
    structures: str | Path | Iterable[Atoms],
    out: str | Path,
    *,
    labels: Labels | None = None,
    shard_size: int = 65536,
    level: str | None = None,
    progress: bool = True,
) -> PackedSet:
    """Stream structures into Arrow IPC files in the new folder `out`, and open them.

    `labels` puts labels into their canonical places and units first; `level` is the level of theory of structures whose
    `info` has none under `level`. Memory holds one shard of `shard_size` structures (fewer, if they are large).

    Every shard has its own schema: a stream may bring a new key, or text where there were numbers, after hours, and a
    schema common to all shards would need a second pass or columns without types. Values of one type are one column,
    with nulls where a structure has none; all other values are JSON in the column `json`, and come back all the same.
    What cannot be written at all (an object of some class, results of atoms that have moved since) is left out, counted
    in `left_out` and printed.

    The folder appears complete or not at all. A folder that already holds these structures is kept and returned;
    anything else at `out` is an InputError and remains untouched.
    """
    out = Path(out).absolute()
    if shard_size < 1:
        raise InputError(f"shard_size is {shard_size}: it must be at least 1")
    before = _what_is_there(out)
    if isinstance(structures, str | Path):
        from .read import read

        structures = read(structures)
    n_structures = len(structures) if isinstance(structures, Sized) else None
    if before is not None and n_structures not in (None, len(before)):
        raise _differs(out)

    console = Console(stderr=True)
    stream = track(structures, "packing", total=n_structures, console=console, disable=not progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        header = _write_shards(stream, partial, labels, shard_size, level, before)
        if before is not None:
            if header != before.header:
                raise _differs(out)
            return before
        _write_text(partial / HEADER, json.dumps(header, indent=1, ensure_ascii=False))
        _sync_folder(partial)
        partial.rename(out)
        _sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    for what, count in header["left_out"].items() if progress else ():
        console.print(f"left out: {what} of {count} structures", markup=False, highlight=False)
    return PackedSet.open(out)


def is_packed(path: str | Path) -> bool:
    """Whether `pack` wrote this folder."""
    return _read_header(Path(path)) is not None


def _write_shards(
    structures: Iterable[Any],
    folder: Path,
    labels: Labels | None,
    shard_size: int,
    level: str | None,
    before: PackedSet | None,
) -> dict[str, Any]:
    """Write all shards into `folder` and return the header; stop where they begin to differ from those of `before`."""
    shards: list[dict[str, Any]] = []
    units = dict(_UNITS)
    for label in labels.entries if labels else ():
        units["arrays" if label.per == "atom" else "info", label.quantity] = label.unit
    levels, left_out, columns = Counter[str](), Counter[str](), Counter[str]()
    used: dict[str, str] = {}

    def finish(shard: _ShardWriter) -> None:
        entry = shard.write(folder / f"shard-{len(shards):05d}.arrow", units)
        if before is not None:
            if entry not in before.header["shards"][len(shards) : len(shards) + 1]:
                raise _differs(before.path)
            (folder / entry["file"]).unlink()
        shards.append(entry)
        columns.update(shard.counts())
        used.update({_name(key): units[key] for key in shard.columns if units.get(key)})

    shard = _ShardWriter()
    n_structures = 0
    for n_structures, atoms in enumerate(structures, start=1):
        if not isinstance(atoms, Atoms):
            kind = type(atoms).__name__
            raise InputError(f"structure {n_structures - 1} is a {kind}, not an ase.Atoms: pass structures to pack")
        if shard.n == shard_size or shard.bytes >= LARGEST_SHARD:
            finish(shard)
            shard = _ShardWriter()
        entries = dict(_to_entries(labels.apply(atoms) if labels else atoms))
        if level is not None:
            entries.setdefault(LEVEL, level)
        if isinstance(stated := entries.get(LEVEL), str):
            levels[stated] += 1
        left_out.update(shard.add(entries.items()))
    if n_structures == 0:
        raise InputError("there are no structures to pack: check the source")
    finish(shard)
    return {
        "format": FORMAT,
        "version": VERSION,
        "n_structures": n_structures,
        "shards": shards,
        "columns": dict(columns),
        "units": used,
        "levels": dict(levels),
        "left_out": dict(left_out),
        "labels": json.loads(json.dumps(labels.to_json())) if labels else None,
    }


# --- one structure as entries, and back

_UNITS = {
    ("atoms", "positions"): "Å",
    ("atoms", "cell"): "Å",
    ("calc", "energy"): "eV",
    ("calc", "free_energy"): "eV",
    ("calc", "energies"): "eV",
    ("calc", "forces"): "eV/Å",
    ("calc", "stress"): "eV/Å^3",
    ("calc", "stresses"): "eV/Å^3",
    ("calc", "dipole"): "e Å",
    ("calc", "charges"): "e",
    ("calc", "magmom"): "μB",
    ("calc", "magmoms"): "μB",
}
_FIXED = {("atoms", "cell"): 9, ("atoms", "pbc"): 3}


class _Stale:
    """Results that belong to other positions than those of the structure."""


def _to_entries(atoms: Atoms) -> Iterator[tuple[Key, Any]]:
    """What has to be stored so that `_to_atoms` gives the same structure again."""
    numbers = atoms.arrays["numbers"]
    small = numbers.astype(np.int16)
    yield ("atoms", "numbers"), small if (small == numbers).all() else numbers
    yield ("atoms", "positions"), np.asarray(atoms.arrays["positions"], dtype=float)
    yield ("atoms", "cell"), atoms.cell.array
    yield ("atoms", "pbc"), atoms.pbc
    if (displacement := atoms.get_celldisp()).any():
        yield ("atoms", "celldisp"), displacement
    if atoms.constraints:
        yield ("atoms", "constraint"), list(atoms.constraints)
    yield from ((("arrays", key), value) for key, value in atoms.arrays.items() if key not in ("numbers", "positions"))
    yield from ((("info", key), value) for key, value in atoms.info.items())
    results = getattr(atoms.calc, "results", None) or {}
    computed = getattr(atoms.calc, "atoms", None)
    stale = bool(results) and computed is not None and computed != atoms
    yield from ((("calc", key), _Stale() if stale else value) for key, value in results.items())


def _to_atoms(entries: Entries) -> Atoms:
    found: dict[str, dict[Any, Any]] = {"atoms": {}, "arrays": {}, "info": {}, "calc": {}}
    for (place, key), value in entries:
        found[place][key] = value
    atoms = Atoms(**found["atoms"])
    if found["calc"]:
        atoms.calc = SinglePointCalculator(atoms)
        atoms.calc.results = found["calc"]
    atoms.arrays.update(found["arrays"])
    atoms.info = found["info"]
    return atoms


# --- writing one shard


class _ShardWriter:
    """Collects structures as columns until they are written to one file."""

    def __init__(self) -> None:
        self.n = 0
        self.columns: dict[Key, _Column] = {}
        self.mixed: set[Key] = set()  # keys that turned out to have values of several types
        self.others: dict[int, list[str]] = {}  # row -> entries as JSON
        self._other_bytes = 0

    @property
    def bytes(self) -> int:
        return sum(column.bytes for column in self.columns.values()) + self._other_bytes

    def add(self, entries: Entries) -> list[str]:
        """Append one structure; returns what it could not hold."""
        left_out = []
        for key, value in entries:
            kind = _kind(key, value)
            column = self._column(key, kind)
            if column is not None and column.kind == kind:
                column.append(self.n, value)
                continue
            if column is not None:
                self._dissolve(key)
            try:
                self._append_other(self.n, key, value)
            except TypeError as error:
                left_out.append(f"{key[0]}[{key[1]!r}] ({error})")
        self.n += 1
        return left_out

    def write(self, path: Path, units: Mapping[Key, str]) -> dict[str, Any]:
        """Write the columns as one record batch and return the shard's entry in the header."""
        arrays, fields = [], []
        for key, column in self.columns.items():
            array = column.to_arrow(self.n, _FIXED.get(key))
            if key == LEVEL and column.kind == ("str", None):
                array = array.dictionary_encode()
            about = {"place": key[0], "key": key[1], "kind": json.dumps(column.kind), "unit": units.get(key, "")}
            arrays.append(array)
            fields.append(pa.field(_name(key), array.type, metadata=about))
        if self.others:
            rows = [f"[{','.join(self.others[row])}]" if row in self.others else None for row in range(self.n)]
            arrays.append(pa.array(rows, pa.string()))
            about = {"place": OTHERS[0], "key": OTHERS[1], "kind": '["str", null]'}
            fields.append(pa.field(_name(OTHERS), pa.string(), metadata=about))
        schema = pa.schema(fields, metadata={"format": FORMAT, "version": str(VERSION)})
        with open(path, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(pa.record_batch(arrays, schema=schema))
            file.flush()
            os.fsync(file.fileno())
        n_bytes = path.stat().st_size
        return {"file": path.name, "n_structures": self.n, "bytes": n_bytes, "sha256": _sha256(path)}

    def counts(self) -> dict[str, int]:
        """How many structures have a value in each column."""
        counts = {_name(key): len(column.rows) for key, column in self.columns.items()}
        return {**counts, _name(OTHERS): len(self.others)} if self.others else counts

    def _column(self, key: Key, kind: Kind | None) -> _Column | None:
        full = len(self.columns) >= MOST_COLUMNS and key[0] != "atoms"
        if key not in self.columns and kind is not None and key not in self.mixed and not full:
            self.columns[key] = _Column(kind)
        return self.columns.get(key)

    def _dissolve(self, key: Key) -> None:
        """Move a column's values to the JSON entries, because the next one is of another type."""
        self.mixed.add(key)
        for row, value in self.columns.pop(key).items():
            self._append_other(row, key, value)

    def _append_other(self, row: int, key: Key, value: Any) -> None:
        text = json.dumps([key[0], _to_json(key[1]), _to_json(value)])
        self.others.setdefault(row, []).append(text)
        self._other_bytes += len(text)


Kind = tuple[str, tuple[int, ...] | None]  # type name; for arrays, the shape after the leading axis

_ARROW = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_(), "str": pa.string()}


class _Column:
    """Values of one kind, for some of the rows."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.rows: list[int] = []
        self.scalars: list[Any] = []
        self.data = bytearray()  # of arrays, one behind the other
        self.sizes: list[int] = []  # elements of each array
        self.bytes = 0

    def append(self, row: int, value: Any) -> None:
        self.rows.append(row)
        if self.kind[1] is None:
            self.scalars.append(value.item() if isinstance(value, np.generic) else value)
            self.bytes += len(value) if isinstance(value, str) else 8
            return
        value = np.asarray(value, value.dtype.newbyteorder("="))
        self.data += value.tobytes()
        self.sizes.append(value.size)
        self.bytes += value.nbytes

    def items(self) -> Iterator[tuple[int, Any]]:
        name, shape = self.kind
        if shape is None:
            yield from zip(self.rows, self.scalars, strict=True)
            return
        values = np.split(np.frombuffer(self.data, name), np.cumsum(self.sizes)[:-1])
        yield from ((row, value.reshape(-1, *shape)) for row, value in zip(self.rows, values, strict=True))

    def to_arrow(self, n: int, fixed_size: int | None) -> pa.Array:
        """The column as an Arrow array of `n` rows; arrays are flat, their shape is in the metadata of the field."""
        name, shape = self.kind
        if shape is None:
            values: list[Any] = [None] * n
            for row, value in zip(self.rows, self.scalars, strict=True):
                values[row] = value
            return pa.array(values, _ARROW[name])
        flat = pa.array(np.frombuffer(self.data, "uint8" if name == "bool" else name))
        if fixed_size is not None:
            return pa.FixedSizeListArray.from_arrays(flat, fixed_size)
        sizes, missing = np.zeros(n, np.int64), np.ones(n, bool)
        sizes[self.rows], missing[self.rows] = self.sizes, False
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
        return pa.ListArray.from_arrays(offsets, flat, mask=pa.array(missing) if missing.any() else None)


def _kind(key: Key, value: Any) -> Kind | None:
    """The type of column that holds this value exactly, or None when only JSON can."""
    if not _is_text(key[1]):
        return None
    if isinstance(value, np.ndarray):
        plain = value.dtype.kind in "biuf" and value.dtype.itemsize <= 8
        return (value.dtype.name, value.shape[1:]) if plain and value.ndim and 0 not in value.shape[1:] else None
    if isinstance(value, bool | np.bool_):
        return "bool", None
    if isinstance(value, int | np.integer):
        return ("int", None) if -(2**63) <= value < 2**63 else None
    if isinstance(value, float | np.float32 | np.float16):
        return "float", None
    return ("str", None) if _is_text(value) else None


def _is_text(value: Any) -> bool:
    """Whether Arrow can hold this as text (Python's lone surrogates have no UTF-8)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- reading one shard


class _Shard:
    """One memory-mapped file; values are looked up in its buffers without building Arrow or Python objects."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        self.path = path
        _check_size(path, n_bytes)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.batch = reader.get_batch(0)
            self.batch.validate()
            self.offsets = self.batch.column("positions").offsets.to_numpy()  # (n_structures + 1,)
            pairs = zip(reader.schema, self.batch, strict=True)
            self.columns = [_reader(field.metadata, column) for field, column in pairs]
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path) from error

    def atoms(self, row: int) -> Atoms:
        try:
            return _to_atoms(self._entries(row, self.columns))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise _damaged(self.path, row) from error

    def level(self, row: int) -> Any:
        wanted = [column for column in self.columns if column[0] in (LEVEL, OTHERS)]
        return dict(self._entries(row, wanted)).get(LEVEL)

    def n_atoms(self) -> np.ndarray:
        return np.diff(self.offsets) // 3

    def _entries(self, row: int, columns: Iterable[tuple[Key, Reader]]) -> Iterator[tuple[Key, Any]]:
        for key, read in columns:
            value = read(row)
            if value is None:
                continue
            if key == OTHERS:
                yield from (((place, name), other) for place, name, other in value)
            else:
                yield key, value


Reader = Callable[[int], Any]  # row -> value, None where there is none


def _reader(metadata: Mapping[bytes, bytes], column: pa.Array) -> tuple[Key, Reader]:
    key = metadata[b"place"].decode(), metadata[b"key"].decode()
    name, shape = json.loads(metadata[b"kind"])
    if key == OTHERS:
        read = _json_reader(column)
    elif shape is None:
        read = _scalar_reader(column, name)
    else:
        read = _array_reader(column, name, shape, copy=key[0] != "atoms")  # Atoms makes its own copies
    if column.null_count == 0:
        return key, read
    valid = _bits(column.buffers()[0])
    return key, lambda row: read(row) if valid(row) else None


def _scalar_reader(column: pa.Array, name: str) -> Reader:
    if pa.types.is_dictionary(column.type):
        words, number = column.dictionary.to_pylist(), memoryview(column.indices.buffers()[1]).cast("B").cast("i")
        return lambda row: words[number[row]]
    if name == "bool":
        return _bits(column.buffers()[1])
    if name == "str":
        offsets = memoryview(column.buffers()[1]).cast("B").cast("i")
        text = memoryview(column.buffers()[2] or b"")
        return lambda row: str(text[offsets[row] : offsets[row + 1]], "utf-8")
    values = memoryview(column.buffers()[1]).cast("B")
    numbers = values.cast("d") if name == "float" else values.cast("q")
    return lambda row: numbers[row]


def _array_reader(column: pa.Array, name: str, shape: list[int], copy: bool) -> Reader:
    values = column.values.to_numpy().view(name)
    if pa.types.is_fixed_size_list(column.type):
        size = column.type.list_size
        offsets: Any = range(0, size * len(column) + 1, size)
    else:
        offsets = memoryview(column.offsets.to_numpy())
    values = values.reshape(-1, *shape)
    stride = int(np.prod(shape, dtype=int))

    def read(row: int) -> np.ndarray:
        value = values[offsets[row] // stride : offsets[row + 1] // stride]
        return value.copy() if copy else value

    return read


def _json_reader(column: pa.Array) -> Reader:
    text = _scalar_reader(column, "str")
    return lambda row: json.loads(text(row), object_hook=_from_json)


def _bits(buffer: pa.Buffer) -> Callable[[int], bool]:
    """Look up a bit of Arrow's packed booleans."""
    packed = memoryview(buffer)
    return lambda row: bool(packed[row >> 3] >> (row & 7) & 1)


# --- values that have no column of their own


def _to_json(value: Any) -> Any:
    """A value as JSON that `_from_json` turns back; TypeError when it cannot be."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_to_json(item) for item in value]
    if isinstance(value, tuple):
        return {"@tuple": [_to_json(item) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("@") for key in value):
            return {key: _to_json(item) for key, item in value.items()}
        return {"@dict": [[_to_json(key), _to_json(item)] for key, item in value.items()]}
    if (
        isinstance(value, np.ndarray)
        and value.dtype.kind in "biufU"
        and (value.dtype.kind == "U" or value.itemsize <= 8)
    ):
        return {"@array": [value.dtype.newbyteorder("=").str, value.shape, value.ravel().tolist()]}
    if isinstance(value, Spacegroup):
        return {"@spacegroup": [value.no, value.setting]}
    if isinstance(value, FixConstraint):
        return {"@constraint": _to_json(value.todict())}
    raise TypeError("results of other positions" if isinstance(value, _Stale) else f"a {type(value).__name__}")


def _from_json(found: dict[str, Any]) -> Any:
    match found:
        case {"@tuple": items}:
            return tuple(items)
        case {"@dict": pairs}:
            return dict(pairs)
        case {"@array": [dtype, shape, values]}:
            return np.array(values, dtype).reshape(shape)
        case {"@spacegroup": [number, setting]}:
            return _spacegroup(number, setting)
        case {"@constraint": arguments}:
            return dict2constraint(arguments)
    return found


@lru_cache
def _spacegroup(number: int, setting: int) -> Spacegroup:
    return Spacegroup(number, setting)  # reads a file of ASE, slowly


# --- the folder


def _read_header(path: Path) -> dict[str, Any] | None:
    try:
        header = json.loads((path / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) and header.get("format") == FORMAT else None


def _what_is_there(out: Path) -> PackedSet | None:
    if is_packed(out):
        return PackedSet.open(out)
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} exists and is no packed set: choose another path, it will not be overwritten")
    return None


def _differs(out: Path) -> InputError:
    return InputError(
        f"{out} holds other structures, or was packed with other options: choose another path or remove it"
    )


def _check_size(path: Path, n_bytes: int) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing: copy the whole folder again, or pack again")
    if (found := path.stat().st_size) != n_bytes:
        raise InputError(f"{path} has {found} bytes and should have {n_bytes}: copy it again, or pack again")


def _damaged(path: Path, row: int | None = None) -> InputError:
    where = "" if row is None else f" at its structure {row}"
    return InputError(f"{path} is damaged{where}: copy it again, or pack again")


def _name(key: Key) -> str:
    """The name of a column: `positions`, `info.band_gap`, `arrays.tags`, `calc.energy`; and `level`, `json`."""
    place, name = key
    return name if place in ("atoms", "") or key == LEVEL else f"{place}.{name}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

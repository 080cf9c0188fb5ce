"""One shard of a packed set: structures as columns of an Arrow file, and back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from ..errors import InputError

if TYPE_CHECKING:  # half a second, for those who pack or read packed sets
    import pyarrow as pa
    from ase.spacegroup import Spacegroup

FORMAT = "transfermium.packed"
VERSION = 1
MOST_COLUMNS = 256  # of one shard; further keys share the column `json`

Key = tuple[str, str]  # place ("atoms", "arrays", "info" or "calc") and name there
Entries = Iterable[tuple[Key, Any]]  # what one structure is made of
LEVEL = ("info", "level")
WIDEST = 1024  # bytes of a value in an array; words that claim more are as wide as the longest of them
OTHERS = ("", "json")  # the column of all values that have none of their own


# --- writing one shard


class ShardWriter:
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
        import pyarrow as pa

        arrays, fields = [], []
        for key, column in self.columns.items():
            array = column.to_arrow(self.n, _FIXED.get(key))
            if key == LEVEL and column.kind == ("str", None):
                array = array.dictionary_encode()
            about = {"place": key[0], "key": key[1], "kind": json.dumps(column.kind), "unit": units.get(key, "")}
            arrays.append(array)
            fields.append(pa.field(column_name(key), array.type, metadata=about))
        if self.others:
            rows = [f"[{','.join(self.others[row])}]" if row in self.others else None for row in range(self.n)]
            arrays.append(pa.array(rows, pa.string()))
            about = {"place": OTHERS[0], "key": OTHERS[1], "kind": '["str", null]'}
            fields.append(pa.field(column_name(OTHERS), pa.string(), metadata=about))
        schema = pa.schema(fields, metadata={"format": FORMAT, "version": str(VERSION)})
        with open(path, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(pa.record_batch(arrays, schema=schema))
            file.flush()
            os.fsync(file.fileno())
        n_bytes = path.stat().st_size
        return {"file": path.name, "n_structures": self.n, "bytes": n_bytes, "sha256": sha256(path)}

    def counts(self) -> dict[str, int]:
        """How many structures have a value in each column."""
        counts = {column_name(key): len(column.rows) for key, column in self.columns.items()}
        return {**counts, column_name(OTHERS): len(self.others)} if self.others else counts

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

_ARROW = {"float": "float64", "int": "int64", "bool": "bool", "str": "string"}


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
        import pyarrow as pa

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


class Shard:
    """One memory-mapped file; values are looked up in its buffers without building Arrow or Python objects."""

    def __init__(self, path: Path, n_bytes: int, n_structures: int) -> None:
        import pyarrow as pa

        self.path = path
        check_size(path, n_bytes)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.batch = reader.get_batch(0)
            self.batch.validate()
            self.offsets = self.batch.column("positions").offsets.to_numpy()  # (n_structures + 1,)
            pairs = zip(reader.schema, self.batch, strict=True)
            self.columns = [_reader(field.metadata, column) for field, column in pairs]
            if self.batch.num_rows != n_structures:
                raise ValueError("another number of structures")
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path) from error

    def geometry(self, row: int) -> Atoms:
        """The structure without labels and other information."""
        return self.atoms(row, [column for column in self.columns if column[0][0] == "atoms"])

    def atoms(self, row: int, columns: Sequence[tuple[Key, Reader]] | None = None) -> Atoms:
        try:
            return _to_atoms(self._entries(row, self.columns if columns is None else columns))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise _damaged(self.path, row) from error

    def level(self, row: int) -> Any:
        wanted = [column for column in self.columns if column[0] in (LEVEL, OTHERS)]
        return dict(self._entries(row, wanted)).get(LEVEL)

    def n_atoms(self) -> np.ndarray:
        return np.diff(self.offsets) // 3

    @property
    def is_plain(self) -> bool:
        """Whether all values have columns of their own, and none is among the others as JSON."""
        return all(key != OTHERS for key, _ in self.columns)

    def values(self, key: Key, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...] | None]:
        """What these rows have under a key, one behind the other; how many values each has; the shape of one."""
        column = self._column(key, rows)
        name, shape = self._kind(key)
        present = column.is_valid().to_numpy(zero_copy_only=False)
        if shape is None:
            return column.drop_null().to_numpy(zero_copy_only=False), present.astype(int), None
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        return column.flatten().to_numpy(zero_copy_only=False).view(name), lengths, tuple(shape)

    def objects(self, key: Key, rows: np.ndarray) -> list[Any]:
        """What each of these rows has under a key, or None."""
        if key not in self._index:
            return [None] * len(rows)
        if self._kind(key)[1] is not None:  # its shape is not in the column
            read = self.columns[self._index[key]][1]
            return [read(row) for row in rows.tolist()]
        found: list[Any] = self._column(key, rows).to_pylist()
        return found

    def count(self, key: Key, rows: np.ndarray) -> int:
        """How many of these rows have something under a key."""
        return len(rows) - int(self._column(key, rows).null_count) if self._has_nulls(key) else len(rows)

    @cached_property
    def _index(self) -> dict[Key, int]:
        return {key: index for index, (key, _) in enumerate(self.columns)}

    def _has_nulls(self, key: Key) -> bool:
        return bool(self.batch.column(self._index[key]).null_count)

    def _kind(self, key: Key) -> tuple[str, list[int] | None]:
        name, shape = json.loads(self.batch.schema.field(self._index[key]).metadata[b"kind"])
        return name, shape

    def _column(self, key: Key, rows: np.ndarray) -> pa.Array:
        column = self.batch.column(self._index[key])
        consecutive = rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
        return column.slice(rows[0], len(rows)) if consecutive else column.take(rows)

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
    if shape is not None and np.dtype(name).kind not in "biuf":
        raise ValueError(f"{name} is no number")
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
    from pyarrow.types import is_dictionary

    if is_dictionary(column.type):
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
    from pyarrow.types import is_fixed_size_list

    values = column.values.to_numpy().view(name)
    if is_fixed_size_list(column.type):
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


# --- one structure as entries, and back

UNITS = {
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


def to_entries(atoms: Atoms) -> Iterator[tuple[Key, Any]]:
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
    yield from results(atoms)


def results(atoms: Atoms) -> Iterator[tuple[Key, Any]]:
    """The results of a structure's calculator, as entries."""
    found = getattr(atoms.calc, "results", None) or {}
    computed = getattr(atoms.calc, "atoms", None)
    stale = bool(found) and computed is not None and computed != atoms
    yield from ((("calc", key), _Stale() if stale else value) for key, value in found.items())


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
    from ase.constraints import FixConstraint
    from ase.spacegroup import Spacegroup

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
            if np.dtype(dtype).kind not in "biufU":
                raise ValueError(f"{dtype} is no plain type")
            return np.array(values, dtype if np.dtype(dtype).itemsize <= WIDEST else str).reshape(shape)
        case {"@spacegroup": [number, setting]}:
            return _spacegroup(number, setting)
        case {"@constraint": arguments}:
            from ase.constraints import dict2constraint

            return dict2constraint(arguments)
    return found


@lru_cache
def _spacegroup(number: int, setting: int) -> Spacegroup:
    from ase.spacegroup import Spacegroup

    return Spacegroup(number, setting)  # reads a file of ASE, slowly


# --- the file


def check_size(path: Path, n_bytes: int) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing: copy the whole folder again, or pack again")
    if (found := path.stat().st_size) != n_bytes:
        raise InputError(f"{path} has {found} bytes and should have {n_bytes}: copy it again, or pack again")


def _damaged(path: Path, row: int | None = None) -> InputError:
    where = "" if row is None else f" at its structure {row}"
    return InputError(f"{path} is damaged{where}: copy it again, or pack again")


def column_name(key: Key) -> str:
    """The name of a column: `positions`, `info.band_gap`, `arrays.tags`, `calc.energy`; and `level`, `json`."""
    place, name = key
    return name if place in ("atoms", "") or key == LEVEL else f"{place}.{name}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

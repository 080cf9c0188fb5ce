"""Structures on disk, read by memory map: a folder of Arrow shards that hold more than fits into memory."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
from ase import Atoms

from ..console import console, track
from ..errors import InputError
from ..model import UNFINISHED, held, sweep, sync_folder
from ..untrusted import check_kinds
from .labels import Label, Labels
from .provenance import as_text, checked
from .read import stream
from .sequences import Lazy
from .shard import (
    FORMAT,
    LEVEL,
    UNITS,
    VERSION,
    Key,
    Shard,
    ShardWriter,
    check_size,
    column_name,
    results,
    sha256,
    to_entries,
)

HEADER = "transfermium.json"
KINDS = {
    "version": int,
    "n_structures": int,
    "shards": [{"file": str, "n_structures": int, "bytes": int, "sha256": str}],
    "units": {str: str},
    "levels": {str: int},
    "left_out": {str: int},
}

LARGEST_SHARD = 2**28  # bytes held in memory before a shard is written, whatever `shard_size` says
MOST_OPEN = 256  # shards; each holds a file handle


class Geometries(Lazy):
    """The structures of a packed set without labels and other information, which is a third of the work."""

    def __init__(self, structures: PackedSet):
        self.structures = structures

    def __len__(self) -> int:
        return len(self.structures)

    def at(self, index: int) -> Atoms:
        shard, row = self.structures._locate(index)
        return shard.geometry(row)


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
        self._open: dict[int, Shard] = {}

    @classmethod
    def open(cls, path: str | Path) -> PackedSet:
        """Open a folder written by `pack`; InputError when it is none, or a shard is missing or cut short."""
        path = Path(path).absolute()
        header = _read_header(path)
        if header is None:
            raise InputError(f"{path} is not a packed set (no readable {HEADER} in it): write one with `pack`")
        try:
            check_kinds(header, KINDS, HEADER)
        except ValueError as error:
            raise InputError(f"{path} is damaged, {error}: copy it again, or pack again") from None
        if header["version"] > VERSION:
            raise InputError(f"{path} was packed by a newer version: update transfermium, or pack it again")
        counts = [shard["n_structures"] for shard in header["shards"]]
        if min(counts, default=0) < 1 or sum(counts) != header["n_structures"]:
            raise InputError(f"{path} is damaged, its shards do not add up: copy it again, or pack again")
        for shard in header["shards"]:
            file = path / shard["file"]
            if Path(shard["file"]).name != shard["file"] or file.is_symlink():
                raise InputError(f"{path} names {shard['file']}, which does not lie in it: copy the files themselves")
            check_size(file, shard["bytes"])
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

    @property
    def geometries(self) -> Geometries:
        """The same structures without anything else."""
        return Geometries(self)

    @cached_property
    def n_atoms(self) -> np.ndarray:
        """Atoms of each structure, from the offsets alone: (n_structures,)."""
        counts = [self._shard(i).n_atoms() for i in range(len(self.header["shards"]))]
        return np.concatenate(counts)[np.asarray(self.rows, dtype=int)]

    def shards(self) -> Iterator[tuple[Shard, np.ndarray]]:
        """The files with the rows that are wanted of each, in order."""
        starts = np.asarray(self._starts)
        rows = np.asarray(self.rows, dtype=int)
        files = np.searchsorted(starts, rows, "right") - 1
        cuts = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(rows)]
        for begin, end in pairwise(cuts):
            if begin < end:
                i = int(files[begin])
                yield self._shard(i), rows[begin:end] - starts[i]

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
            if sha256(self.path / shard["file"]) != shard["sha256"]:
                raise InputError(f"{self.path / shard['file']} is damaged: copy it again, or pack again")

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedSet, (self.path, self.header, self.rows)

    def __repr__(self) -> str:
        return f"PackedSet({str(self.path)!r}, {len(self)} structures)"

    def _locate(self, index: Any) -> tuple[Shard, int]:
        row = int(self.rows[index])
        shard = bisect_right(self._starts, row) - 1
        return self._shard(shard), row - self._starts[shard]

    def _shard(self, i: int) -> Shard:
        shard = self._open.get(i)
        if shard is None:  # safe in several threads: at worst two of them open it
            while len(self._open) >= MOST_OPEN:
                oldest, *_ = self._open
                self._open.pop(oldest, None)
            entry = self.header["shards"][i]
            shard = self._open[i] = Shard(self.path / entry["file"], entry["bytes"], entry["n_structures"])
        return shard


def pack(
    structures: str | Path | Sequence[str | Path] | Iterable[Atoms],
    out: str | Path,
    *,
    labels: Labels | None = None,
    shard_size: int = 65536,
    level: str | None = None,
    provenance: Mapping[str, str] | None = None,
    progress: bool = True,
) -> PackedSet:
    """Stream structures, or what `read` finds at a path or a list of paths, into Arrow IPC files in the folder `out`.

    `labels` puts labels into their canonical places and units first: what a calculator has besides is kept, but other
    values under a name of the same quantity are left out. `level` is the level of theory of structures whose `info` has
    none under `level`, and `provenance` what else is known of the labels ("functional", "u", "pseudopotentials",
    "code", "corrections") of those that say nothing under `provenance`. Memory holds one shard of `shard_size`
    structures (fewer, if they are large).

    Every shard has its own schema: a stream may bring a new key, or text where there were numbers, after hours, and a
    schema common to all shards would need a second pass or columns without types. Values of one type are one column,
    with nulls where a structure has none; all other values are JSON in the column `json`, and come back all the same.
    What cannot be written at all (an object of some class, results of atoms that have moved since) is left out, counted
    in `left_out` and printed.

    The folder appears complete or not at all; after a kill the same call removes what was left and begins again. A
    folder that already holds these structures is kept and returned; anything else at `out` is an InputError and remains
    untouched.
    """
    out = Path(out).absolute()
    if shard_size < 1:
        raise InputError(f"shard_size is {shard_size}: it must be at least 1")
    usual = {LEVEL: level, ("info", "provenance"): as_text(checked(provenance).get("", {})) or None}
    before = _what_is_there(out)
    source = _structures(structures)
    n_structures = len(source) if isinstance(source, Sized) else None
    if before is not None and n_structures not in (None, len(before)):
        raise _differs(out)

    shown = track(source, "packing", total=n_structures, quiet=not progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out.parent, out.name)
    with _unfinished(out) as partial:
        header = _write_shards(shown, partial, labels, shard_size, usual, before)
        if before is not None:
            if header != before.header:
                raise _differs(out)
            return before
        _write_text(partial / HEADER, json.dumps(header, indent=1, ensure_ascii=False))
        sync_folder(partial)
        partial.rename(out)
    sync_folder(out.parent)

    for what, count in header["left_out"].items() if progress else ():
        console.print(f"left out: {what} of {count} structures", markup=False)
    return PackedSet.open(out)


def is_packed(path: str | Path) -> bool:
    """Whether `pack` wrote this folder."""
    return _read_header(Path(path)) is not None


def _structures(source: Any) -> Iterable[Any]:
    """What to pack; paths are read one structure at a time."""
    several = isinstance(source, list | tuple) and source and all(isinstance(item, str | Path) for item in source)
    return stream(source) if several or isinstance(source, str | Path) else source


def _write_shards(
    structures: Iterable[Any],
    folder: Path,
    labels: Labels | None,
    shard_size: int,
    usual: Mapping[Key, str | None],
    before: PackedSet | None,
) -> dict[str, Any]:
    """Write all shards into `folder` and return the header; stop where they begin to differ from those of `before`."""
    shards: list[dict[str, Any]] = []
    units = _units(labels)
    levels, left_out, columns = Counter[str](), Counter[str](), Counter[str]()
    used: dict[str, str] = {}

    def finish(shard: ShardWriter) -> None:
        entry = shard.write(folder / f"shard-{len(shards):05d}.arrow", units)
        if before is not None:
            if entry not in before.header["shards"][len(shards) : len(shards) + 1]:
                raise _differs(before.path)
            (folder / entry["file"]).unlink()
        shards.append(entry)
        columns.update(shard.counts())
        used.update({column_name(key): units[key] for key in shard.columns if units.get(key)})

    shard = ShardWriter()
    n_structures = 0
    for n_structures, atoms in enumerate(structures, start=1):
        if not isinstance(atoms, Atoms):
            kind = type(atoms).__name__
            raise InputError(f"structure {n_structures - 1} is a {kind}, not an ase.Atoms: pass structures to pack")
        if shard.n == shard_size or shard.bytes >= LARGEST_SHARD:
            finish(shard)
            shard = ShardWriter()
        if labels is None:
            entries = dict(to_entries(atoms))
        else:
            entries, others = _labelled(atoms, labels, f"structure {n_structures - 1}")
            left_out.update(others)
        for key, value in usual.items():
            if value is not None:
                entries.setdefault(key, value)
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


def _labelled(atoms: Atoms, labels: Labels, where: str) -> tuple[dict[Key, Any], list[str]]:
    """Entries of a structure with labels in their places, and what was left out so that they are found there."""
    passed = {at: label.quantity for label in labels.entries for at in label.passed_over(atoms)}
    places = {_place(label) for label in labels.entries}
    taken = {(place, key) for label in labels.entries for place, key, _ in label.keys}
    entries = {
        key: value for key, value in to_entries(labels.apply(atoms, where)) if key not in passed or key in places
    }
    entries |= {key: value for key, value in results(atoms) if key not in passed and key not in taken}
    return entries, [f"{place}[{key!r}] (another {quantity})" for (place, key), quantity in passed.items()]


def _units(labels: Labels | None) -> dict[Key, str]:
    """Units of labels, and those of ASE; where labels are in others, nobody has said what unit further results have."""
    entries = labels.entries if labels else ()
    foreign = any(label.factor != 1 for label in entries)
    units = {key: unit for key, unit in UNITS.items() if not (foreign and key[0] == "calc")}
    return units | {_place(label): label.unit for label in entries}


def _place(label: Label) -> Key:
    return "arrays" if label.per == "atom" else "info", label.quantity


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


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A new hidden folder beside a path, held by this process; another one may sweep it away before it is."""
    with contextlib.ExitStack() as stack:
        ours: bool | None = False
        while ours is False:
            partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}{UNFINISHED}")
            partial.mkdir()
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                ours = stack.enter_context(held(partial))
        yield partial


def _differs(out: Path) -> InputError:
    return InputError(
        f"{out} holds other structures, or was packed with other options: choose another path or remove it"
    )


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())

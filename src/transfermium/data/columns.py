"""Structures as columns: what a whole set is asked for before training, without building each of its structures.

Sets may be larger than memory, so they come in blocks, and what is kept of each structure is a number or two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from ase import Atoms

from .sequences import Joined, Subset

if TYPE_CHECKING:
    from .shard import Shard

LONGEST = 8192  # structures in a block
BITS = 15  # bytes for one bit per element
NOTHING = {"", "nan", "none", "null", "na", "n/a"}  # words that stand for no value

Key = tuple[str, str]  # place ("info", "arrays" or "calc") and name there


@runtime_checkable
class Sharded(Protocol):
    """A packed set."""

    def shards(self) -> Iterator[tuple[Shard, np.ndarray]]:
        """The files with the rows that are wanted of each, in order."""


class Block(Protocol):
    """Some consecutive structures of a sequence."""

    def __len__(self) -> int: ...

    @property
    def n_atoms(self) -> np.ndarray:
        """(n_structures,)."""

    @property
    def numbers(self) -> np.ndarray:
        """Atomic numbers of all atoms, one structure after the other."""

    def structures(self) -> Iterator[Atoms]: ...

    def present(self) -> dict[Key, int]:
        """How many structures have something under each key."""

    def info(self, name: str) -> Sequence[Any]:
        """What each structure has under this name, or None."""

    def plain(self, key: Key) -> Plain | None:
        """What they have under a key as one array; None where it is not of one kind of number."""


class Plain(NamedTuple):
    """Values of several structures, one behind the other."""

    values: np.ndarray  # flat
    counts: np.ndarray  # (n_structures,): how many numbers each structure has, zero where it has none
    shape: tuple[int, ...] | None  # of a value after its first axis; None for single numbers


def blocks(sequence: Iterable[Atoms]) -> Iterator[Block]:
    """All structures in blocks; those of packed sets are read as columns, others are built."""
    if not isinstance(sequence, Sequence):
        yield from (BlockOfAtoms([atoms]) for atoms in sequence)
    elif isinstance(sequence, Joined):
        for part in sequence.parts:
            yield from blocks(part)
    elif isinstance(sequence, Sharded):
        for shard, rows in sequence.shards():
            for start in range(0, len(rows), LONGEST):
                some = rows[start : start + LONGEST]
                yield BlockOfShard(shard, some) if shard.is_plain else BlockOfAtoms([shard.atoms(int(r)) for r in some])
    elif isinstance(sequence, Subset) and isinstance(sequence.structures, Subset | Joined | Sharded):
        yield from _blocks_of_subset(sequence.structures, np.asarray(sequence.indices))
    else:
        few = max(LONGEST // 8, 1)
        for start in range(0, len(sequence), few):
            yield BlockOfAtoms([sequence[i] for i in range(start, min(start + few, len(sequence)))])


def _blocks_of_subset(sequence: Any, indices: np.ndarray) -> Iterator[Block]:
    if isinstance(sequence, Joined):
        parts = np.searchsorted(sequence.ends, indices, "right")
        for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(parts)) + 1):
            if len(run):
                part = int(parts[run[0]])
                yield from blocks(Subset(sequence.parts[part], indices[run] - ([0, *sequence.ends][part])))
    elif isinstance(sequence, Subset):
        yield from blocks(Subset(sequence.structures, np.asarray(sequence.indices)[indices]))
    else:
        yield from blocks(sequence[indices])


class BlockOfAtoms:
    """Structures in memory."""

    def __init__(self, atoms: list[Atoms]):
        self.atoms = atoms

    def __len__(self) -> int:
        return len(self.atoms)

    @property
    def n_atoms(self) -> np.ndarray:
        return np.array([len(atoms) for atoms in self.atoms], int)

    @property
    def numbers(self) -> np.ndarray:
        return np.concatenate([atoms.numbers for atoms in self.atoms])

    def structures(self) -> Iterator[Atoms]:
        return iter(self.atoms)

    def present(self) -> dict[Key, int]:
        places = (
            (place, found)
            for atoms in self.atoms
            for place, found in (("info", atoms.info), ("arrays", atoms.arrays), ("calc", _results(atoms)))
        )
        return Counter((place, name) for place, found in places for name in found if found[name] is not None)

    def info(self, name: str) -> list[Any]:
        return [atoms.info.get(name) for atoms in self.atoms]

    def plain(self, key: Key) -> None:
        return None


class BlockOfShard:
    """Rows of a file of a packed set, read column by column."""

    def __init__(self, shard: Shard, rows: np.ndarray):
        self.shard = shard
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def n_atoms(self) -> np.ndarray:
        return self.shard.n_atoms()[self.rows]

    @property
    def numbers(self) -> np.ndarray:
        return self.shard.values(("atoms", "numbers"), self.rows)[0]

    def structures(self) -> Iterator[Atoms]:
        return (self.shard.atoms(int(row)) for row in self.rows)

    def present(self) -> dict[Key, int]:
        keys = (key for key, _ in self.shard.columns if key[0] != "atoms")
        return {key: n for key in keys if (n := self.shard.count(key, self.rows))}

    def info(self, name: str) -> Sequence[Any]:
        return self.shard.objects(("info", name), self.rows)

    def plain(self, key: Key) -> Plain | None:
        values, counts, shape = self.shard.values(key, self.rows)
        return Plain(values, counts, shape) if values.dtype.kind in "iuf" else None


def isolated_atoms(structures: Sequence[Atoms]) -> list[int]:
    """Indices of the lone atoms that are marked `config_type=IsolatedAtom`."""
    found: list[int] = []
    start = 0
    for block in blocks(structures):
        alone = np.flatnonzero(block.n_atoms == 1)
        if len(alone):
            marks = block.info("config_type")
            found += [start + i for i in alone.tolist() if str(marks[i]).lower() == "isolatedatom"]
        start += len(block)
    return found


def elements(structures: Sequence[Atoms]) -> np.ndarray:
    """Which elements each structure has, as packed bits: (n_structures, BITS)."""
    return _each(structures, BITS, np.uint8, lambda block: np.packbits(counts_of(block) > 0, axis=1))


def listed(bits: np.ndarray) -> frozenset[int]:
    """The atomic numbers of any of these packed bits."""
    return frozenset(np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(np.atleast_2d(bits), axis=0))).tolist())


def counts_of(block: Block) -> np.ndarray:
    """Atoms of each element in each structure: (n_structures, 8 BITS)."""
    owners = np.repeat(np.arange(len(block)), block.n_atoms)
    n = 8 * BITS
    return np.bincount(owners * n + block.numbers, minlength=len(block) * n).reshape(-1, n)


def count_elements(structures: Sequence[Atoms]) -> np.ndarray:
    """Atoms of each element in all structures together."""
    total = np.zeros(8 * BITS, int)
    for block in blocks(structures):
        total += np.bincount(block.numbers, minlength=8 * BITS)
    return total


def has(structures: Sequence[Atoms], keys: set[Key]) -> np.ndarray:
    """Whether each structure has something that is not all NaN under at least one of these keys: (n_structures,)."""

    def present(block: Block) -> np.ndarray:
        found = np.zeros(len(block), bool)
        for key in keys & block.present().keys():
            plain = block.plain(key)
            if plain is None:
                return np.array([_has(atoms, keys) for atoms in block.structures()])
            owners = np.repeat(np.arange(len(block)), plain.counts)
            found[owners[~np.isnan(plain.values)]] = True
        return found

    return _each(structures, 0, np.bool_, present)


def codes(structures: Sequence[Atoms], name: str, word: Callable[[Any], str]) -> tuple[np.ndarray, list[Any]]:
    """Values of info as numbers, equal where they are the same word and -1 where there is none, and the values."""
    numbers: dict[str, int] = {}
    values: list[Any] = []

    def coded(value: Any) -> int:
        if value is None:
            return -1
        number = numbers.setdefault(word(value), len(values))
        if number == len(values):
            values.append(value)
        return number

    found = _each(structures, 0, np.int64, lambda block: np.array([coded(value) for value in block.info(name)]))
    return found, values


def info_names(structures: Sequence[Atoms]) -> set[str]:
    """All names in the info of the structures."""
    return {name for block in blocks(structures) for place, name in block.present() if place == "info"}


def _has(atoms: Atoms, keys: set[Key]) -> bool:
    places = {"info": atoms.info, "arrays": atoms.arrays, "calc": _results(atoms)}
    return any(not is_missing(places[place].get(name)) for place, name in keys)


def is_missing(raw: Any, nan: bool = True) -> bool:
    """Whether a value stands for none; NaN does, but where `nan` is False, because there it is a mistake."""
    if raw is None or isinstance(raw, str):
        return raw is None or raw.strip().lower() in NOTHING
    if not nan:
        return False
    try:
        return bool(np.isnan(np.asarray(raw, dtype=float)).all())
    except (TypeError, ValueError):
        return False


def _results(atoms: Atoms) -> dict[str, Any]:
    return atoms.calc.results if atoms.calc is not None else {}


def _each(structures: Sequence[Atoms], width: int, dtype: Any, work: Callable[[Block], np.ndarray]) -> np.ndarray:
    """Rows of all blocks one below the other, without a second copy of them."""
    result = np.empty((len(structures), width) if width else len(structures), dtype)
    start = 0
    for block in blocks(structures):
        result[start : start + len(block)] = work(block)
        start += len(block)
    return result

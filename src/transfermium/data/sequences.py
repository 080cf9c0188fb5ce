"""Sequences of structures that fetch them only when asked: joined, picked out, sliced."""

import operator
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import SupportsIndex, overload

import numpy as np
from ase import Atoms

MEMORY = "memory"  # name of structures that come from no file


class Lazy(Sequence[Atoms]):
    """A sequence that builds a structure on access; slices stay lazy, numpy integers are welcome."""

    @abstractmethod
    def at(self, index: int) -> Atoms:
        """Return the structure at `index`, which lies in 0...len-1."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Atoms: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Atoms]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Atoms | Sequence[Atoms]:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])

        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"structure {i} of {len(self)}")
        return self.at(i % len(self))


class Joined(Lazy):
    """Several sequences of structures, one after the other; `names` tells where each came from."""

    def __init__(self, parts: Sequence[Sequence[Atoms]], names: Sequence[str] = ()):
        self.parts = parts
        self.names = names
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def at(self, index: int) -> Atoms:
        part = bisect_right(self.ends, index)
        return self.parts[part][index - self.ends[part]]  # counted from the end of the part

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {len(part)}" for name, part in zip(self.names, self.parts, strict=False))
        return f"<{len(self)} structures in {len(self.parts)} parts{'; ' if sizes else ''}{sizes}>"


class Subset(Lazy):
    """Some structures of a sequence, in the order of `indices`."""

    def __init__(self, structures: Sequence[Atoms], indices: Iterable[SupportsIndex]):
        self.structures = structures
        self.indices = indices if isinstance(indices, range) else _integers(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, index: int) -> Atoms:
        return self.structures[int(self.indices[index])]


def _integers(indices: Iterable[SupportsIndex]) -> np.ndarray:
    if isinstance(indices, np.ndarray) and indices.dtype.kind in "iu":
        return indices.astype(np.int64, copy=False)
    return np.array([operator.index(i) for i in indices], np.int64)


def original(structures: Sequence[Atoms], index: int) -> int:
    """The index that a structure has in the innermost sequence, below all subsets and labels: for error messages."""
    while (below := getattr(structures, "structures", None)) is not None:
        if isinstance(structures, Subset):
            index = int(structures.indices[index])
        structures = below
    return index


def spoken(structures: Iterable[Atoms], index: int) -> str:
    """What error messages call a structure: by its index, of several files by that within its own."""
    name = ""
    while not isinstance(structures, list):
        if isinstance(structures, Joined):
            part = bisect_right(structures.ends, index)
            name = structures.names[part] if structures.names else name
            index -= structures.ends[part] - len(structures.parts[part])
            structures = structures.parts[part]
        elif (below := getattr(structures, "structures", None)) is not None:
            index = int(structures.indices[index]) if isinstance(structures, Subset) else index
            structures = below
        else:
            break
    return f"{name}: structure {index}" if name not in ("", MEMORY) else f"structure {index}"

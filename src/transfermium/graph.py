"""Structures as graphs: `ase.Atoms` to `Sample` to `Batch`, with neighbours found by vesin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident
from typing import Any, NamedTuple

import ase
import numpy as np
import torch
from torch import Tensor
from vesin import NeighborList

from .errors import InputError

LARGEST_EXTENT = 1e4  # Å; neighbour searches over larger boxes can exhaust memory
LARGE = 5_000  # atoms; the memory of searches in larger structures is given back
SHORTEST_DISTANCE = 1e-3  # Å; directions between closer atoms are noise
LEAST_ROOM = 0.1  # Å^3 per atom (also Å or Å^2 of a wire or slab); less is no matter, and has neighbours without end
FIRST_LOOK = 1.65  # Å times the cube root of twice the atoms wanted: a ball that holds them in most solids


class Neighbors(NamedTuple):
    """The directed edges of one structure."""

    receivers: np.ndarray  # (n_edges,), sorted
    senders: np.ndarray  # (n_edges,)
    shifts: np.ndarray  # (n_edges, 3), whole cells between the receiver and the image of the sender
    shells: np.ndarray = np.zeros(0, np.uint8)  # (n_edges,), as in a graph

    @property
    def bytes(self) -> int:
        return sum(array.nbytes for array in self)

    def compact(self) -> Neighbors:
        """The same in the smallest types of integers that hold them: 5 bytes an edge in most structures."""
        last = int(self.senders.max(initial=0))
        small = np.abs(self.shifts).max(initial=0) < 128
        index, shift = np.min_scalar_type(last), np.int8 if small else self.shifts.dtype
        shells = self.shells.astype(np.min_scalar_type(int(self.shells.max(initial=0))))
        return Neighbors(self.receivers.astype(index), self.senders.astype(index), self.shifts.astype(shift), shells)

    def lengths(self, atoms: ase.Atoms) -> np.ndarray:
        """Of the edges, in Å: (n_edges,)."""
        images = self.shifts @ np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)
        vectors: np.ndarray = atoms.positions[self.senders] - atoms.positions[self.receivers] + images
        return np.linalg.norm(vectors, axis=1)


class AtomGraph(NamedTuple):
    """Structures side by side in one graph; one structure is a batch of one."""

    positions: Tensor  # (n_atoms, 3), Å
    atomic_numbers: Tensor  # (n_atoms,)
    cell: Tensor  # (n_systems, 3, 3), Å, rows; a direction that is not periodic is zero
    system_idx: Tensor  # (n_atoms,)
    senders: Tensor  # (n_edges,)
    receivers: Tensor  # (n_edges,), sorted
    cell_shifts: Tensor  # (n_edges, 3), whole cells between the receiver and the image of the sender
    shells: Tensor  # (n_edges,), which shell of the receiver, 1 is the nearest; empty where edges have a cutoff
    inputs: dict[str, Tensor]  # name -> (n_atoms, k), what the model is told beside the structure

    @property
    def n_systems(self) -> int:
        return self.cell.shape[0]

    @property
    def n_atoms(self) -> int:
        return self.positions.shape[0]

    @property
    def n_edges(self) -> int:
        return self.senders.shape[0]

    def edge_vectors(self) -> Tensor:
        """Vectors from each receiver to its neighbour, in Å: (n_edges, 3)."""
        cells = self.cell.index_select(0, self.system_idx.index_select(0, self.receivers))  # (n_edges, 3, 3)
        images = (self.cell_shifts.unsqueeze(1) @ cells).squeeze(1)
        return self.positions.index_select(0, self.senders) - self.positions.index_select(0, self.receivers) + images

    def sum_over_neighbors(self, messages: Tensor) -> Tensor:
        """Sum what arrives at each atom: (n_edges, ...) to (n_atoms, ...)."""
        total = messages.new_zeros((self.n_atoms, *messages.shape[1:]))
        return total.index_add(0, self.receivers, messages)

    def sum_over_systems(self, per_atom: Tensor) -> Tensor:
        """Sum over the atoms of each structure: (n_atoms, ...) to (n_systems, ...)."""
        total = per_atom.new_zeros((self.n_systems, *per_atom.shape[1:]))
        return total.index_add(0, self.system_idx, per_atom)

    def atoms_per_system(self) -> Tensor:
        return self.sum_over_systems(torch.ones_like(self.system_idx))  # a bincount would wait for the GPU

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> AtomGraph:
        """Move to a device and, when asked, to another floating-point type."""

        to_gpu = torch.device(device).type == "cuda"  # the only direction in which nobody reads a copy too early

        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() else None, non_blocking=to_gpu)

        return self.each(move)

    def each(self, change: Callable[[Tensor], Tensor]) -> AtomGraph:
        """The same graph with every tensor changed."""
        changed = {name: change(x) for name, x in self._asdict().items() if name != "inputs"}
        return AtomGraph(**changed, inputs={name: change(x) for name, x in self.inputs.items()})


class Sample(NamedTuple):
    """One structure as an objective wants it seen, with what is to be learned from it."""

    atoms: ase.Atoms
    targets: dict[str, np.ndarray]  # leading axis: 1 (per structure) or n_atoms; NaN where there is no label
    inputs: Mapping[str, np.ndarray] = {}  # leading axis likewise; in both, rows of 3 are vectors, of 3×3 tensors


class Batch(NamedTuple):
    """Samples side by side: a graph and targets whose leading axis is systems or atoms."""

    graph: AtomGraph
    targets: dict[str, Tensor]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move to a device; `dtype` is for the graph, targets keep their precision."""
        to_gpu = torch.device(device).type == "cuda"
        targets = {name: t.to(device, non_blocking=to_gpu) for name, t in self.targets.items()}
        return Batch(self.graph.to(device, dtype), targets)

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU fetches while others work."""
        return Batch(self.graph.each(Tensor.pin_memory), {name: t.pin_memory() for name, t in self.targets.items()})


@dataclass(frozen=True)
class Cutoff:
    """Neighbours are all atoms, and all periodic images, within `radius` Å."""

    radius: float

    def __post_init__(self) -> None:
        if not 0 < self.radius < 100:
            raise InputError(f"a cutoff of {self.radius} Å makes no sense: choose one between 3 and 12 Å")

    def search(self, skin: float = 0.0) -> NeighborList:
        """A search to be kept between calls of `neighbors`, for structures that follow each other in small steps.

        It looks `skin` Å further, and finds pairs anew only when an atom has moved by half of that, or when the number
        of atoms, the cell or its periodicity has changed; the neighbours are those of a fresh search.
        """
        return NeighborList(cutoff=self.radius, full_list=True, skin=skin, n_threads=1)

    def neighbors(self, atoms: ase.Atoms, search: NeighborList | None = None) -> Neighbors:
        """All directed edges of one structure.

        Raises `InputError` for structures in which no neighbours can be searched.
        """
        if len(atoms) == 0:
            return Neighbors(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3), np.int32))
        cell = _checked_cell(atoms)
        if search is None:
            search = _own_search(self, get_ident()) if len(atoms) < LARGE else self.search()
        pairs, shifts, distances = search.compute(atoms.positions, cell, atoms.pbc, quantities="PSd", copy=False)
        if distances.min(initial=np.inf) < SHORTEST_DISTANCE:
            raise InputError(f"{atoms.get_chemical_formula()} has two atoms at the same place: remove one of them")
        order = np.argsort(
            pairs[:, 0].astype(np.min_scalar_type(len(atoms))), kind="stable"
        )  # small integers sort fast
        pairs = pairs.take(order, axis=0).view(np.int64)
        return Neighbors(pairs[:, 0], pairs[:, 1], shifts.take(order, axis=0))

    def envelope(self, lengths: Tensor) -> Tensor:
        """Fall from one to zero at the cutoff, with two continuous derivatives: (n_edges,)."""
        x = (lengths / self.radius).clamp(max=1.0)
        return 1 - x**6 * (28 - 48 * x + 21 * x**2)


@dataclass(frozen=True)
class Shells:
    """Neighbours are the nearest whole shells of atoms, counted from 1; how far away they are does not matter.

    A shell ends where the next atom is more than `tolerance` further away. The first one is kept whatever its size, the
    others as long as there are at most `most` neighbours in all. An atom may have a neighbour that does not have it.

    Args:
        most: neighbours of an atom.
        radius: in Å, of the sphere in which they are looked for.
        tolerance: in Å.
        whole: otherwise exactly the nearest `most` are kept; which atoms of the last shell these are is up to rounding.
    """

    most: int = 24
    radius: float = 18.0
    tolerance: float = 1e-2
    whole: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.most <= 1000:
            raise InputError(f"{self.most} neighbours make no sense: choose between 12 and 48")
        if not 0 < self.radius < 100:
            raise InputError(f"a radius of {self.radius} Å makes no sense: choose one between 6 and 18 Å")
        if not 0 <= self.tolerance <= 1:
            raise InputError(f"a tolerance of {self.tolerance} Å makes no sense: choose one below 0.1 Å")

    def search(self, skin: float = 0.0) -> NeighborList:
        """A search to be kept between calls of `neighbors`; see `Cutoff.search`."""
        return Cutoff(self.radius).search(skin)

    def neighbors(self, atoms: ase.Atoms, search: NeighborList | None = None) -> Neighbors:
        """All directed edges of one structure, with their shells.

        Raises `InputError` for structures in which no neighbours can be searched.
        """
        radius = self.radius if search is not None else min(FIRST_LOOK * (2 * self.most) ** (1 / 3), self.radius)
        while True:  # nearly always a small sphere tells; the whole one can have a hundred times as many atoms
            found, complete = self._nearest(atoms, Cutoff(radius).neighbors(atoms, search))
            if complete or radius == self.radius:
                return found
            radius = min(1.5 * radius, self.radius)

    def envelope(self, lengths: Tensor) -> Tensor:
        """Weights of bonds for heads that look at them: (n_edges,)."""
        return Cutoff(self.radius).envelope(lengths)

    def _nearest(self, atoms: ase.Atoms, found: Neighbors) -> tuple[Neighbors, bool]:
        """The nearest shells of what was found, and whether atoms further away could not change them."""
        lengths = found.lengths(atoms)
        order = np.lexsort((lengths, found.receivers))
        receivers, lengths = found.receivers[order], lengths[order]
        first = np.searchsorted(receivers, receivers)  # (n_edges,), where the edges of the receiver begin
        rank = np.arange(len(order)) - first
        begins = (np.diff(lengths, prepend=0.0) > self.tolerance) | (rank == 0)
        total = np.cumsum(begins)  # of all shells up to here
        shells = total - total[first] + 1

        last = np.searchsorted(total, total, side="right") - 1 - first  # (n_edges,), rank of the last of the shell
        kept = (last < self.most) | (shells == 1) if self.whole else rank < self.most
        beyond = (rank >= self.most) & (shells > 1)
        complete = len(np.unique(receivers[beyond])) == len(atoms)
        chosen = order[kept]
        nearest = Neighbors(receivers[kept], found.senders[chosen], found.shifts[chosen], shells[kept])
        return nearest, complete


@lru_cache(maxsize=16)
def _own_search(edges: Cutoff, thread: int) -> NeighborList:
    """A search of one thread, kept with its memory: to allocate it each time costs a tenth of the search."""
    return edges.search()


def to_graph(
    structures: Sequence[ase.Atoms],
    edges: Cutoff | Shells,
    inputs: Sequence[Mapping[str, np.ndarray]] = (),
    known: Sequence[Neighbors] = (),
) -> AtomGraph:
    """Find all neighbours and put the structures side by side in one graph, in double precision.

    `known` are the neighbours of each structure, where they need not be searched.
    """
    found = known or [edges.neighbors(atoms) for atoms in structures]
    n_edges = sum(len(one.senders) for one in found)
    senders, receivers, shifts = np.empty(n_edges, np.int64), np.empty(n_edges, np.int64), np.empty((n_edges, 3))
    first_atom = first_edge = 0
    for atoms, one in zip(structures, found, strict=True):
        own = slice(first_edge, first_edge + len(one.senders))
        np.add(one.senders, np.int64(first_atom), out=senders[own])
        np.add(one.receivers, np.int64(first_atom), out=receivers[own])
        shifts[own] = one.shifts
        first_atom += len(atoms)
        first_edge = own.stop

    counts = [len(atoms) for atoms in structures]
    cells = [np.where(atoms.pbc[:, None], atoms.cell.array, 0.0) for atoms in structures]
    return AtomGraph(
        positions=_real(np.concatenate([atoms.positions for atoms in structures])),
        atomic_numbers=torch.from_numpy(np.concatenate([atoms.numbers for atoms in structures]).astype(np.int64)),
        cell=_real(np.stack(cells)),
        system_idx=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        senders=torch.from_numpy(senders),
        receivers=torch.from_numpy(receivers),
        cell_shifts=torch.from_numpy(shifts),
        shells=torch.from_numpy(np.concatenate([one.shells for one in found]).astype(np.int64)),
        inputs=_joined_inputs(inputs, counts),
    )


def to_batch(samples: Sequence[Sample], edges: Cutoff | Shells, known: Sequence[Neighbors] = ()) -> Batch:
    """Put samples side by side; what is to be learned stays in double precision."""
    graph = to_graph([s.atoms for s in samples], edges, [s.inputs for s in samples], known)
    names = samples[0].targets
    targets = {name: torch.from_numpy(np.concatenate([s.targets[name] for s in samples])) for name in names}
    return Batch(graph, targets)


def is_isolated_atom(atoms: ase.Atoms) -> bool:
    """Whether a structure is a lone atom marked `config_type=IsolatedAtom`: a reference energy of its element."""
    return len(atoms) == 1 and str(atoms.info.get("config_type", "")).lower() == "isolatedatom"


def _checked_cell(atoms: ase.Atoms) -> np.ndarray:
    """The cell, with zeros where it is not periodic, of a structure whose neighbours can be searched."""
    cell = np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)
    fits = atoms.positions.max() - atoms.positions.min() < LARGEST_EXTENT and np.abs(cell).max() < LARGEST_EXTENT / 2
    if fits and (np.linalg.det(cell) > LEAST_ROOM * len(atoms) or not atoms.pbc.any()):
        return cell  # nearly all: the rest takes a closer look

    positions, axes, name = atoms.positions, cell[atoms.pbc], atoms.get_chemical_formula()
    if not np.isfinite(positions).all():
        raise InputError(f"{name} has positions that are not finite numbers: remove or repair this structure")
    if np.ptp(positions, axis=0).max() > LARGEST_EXTENT:
        raise InputError(f"{name} is larger than {LARGEST_EXTENT:.0f} Å: are its positions in Å?")
    if not np.isfinite(axes).all() or np.linalg.matrix_rank(axes, tol=1e-8) < len(axes):
        raise InputError(f"{name} is periodic but its cell has no volume: set pbc to False or give a cell")
    if np.linalg.norm(axes, axis=1).max(initial=0.0) > LARGEST_EXTENT:
        raise InputError(f"{name} has a cell longer than {LARGEST_EXTENT:.0f} Å: is it in Å?")
    room = np.sqrt(np.linalg.det(axes @ axes.T))  # length, area or volume
    if room < LEAST_ROOM * (len(atoms) if len(axes) == 3 else 1):
        unit = ("Å", "Å^2", "Å^3")[len(axes) - 1]
        raise InputError(f"{name} has a cell of {room:.2g} {unit}, too small for its atoms: is it in Å?")
    return cell


def _joined_inputs(inputs: Sequence[Mapping[str, np.ndarray]], counts: Sequence[int]) -> dict[str, Tensor]:
    """Per-structure values are given to each atom: (n_atoms, k) for every name."""
    names = inputs[0] if inputs else ()
    joined = {}
    for name in names:
        values = [np.asarray(one[name], float) for one in inputs]
        columns = [v.reshape(len(v), int(np.prod(v.shape[1:]))) for v in values]
        full = [np.broadcast_to(v, (n, v.shape[1])) for v, n in zip(columns, counts, strict=True)]
        joined[name] = _real(np.concatenate(full))
    return joined


def _real(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, float))

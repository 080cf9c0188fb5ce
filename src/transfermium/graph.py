"""Structures as graphs: `ase.Atoms` to `Sample` to `Batch`, with neighbours found by vesin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ase
import numpy as np
import torch
from torch import Tensor
from vesin import NeighborList

from .errors import InputError

LARGEST_EXTENT = 1e4  # Å; neighbour searches over larger boxes can exhaust memory
SHORTEST_DISTANCE = 1e-3  # Å; directions between closer atoms are noise


class AtomGraph(NamedTuple):
    """Structures side by side in one graph; one structure is a batch of one."""

    positions: Tensor  # (n_atoms, 3), Å
    atomic_numbers: Tensor  # (n_atoms,)
    cell: Tensor  # (n_systems, 3, 3), Å, rows; a direction that is not periodic is zero
    system_idx: Tensor  # (n_atoms,)
    senders: Tensor  # (n_edges,)
    receivers: Tensor  # (n_edges,), sorted
    cell_shifts: Tensor  # (n_edges, 3), whole cells between the receiver and the image of the sender
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
        return torch.bincount(self.system_idx, minlength=self.n_systems)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> AtomGraph:
        """Move to a device and, when asked, to another floating-point type."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() else None)

        moved = {name: move(x) for name, x in self._asdict().items() if name != "inputs"}
        return AtomGraph(**moved, inputs={name: move(x) for name, x in self.inputs.items()})


class Sample(NamedTuple):
    """One structure as an objective wants it seen, with what is to be learned from it."""

    atoms: ase.Atoms
    targets: dict[str, np.ndarray]  # leading axis: 1 (per structure) or n_atoms; NaN where there is no label
    inputs: Mapping[str, np.ndarray] = {}  # leading axis likewise


class Batch(NamedTuple):
    """Samples side by side: a graph and targets whose leading axis is systems or atoms."""

    graph: AtomGraph
    targets: dict[str, Tensor]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Move to a device; `dtype` is for the graph, targets keep their precision."""
        return Batch(self.graph.to(device, dtype), {name: t.to(device) for name, t in self.targets.items()})


@dataclass(frozen=True)
class Cutoff:
    """Neighbours are all atoms, and all periodic images, within `radius` Å."""

    radius: float

    def __post_init__(self) -> None:
        if not 0 < self.radius < 100:
            raise InputError(f"a cutoff of {self.radius} Å makes no sense: choose one between 3 and 12 Å")

    def neighbors(self, atoms: ase.Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Receivers (sorted), senders, and cell shifts of all directed edges of one structure.

        Raises `InputError` for structures in which no neighbours can be searched.
        """
        if len(atoms) == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3))
        positions, cell, periodic = _checked(atoms)
        search = NeighborList(cutoff=self.radius, full_list=True)
        i, j, shifts, d = search.compute(points=positions, box=cell, periodic=periodic, quantities="ijSd")
        if len(d) and d.min() < SHORTEST_DISTANCE:
            raise InputError(f"{atoms.get_chemical_formula()} has two atoms at the same place: remove one of them")
        order = np.argsort(i, kind="stable")
        return i[order].astype(np.int64), j[order].astype(np.int64), shifts[order].astype(np.float64)

    def envelope(self, lengths: Tensor) -> Tensor:
        """Fall from one to zero at the cutoff, with two continuous derivatives: (n_edges,)."""
        x = (lengths / self.radius).clamp(max=1.0)
        return 1 - x**6 * (28 - 48 * x + 21 * x**2)


def to_graph(
    structures: Sequence[ase.Atoms], edges: Cutoff, inputs: Sequence[Mapping[str, np.ndarray]] = ()
) -> AtomGraph:
    """Find all neighbours and put the structures side by side in one graph, in double precision."""
    receivers, senders, shifts = [], [], []
    start = 0
    for atoms in structures:
        i, j, s = edges.neighbors(atoms)
        receivers.append(i + start)
        senders.append(j + start)
        shifts.append(s)
        start += len(atoms)

    counts = [len(atoms) for atoms in structures]
    cells = [np.where(atoms.pbc[:, None], atoms.cell.array, 0.0) for atoms in structures]
    return AtomGraph(
        positions=_real(np.concatenate([atoms.positions for atoms in structures])),
        atomic_numbers=torch.from_numpy(np.concatenate([atoms.numbers for atoms in structures]).astype(np.int64)),
        cell=_real(np.stack(cells)),
        system_idx=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        senders=torch.from_numpy(np.concatenate(senders)),
        receivers=torch.from_numpy(np.concatenate(receivers)),
        cell_shifts=_real(np.concatenate(shifts)),
        inputs=_joined_inputs(inputs, counts),
    )


def to_batch(samples: Sequence[Sample], edges: Cutoff) -> Batch:
    """Put samples side by side; what is to be learned stays in double precision."""
    graph = to_graph([s.atoms for s in samples], edges, [s.inputs for s in samples])
    names = samples[0].targets
    targets = {name: torch.from_numpy(np.concatenate([s.targets[name] for s in samples])) for name in names}
    return Batch(graph, targets)


def is_isolated_atom(atoms: ase.Atoms) -> bool:
    """Whether a structure is a lone atom marked `config_type=IsolatedAtom`: a reference energy of its element."""
    return len(atoms) == 1 and str(atoms.info.get("config_type", "")).lower() == "isolatedatom"


def _checked(atoms: ase.Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    positions, periodic = atoms.positions, atoms.pbc
    name = atoms.get_chemical_formula()
    if not np.isfinite(positions).all():
        raise InputError(f"{name} has positions that are not finite numbers: remove or repair this structure")
    if np.ptp(positions, axis=0).max() > LARGEST_EXTENT:
        raise InputError(f"{name} is larger than {LARGEST_EXTENT:.0f} Å: are its positions in Å?")

    cell = np.where(periodic[:, None], atoms.cell.array, 0.0)
    if periodic.any():
        axes = cell[periodic]
        if not np.isfinite(axes).all() or np.linalg.matrix_rank(axes, tol=1e-8) < len(axes):
            raise InputError(f"{name} is periodic but its cell has no volume: set pbc to False or give a cell")
        if np.linalg.norm(axes, axis=1).max() > LARGEST_EXTENT:
            raise InputError(f"{name} has a cell longer than {LARGEST_EXTENT:.0f} Å: is it in Å?")
    return positions, cell, periodic


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

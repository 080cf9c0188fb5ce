"""From structures to batches: which ones, in which order, with which noise."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import tee
from typing import NamedTuple

import ase
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..errors import InputError
from ..graph import Batch, Cutoff, Neighbors, Sample, Shells, to_batch
from ..objectives import Objective
from .sequences import spoken

TRAINING, VALIDATION, CALIBRATION = 0, 1, 2  # kinds of random numbers
MEMORY = 256_000_000  # bytes of neighbours that are kept of a set for the next epochs: 50 million edges
OVERHEAD = 500  # bytes of Python objects for each structure

Place = tuple[int, int]  # an epoch, and how many of its structures have been dealt


def rng_of(seed: int, kind: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers that depend on these four and on nothing else: not on the worker, the process or the order."""
    return np.random.default_rng((seed, kind, epoch, index))


def count_edges(
    structures: Sequence[ase.Atoms],
    edges: Cutoff | Shells,
    seen: Callable[[int], None] = lambda done: None,
    keep: Callable[[int, ase.Atoms, Neighbors], None] = lambda index, atoms, neighbors: None,
) -> np.ndarray:
    """Number of edges of each structure as it is, without noise; `seen` hears how many are done.

    `keep` gets what was found, such as `Batches.keep` to need no second search.
    """
    counts = np.zeros(len(structures), int)
    for index in range(len(structures)):
        atoms = structures[index]
        try:
            neighbors = edges.neighbors(atoms)
        except InputError as error:
            raise InputError(f"{spoken(structures, index)}: {error}") from None
        counts[index] = len(neighbors.senders)
        keep(index, atoms, neighbors)
        seen(index + 1)
    return counts


def plan(counts: np.ndarray, budget: int, order: np.ndarray) -> list[np.ndarray]:
    """Cut an order of structures into batches of at most `budget` edges; a larger structure is a batch of its own."""
    return [members for (members,) in steps(counts, budget, order)]


def steps(counts: np.ndarray, budget: int, order: np.ndarray, parts: int = 1) -> Iterator[list[np.ndarray]]:
    """Cut an order of structures into steps, each of `parts` batches of at most `budget` edges and of like size.

    A step takes as many structures as come next in the order and fit. A structure larger than the budget is a batch of
    its own; so a step of few structures has batches without any.
    """
    start, window = 0, 64
    while start < len(order):
        sizes = np.maximum(counts[order[start : start + window]], 1)
        n = int(np.searchsorted(np.cumsum(sizes), parts * budget, "right"))
        if n == len(sizes) and start + n < len(order):  # more might fit
            window *= 2
            continue
        n = max(n, 1)
        lots = deal(sizes[:n], parts)
        while overfull := sum(len(lot) > 1 and int(sizes[lot].sum()) > budget for lot in lots):
            n -= overfull
            lots = deal(sizes[:n], parts)
        yield [order[start + lot] for lot in lots]
        start += n


def deal(sizes: np.ndarray, parts: int) -> list[np.ndarray]:
    """Indices of `sizes` in `parts` lots of nearly equal sums: the largest first, each to the smallest lot so far."""
    if parts == 1:
        return [np.arange(len(sizes))]
    lots: list[list[int]] = [[] for _ in range(parts)]
    sums = [(0, number) for number in range(parts)]  # a heap
    for index in np.argsort(-sizes, kind="stable").tolist():
        total, number = sums[0]
        lots[number].append(index)
        heapq.heapreplace(sums, (total + int(sizes[index]), number))
    return [np.array(sorted(lot), int) for lot in lots]


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A matrix that turns columns, every rotation being as likely as any other: (3, 3)."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.linalg.det(q)  # rather than its mirror image


def turned(sample: Sample, rotation: np.ndarray) -> Sample:
    """The sample in another orientation, with its inputs and targets: rows of 3 are vectors, of 3×3 tensors."""
    atoms = sample.atoms
    positions, cell = atoms.positions @ rotation.T, atoms.cell.array @ rotation.T
    return Sample(
        ase.Atoms(atoms.numbers, positions, cell=cell, pbc=atoms.pbc),
        {name: turned_rows(values, rotation) for name, values in sample.targets.items()},
        {name: turned_rows(values, rotation) for name, values in sample.inputs.items()},
    )


def turned_rows(values: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Rows of 3 numbers as vectors, of 3×3 as tensors, all others as they are."""
    if values.shape[1:] == (3, 3):
        return rotation @ values @ rotation.T
    return values @ rotation.T if values.shape[1:] == (3,) else values


class Kept(NamedTuple):
    """Neighbours found before."""

    geometry: int  # what they were found in
    neighbors: Neighbors
    bytes: int  # taken from the memory for all of them


class Batches(Dataset[Batch]):
    """Batches of a set of structures, addressed by (epoch, members): the same address is always the same batch.

    Neighbours of structures whose atoms the objective leaves in place are kept until their geometry changes, in at most
    `memory` bytes; batches are the same without.

    With `turning`, which is for backbones that obey no rotation, each structure is turned as a whole at every access,
    about a random axis by a random angle, with all that is to be learned of it.
    """

    def __init__(
        self,
        structures: Sequence[ase.Atoms],
        objective: Objective,
        edges: Cutoff | Shells,
        seed: int,
        kind: int = TRAINING,
        memory: int = MEMORY,
        turning: bool = False,
    ):
        self.structures = structures
        self.objective = objective
        self.edges = edges
        self.seed = seed
        self.kind = kind
        self.memory = memory
        self.turning = turning
        self.kept: dict[int, Kept] = {}

    def __getitem__(self, address: tuple[int, np.ndarray]) -> Batch:
        epoch, members = address
        samples, neighbors = [], []
        for index in map(int, members):
            atoms = self.structures[index]
            rng = rng_of(self.seed, self.kind, epoch, index)
            sample = self.objective.prepare(atoms, rng)
            still = _in_place(sample.atoms, atoms)
            neighbors.append(self._neighbors(index, atoms) if still else self.edges.neighbors(sample.atoms))
            samples.append(turned(sample, random_rotation(rng)) if self.turning else sample)  # it keeps its neighbours
        return to_batch(samples, self.edges, neighbors)

    def _neighbors(self, index: int, atoms: ase.Atoms) -> Neighbors:
        """Those of a structure as it is; a sequence may change it between epochs."""
        kept = self.kept.get(index)
        if kept is not None and kept.geometry == _geometry(atoms):
            return kept.neighbors
        found = self.edges.neighbors(atoms)
        self.keep(index, atoms, found)
        return found

    def keep(self, index: int, atoms: ase.Atoms, neighbors: Neighbors) -> None:
        """Remember the neighbours of a structure as it is, where they will serve again and there is room."""
        if not self._leaves_atoms:
            return
        if index in self.kept:
            self.memory += self.kept.pop(index).bytes
        compact = neighbors.compact()
        worker = get_worker_info()
        size = (compact.bytes + OVERHEAD) * (worker.num_workers if worker else 1)  # each worker has its own
        if size <= self.memory:
            self.kept[index] = Kept(_geometry(atoms), compact, size)
            self.memory -= size

    @cached_property
    def _leaves_atoms(self) -> bool:
        """Whether the objective leaves atoms in place, judged by the first structure."""
        atoms = self.structures[0]
        return _in_place(self.objective.prepare(atoms, rng_of(self.seed, self.kind, 0, 0)).atoms, atoms)


def _in_place(a: ase.Atoms, b: ase.Atoms) -> bool:
    """Whether all atoms and cells are in the same places, so that neighbours are too; elements may differ."""
    return a is b or (
        np.array_equal(a.positions, b.positions) and np.array_equal(a.cell, b.cell) and np.array_equal(a.pbc, b.pbc)
    )


def _geometry(atoms: ase.Atoms) -> int:
    """A number that is another one, but for a chance of 2⁻⁶⁴, when atoms have moved; elements do not matter."""
    return hash((atoms.positions.tobytes(), atoms.cell.array.tobytes(), atoms.pbc.tobytes()))


class Share(NamedTuple):
    """Which batches of each step a process works on, one after the other: `pieces` of `size` × `pieces`."""

    rank: int = 0
    size: int = 1
    pieces: int = 1


ALL = Share()


class Dealt(NamedTuple):
    """What a process works on at once."""

    epoch: int
    members: np.ndarray
    batch: Batch | None  # None where a step has too few structures for all
    after: Place  # where the next step begins


def training_batches(
    batches: Batches, counts: np.ndarray, budget: int, start: Place = (0, 0), workers: int = 0, share: Share = ALL
) -> Iterator[Dealt]:
    """The batches of a process, for ever, each epoch in a new order, from the step on that begins at `start`."""
    dealt, coming = tee(dealing(counts, budget, batches.seed, start, share))
    filled = ((epoch, members) for epoch, members, _ in coming if len(members))
    own = torch.Generator()  # or the loader draws from the caller's random numbers
    loader = iter(DataLoader(batches, batch_size=None, sampler=filled, num_workers=workers, generator=own))
    try:
        for epoch, members, after in dealt:
            yield Dealt(epoch, members, next(loader) if len(members) else None, after)
    except InputError as error:  # a worker sends its whole traceback; the sentence is its last line
        sentence = str(error).strip().splitlines()[-1]
        raise InputError(sentence.removeprefix(f"{InputError.__module__}.InputError: ")) from None


def dealing(
    counts: np.ndarray, budget: int, seed: int, start: Place = (0, 0), share: Share = ALL
) -> Iterator[tuple[int, np.ndarray, Place]]:
    """Epoch and members of the batches of a process, for ever, and where the step after that of each batch begins."""
    rank, size, pieces = share
    epoch, position = start
    while True:
        everyone = np.arange(len(counts), dtype=np.min_scalar_type(-len(counts)))
        order = np.random.default_rng((seed, TRAINING, epoch)).permutation(everyone)
        for lots in steps(counts, budget, order[position:], size * pieces):
            position += sum(map(len, lots))
            for members in lots[rank * pieces : (rank + 1) * pieces]:
                yield epoch, members, (epoch, position)
        epoch, position = epoch + 1, 0


def ahead(stream: Iterator[Dealt], device: torch.device, dtype: torch.dtype) -> Iterator[Dealt]:
    """The same items; for a GPU, the next one is made in a thread while it works, ready to be fetched."""
    if device.type != "cuda":
        yield from stream  # on a CPU a thread hides nothing: model and preparation share its cores
        return

    def following() -> Dealt:
        dealt = next(stream)
        return dealt._replace(batch=dealt.batch and dealt.batch.to("cpu", dtype).pinned())

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(following)
        while True:
            item = coming.result()
            coming = thread.submit(following)
            yield item

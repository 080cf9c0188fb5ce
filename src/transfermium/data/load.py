"""From structures to batches: which ones, in which order, with which noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import ase
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError
from ..graph import Batch, Cutoff, to_batch
from ..objectives import Objective
from .sequences import original

TRAINING, VALIDATION, CALIBRATION = 0, 1, 2  # kinds of random numbers


def rng_of(seed: int, kind: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers that depend on these four and on nothing else: not on the worker, the process or the order."""
    return np.random.default_rng((seed, kind, epoch, index))


def count_edges(
    structures: Sequence[ase.Atoms], edges: Cutoff, seen: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Number of edges of each structure as it is, without noise; `seen` hears how many are done."""
    counts = np.zeros(len(structures), int)
    for index in range(len(structures)):
        try:
            counts[index] = len(edges.neighbors(structures[index])[0])
        except InputError as error:
            raise InputError(f"structure {original(structures, index)}: {error}") from None
        seen(index + 1)
    return counts


def plan(counts: np.ndarray, budget: int, order: np.ndarray) -> list[np.ndarray]:
    """Cut an order of structures into batches of at most `budget` edges; a larger structure is a batch of its own."""
    batches: list[list[int]] = []
    room = 0
    for index in order:
        size = max(int(counts[index]), 1)
        if not batches or size > room:
            batches.append([])
            room = budget
        batches[-1].append(int(index))
        room -= size
    return [np.array(batch) for batch in batches]


class Batches(Dataset[Batch]):
    """Batches of a set of structures, addressed by (epoch, members): the same address is always the same batch."""

    def __init__(
        self, structures: Sequence[ase.Atoms], objective: Objective, edges: Cutoff, seed: int, kind: int = TRAINING
    ):
        self.structures = structures
        self.objective = objective
        self.edges = edges
        self.seed = seed
        self.kind = kind

    def __getitem__(self, address: tuple[int, np.ndarray]) -> Batch:
        epoch, members = address
        samples = []
        for index in members:
            rng = rng_of(self.seed, self.kind, epoch, int(index))
            samples.append(self.objective.prepare(self.structures[int(index)], rng))
        return to_batch(samples, self.edges)


def training_batches(
    batches: Batches, counts: np.ndarray, budget: int, skip: int = 0, workers: int = 0
) -> Iterator[tuple[int, np.ndarray, Batch]]:
    """Epoch, members and batch, for ever, each epoch in a new order; `skip` batches are passed over unseen."""
    order_and_skip = _Addresses(counts, budget, batches.seed, skip)
    own = torch.Generator()  # or the loader draws from the caller's random numbers
    loader = DataLoader(batches, batch_size=None, sampler=order_and_skip, num_workers=workers, generator=own)
    try:
        for (epoch, members), batch in zip(order_and_skip, loader, strict=False):
            yield epoch, members, batch
    except InputError as error:  # a worker sends its whole traceback; the sentence is its last line
        sentence = str(error).strip().splitlines()[-1]
        raise InputError(sentence.removeprefix(f"{InputError.__module__}.InputError: ")) from None


class _Addresses:
    """An endless sampler that starts anew each time it is iterated."""

    def __init__(self, counts: np.ndarray, budget: int, seed: int, skip: int):
        self.counts = counts
        self.budget = budget
        self.seed = seed
        self.skip = skip

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return islice(self._all(), self.skip, None)

    def _all(self) -> Iterator[tuple[int, np.ndarray]]:
        epoch = 0
        while True:
            order = np.random.default_rng((self.seed, TRAINING, epoch)).permutation(len(self.counts))
            for members in plan(self.counts, self.budget, order):
                yield epoch, members
            epoch += 1

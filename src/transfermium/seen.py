"""What a model learned from: a mark of each structure, kept in its file, by which copies among tests are noticed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import ase
import numpy as np
import torch
from torch import Tensor

from .console import track
from .data.sequences import Subset
from .graph import Cutoff
from .model import Model

KEY = "seen"  # of the marks, among what is saved beside the weights
MOST, KEPT = 20_000, 100_000  # structures that are marked of a stage, and marks that are kept of all stages
SOME = 1_000  # structures, which take a second or two
PAIRS = Cutoff(5.0)
STEP = 1e-4  # relative, of sums: above what rounding in files does, below what tells frames of a liquid apart


def marks(structures: Iterable[ase.Atoms]) -> np.ndarray:
    """One number for each geometry, (n_structures,) of int64; labels are no part of it.

    It is the same for copies that are moved, turned, mirrored or repeated, in any order of atoms, or rounded to single
    precision; of positions that were rounded to five digits one copy in a hundred is missed. Structures displaced by
    0.01 Å from high symmetry, which changes sums to second order, may share one.
    """
    return np.array([_mark(atoms) for atoms in structures], np.int64)


def seen_by(structures: Sequence[Sequence[ase.Atoms]], base: Model | None, quiet: bool = True) -> Tensor:
    """Marks of what a stage learned from and validated with, beside those of its base; of very many a part."""
    found = [] if (earlier := _marks_of(base)) is None else [earlier]
    total = sum(map(len, structures))
    for some in structures:
        part = _evenly(some, math.ceil(MOST * len(some) / max(total, 1)))
        found.append(marks(track(part, "marking what was seen", quiet=quiet or len(part) < SOME)))
    return torch.from_numpy(np.unique(np.concatenate(found))[:KEPT])  # marks are hashes: the smallest are a fair part


class Copies(NamedTuple):
    """How many structures, of those that were looked at, are copies of ones that a model has seen."""

    found: int
    of: int


def copies_of_seen(model: Model, structures: Sequence[ase.Atoms]) -> Copies | None:
    """Structures that a model learned from or validated with; None where its file does not know.

    Single atoms without a cell, all alike, are not counted; of more than `MOST` structures a part is looked at.
    """
    seen = which_seen(model, _evenly(structures, MOST))
    return None if seen is None else Copies(int((seen > 0).sum()), int((seen >= 0).sum()))


def which_seen(model: Model, structures: Sequence[ase.Atoms]) -> np.ndarray | None:
    """Of each structure 1 where a model has seen a copy of it, 0 where not, and -1 of single atoms without a cell.

    None where its file does not know.
    """
    known = _marks_of(model)
    if known is None:
        return None
    seen = np.full(len(structures), -1)
    some = [i for i, atoms in enumerate(structures) if len(atoms) > 1 or atoms.pbc.any()]
    seen[some] = np.isin(marks(structures[i] for i in some), known)
    return seen


def _evenly(structures: Sequence[ase.Atoms], most: int) -> Sequence[ase.Atoms]:
    few = np.linspace(0, len(structures) - 1, min(len(structures), most)).astype(int)
    return Subset(structures, np.unique(few))


def _marks_of(model: Model | None) -> np.ndarray | None:
    found = None if model is None else model.attached.get(KEY)
    return found.numpy() if found is not None and found.dtype == torch.int64 and found.ndim == 1 else None


def _mark(atoms: ase.Atoms) -> int:
    kinds, counts = np.unique(atoms.numbers, return_counts=True)
    formula = (kinds.tolist(), (counts // np.gcd.reduce(counts)).tolist() if len(counts) else [])
    pairs = PAIRS.neighbors(atoms)
    shifts = pairs.shifts @ np.asarray(atoms.cell)
    vectors = atoms.positions[pairs.senders] + shifts - atoms.positions[pairs.receivers]
    r = np.linalg.norm(vectors, axis=1) / PAIRS.radius
    one, other = atoms.numbers[pairs.senders].astype(float), atoms.numbers[pairs.receivers].astype(float)
    fades = (1 - np.minimum(r, 1.0) ** 2) ** 3
    sums = [
        float((fades * weight).sum()) / max(len(atoms), 1)
        for weight in (np.sqrt(one * other), (one + other) * r**2, one * other * np.exp(-3 * r))
    ]
    steps = [int(np.floor(np.log(total) / STEP)) if total > 0 else None for total in sums]
    return int.from_bytes(blake2b(repr((formula, steps)).encode(), digest_size=8).digest(), "little", signed=True)

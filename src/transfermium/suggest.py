"""Which structures to label next: those that together would teach most about all others."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch

from . import distributed
from .console import console
from .data.read import Source, read
from .errors import InputError
from .evaluate import parts, shared, tell_unseen
from .graph import to_graph
from .model import Model, check_file, load, write_whole
from .train import chosen_device
from .transfer.probe import summary

METHODS = ("variance", "k-center", "random")
COMPONENTS = 256  # directions of features that are told apart
NOISE = 0.1  # of a label, where the pool's variance per structure is one
MOST = 50_000  # structures of a pool that are looked at


def suggest(
    model: str | Path | Model,
    pool: Source,
    n: int = 50,
    out: str | Path | None = None,
    *,
    labelled: Source | None = None,
    method: str = "variance",
    edges: int = 10_000,
    device: str = "auto",
    seed: int = 0,
    verbose: bool = True,
) -> list[ase.Atoms]:
    """Choose structures of a pool whose labels would teach most, in the order in which to label them.

    Labels are taken for a linear function of what the layers of the backbone see of a structure, plus noise. Then it is
    known, before any label is, how much of the variance over the pool each new one would remove, and structures are
    taken one after the other that remove most of what those before them leave: a batch never holds the same twice, and
    outliers that tell nothing of others come late (greedy Bayesian experimental design: Cohn, Ghahramani and Jordan,
    doi:10.1613/jair.295). Any beginning of the order is a choice of its own.

    Args:
        pool: structures without labels; any that they have are not looked at.
        n: how many to choose.
        out: an extended XYZ file for them.
        labelled: structures that have labels already: what they teach is not asked again, nor are they themselves.
        method: "variance" as above, "k-center" for those farthest from all before, or "random" to compare with.
        seed: of random choice, and of what is looked at in a pool of more than `MOST` structures.

    Returns:
        Copies without results, whose `info` has "pool_index" and "remaining": the fraction of the variance over the
        pool that is left after it and all before it.

    Raises:
        InputError: for structures or options that cannot be used.
    """
    distributed.join()
    if method not in METHODS:
        raise InputError(f"there is no method '{method}': choose among {', '.join(METHODS)}")
    check_file(out)
    if out is not None and Path(out).suffix.lower() not in (".extxyz", ".xyz"):
        raise InputError(f"{out} is not an .extxyz file, to which the chosen structures are written")
    model = model if isinstance(model, Model) else load(model)
    given = read(pool)
    if not 0 < n <= len(given):
        raise InputError(f"n is {n}, but must be between 1 and the {len(given)} structures of the pool")
    rng = np.random.default_rng(seed)
    known = [] if labelled is None else list(read(labelled))
    looked = np.arange(len(given))
    if labels := set(map(_identity, known)):
        looked = np.array([i for i, atoms in enumerate(given) if _identity(atoms) not in labels], int)
        if verbose and len(looked) < len(given):
            console.print(f"{len(given) - len(looked):,} of {len(given):,} structures are labelled already: left out")
        if n > len(looked):
            raise InputError(f"n is {n}, but of the pool only {len(looked)} structures are not labelled already")
    if len(looked) > max(MOST, n):
        looked = np.sort(rng.choice(looked, max(MOST, n), replace=False))
        if verbose:
            console.print(f"Of {len(given):,} structures {len(looked):,} are looked at, drawn at random")
    candidates = [given[int(i)] for i in looked]
    tell_unseen(model, candidates, verbose)
    model = model.to(chosen_device(device)).eval()

    rows = _features(model, [*candidates, *known], edges, verbose)
    z = components(rows, len(candidates))
    order, remaining = chosen(z[: len(candidates)], n, z[len(candidates) :], method, rng)
    results = []
    for k, left in zip(order, remaining, strict=True):
        atoms = candidates[k].copy()
        atoms.calc = None
        atoms.info |= {"pool_index": int(looked[k]), "remaining": float(left)}
        results.append(atoms)
    if out is not None and distributed.rank() == 0:
        _write(Path(out), results)
    return results


def components(features: np.ndarray, n: int) -> np.ndarray:
    """Features of structures, the first n of a pool, along the principal components of the pool: (n_structures, k).

    Each feature is divided by its spread over the pool; in the end the variance of the pool is one.
    """
    x = np.asarray(features, float)
    center, spread = x[:n].mean(axis=0), x[:n].std(axis=0)
    varies = spread > 1e-6 * np.abs(center).max(initial=1.0)
    if not varies.any():
        raise InputError("all structures of the pool look the same to this model: there is nothing to choose")
    z = (x[:, varies] - center[varies]) / spread[varies]
    values, vectors = np.linalg.eigh(z[:n].T @ z[:n])
    k = min(COMPONENTS, len(values))
    z = z @ vectors[:, ::-1][:, :k]
    return np.asarray(z / np.sqrt(np.square(z[:n]).sum() / n))


def chosen(
    pool: np.ndarray, n: int, known: np.ndarray, method: str, rng: np.random.Generator
) -> tuple[list[int], list[float]]:
    """Indices of n rows of the pool in order, and the fraction of its variance that is left after each of them.

    Args:
        pool: `components` of each structure, (n_pool, k).
        known: the same of labelled structures.
    """
    prior = np.eye(pool.shape[1])
    covariance = np.linalg.inv(prior + known.T @ known / NOISE)  # of the weights, with a prior of one
    gram = pool.T @ pool / len(pool)
    along = pool @ covariance  # (n_pool, k)
    everything = float(np.trace(gram))
    free = np.ones(len(pool), bool)
    nearest = np.full(len(pool), np.inf)
    for row in known if method == "k-center" else ():
        nearest = np.minimum(nearest, np.square(pool - row).sum(axis=1))

    order: list[int] = []
    remaining = []
    lot = rng.permutation(len(pool))
    for _ in range(n):
        if method == "variance":
            own = (along * pool).sum(axis=1)  # variance of each structure
            gain = ((along @ gram) * along).sum(axis=1) / (own + NOISE)
        elif method == "k-center":
            gain = nearest if order or len(known) else -np.square(pool).sum(axis=1)  # the first is the most central
        else:
            gain = -lot.argsort().astype(float)
        best = int(np.argmax(np.where(free, gain, -np.inf)))
        order.append(best)
        free[best] = False
        nearest = np.minimum(nearest, np.square(pool - pool[best]).sum(axis=1))
        told = covariance @ pool[best]
        weight = float(pool[best] @ told) + NOISE
        along = along - np.outer(pool @ told, told) / weight
        covariance = covariance - np.outer(told, told) / weight
        remaining.append(float((gram * covariance).sum()) / everything)
    return order, remaining


def printable(structures: Sequence[ase.Atoms], most: int = 20) -> list[dict[str, Any]]:
    """Rows of a table of the first that were chosen, and of the last."""
    shown = [*range(min(len(structures), most - 1)), len(structures) - 1]
    rows = []
    for rank in dict.fromkeys(shown):
        atoms = structures[rank]
        row: dict[str, Any] = {"rank": rank + 1, "in the pool": atoms.info["pool_index"]}
        row |= {"formula": atoms.get_chemical_formula(), "atoms": len(atoms)}
        rows.append({**row, "variance left (%)": 100 * atoms.info["remaining"]})
    return rows


def _features(model: Model, structures: Sequence[ase.Atoms], edges: int, verbose: bool) -> np.ndarray:
    """Means and standard deviations over atoms of what each layer sees: (n_structures, n_features)."""

    @torch.no_grad()
    def work(members: list[int]) -> Mapping[int, np.ndarray]:
        weight = next(model.parameters())
        graph = to_graph([structures[i] for i in members], model.backbone.edges).to(weight.device, weight.dtype)
        layers = model.features(graph, ("layers",)).layers
        assert layers is not None
        return dict(zip(members, summary(layers, graph).cpu().numpy(), strict=True))

    found: dict[int, np.ndarray] = {}
    for some in shared(parts(model, structures, edges), work, structures, "looking at structures", not verbose):
        found |= some
    return np.stack([found[i] for i in range(len(structures))])


def _identity(atoms: ase.Atoms) -> tuple[bytes, ...]:
    """The same for the same atoms at the same places, in the same order."""
    arrays = (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    return tuple(np.ascontiguousarray(array).tobytes() for array in arrays)


def _write(path: Path, structures: Sequence[ase.Atoms]) -> None:
    from ase.io import write  # it takes half a second

    text = io.StringIO()
    write(text, structures, format="extxyz")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue().encode())

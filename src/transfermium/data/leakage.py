"""Leaks: structures that a test set has too, and that must not be trained on if its errors are to mean anything."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from time import monotonic

import numpy as np
from ase import Atoms

from ..console import track
from ..errors import InputError
from ..graph import Cutoff
from .columns import codes as column_codes
from .columns import info_names, is_missing
from .labels import word
from .sequences import Subset, original
from .split import IDS, OF_RUNS, formulas

TOLERANCE = 0.05  # fcc and hcp differ by 0.059
FRAMES = 0.005  # two frames of a liquid differ by 0.015, neighbours in one trajectory by 0.002
AROUND = 12  # nearest neighbours whose mean distance is the unit of length
RANGE = 2.0  # of neighbours that are compared, in this unit
NEAREST = 24  # neighbours that are compared, of each element around each element; with fewer fcc is hcp
FIRST_SEARCH, FARTHEST = 6.0, 12.0  # Å
PATIENCE = 2.0  # s without a progress bar


@dataclass(frozen=True)
class Leak:
    """A structure that should be left out.

    Attributes:
        index: of the structure.
        other: index of the held-out structure that it would give away.
        why: what they have in common, in words.
        by: "structure", or the id that they share, such as "mptrj_traj_id".
    """

    index: int
    other: int
    why: str
    by: str


def leaks(
    structures: Sequence[Atoms],
    held_out: Sequence[Atoms],
    *,
    tolerance: float = TOLERANCE,
    ids: bool = True,
    quiet: bool = False,
) -> list[Leak]:
    """Find the structures that are also in `held_out`, or belong to a material or trajectory that is.

    Two structures are the same if they have the same reduced composition and every entry of their `fingerprint` agrees
    within the fraction `tolerance`. Beyond that, and only where the composition is the same too, a structure leaks
    that has an id (`material_id`, `mptrj_traj_id`...) of a held-out structure under the same key, or of a structure
    that leaks; not where `ids` are of no account, as among frames of one system.

    Compositions and ids are read as columns; structures with a composition that is held out are built once. A bar shows
    progress where that takes more than two seconds, unless `quiet`.
    """
    if not 0 < tolerance < 1:
        raise InputError(f"a tolerance of {tolerance} makes no sense: give a fraction of the distances, such as 0.05")
    ours, theirs = formulas(structures), formulas(held_out)
    candidates = np.flatnonzero(np.isin(ours, theirs)).tolist()
    others = np.flatnonzero(np.isin(theirs, ours)).tolist()

    @cache
    def compared(composition: np.uint64) -> tuple[np.ndarray, np.ndarray]:
        same = np.flatnonzero(theirs == composition)
        return same, np.stack([_logarithms(held_out, j, "held-out structure") for j in same.tolist()])

    found: dict[int, Leak] = {}
    for i in _patiently(candidates, "looking for leaks", quiet):
        same, logarithms = compared(ours[i])
        differences = np.abs(logarithms - _logarithms(structures, i)).max(axis=1)
        least = int(differences.argmin())
        if differences[least] <= tolerance:
            j = int(same[least])
            found[i] = Leak(
                i, j, f"distances differ from held-out structure {j} by {differences[least]:.1%}", "structure"
            )

    if not ids:
        return [found[i] for i in sorted(found)]
    own, held = _ids(structures, ours, candidates), _ids(held_out, theirs, others)
    for name, members in own.items():
        if name in held:
            j = held[name][0]
            for i in members:
                found.setdefault(i, Leak(i, j, f"has the {name[1]} {name[2]} of held-out structure {j}", name[1]))

    before = -1
    while before < len(found):  # a trajectory may lead to a material, and that to another trajectory
        before = len(found)
        for name, members in own.items():
            k = next((i for i in members if i in found), None)
            if k is not None:
                for i in members:
                    why = f"has the {name[1]} {name[2]} of structure {k}, which leaks"
                    found.setdefault(i, Leak(i, found[k].other, why, name[1]))
    return [found[i] for i in sorted(found)]


def without(
    structures: Sequence[Atoms], held_out: Sequence[Atoms], *, tolerance: float = TOLERANCE, quiet: bool = False
) -> tuple[Subset, list[Leak]]:
    """The structures that do not leak, in their order, and those that do; see `leaks`.

    Within `FRAMES`, ids are of no account.
    """
    found = leaks(structures, held_out, tolerance=tolerance, ids=tolerance > FRAMES, quiet=quiet)
    kept = np.setdiff1d(np.arange(len(structures)), [leak.index for leak in found])
    return Subset(structures, kept), found


def tolerance_for(structures: Sequence[Atoms], held_out: Sequence[Atoms]) -> float:
    """`TOLERANCE`; or `FRAMES` where both are frames of one system, which are all alike: nothing would be left.

    They are where all have the same reduced composition, most of `structures` leak into `held_out`, and no ids tell
    several materials apart.
    """
    if len(np.unique(np.concatenate([formulas(structures), formulas(held_out)]))) > 1:
        return TOLERANCE
    if _of_several_materials(structures, held_out):
        return TOLERANCE
    return FRAMES if 2 * len(leaks(structures, held_out, quiet=True)) > len(structures) else TOLERANCE


def _of_several_materials(*sides: Sequence[Atoms]) -> bool:
    """Whether ids of materials, not those of frames or trajectories, group structures."""
    counts: Counter[tuple[str, str]] = Counter()
    for side in sides:
        members = _ids(side, np.zeros(len(side), int), list(range(len(side))))
        counts.update({(key, value): len(own) for (_, key, value), own in members.items() if key not in OF_RUNS})
    for key in {key for key, _ in counts}:
        own = [n for (name, _), n in counts.items() if name == key]
        if len(own) > 1 and max(own) > 1:
            return True
    return False


def summary(found: Sequence[Leak], total: int) -> str:
    """One sentence on what leaks, of how many structures."""
    if not found:
        return f"none of {total} structures leaks"
    counts = Counter(leak.by for leak in found)
    ways = [f"{n} by {way}" for way, n in counts.most_common()]
    return f"{len(found)} of {total} structures leak ({', '.join(ways)})"


def fingerprint(atoms: Atoms) -> np.ndarray:
    """Distances from the atoms of each element to their 1st, 2nd, ... 24th neighbour of each element.

    Each is averaged over the half of the atoms for which it is shorter, and over the other half. The unit is the mean
    distance of the 12 nearest neighbours, of any element, over all atoms; a neighbour farther than two units (or 12 Å)
    is put there. So the result depends on neither the choice of the cell, the order of the atoms, the orientation, the
    volume nor the amount of vacuum, and changes continuously as atoms move. It does not tell mirror images apart, nor
    stackings that differ only beyond this range.

    Returns:
        (n_elements, 2, n_elements, 24): halves of each element, neighbours of each element; by atomic number.
    """
    present, element = np.unique(atoms.numbers, return_inverse=True)
    centers, neighbors, distances = _surroundings(atoms)
    of_pairs = np.full((len(atoms) * len(present), NEAREST), RANGE)  # a pair is a center and an element around it
    if len(distances):
        unit = distances[_ranks(centers) < AROUND].mean()
        near = distances < RANGE * unit
        pairs = (centers * len(present) + element[neighbors])[near]
        order = np.argsort(pairs, kind="stable")  # those of a pair stay sorted by distance
        pairs, ranks = pairs[order], _ranks(pairs[order])
        kept = ranks < NEAREST
        of_pairs[pairs[kept], ranks[kept]] = (distances[near][order] / unit)[kept]
    of_atoms = of_pairs.reshape(len(atoms), len(present), NEAREST)
    return np.stack([_halves(np.sort(of_atoms[element == e], axis=0)) for e in range(len(present))])


def _halves(values: np.ndarray) -> np.ndarray:
    """Mean of the first and of the second half along the first axis; an odd middle belongs to both."""
    edges = np.linspace(0, 1, len(values) + 1)
    begin = np.array([[0.0], [0.5]])
    shares = np.minimum(edges[1:], begin + 0.5) - np.maximum(edges[:-1], begin)  # (2, n)
    return np.tensordot(2 * np.maximum(shares, 0), values, axes=1)


def _surroundings(atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms, their neighbours and the distances (Å), by atom and distance: so far that `fingerprint` can be taken."""
    radius = FIRST_SEARCH
    while True:
        found = Cutoff(radius).neighbors(atoms)
        away = atoms.positions[found.senders] + found.shifts @ atoms.cell.array - atoms.positions[found.receivers]
        distances = np.linalg.norm(away, axis=1)
        order = np.lexsort((distances, found.receivers))
        centers, neighbors, distances = found.receivers[order], found.senders[order], distances[order]
        if radius == FARTHEST:
            return centers, neighbors, distances
        if np.bincount(centers, minlength=len(atoms)).min() >= AROUND:
            needed = RANGE * distances[_ranks(centers) < AROUND].mean()
            if needed <= radius:
                return centers, neighbors, distances
        radius = min(1.3 * radius, FARTHEST)


def _ranks(groups: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal numbers."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


def _logarithms(structures: Sequence[Atoms], index: int, what: str = "structure") -> np.ndarray:
    """Of the fingerprint: a difference of these is a fraction of the distances."""
    try:
        return np.log(fingerprint(structures[index])).astype(np.float32).ravel()
    except InputError as error:
        raise InputError(f"{what} {original(structures, index)}: {error}") from error


Name = tuple[int, str, str]  # composition, key and value of an id


def _ids(structures: Sequence[Atoms], compositions: np.ndarray, chosen: list[int]) -> dict[Name, list[int]]:
    """Which of the chosen structures have each id; those of materials before those of trajectories."""
    some = Subset(structures, chosen)
    names = info_names(some) if chosen else set()
    members: dict[Name, list[int]] = {}
    for key in (key for key in IDS if key in names):
        codes, values = column_codes(some, key, word)
        for i, code in zip(chosen, codes.tolist(), strict=True):
            if code >= 0 and not is_missing(values[code]):
                members.setdefault((int(compositions[i]), key, word(values[code])), []).append(i)
    return members


def _patiently(items: Sequence[int], title: str, quiet: bool) -> Iterator[int]:
    """The same items, with a progress bar for what is left after two seconds."""
    start = monotonic()
    for done, item in enumerate(items):
        if monotonic() - start > PATIENCE:
            yield from track(items[done:], title, quiet=quiet)
            return
        yield item

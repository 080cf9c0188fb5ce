"""Structures that are there twice: alike, nearly alike, or alike with different labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..data.columns import is_missing
from ..errors import InputError
from .base import CENTRES, STATES, Around, Case, Finding, counted, some, unused

SAME, NEAR = 3e-4, 5e-3  # of what atoms see of their neighbours, relative: rounded positions, and about 0.003 Å
MOST_CANDIDATES = 20_000  # pairs that are looked at closely, the most alike ones
CONFLICT = 0.02  # eV/atom
MANY = 0.01  # of all structures


class Copies(NamedTuple):
    """Groups of equal and of nearly equal structures, each in order; and whether too many are alike to look at all."""

    same: list[list[int]]
    near: list[list[int]]
    cut: bool = False


def check(case: Case) -> Iterator[Finding]:
    """Equal structures, those with conflicting labels first."""
    found = copies(case)
    conflicts = list(_conflicts(case, found.same))
    yield from conflicts
    extra = [i for group in found.same for i in group[1:]]
    if extra:
        yield Finding(
            "duplicates",
            "warning" if len(extra) > 0.001 * len(case) else "note",
            f"Copies of earlier structures: {len(extra):,} ({counted(len(found.same), 'group')} of equal structures)",
            "files that overlap were put together; copies weigh more, and may fall on both sides of a split",
            case.drop("duplicates"),
            some(sorted(extra)),
            (f"the first group: structures {', '.join(map(str, found.same[0][:6]))}",),
        )
    close = [i for group in found.near for i in group[1:]]
    if close:
        yield Finding(
            "near-duplicates",
            "note",
            f"Nearly equal to others: {counted(len(close))} ({counted(len(found.near), 'group')})",
            "steps of a relaxation near its end, or structures that were rounded or rattled; split them in groups",
            case.split("near-duplicates"),
            some(sorted(close)),
        )
    if found.cut:
        yield Finding(
            "copies-unsure",
            "note",
            f"Only the {MOST_CANDIDATES:,} pairs of structures that are most alike were compared: more are",
            "frames of one trajectory that follow each other closely; every tenth would tell as much",
            f"import transfermium as tm\nstructures = list(tm.read({', '.join(map(repr, case.sources))}))[::10]\n"
            f"tm.pack(structures, {unused('repaired')!r})",
        )


def copies(case: Case) -> Copies:
    """Groups of structures with the same atoms in the same places, however they are turned, moved or numbered."""
    if "copies" not in case.kept:
        case.kept["copies"] = _copies(case)
    found: Copies = case.kept["copies"]
    return found


def _copies(case: Case) -> Copies:
    from scipy.spatial import cKDTree  # it takes half a second

    contacts = case.contacts
    logs = np.log(contacts.moments + 1e-3)
    sizes = contacts.moments[:, : len(CENTRES)].mean(axis=1)  # of what atoms see
    _, kinds = np.unique(np.column_stack([case.composition, case.periodic]), axis=0, return_inverse=True)
    volume = np.log(np.nan_to_num(case.volume, nan=1.0) + 1e-9)
    unusable = np.zeros(len(case), bool)
    unusable[list(contacts.unusable)] = True
    unusable |= ~contacts.moments.any(axis=1) & (case.n_atoms > 1)  # too far apart to tell
    certain, likely, apart, cut = [np.zeros((0, 2), int)], [np.zeros((0, 2), int)], [np.zeros(0)], False
    order = np.argsort(kinds.ravel(), kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(kinds.ravel()[order])) + 1):
        members = members[~unusable[members]]
        if len(members) < 2:
            continue
        peaks = contacts.peaks[members] / (4 * sizes[members].mean() + 1e-9)  # differ in no more than atoms do
        seen = np.column_stack([logs[members], volume[members], peaks])
        _, first, own = np.unique(np.round(seen, 7), axis=0, return_index=True, return_inverse=True)
        again = np.setdiff1d(np.arange(len(members)), first)
        certain.append(members[np.column_stack([first[own.ravel()[again]], again])])
        tree, radius = cKDTree(seen[first]), 2 * NEAR
        while tree.count_neighbors(tree, radius, p=np.inf) > 2 * MOST_CANDIDATES + len(first):
            radius, cut = radius / 2, True
        pairs = first[tree.query_pairs(radius, p=np.inf, output_type="ndarray")].reshape(-1, 2)
        likely.append(members[pairs])
        apart.append(np.abs(seen[pairs[:, 0]] - seen[pairs[:, 1]]).max(axis=1))
    most_alike = np.argsort(np.concatenate(apart), kind="stable")
    cut = cut or len(most_alike) > MOST_CANDIDATES
    pairs = np.concatenate([*certain, np.concatenate(likely)[most_alike[:MOST_CANDIDATES]]])
    if not len(pairs):
        return Copies([], [])
    around: dict[int, np.ndarray] = {}
    difference = np.array([_difference(case, int(a), int(b), around) for a, b in pairs.tolist()])
    same = _groups(len(case), pairs[difference < SAME])
    leader = {i: group[0] for group in same for i in group}
    rest = [(leader.get(a, a), leader.get(b, b)) for a, b in pairs[(difference >= SAME) & (difference < NEAR)].tolist()]
    near = _groups(len(case), np.array([pair for pair in rest if pair[0] != pair[1]], int).reshape(-1, 2))
    return Copies(same, near, cut)


def _difference(case: Case, a: int, b: int, seen: dict[int, np.ndarray]) -> float:
    """Of what atoms see, relative, the worst of them."""
    for i in (a, b):
        if i not in seen:
            seen[i] = _surroundings(case, i)
    size = np.abs(seen[a]).mean() + 1e-9
    return float(np.sqrt(np.square(seen[a] - seen[b]).mean(axis=1)).max() / size)


def _surroundings(case: Case, index: int) -> np.ndarray:
    """Neighbours of each atom by distance and element, of each element sorted: (n_atoms, n)."""
    atoms = case.atoms[index]
    sums = np.zeros((len(atoms), len(CENTRES)))
    try:
        found = Around.of(atoms)
    except InputError:
        return np.full_like(sums, np.nan)
    weights = np.random.default_rng(1).uniform(0.5, 1.5, 119)[atoms.numbers]
    np.add.at(sums, found.receivers, found.bells() * weights[found.senders, None])
    key = np.round(sums @ np.random.default_rng(2).uniform(0.5, 1.5, len(CENTRES)), 3)
    return sums[np.lexsort((*sums.T[::-1], key, atoms.numbers))]


def _groups(n: int, pairs: np.ndarray) -> list[list[int]]:
    if not len(pairs):
        return []
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (n, n))
    _, group = connected_components(links, directed=False)
    members = np.unique(pairs)
    order = members[np.argsort(group[members], kind="stable")]
    return [part.tolist() for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1)]


def _conflicts(case: Case, groups: Sequence[Sequence[int]]) -> Iterator[Finding]:
    told = [case.info(name) for name in STATES]
    bad: list[int] = []
    worst = 0.0
    per_atom = case.per_atom(case.energy)
    for group in groups:
        known = [i for i in group if np.isfinite(per_atom[i])]
        if len(known) < 2 or any(
            len({str(values[i]) for i in known if not is_missing(values[i])}) > 1 for values in told
        ):
            continue
        spread = float(np.ptp(per_atom[known]))
        if spread > CONFLICT:
            bad += known
            worst = max(worst, spread)
    if bad:
        yield Finding(
            "conflicting-duplicates",
            "error" if len(bad) > max(4, MANY * len(case)) else "warning",
            f"Equal to others with another energy: {counted(len(bad))} (up to {worst:.3g} eV/atom apart)",
            "two levels of theory, magnetic states or settings under one label, or energies in another order "
            "than structures",
            case.drop("conflicting-duplicates"),
            some(sorted(bad)),
        )
    for entry in case.labels.entries:
        if entry.quantity in ("energy", "forces", "stress") or entry.shape or entry.per == "atom" or entry.classes:
            continue
        values = np.array([np.nan if v is None else v for v in case.values(entry)], float)
        wide = 0.2 * np.nanstd(values)
        unlike = sorted(i for group in groups if np.ptp(_known(values[list(group)])) > wide > 0 for i in group)
        if unlike:
            kind = f"conflicting-{entry.quantity}"
            yield Finding(
                kind,
                "warning",
                f"Equal to others with another '{entry.quantity}': {counted(len(unlike))}",
                "two calculations, phases or settings under one label; no model can learn both",
                case.drop(kind),
                some(unlike),
            )


def _known(values: np.ndarray) -> np.ndarray:
    known = values[np.isfinite(values)]
    return known if len(known) else np.zeros(1)

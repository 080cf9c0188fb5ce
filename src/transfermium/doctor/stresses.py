"""Stresses: the order of components, absurd ones, and those of structures without a volume."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np

from ..data.columns import codes
from . import yardstick
from .base import Case, Finding, counted, held, some
from .pairs import SHEAR, similar

NAMES = ("yz", "xz", "xy")
ABSURD = 0.62  # eV/Å³, 100 GPa
GROUPS, MOST_GROUPS = ("group", "config_type"), 8  # information that names parts of a set
LEAST_SHEARED = 14  # structures that a potential is asked about
ORDINARY = 0.92  # distances of nearest neighbours in sums of covalent radii, which no such pressure leaves


def check(case: Case) -> Iterator[Finding]:
    """Components of the stress beside the yardstick, and their sizes."""
    if "stress" not in case.labels:
        return
    known = np.isfinite(case.stress[:, 0, 0])
    yield from _orders(case, np.flatnonzero(known))
    flat = np.flatnonzero(known & ~case.periodic)
    if len(flat):
        yield Finding(
            "stress-not-periodic",
            "warning",
            f"{counted(len(flat))} with a stress do not repeat in three directions",
            "pbc was lost in a conversion, or a stress of zeros was written for molecules",
            case.reshape("atoms.pbc = True  # if they are crystals"),
            some(flat),
        )
    if ("wrong", "stress") in case.kept:
        return
    pressure = np.abs(np.trace(np.nan_to_num(case.stress), axis1=1, axis2=2)) / 3
    absurd = np.flatnonzero(
        (pressure > ABSURD) & (case.contacts.typical > ORDINARY) & np.isfinite(case.contacts.typical)
    )
    if len(absurd):
        yield Finding(
            "stress-absurd",
            "warning",
            f"{counted(len(absurd))} with more than 100 GPa at ordinary distances (up to "
            f"{pressure[absurd].max() * 160.2177:.4g} GPa)",
            "calculations that did not converge, or that were set up for another cell",
            case.drop("stress-absurd"),
            some(absurd),
        )


def _orders(case: Case, known: np.ndarray) -> Iterator[Finding]:
    """Another order in all structures; or else in some of the groups that the data name."""
    if whole := _order(case, known):
        yield _other_order(case, *whole, known)
        return
    for name in (name for name in GROUPS if name in case.keys):
        ids, words = codes([case.atoms[i] for i in known], name, str)
        found: dict[tuple[int, ...], list[tuple[np.ndarray, list[str]]]] = {}
        for k, word in enumerate(words[:MOST_GROUPS]):
            group = known[ids == k]
            if LEAST_SHEARED <= len(group) < len(known) and (one := _order(case, group)):
                found.setdefault(one[0], []).append((group, [f"of '{word}', {words}" for words in one[1]]))
        if found:
            best, groups = max(found.items(), key=lambda item: sum(len(group) for group, _ in item[1]))
            evidence = [words for _, told in groups for words in told]
            yield _other_order(case, best, evidence, np.sort(np.concatenate([group for group, _ in groups])))
            return


def _order(case: Case, indices: np.ndarray) -> tuple[tuple[int, ...], list[str]] | None:
    """The order of the shear components that fits energies of sheared cells, or a potential, best; None for ours."""
    orders = list(permutations(range(3)))
    evidence, votes = [], set()
    if left := _by_energies(case, indices, orders):
        best = min(left, key=lambda order: left[order])
        if left[best] < 0.5 * left[orders[0]]:
            votes.add(best)
            evidence.append(
                f"energies of sheared cells are {left[orders[0]] / left[best]:.1f} times closer to the work "
                "of the stress in this order"
            )
        else:
            votes.add(orders[0])
    if fits := _by_yardstick(case, indices, orders):
        best = max(fits, key=lambda order: min(fits[order]))
        if min(fits[best]) > 0.6 and all(
            fit > other + 0.2 for fit, other in zip(fits[best], fits[orders[0]], strict=True)
        ):
            votes.add(best)
            r, other = (sum(fits[order]) / 2 for order in (best, orders[0]))
            evidence.append(f"the correlation with a potential is {r:.2f} in this order, {other:.2f} as they are")
    return None if len(votes) != 1 or votes == {orders[0]} else (votes.pop(), evidence)


def _other_order(case: Case, best: tuple[int, ...], evidence: list[str], members: np.ndarray) -> Finding:
    order = " ".join(NAMES[best.index(k)] for k in range(3))  # component k of ours is component best[k] of theirs
    fix = (
        ["s = np.asarray(LABEL)"]
        if _first(case).size == 6
        else [
            "from ase.stress import full_3x3_to_voigt_6_stress",
            "s = full_3x3_to_voigt_6_stress(np.reshape(LABEL, (3, 3)))",
        ]
    )
    lines = case.relabel("stress", *fix, f"LABEL = s[[0, 1, 2, {', '.join(str(3 + k) for k in best)}]]")
    some_only = len(members) < np.isfinite(case.stress[:, 0, 0]).sum()
    return Finding(
        "stress-order",
        "error",
        f"The shear components of {f'{len(members):,} stresses' if some_only else 'the stress'} are in the order "
        f"{order}, not yz xz xy",
        f"the order xx yy zz {order}, {'as in VASP' if order == 'xy yz xz' else 'of another program'}, was "
        "taken for that of ASE",
        case.change(*lines, of="stress-order" if some_only else ""),
        some(members),
        tuple(evidence),
    )


def _by_energies(case: Case, indices: np.ndarray, orders: list[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """What each order leaves of the energy between sheared cells, eV; empty without at least 8 of them."""
    pairs = similar(case, indices)
    sheared = pairs.only((np.abs(pairs.shears).max(axis=1, initial=0) > 2e-3) & (pairs.distance < 0.2))
    as_they_are = np.einsum("ni,ni->n", sheared.shears, sheared.virials)
    rest = sheared.change - sheared.by_forces - (sheared.by_stress - as_they_are)
    known = np.isfinite(rest)
    left = {
        order: float(np.median(np.abs(rest - np.einsum("ni,ni->n", sheared.shears, sheared.virials[:, order]))[known]))
        if known.sum() >= 8
        else 0.0
        for order in orders
    }
    matters = float(np.median(np.abs(as_they_are[known]))) if known.sum() >= 8 else 0.0
    return left if matters > 0 and max(left.values()) > 2 * min(left.values()) > 0 else {}


def _by_yardstick(
    case: Case, indices: np.ndarray, orders: list[tuple[int, ...]]
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Correlations of shear components with what a potential says, in each order, for two halves of the structures."""
    found = yardstick.beside(case, indices)
    if found is None:
        return {}
    label, predicted = (one[:, SHEAR[0], SHEAR[1]] for one in found.stress)
    sheared = np.flatnonzero(np.abs(predicted).max(axis=1) > yardstick.LEAST_STRESS / 4)
    if len(sheared) < LEAST_SHEARED:
        return {}
    halves = sheared[::2], sheared[1::2]
    fits = {
        order: [yardstick.fit(label[half][:, order].ravel(), predicted[half].ravel()) for half in halves]
        for order in orders
    }
    return {order: (abs(one.r), abs(two.r)) for order, (one, two) in fits.items() if one and two}


def _first(case: Case) -> np.ndarray:
    """The first stress as it is given."""
    place, key, _ = max(case.labels["stress"].keys, key=lambda at: at[2])
    values = (held(atoms, place).get(key) for atoms in case.atoms)
    return np.asarray(next(value for value in values if value is not None))

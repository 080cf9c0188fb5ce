"""Energies: some in another unit or of another zero than the rest, outliers, and those of other structures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from ase.data import chemical_symbols

from ..data.labels import ENERGIES
from .base import Case, Finding, counted, some, unused
from .mixtures import OTHER_UNITS
from .pairs import similar, slope

EXPLAINED = 0.35  # of the variance by composition: less is what energies of other structures have
FAR = 6.0  # robust standard deviations, beyond which an energy is not like the others
LEAST = 0.05  # eV/atom, likewise
ABSURD = 25.0  # eV/atom from what the composition tells
HARD, HOT = 0.2, 2.0  # eV/Å³ and eV/Å
MOST_SHARE = 0.35  # of energies that can be unlike the others


def check(case: Case) -> Iterator[Finding]:
    """Energies beside what compositions tell."""
    known = case.untold(np.flatnonzero(np.isfinite(case.energy) & (case.n_atoms > 1)), "energy")
    if len(known) < 10:
        return
    shares = case.composition[known] / case.n_atoms[known, None]
    references, rest, spread = _robust(case.energy[known] / case.n_atoms[known], shares)
    free = len(known) - np.linalg.matrix_rank(shares)
    if ("wrong", "energy") in case.kept:
        return
    found = list(_elsewhere(case, known)) or (
        list(_mixtures(case, known, shares @ references, rest, spread)) if free >= 8 else []
    )
    yield from found
    bad = {i for one in found for i in one.structures}
    absurd = [
        int(known[k]) for k in np.flatnonzero(np.abs(rest) > max(ABSURD, 3 * FAR * spread)) if int(known[k]) not in bad
    ]
    few = [int(known[k]) for k in np.flatnonzero(np.abs(rest) > max(4 * FAR * spread, 1.0)) if int(known[k]) not in bad]
    few = few if len(few) <= 0.02 * len(known) else []
    if absurd or few:
        far = sorted({*absurd, *few})
        largest = float(np.abs(rest[np.isin(known, far)]).max())
        yield Finding(
            "energy-outliers",
            "warning",
            f"Energies far from what the composition tells: {counted(len(far))} (up to {largest:.3g} eV/atom)",
            "calculations that did not converge, exploded structures, or another setting; they dominate squared errors",
            case.drop("energy-outliers"),
            some(far),
            (f"the others scatter by {spread:.3g} eV/atom",),
        )
    yield from _formation(case, known, references)


def _mixtures(
    case: Case, known: np.ndarray, expected: np.ndarray, rest: np.ndarray, spread: float
) -> Iterator[Finding]:
    """Energies that are like the others only in another unit, or with another zero."""
    far = (np.abs(rest) > max(FAR * spread, LEAST)) & ~_strained(case)[known]
    least = max(6, 0.02 * len(known))
    if not least <= far.sum() <= MOST_SHARE * len(known):
        return
    n = case.n_atoms[known]
    given = case.energy[known] / n
    factors = {"per atom": n.astype(float), **{f"in {u}": np.full(len(n), ENERGIES[u]) for u in OTHER_UNITS}}
    near = max(3 * spread, LEAST)
    left = {name: np.abs(given * factor - expected) for name, factor in factors.items()}
    like = {name: far & (size < near) & (size < np.abs(rest) / 2) for name, size in left.items()}
    small = far & (
        np.abs(expected) > 2 * np.abs(given) + 1.0
    )  # as they are in large units, per atom, or of another zero
    enough = [name for name in like if like[name].sum() >= max(least, 0.4 * far.sum())]
    if enough:  # of several units, the one that fits most, and closest
        name = max(enough, key=lambda one: like[one].sum() - 3 * float(np.median(left[one][like[one]])) / near)
        chosen = like[name] | (small & like[name][small].any())
    elif small.sum() >= max(least, 0.5 * far.sum()):
        name, chosen = "relative to elements or atoms", small
    else:
        return
    members = known[chosen]
    relative = not enough
    kind = "energy-mixed-zero" if relative else "energy-mixed-units"
    unit = "len(atoms)" if name == "per atom" else f"{ENERGIES.get(name.removeprefix('in '), 1.0):.9g}"
    distance = float(np.median(np.abs(rest[chosen])))
    lines = case.relabel("energy", f"LABEL = LABEL * {unit}")
    yield Finding(
        kind,
        "error",
        f"Of {len(known):,} structures, {len(members):,} seem to have energies {name}",
        f"two sources were put together: energies of these are {name}, the others are not",
        case.drop(kind) if relative else case.change(*lines, of=kind),
        some(members),
        (f"they lie {distance:.3g} eV/atom from what their composition tells, the others {spread:.3g}",),
    )


def _strained(case: Case) -> np.ndarray:
    """Structures under such pressure or forces that their energies may well be far from the others: (n_structures,)."""
    pressure = np.abs(np.trace(np.nan_to_num(case.stress), axis1=1, axis2=2)) / 3
    return (pressure > HARD) | (np.nan_to_num(case.rms_force()) > HOT)


def _formation(case: Case, known: np.ndarray, references: np.ndarray) -> Iterator[Finding]:
    """Whether energies are relative to elements: then those of the elements are near zero."""
    given = case.energy[known] / case.n_atoms[known]
    pure = (case.composition[known] > 0).sum(axis=1) == 1
    elements = case.composition[known].any(axis=0).sum()
    near_zero = (
        pure.sum() >= 3
        and np.median(np.abs(given[pure])) < 0.3
        and (case.composition[known[pure]].any(axis=0)).sum() >= 3
    )
    if elements >= 5 and (near_zero or np.median(np.abs(given)) < 0.7) and (given > -6).mean() > 0.98:
        present = np.flatnonzero(case.composition[known].any(axis=0))
        shown = ", ".join(f"{chemical_symbols[z]} {references[z]:.2f}" for z in present[:8])
        yield Finding(
            "energy-formation",
            "warning",
            "The energies look like formation energies, not totals",
            "a total energy was replaced by a formation energy: references of elements take that up, but "
            "energies of another zero "
            "must not share a head with these",
            f"transfermium pretrain {case.files} --objective Property --objective.name energy "
            f"--objective.kind extensive --out {unused('run')}",
            (),
            (f"energies of the elements by least squares, eV: {shown}",),
        )


def _elsewhere(case: Case, known: np.ndarray) -> Iterator[Finding]:
    """Whether energies belong to other structures: they neither follow forces nor compositions."""
    counts = case.composition[known].astype(float)
    n = case.n_atoms[known, None]
    varied = np.std(counts / n, axis=0).max() > 0.05
    explained = max(_explained(case.energy[known], counts), _explained(case.energy[known] / n[:, 0], counts / n))
    evidence = []
    if (
        varied
        and len(known) > 2 * counts.any(axis=0).sum() + 30
        and explained < EXPLAINED
        and np.std(case.energy[known] / n[:, 0]) > 0.3
    ):
        evidence.append(f"compositions explain {max(explained, 0):.0%} of their variance")
    pairs = similar(case, case.untold(case.everything, "energy", "forces"))
    near = pairs.only(pairs.distance + 5 * pairs.strain < 0.1)
    found = slope(near.change, near.by_forces + np.nan_to_num(near.by_stress))
    if found and found.n >= 20:
        size = np.median(np.abs(near.change)) / max(
            np.median(np.abs(near.by_forces + np.nan_to_num(near.by_stress))), 1e-12
        )
        r = _rank_correlation(near.change, near.by_forces + np.nan_to_num(near.by_stress))
        if abs(r) < 0.25 and found.agreement < 0.2 and size > 1:
            evidence.append(
                f"between {found.n} pairs of similar structures energies do not follow the work of forces "
                f"(correlation {r:.2f})"
            )
    if evidence:
        yield Finding(
            "energy-shuffled",
            "error",
            "The energies do not belong to these structures",
            "energies and structures are in different orders, or the forces are those of other frames",
            case.change("atoms.calc = None  # then read structures and labels again, from the same files"),
            (),
            tuple(evidence),
        )


def _explained(values: np.ndarray, columns: np.ndarray) -> float:
    """The share of the variance that a linear function explains, beyond what any would by chance."""
    a = np.column_stack([columns[:, columns.any(axis=0)], np.ones(len(values))])
    values = np.clip(values, *np.quantile(values, [0.01, 0.99]))
    free = len(values) - np.linalg.matrix_rank(a)
    if free < 10 or np.var(values) == 0:
        return 1.0
    left = np.square(values - a @ np.linalg.lstsq(a, values, rcond=None)[0]).sum() / free
    return float(1 - left / np.var(values))


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    known = np.isfinite(x) & np.isfinite(y)
    ranks = [np.argsort(np.argsort(one[known])).astype(float) for one in (x, y)]
    return float(np.corrcoef(np.array(ranks))[0, 1])


def _robust(values: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """References by least absolute deviations, what is left of the values, and its robust standard deviation."""
    present = np.flatnonzero(shares.any(axis=0))
    a = shares[:, present]
    weights = np.ones(len(values))
    solution = np.full(len(present), np.median(values))
    ridge = 1e-4 * len(values) / len(present)
    for _ in range(20):
        weighted = a * weights[:, None]
        change = np.linalg.solve(
            weighted.T @ a + ridge * np.median(weights) * np.eye(len(present)), weighted.T @ (values - a @ solution)
        )
        solution = solution + change
        rest = np.abs(values - a @ solution)
        weights = 1 / np.maximum(rest, 0.3 * np.median(rest) + 1e-9)
    rest = values - a @ solution
    references = np.zeros(shares.shape[1])
    references[present] = solution
    return references, rest, float(1.4826 * np.median(np.abs(rest))) + 1e-9

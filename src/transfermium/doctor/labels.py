"""Labels: unreadable, constant, missing, ambiguous or absurd ones, and calculations that did not converge."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import numpy as np

from ..data.labels import KEYS, Label
from .base import Case, Finding, counted, held, some, unused

CONVERGED = (
    "converged",
    "scf_converged",
    "is_converged",
    "electronic_converged",
    "converged_electronic",
    "scf_convergence",
)
LARGE_SENTINEL = 500  # which says enough even where it is there once
SENTINELS = (-1.0, -99.0, -999.0, -9999.0, 99.0, 999.0, 9999.0, 99999.0, 1e10)
NO = {"false", "f", "no", "0", "0.0", "n", "unconverged", "not converged", "failed"}


def check(case: Case) -> Iterator[Finding]:
    """Each label by itself."""
    yield from _unreadable(case)
    yield from _unconverged(case)
    for entry in case.labels.entries:
        yield from _missing(case, entry)
        yield from _constant(case, entry)
        yield from _ambiguous(case, entry)
        if entry.per == "structure" and not entry.shape and not entry.classes:
            yield from _absurd(case, entry)
    lone = [
        i
        for i, atoms in enumerate(case.atoms)
        if len(atoms) == 1 and "config_type" not in atoms.info and not atoms.pbc.any()
    ]
    if lone and "energy" in case.labels:
        yield Finding(
            "lone-atoms",
            "note",
            f"{counted(len(lone))} of one atom without a mark",
            "isolated atoms, whose energies are references: marked as such they are used for that, and not trained on",
            case.change("if len(atoms) == 1:", "    atoms.info['config_type'] = 'IsolatedAtom'"),
            some(lone),
        )


def _unreadable(case: Case) -> Iterator[Finding]:
    for name, bad in case.unreadable.items():
        kind = f"unreadable-{name}"
        reasons = list(dict.fromkeys(bad.values()))
        yield Finding(
            kind,
            "error" if name in KEYS else "warning",
            f"'{name}' of {counted(len(bad))} cannot be used: {reasons[0]}",
            "a calculation that failed, or a conversion that went wrong",
            case.drop(kind),
            some(bad),
            tuple(reasons[1:4]),
        )


def _unconverged(case: Case) -> Iterator[Finding]:
    names = [name for name in case.keys if name.lower() in CONVERGED]
    bad = sorted(
        {
            i
            for name in names
            for i, value in enumerate(case.info(name))
            if value is not None and str(value).strip().lower() in NO
        }
    )
    if bad:
        yield Finding(
            "unconverged",
            "error",
            f"Marked as not converged: {counted(len(bad))} ({', '.join(names)})",
            "the self-consistency cycle reached its limit; energies and forces are noise",
            case.drop("unconverged"),
            some(bad),
        )


def _missing(case: Case, entry: Label) -> Iterator[Finding]:
    n = case.labels[entry.quantity].count
    if entry.quantity in KEYS and n < len(case):
        lacking = [i for i, value in enumerate(case.values(entry)) if value is None]
        yield Finding(
            f"missing-{entry.quantity}",
            "note",
            f"{n:,} of {len(case):,} structures have '{entry.quantity}'",
            "sets with different labels were put together, or some were lost; losses take what there is",
            case.drop(f"missing-{entry.quantity}"),
            some(lacking),
        )


def _constant(case: Case, entry: Label) -> Iterator[Finding]:
    """Labels that never change; all else that structures may have in common is no label."""
    same = entry.minimum is not None and entry.minimum == entry.maximum
    meant = entry.quantity in {*KEYS, *case.label, *case.unit}
    if not meant or entry.count < 4 or not (same or len(entry.classes) == 1):
        return
    what = entry.classes[0] if entry.classes else f"{entry.minimum:g}"
    serious = entry.quantity == "energy" or (entry.quantity in KEYS and (case.n_atoms > 2).any())
    lines = ["for held in (atoms.info, atoms.arrays, atoms.calc.results if atoms.calc else {}):"]
    lines += [f"    held.pop({key!r}, None)" for key in dict.fromkeys(key for _, key, _ in entry.keys)]
    yield Finding(
        f"constant-{entry.quantity}",
        "error" if serious else "warning",
        f"'{entry.quantity}' is {what} in all {entry.count:,} structures",
        "a placeholder was written where the label is missing",
        case.change(*lines),
    )


def _ambiguous(case: Case, entry: Label) -> Iterator[Finding]:
    if entry.quantity not in ("energy", "forces") or not entry.also_found:
        return
    differing, worst = [], 0.0
    for i, atoms in enumerate(case.atoms):
        if i in case.unreadable.get(entry.quantity, {}):
            continue
        own = entry.value(atoms)
        for place, key in entry.passed_over(atoms) if own is not None else ():
            other = np.asarray(held(atoms, place)[key], float)
            if other.shape != np.shape(own):
                continue
            gap = float(np.abs(other * entry.factor - own).max()) / (len(atoms) if entry.quantity == "energy" else 1)
            if gap > (5e-3 if entry.quantity == "energy" else 0.05):
                differing.append(i)
                worst = max(worst, gap)
    if differing:
        used = ", ".join(key for _, key, _ in entry.keys)
        kind = f"ambiguous-{entry.quantity}"
        first = entry.also_found[0].rpartition(" (")[0]
        yield Finding(
            kind,
            "warning",
            f"Two different values of '{entry.quantity}' in {counted(len(set(differing)))} ({used} is used; "
            f"also found: {', '.join(entry.also_found)})",
            "labels of a model or of another level of theory lie beside the reference",
            f"transfermium pack {case.files} --label {shlex.quote(f'{entry.quantity}={first}')} "
            f"--out {unused('repaired')}",
            some(sorted(set(differing))),
            (f"up to {worst:.3g} {'eV/atom' if entry.quantity == 'energy' else 'eV/Å'} apart",),
        )


def _absurd(case: Case, entry: Label) -> Iterator[Finding]:
    """Placeholders, and values many times as far from the middle as nearly all others."""
    values = np.array([np.nan if v is None else v for v in case.values(entry)], float)
    known = values[np.isfinite(values)]
    if len(known) < 20 or len(np.unique(known)) < 8:
        return
    middle = np.median(known)
    low, high = np.quantile(known, [0.02, 0.98])
    for sentinel in SENTINELS:
        hits = np.flatnonzero(values == sentinel)
        others = known[known != sentinel]
        reach = np.abs(others - middle).max(initial=0.0)
        least = 1 if abs(sentinel) > LARGE_SENTINEL else 2
        if len(hits) >= least and abs(sentinel - np.median(others)) > 1.5 * reach:
            kind = f"placeholder-{entry.quantity}"
            yield Finding(
                kind,
                "error",
                f"'{entry.quantity}' is {sentinel:g} in {counted(len(hits))}, far from all others",
                "a placeholder for a missing value was taken for a number",
                case.drop(kind),
                some(hits),
            )
            case.told.setdefault(entry.quantity, set()).update(hits.tolist())
            return
    if entry.quantity == "energy":
        return  # how far it may be depends on the composition
    far = np.flatnonzero(np.abs(values - middle) > 15 * max(high - middle, middle - low, 1e-12))
    if len(far):
        kind = f"outliers-{entry.quantity}"
        yield Finding(
            kind,
            "warning",
            f"'{entry.quantity}' is absurdly far from all others in {counted(len(far))} (up to "
            f"{values[far][np.abs(values[far]).argmax()]:.4g})",
            "calculations that failed, or another unit; squared errors see nothing else",
            case.drop(kind),
            some(far),
            (f"96 % lie between {low:.4g} and {high:.4g}",),
        )

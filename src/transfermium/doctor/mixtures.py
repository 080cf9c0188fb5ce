"""Labels of two origins under one name: some in another unit, with another sign or of another zero than the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..data.labels import ENERGIES, LENGTHS
from ..data.split import formulas
from . import yardstick
from .base import STATES, Case, Finding, parts, some

LEAST = 4  # structures of each side
LEAST_SHARE = 0.02
GAP = 5.0  # between the two, in standard deviations of either
UNEXPLAINED = 3.0  # times what a potential says that they differ and scatter by
SERIOUS = 1.0  # eV/atom, more than states of electrons and heat make
OTHER_UNITS = ("hartree", "rydberg", "kcal/mol", "kJ/mol", "meV")
SMALL = 0.1  # of the energies of others, are those relative to elements
ALIKE = 0.02  # of energies that only their unit keeps apart
LARGE_FORCE, FEW_ATOMS = 0.1, 5  # eV/Å; of fewer atoms all forces can be wrong at once
LIKE, MOST = 0.5, 0.85  # correlation with a potential, and the share of structures that have it
NEARLY_ALL = 0.95  # likewise, of many substances: a potential fails for some of them
FORCES = {
    f"{energy}/{length}": ENERGIES[energy] / LENGTHS[length]
    for energy, length in (*((unit, "Å") for unit in OTHER_UNITS), ("hartree", "bohr"), ("rydberg", "bohr"))
}


def check(case: Case) -> Iterator[Finding]:
    """Two origins within each source; what else is looked for, is looked for in the rest."""
    for _, indices in parts(case.structures, case.sources):
        for quantity, found in (("energy", _energies(case, indices)), ("forces", _forces(case, indices))):
            for finding in found:
                case.told.setdefault(quantity, set()).update(finding.structures)
                yield finding


def _energies(case: Case, indices: np.ndarray) -> Iterator[Finding]:
    """Two separate groups of energies at one composition, where geometry says nothing of two."""
    known = case.untold(indices[np.isfinite(case.energy)[indices] & (case.n_atoms[indices] > 1)], "energy")
    if len(known) < 2 * LEAST:
        return
    _, substance = np.unique(case.composition[known], axis=0, return_inverse=True)
    odd: dict[str, list[int]] = {}
    measured: dict[str, str] = {}
    for one in np.unique(substance):
        members = known[substance.ravel() == one]
        low = split(case.per_atom(case.energy)[members])
        if low is None:
            continue
        sides = members[low], members[~low]
        explained = _explained(case, indices, *sides)
        name, side = _unit(case, *sides)
        told = any(_tells(case.info(key), *sides) for key in STATES)
        if explained or (not name and (explained is None or told or _apart(case, *sides) < SERIOUS)):
            continue
        odd.setdefault(name, []).extend(side.tolist())
        measured.setdefault(name, _measured(case, *sides))
    if not odd:
        return
    name, found = max(odd.items(), key=lambda item: len(item[1]))
    kind = "energy-mixed-units" if name else "energy-mixed-zero"
    rest = np.setdiff1d(known, found)
    small = np.abs(np.median(case.energy[found])) < SMALL * np.abs(np.median(case.energy[rest]))
    zero = "relative to elements or atoms" if small else "of another zero"
    what = f"in {name}" if name and name != "per atom" else name or zero
    by = "len(atoms)" if name == "per atom" else f"{ENERGIES.get(name, 1.0):.9g}"
    yield Finding(
        kind,
        "error",
        f"Of {len(known):,} structures, {len(found):,} seem to have energies {what}",
        f"two sources were put together: energies of these are {what}, the others are not",
        case.change(*case.relabel("energy", f"LABEL = LABEL * {by}"), of=kind) if name else case.drop(kind),
        some(sorted(found)),
        (measured[name],),
    )


def split(values: np.ndarray) -> np.ndarray | None:
    """Which values lie below the widest gap; None where it is not much wider than both sides."""
    order = np.argsort(values)
    least = max(LEAST, int(LEAST_SHARE * len(values)))
    gaps = np.diff(values[order])[least - 1 : len(values) - least]
    if not len(gaps) or gaps.max() == 0:
        return None
    place = least + int(gaps.argmax())
    low = np.zeros(len(values), bool)
    low[order[:place]] = True
    return low if gaps.max() > GAP * max(values[low].std(), values[~low].std()) else None


def _unit(case: Case, low: np.ndarray, high: np.ndarray) -> tuple[str, np.ndarray]:
    """In which unit one side would be most like the other, and that side; "" and the smaller side for none."""
    factors = {"per atom": float(case.n_atoms[low[0]]), **{unit: ENERGIES[unit] for unit in OTHER_UNITS}}
    found: list[tuple[float, str, np.ndarray]] = []
    for name, factor in factors.items():
        for side, other in ((low, high), (high, low)):
            scaled, energies = case.energy[side] * factor, case.energy[other]
            middle = float(np.median(energies))
            near = ALIKE * abs(middle)
            of_a_size = np.ptp(energies) < abs(middle)  # energies around zero are like any number times small ones
            if of_a_size and ((scaled > energies.min() - near) & (scaled < energies.max() + near)).all():
                found.append((abs(float(np.median(scaled)) - middle), name, side))
    if not found:
        return "", min(low, high, key=len)
    _, name, side = min(found, key=lambda one: one[0])
    return name, side


def _apart(case: Case, low: np.ndarray, high: np.ndarray) -> float:
    """eV/atom."""
    given = case.per_atom(case.energy)
    return float(np.median(given[high]) - np.median(given[low]))


def _measured(case: Case, low: np.ndarray, high: np.ndarray) -> str:
    lower, higher = (float(np.median(case.energy[side])) for side in (low, high))
    ratio = lower / higher if abs(lower) > abs(higher) else higher / lower
    return (
        f"of the same {case.atoms[low[0]].symbols}, energies of structures {_listed(low)} are about {lower:.6g} eV, "
        f"those of {_listed(high)} {higher:.6g} eV: {_apart(case, low, high):.4g} eV/atom apart, or {ratio:.4g} times "
        "as large"
    )


def _explained(case: Case, indices: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool | None:
    """Whether a potential sees as large a difference in the structures; None where it cannot say."""
    found = yardstick.beside(case, indices)
    if found is None:
        return None
    predicted = found.energy / case.n_atoms[found.indices]
    a, b = (predicted[np.isin(found.indices, side)] for side in (low, high))
    if min(len(a), len(b)) < 2:
        return None
    return bool(_apart(case, low, high) < UNEXPLAINED * (abs(np.median(a) - np.median(b)) + a.std() + b.std()))


def _tells(values: list[object], one: np.ndarray, other: np.ndarray) -> bool:
    """Whether information tells the two sides apart."""
    return not {str(values[i]) for i in one} & {str(values[i]) for i in other}


def _forces(case: Case, indices: np.ndarray) -> Iterator[Finding]:
    """Structures whose forces are many times, or the opposite of, what a potential makes of those of the others."""
    first = _multiples(case, yardstick.beside(case, indices), LARGE_FORCE)
    if first is None or not len(first.indices):
        return
    few = len(np.unique(formulas([case.atoms[i] for i in first.indices]))) <= yardstick.FEW_SUBSTANCES
    most = MOST if few else NEARLY_ALL
    if _odd(first, most) is None:
        return
    every = _multiples(case, yardstick.beside(case, indices, every=True), yardstick.LEAST_FORCE)
    odd = _odd(every, most) if every else None
    if every is None or odd is None:
        return
    members, rest = every.indices[odd], np.median(np.abs(every.times[~odd]))
    times = float(np.median(every.times[odd])) / float(rest)
    evidence = (
        f"those of the others are {rest:.3g} times what a potential says, these {times * rest:.3g} times",
        f"of {len(indices) - len(every.indices):,} structures with small forces or few atoms nothing can be said",
    )
    unit = min(FORCES, key=lambda name: abs(np.log(abs(times) * FORCES[name])))
    scale = 1.0 if abs(np.log(abs(times))) < np.log(3) else FORCES[unit]
    kind = "forces-mixed-units" if scale != 1 else "forces-mixed-sign"
    what = f"{'gradients' if times < 0 else ''}{' ' if times < 0 and scale != 1 else ''}"
    what += f"in {unit}" if scale != 1 else ""
    yield Finding(
        kind,
        "error",
        f"Of {len(every.indices):,} structures with large forces, {len(members):,} seem to have {what}",
        f"two sources were put together: {what} are the labels of these, and not of the others",
        case.change(*case.relabel("forces", f"LABEL = {np.sign(times) * scale:.9g} * np.asarray(LABEL)"), of=kind),
        some(members),
        evidence,
    )


class Multiples(NamedTuple):
    """How many times forces are those that a potential says, where these are large; negative for the wrong sign."""

    indices: np.ndarray
    times: np.ndarray
    r: np.ndarray


def _multiples(case: Case, found: yardstick.Beside | None, least: float) -> Multiples | None:
    if found is None:
        return None
    label, predicted = found.forces
    products = ((label, label), (predicted, predicted), (label, predicted))
    ll, pp, lp = (np.bincount(found.owner, (a * b).sum(axis=1), len(found.indices)) for a, b in products)
    n = case.n_atoms[found.indices]
    large = (ll > 0) & (pp > 3 * n * least**2) & (n >= FEW_ATOMS)
    ll, pp, lp = ll[large], pp[large], lp[large]
    return Multiples(found.indices[large], np.sign(lp) * np.sqrt(ll / pp), lp / np.sqrt(ll * pp))


def _odd(one: Multiples, most: float) -> np.ndarray | None:
    """Which are of another sign or size; None where there are no two kinds."""
    clear = np.abs(one.r) > LIKE
    least = max(LEAST, LEAST_SHARE * len(one.r))
    if len(one.r) < 2 * LEAST or clear.mean() < most:
        return None
    negative = one.times < 0
    if min((negative & clear).sum(), (~negative & clear).sum()) >= least:
        return negative
    sizes = np.log(np.abs(one.times))
    low = split(sizes)
    if low is None or abs(np.median(sizes[low]) - np.median(sizes[~low])) < np.log(10):
        return None
    return max((low, ~low), key=lambda side: abs(float(np.median(sizes[side])) - np.log(1.7)))


def _listed(members: np.ndarray) -> str:
    """The first few, in order."""
    return ", ".join(map(str, members[:5])) + (", ..." if len(members) > 5 else "")

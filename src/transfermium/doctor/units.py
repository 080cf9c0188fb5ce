"""Units and signs of energy, forces and stress, from what they must have to do with each other and with distances.

No single clue is enough: the work along a trajectory gives only the ratio of energies and forces, a yardstick only
orders of magnitude and signs, total energies only some units. So every combination of usual mistakes predicts all
clues, and the one that explains them best is told, if it does so far better than no mistake at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np

from ..data.labels import ENERGIES, LENGTHS, factor
from ..data.split import formulas
from . import yardstick
from .base import Case, Finding, parts, some
from .pairs import Pairs, Slope, similar, slope

LEAST_STRUCTURES = 5
MANY_ELEMENTS = 10  # whose compounds differ by energies of bonds, which no potential gets wrong by much
CERTAIN = 6.0  # natural logarithm of how much better a mistake explains the clues than none
CLOSE = 2.0  # below which another mistake is named too
SILENT = 4.0  # a measurement that makes no sense under one kind, and does under another
HUGE = 30.0  # times as large as a potential says, which no compression makes of a stress
WORST = 16.0  # that one clue can count: any clue can be wrong

# Energies of atoms in hartree: of all electrons (Hartree-Fock), of valence electrons (sums of ionization energies)
ALL_ELECTRONS = dict(
    zip(
        range(1, 37),
        (
            0.5,
            2.862,
            7.433,
            14.573,
            24.529,
            37.689,
            54.401,
            74.809,
            99.409,
            128.547,
            161.859,
            199.615,
            241.877,
            288.854,
            340.719,
            397.505,
            459.482,
            526.817,
            599.165,
            676.758,
            759.736,
            848.406,
            942.884,
            1043.357,
            1149.866,
            1262.444,
            1381.415,
            1506.871,
            1638.964,
            1777.848,
            1923.261,
            2075.360,
            2234.239,
            2399.868,
            2572.441,
            2752.055,
        ),
        strict=True,
    )
)
VALENCE = {
    1: 0.5,
    5: 2.624,
    6: 5.439,
    7: 9.808,
    8: 15.915,
    9: 24.21,
    13: 1.957,
    14: 3.789,
    15: 6.497,
    16: 10.165,
    17: 15.027,
}


class Mistake(NamedTuple):
    """One way in which a label can be given.

    Attributes:
        unit: as an option takes it; a leading minus turns the sign.
        size: the label is so many times what it should be; negative for the wrong sign.
        reasons: and the logarithm of how rare each is; shared ones count once.
        kind: "total" or "per atom", "stress" or "virial".
    """

    unit: str
    size: float
    reasons: tuple[tuple[str, float], ...] = ()
    kind: str = ""

    @property
    def words(self) -> str:
        sign = "the opposite sign and " if self.size < 0 and self.unit in ("eV/Å", "-eV/Å") else ""
        return f"{sign}{self.unit.removeprefix('-')}" if sign else self.unit


class Clue(NamedTuple):
    """A measured product of sizes of labels.

    Attributes:
        powers: of the sizes of energy, forces and stress in it.
        value: measured, with its sign.
        error: of its logarithm; infinite where only the sign is known.
        kinds: of energy and stress, under which it was measured; "" for any.
        words: how.
        source: clues of one source are the same measurement, made under each kind.
        signed: whether the sign of the value is known.
    """

    powers: tuple[int, int, int]
    value: float
    error: float
    kinds: tuple[str, str]
    words: str
    source: str = ""
    signed: bool = True


FAMILIES = {"hartree": 3.0, "kcal/mol": 3.3, "rydberg": 4.3, "kJ/mol": 4.3, "meV": 4.0}
PER_ATOM, SIGN, BOHR, VIRIAL = ("per atom", 3.0), ("sign", 3.0), ("bohr", 4.5), ("virial", 3.5)


def check(case: Case) -> Iterator[Finding]:
    """Units and signs, of each source by itself."""
    for name, indices in parts(case.structures, case.sources):
        indices = case.untold(indices, "energy", "forces")
        if len(indices) >= LEAST_STRUCTURES:
            yield from _of_part(case, name, indices)


def _of_part(case: Case, name: str, indices: np.ndarray) -> Iterator[Finding]:
    clues = list(_clues(case, indices))
    if not clues:
        return
    scored = sorted(((_score(one, clues), one) for one in _combinations(case)), key=lambda s: -s[0])
    best_score, best = scored[0]
    right = next(score for score, one in scored if not any(mistake.reasons for mistake in one))
    if best_score - right < CERTAIN:
        return
    wrong = {q: one for q, one in zip(("energy", "forces", "stress"), best, strict=True) if one.reasons}
    fix = _fix(_only(case, name), wrong)
    for quantity, mistake in wrong.items():
        place = ("energy", "forces", "stress").index(quantity)
        case.kept["wrong", quantity] = True
        rest = [one for score, one in scored if best_score - score < CLOSE and one[place] != mistake]
        others = list(dict.fromkeys(_described(quantity, one[place]) for one in rest))
        yield _finding(case, name, indices, quantity, mistake, others, clues, best_score - right, fix)


def _combinations(case: Case) -> Iterator[tuple[Mistake, Mistake, Mistake]]:
    """Of what labels there are, in every unit that is used for them."""
    energies, forces, stresses = (
        [Mistake("eV", 1.0, (), "total")],
        [Mistake("eV/Å", 1.0)],
        [Mistake("eV/Å^3", 1.0, (), "stress")],
    )
    if "energy" in case.labels:
        own = [("eV", ()), *((unit, ((unit, rare),)) for unit, rare in FAMILIES.items())]
        energies = [
            Mistake(
                f"{unit}{'/atom' if kind else ''}",
                1 / ENERGIES[unit],
                (*why, *((PER_ATOM,) if kind else ())),
                "per atom" if kind else "total",
            )
            for (unit, why), kind in product(own, ("", "per atom"))
        ]
    if "forces" in case.labels:
        usual = {"hartree": "bohr", "rydberg": "bohr"}
        for unit, length, sign in product(("eV", *FAMILIES), ("Å", "bohr"), (1, -1)):
            odd = () if length == usual.get(unit, "Å") else (BOHR,)
            why = (((unit, FAMILIES[unit]),) if unit in FAMILIES else ()) + odd + ((SIGN,) if sign < 0 else ())
            size = sign * LENGTHS[length] / ENERGIES[unit]
            if why:
                forces.append(Mistake(f"{'-' if sign < 0 else ''}{unit}/{length}", size, why))
    if "stress" in case.labels:
        pressures = {"eV/Å^3": 0.0, "GPa": 3.0, "kbar": 3.0, "hartree/bohr^3": FAMILIES["hartree"], "MPa": 5.0}
        for (unit, rare), sign in product(pressures.items(), (1, -1)):
            vasp = 0.5 if unit == "kbar" else SIGN[1] if unit == "eV/Å^3" else 1.0
            why = (((unit.split("/")[0], rare),) if rare else ()) + ((("sign of stress", vasp),) if sign < 0 else ())
            if why:
                stresses.append(
                    Mistake(f"{'-' if sign < 0 else ''}{unit}", sign / abs(factor("stress", unit)), why, "stress")
                )
        for sign in (1, -1):
            why = (VIRIAL, ("sign of virial", 1.0)) if sign > 0 else (VIRIAL,)
            stresses.append(Mistake(f"{'-' if sign > 0 else ''}virial", sign, why, "virial"))
    yield from product(energies, forces, stresses)


def _score(one: tuple[Mistake, Mistake, Mistake], clues: list[Clue]) -> float:
    """Logarithm of the likelihood and the prior."""
    reasons = dict(reason for mistake in one for reason in mistake.reasons)
    total = -sum(reasons.values())
    told = set()
    for clue in clues:
        if clue.kinds[0] not in ("", one[0].kind) or clue.kinds[1] not in ("", one[2].kind):
            continue
        told.add(clue.source)
        expected = math.prod(mistake.size**power for mistake, power in zip(one, clue.powers, strict=True))
        lost = WORST if clue.signed and expected * clue.value < 0 else 0.0
        if math.isfinite(clue.error):
            lost += (math.log(abs(clue.value / expected)) / clue.error) ** 2 / 2
        total -= min(lost, WORST)
    return total - SILENT * len({clue.source for clue in clues if clue.source} - told)


# ---------------------------------------------------------------------------------------------------------------- clues


def _clues(case: Case, indices: np.ndarray) -> Iterator[Clue]:
    yield from _from_extensivity(case, indices)
    yield from _from_pairs(case, indices, similar(case, indices))
    yield from _from_yardstick(case, yardstick.beside(case, indices))
    yield from _from_totals(case, indices)
    apart, sizes = case.contacts.repulsion[indices].sum(axis=0)
    if (case.contacts.repulsion[indices, 1] > 0).sum() >= LEAST_STRUCTURES and abs(apart) > 0.6 * sizes:
        side = "apart" if apart > 0 else "together"
        yield Clue((0, 1, 0), apart, math.inf, ("", ""), f"forces push atoms that are too close {side}")


def _from_pairs(case: Case, indices: np.ndarray, pairs: Pairs) -> Iterator[Clue]:
    still = pairs.strain < 1e-4
    beside = yardstick.beside(case, indices)
    if "forces" in case.labels and not (beside and yardstick.unrelated(beside)):
        for kind, change in _kinds(case, pairs):
            among = [still, still & (pairs.distance < 0.08)]
            fits = [(slope(change[some], pairs.by_forces[some]), some) for some in among]
            found, chosen = max(fits, key=lambda fit: fit[0].agreement if fit[0] else 0)
            if found and found.holds:
                words = (
                    f"between {found.n} pairs of similar structures the energy changes by {found.value:.4g} times the "
                    "work of the forces"
                )
                yield Clue(
                    (1, -1, 0), found.value, _error(found, pairs.only(chosen)), (kind, ""), words, "work of forces"
                )
    if "stress" not in case.labels:
        return
    size = np.abs(pairs.by_stress)
    strained = (pairs.strain > 2e-4) & (pairs.distance < 0.15) & (np.abs(np.nan_to_num(pairs.by_forces)) < 0.2 * size)
    for kind, change in _kinds(case, pairs):
        for what, work in (("stress", pairs.by_stress), ("virial", pairs.by_stress / case.volume[pairs.a])):
            found = slope(change[strained], work[strained])
            if found and found.holds:
                words = (
                    f"between {found.n} strained pairs the energy changes by {found.value:.4g} times the {what}'s work"
                )
                error = _error(found, pairs.only(strained))
                yield Clue((1, 0, -1), found.value, error, (kind, what), words, "work of stress")


def _error(found: Slope, pairs: Pairs) -> float:
    """Of the logarithm of a slope; pairs share structures, and far ones are off by a third, all to one side."""
    structures = len(np.union1d(pairs.a, pairs.b))
    return float(max(0.04, 6 * np.median(pairs.distance) ** 2, 2 * found.spread / math.sqrt(structures)))


def _kinds(case: Case, pairs: Pairs) -> Iterator[tuple[str, np.ndarray]]:
    yield "total", pairs.change
    if len(pairs.a):
        yield "per atom", pairs.change * case.n_atoms[pairs.a]


def _from_yardstick(case: Case, found: yardstick.Beside | None) -> Iterator[Clue]:
    if found is None:
        return
    name = "the base" if case.base is case.yardstick else "the model that ships with the package"
    one = yardstick.fit(found.forces[0].ravel(), found.forces[1].ravel(), yardstick.LEAST_FORCE)
    if one and abs(one.r) > yardstick.LEAST_R:
        words = f"forces are {one.slope:.3g} times those of {name} (correlation {one.r:.2f})"
        yield Clue((0, 1, 0), one.slope / 1.7, 0.55, ("", ""), words)
    substance = formulas([case.atoms[i] for i in found.indices])
    predicted = yardstick.about_mean_pressure(found.stress[1], substance)
    volume = case.volume[found.indices, None, None]
    logs: dict[str, float] = {}
    for kind, stress in (("stress", found.stress[0]), ("virial", found.stress[0] / volume)):
        given = yardstick.about_mean_pressure(stress, substance)
        one = yardstick.fit(given.ravel(), predicted.ravel(), yardstick.LEAST_STRESS)
        if one and abs(one.r) > yardstick.LEAST_R and not yardstick.contradicts(stress, found.stress[1], one.r):
            words = f"as a {kind} the labels are {one.slope:.3g} times the stress of {name} (correlation {one.r:.2f})"
            yield Clue((0, 0, 1), one.slope, 0.6, ("", kind), words, "stress")
            logs[kind] = one.r
        elif one and abs(one.slope) > HUGE:
            words = f"as a {kind} the labels are {abs(one.slope):.3g} times as large as the stress of {name}"
            yield Clue((0, 0, 1), abs(one.slope), 1.0, ("", kind), words, "stress", signed=False)
    if len(logs) == 2 and np.nanstd(np.log(volume)) > 0.3:
        difference = abs(logs["stress"]) - abs(logs["virial"])
        for kind, worse in (("stress", -difference), ("virial", difference)):
            if worse > 0.05:
                words = f"as a {kind} the labels follow {name} less well (by {worse:.2f} in correlation)"
                yield Clue((0, 0, 0), math.exp(min(worse * 20, 4)), 1.0, ("", kind), words)
    for kind, totals in (("total", case.energy), ("per atom", case.energy * case.n_atoms)):
        given = case.per_atom(totals)[found.indices]
        known = np.isfinite(given) & np.isfinite(found.energy)
        shares = case.composition[found.indices][known] / case.n_atoms[found.indices][known, None]
        free = known.sum() - np.linalg.matrix_rank(shares) if known.any() else 0
        if free < 20:
            continue
        predicted = found.energy / case.n_atoms[found.indices]
        one = yardstick.fit(_residual(given[known], shares), _residual(predicted[known], shares), 1e-3)
        if one and one.r > 0.8:
            words = (
                f"beyond the composition, energies differ {one.slope:.3g} times as much as those of {name} "
                f"(correlation {one.r:.2f})"
            )
            many = shares.any(axis=0).sum() >= MANY_ELEMENTS
            yield Clue(
                (1, 0, 0), one.slope / (1.1 if many else 1.3), 0.45 if many else 1.0, (kind, ""), words, "energies"
            )


def _residual(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    shares = shares[:, shares.any(axis=0)]
    return values - shares @ np.linalg.lstsq(shares, values, rcond=None)[0]


def _from_extensivity(case: Case, indices: np.ndarray) -> Iterator[Clue]:
    """Whether energies grow with the number of atoms, at equal shares of the elements."""
    known = indices[np.isfinite(case.energy)[indices] & (case.n_atoms[indices] > 1)]
    if len(known) < 20:
        return
    shares = case.composition[known] / case.n_atoms[known, None]
    _, group = np.unique(np.round(shares, 6), axis=0, return_inverse=True)
    group = group.ravel()
    logs = np.log(case.n_atoms[known])
    spread = logs - (np.bincount(group, logs) / np.bincount(group))[group]
    if np.square(spread).sum() < 0.5 or np.median(np.abs(case.energy[known])) == 0:
        if np.std(logs) < 0.3 or len(known) - np.linalg.matrix_rank(shares) < 20:
            return
        left = {
            kind: np.median(np.abs(_residual(case.energy[known] / n, shares) * n / np.median(n)))
            for kind, n in (("total", case.n_atoms[known]), ("per atom", np.ones(len(known))))
        }
        better = math.log(max(left["total"], 1e-12) / max(left["per atom"], 1e-12))  # positive: they are per atom
        sizes = {
            kind: np.median(np.abs(case.energy[known] / n))
            for kind, n in (("total", case.n_atoms[known]), ("per atom", 1.0))
        }
        better -= math.log(sizes["total"] / sizes["per atom"])
    else:
        sizes = np.log(np.abs(case.energy[known]) + 1e-12)
        sizes -= (np.bincount(group, sizes) / np.bincount(group))[group]
        power = float((sizes * spread).sum() / np.square(spread).sum())  # 1 for totals
        if not -0.5 < power < 1.5:
            return
        better = 6 * (0.5 - power)
    if abs(better) < 0.7:
        return
    wrong = "total" if better > 0 else "per atom"
    grow = "do not grow" if better > 0 else "grow"
    words = f"energies {grow} with the number of atoms: they are {'per atom' if better > 0 else 'totals'}"
    yield Clue((0, 0, 0), math.exp(min(4.0, 3 * abs(better))), 1.0, (wrong, ""), words)


def _from_totals(case: Case, indices: np.ndarray) -> Iterator[Clue]:
    """Total energies of atoms with all, or with the valence electrons, are known to some percent in any functional."""
    known = indices[np.isfinite(case.energy)[indices]]
    for name, table, error in (("all electrons", ALL_ELECTRONS, 0.01), ("the valence electrons", VALENCE, 0.03)):
        covered = np.zeros(119, bool)
        covered[list(table)] = True
        inside = known[~case.composition[known][:, ~covered].any(axis=1)] if len(known) else known
        if len(inside) < max(LEAST_STRUCTURES, 0.5 * len(known)):
            continue
        energies = np.array([table.get(z, 0.0) for z in range(119)]) * -ENERGIES["hartree"]
        expected = case.composition[inside] @ energies
        for kind, given in (("total", case.energy[inside]), ("per atom", case.energy[inside] * case.n_atoms[inside])):
            ratio = given / expected
            middle = float(np.median(ratio))
            if middle <= 0 or np.median(np.abs(ratio / middle - 1)) > 2 * error:
                continue
            if min(abs(math.log(middle * unit)) for unit in ENERGIES.values()) < 2 * error:
                words = f"energies are {middle:.4g} times those of the atoms with {name}"
                yield Clue((1, 0, 0), middle, error, (kind, ""), words, "totals")


# -------------------------------------------------------------------------------------------------------------- finding


def _described(quantity: str, mistake: Mistake) -> str:
    if quantity == "forces":
        turned = mistake.unit.startswith("-")
        unit = mistake.unit.removeprefix("-")
        return (
            "gradients, which have the opposite sign"
            if turned and unit == "eV/Å"
            else f"{'gradients ' if turned else ''}in {unit}"
        )
    if mistake.kind == "virial":
        return "virials, not stresses" + ("" if mistake.unit == "virial" else ", of the opposite sign")
    if quantity == "stress":
        if mistake.unit == "-eV/Å^3":
            return "of the opposite sign: positive under compression, as in VASP and LAMMPS"
        sign = ", positive under compression (VASP)" if mistake.unit.startswith("-") else ""
        return f"in {mistake.unit.removeprefix('-')}{sign}"
    return f"in {mistake.unit}" if mistake.unit != "eV/atom" else "per atom, not totals"


PLURALS = {"energy": "energies", "forces": "forces", "stress": "stresses"}


def _finding(
    case: Case,
    name: str,
    indices: np.ndarray,
    quantity: str,
    mistake: Mistake,
    others: list[str],
    clues: list[Clue],
    odds: float,
    fix: str,
) -> Finding:
    place = ("energy", "forces", "stress").index(quantity)
    kind = f"{quantity}-unit"
    if quantity == "forces" and mistake.unit == "-eV/Å":
        kind = "forces-sign"
    elif quantity == "stress" and mistake.unit == "-eV/Å^3":
        kind = "stress-sign"
    elif quantity == "stress" and mistake.kind == "virial":
        kind = "stress-virial"
    elif mistake.unit == "eV/atom":
        kind = "energy-per-atom"
    where = f" of {name}" if name else ""
    said = [clue.words for clue in clues if clue.powers[place] or (mistake.kind and mistake.kind in clue.words)]
    doubt = f" (or {' or '.join(others)})" if others else ""
    return Finding(
        kind,
        "error",
        f"The {PLURALS[quantity]}{where} are {_described(quantity, mistake)}",
        f"the {quantity} labels are {_described(quantity, mistake)}{doubt}",
        fix,
        some(indices[_labelled(case, quantity)[indices]]),
        (*said, f"this explains what was measured e^{odds:.0f} times better than our units and signs"),
    )


def _labelled(case: Case, quantity: str) -> np.ndarray:
    if quantity == "forces":
        return case.has_forces
    return np.isfinite(case.energy if quantity == "energy" else case.stress[:, 0, 0])


def _only(case: Case, name: str) -> Case:
    """The case with commands for one source."""
    if not name:
        return case
    import copy

    one = copy.copy(case)
    one.sources = (name,)
    return one


def _fix(case: Case, wrong: dict[str, Mistake]) -> str:
    """What mends all labels of a source at once: a command, or Python for what no unit can say."""
    if all(_is_said(case, quantity, mistake) for quantity, mistake in wrong.items()):
        return case.convert({quantity: mistake.unit for quantity, mistake in wrong.items()})
    lines = []
    for quantity, mistake in wrong.items():
        by = {"per atom": " * len(atoms)", "virial": " / atoms.get_volume()"}.get(mistake.kind, "")
        lines += case.relabel(quantity, f"LABEL = {1 / mistake.size:.9g} * np.asarray(LABEL){by}")
    return case.change(*lines)


def _is_said(case: Case, quantity: str, mistake: Mistake) -> bool:
    """Whether a unit can say the mistake; what was declared before, virials and gradients have none."""
    keys = [key.lower() for _, key, _ in case.labels[quantity].keys]
    virials = mistake.kind == "virial" or any(key.endswith(("virial", "virials")) for key in keys)
    return not (quantity in case.unit or virials or (quantity == "forces" and mistake.size < 0))

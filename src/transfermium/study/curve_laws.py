"""What a learning curve says: laws, what a label is worth, what pre-training structures are worth, one sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..evaluate import PRINTED
from .laws import Estimate, Fit, fit, fits, short, surfaces
from .points import DELTA, DIRECT, LONG, SCRATCH, TOGETHER
from .savings import answer, error_in_words, factors, ratio, saved, scarce, slopes, verdict

Point = Mapping[str, Any]  # what a cell says of one point
Arm = tuple[str, int | None]  # its name, and the number of structures of its base
FROM_SCRATCH: Arm = (SCRATCH, None)
AS_LONG: Arm = (LONG, None)  # from scratch for the time of both stages
MARGIN = 0.1  # of exponents: slopes that differ by less are said to be equal
SEVERAL = 3  # runs that are still named one by one
DOES = {DELTA: "Learning the difference", TOGETHER: "Learning both levels together"}  # others are pre-trained


class Goal(NamedTuple):
    """An error to reach: of which quantity, in its unit."""

    quantity: str
    error: float


def goal_of(text: str | float, units: Mapping[str, str]) -> Goal:
    """An error such as 0.05 (of the first quantity, in its unit), "43meV/atom", "50 meV/Å" or "0.5GPa"; of energies
    it is that of one atom, also as "43meV".

    Args:
        units: quantity to unit, the first one is meant where no unit is given.
    """
    value, unit = number_of(text)
    if not unit:
        return Goal(next(iter(units)), value)
    for prefix, factor in (("", 1.0), ("m", 1e-3), ("k", 1e3)):
        known = {prefix + own: name for name, own in units.items() if own}
        if prefix:  # of labels in meV, 0.3 eV
            bare = {own.removeprefix(prefix): name for name, own in units.items() if own.startswith(prefix)}
            if unit in bare:
                return Goal(bare[unit], value / factor)
        known |= {whole.removesuffix("/atom"): name for whole, name in known.items() if whole.endswith("/atom")} | known
        if unit in known:
            return Goal(known[unit], value * factor)
    for name, own in units.items():
        printed, scale = PRINTED.get(own, ("", 1.0))
        if unit == printed:
            return Goal(name, value / scale)
    declare = "" if all(units.values()) else "; --unit NAME=UNIT declares that of a label"
    raise InputError(f"the target error '{text}' has the unit {unit}, but errors here are in {_listed(units)}{declare}")


def number_of(text: str | float) -> tuple[float, str]:
    """The number and the unit of an error, which may be none."""
    found = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\W\d].*)?", str(text))
    if not found or not 0 < float(found[1]) < math.inf:
        raise InputError(f"the target error '{text}' is not a number above zero with a unit, such as 43meV/atom")
    return float(found[1]), re.sub(r"/(A|Ang|Angstrom|Ångström)\b", "/Å", (found[2] or "").strip())


def _listed(units: Mapping[str, str]) -> str:
    return ", ".join(f"{unit or 'no unit'} ({name})" for name, unit in units.items())


class Curves:
    """The errors of all arms as curves.

    Args:
        points: what cells say; those without errors are left out.
        groups: the material of each test structure.
        learned: labels of the objective; other quantities, such as forces where energies were learned, come behind.
    """

    def __init__(self, points: Sequence[Point], groups: Sequence[Any] | None = None, learned: Sequence[str] = ()):
        self.points = [point for point in points if point["errors"]]
        self.asked = points
        self.groups = groups
        if not self.points:
            raise InputError("all trainings diverged, so that there is no curve: try smaller learning rates (--rates)")
        shared = [set(point["errors"]) for point in self.points]
        names = [name for name in self.points[0]["errors"] if all(name in own for own in shared)]
        self.quantities = in_order(names, learned)
        self.units = {name: self.points[0]["units"][name] for name in self.quantities}
        self.arms: list[Arm] = list(dict.fromkeys(_arm(point) for point in self.points))
        self.fit = cache(self._fit)

    def seeds(self, arm: Arm) -> tuple[int, ...]:
        """Those at which the arm has every size that it has at all."""
        own = [(point["seed"], point["n_train"]) for point in self.points if _arm(point) == arm]
        sizes = {n for _, n in own}
        return tuple(sorted({s for s, _ in own if {n for other, n in own if other == s} == sizes}))

    def sizes(self, arm: Arm) -> list[int]:
        return sorted({point["n_train"] for point in self.points if _arm(point) == arm})

    def errors(self, arm: Arm, quantity: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        """(n_seeds, n_sizes, n_test); where nothing is wrong, half a mistake, or half of the least error of any arm."""
        by = {(p["seed"], p["n_train"]): p["errors"][quantity] for p in self.points if _arm(p) == arm}
        seeds = self.seeds(arm) if seeds is None else seeds
        found = np.array([[by[seed, n] for n in self.sizes(arm)] for seed in seeds], float)
        return found + np.where(found.any(axis=2, keepdims=True), 0.0, self._half(quantity))

    def _half(self, quantity: str) -> float:
        if self.units[quantity] == "wrong":
            return 0.5 / len(self.points[0]["errors"][quantity])
        means = (float(np.mean(point["errors"][quantity])) for point in self.points)
        return 0.5 * min((mean for mean in means if mean > 0), default=1.0)

    def _fit(self, arm: Arm, quantity: str, seeds: tuple[int, ...], form: str | None = None) -> Fit:
        return fit(self.sizes(arm), self.errors(arm, quantity, seeds), form, groups=self.groups)

    def laws(self, arm: Arm, quantity: str) -> list[Fit]:
        return fits(self.sizes(arm), self.errors(arm, quantity), groups=self.groups)

    def pair(self, arm: Arm, quantity: str, form: str | None = None, against: Arm = FROM_SCRATCH) -> tuple[Fit, Fit]:
        """The arm and scratch, or another one, at the seeds of both."""
        both = tuple(seed for seed in self.seeds(arm) if seed in self.seeds(against))
        return self.fit(arm, quantity, both, form), self.fit(against, quantity, both, form)

    def has_curve(self, arm: Arm) -> bool:
        return len(self.sizes(arm)) > 1 and bool(self.seeds(arm))

    def comparable(self, arm: Arm, against: Arm = FROM_SCRATCH) -> bool:
        """Whether both have curves with seeds and sizes in common; some of their runs may have diverged."""
        seeds = set(self.seeds(arm)) & set(self.seeds(against))
        sizes = set(self.sizes(arm)) & set(self.sizes(against))
        return bool(seeds and sizes) and self.has_curve(arm) and self.has_curve(against)

    def diverged(self, *arms: Arm) -> list[tuple[str, int, int]]:
        """Runs without errors, as arm, size and seed; of these arms, or of all."""
        lost = (p for p in self.asked if not p["errors"] and (not arms or _arm(p) in arms))
        return [(name_of(_arm(p)), p["n_train"], p["seed"]) for p in lost]


def summary(
    curves: Curves,
    *,
    chosen: Arm | None,
    goal: Goal | None = None,
    cost: float | None = None,
    margin: float = MARGIN,
    labels: int,
) -> dict[str, Any]:
    """Laws, factors, labels needed and the verdict.

    Args:
        chosen: the arm that the verdict is about, chosen without test errors.
        goal: an error to reach.
        cost: hours of one label.
        margin: of exponents, below which slopes are equal.
        labels: how many there are now.
    """
    result: dict[str, Any] = {"units": curves.units, "fits": {}, "factors": {}, "labels needed": {}, "ratios": {}}
    result |= {"diverged": [list(run) for run in curves.diverged()], "scarce": {}}
    others = [arm for arm in curves.arms if arm[0] != SCRATCH and curves.comparable(arm)]
    drawn = [arm for arm in curves.arms if curves.has_curve(arm)]
    for quantity in curves.quantities:
        result["fits"][quantity] = {name_of(a): [law.record() for law in curves.laws(a, quantity)] for a in drawn}
        result["factors"][quantity] = {name_of(arm): _factors(curves, arm, quantity, cost) for arm in others}
        result["ratios"][quantity] = {name_of(arm): list(ratio(*curves.pair(arm, quantity))) for arm in others}
        result["scarce"][quantity] = {name_of(arm): scarce(*curves.pair(arm, quantity)) for arm in others}
    if longer := [arm for arm in others if arm[0] not in DIRECT and curves.comparable(arm, AS_LONG)]:
        result["equal compute"] = {
            quantity: {
                name_of(arm): {
                    "ratio": list(ratio(*curves.pair(arm, quantity, against=AS_LONG))),
                    "factors": _factors(curves, arm, quantity, cost, AS_LONG),
                    "scarce": scarce(*curves.pair(arm, quantity, against=AS_LONG)),
                }
                for arm in longer
            }
            for quantity in curves.quantities
        }
    if goal is not None:
        result["goal"] = goal._asdict()
        for arm in drawn:
            needed = curves.fit(arm, goal.quantity, curves.seeds(arm)).inverse(goal.error)
            result["labels needed"][name_of(arm)] = recorded(needed)
    if grown := pretraining_sizes(curves, margin):
        result["pre-training sizes"] = grown
    result["verdict"] = _verdict(curves, chosen, goal, cost, labels)
    if chosen is not None:
        result["verdict"] += _difference(curves, chosen, curves.quantities[0] if goal is None else goal.quantity)
    return result


def _factors(
    curves: Curves, arm: Arm, quantity: str, cost: float | None, against: Arm = FROM_SCRATCH
) -> list[dict[str, Any]]:
    transfer, scratch = curves.pair(arm, quantity, against=against)
    rows = []
    for n, factor in zip(curves.sizes(arm), factors(transfer, scratch), strict=True):
        row = {"n_train": n, **recorded(factor)}
        if cost is not None:
            row["hours saved"] = recorded(saved(factor, n, cost))
        rows.append(row)
    return rows


def _verdict(curves: Curves, chosen: Arm | None, goal: Goal | None, cost: float | None, labels: int) -> str:
    if chosen is None:
        return "No arm but training from scratch was asked for: there is nothing to compare."
    if len({point["n_train"] for point in curves.points}) == 1:
        return "One size makes no curve: there is nothing to say of labels that were saved."
    if not curves.comparable(chosen):
        return f"So many runs diverged that {name_of(chosen)} cannot be compared with training from scratch."
    quantity = curves.quantities[0] if goal is None else goal.quantity
    transfer, scratch = curves.pair(chosen, quantity)
    unit = curves.units[quantity]
    target = None if goal is None else goal.error
    what = DOES.get(chosen[0], "Pre-training")
    found = verdict(transfer, scratch, target=target, unit=unit, cost=cost, what=what)
    said = f"{_spoken(quantity)}, {name_of(chosen)}: {found}{_lost(curves, chosen, len(transfer.logs))}"
    if chosen[0] not in DIRECT and curves.comparable(chosen, AS_LONG):
        fair = verdict(*curves.pair(chosen, quantity, against=AS_LONG), cost=cost, what=what, against=LONG)
        said += f" Against scratch for as long as both stages: {fair[0].lower()}{fair[1:]}"
    if goal is None:
        return said
    error, found = error_in_words(goal.error, unit), answer(transfer, scratch)
    asked = {"From scratch": scratch} if found != "helps" else {}
    asked |= {f"With {name_of(chosen)}": transfer} if found not in ("hurts", "no") else {}
    told = {side: _at_hand(law.inverse(goal.error), error, labels) for side, law in asked.items()}
    if found == "helps" or (len(told) > 1 and len(set(told.values())) == 1):
        return f"{said} {told.popitem()[1]}"
    return " ".join([said, *(f"{side}: {text[0].lower()}{text[1:]}" for side, text in told.items())])


def _difference(curves: Curves, chosen: Arm, quantity: str) -> str:
    """A sentence where a difference from a cheap value is learned clearly better than the value itself."""
    delta: Arm = (DELTA, None)
    if chosen == delta or not curves.comparable(delta, chosen):
        return ""
    found = ratio(*curves.pair(delta, quantity, against=chosen))
    if not found.high < 1:
        return ""
    return (
        " Where the cheap value of each new structure is known, learn the difference from it: errors with delta are "
        f"{short(found.value)} times those with {name_of(chosen)} ({short(found.low)} to {short(found.high)})."
    )


def _lost(curves: Curves, chosen: Arm, n_seeds: int) -> str:
    """A sentence on runs that diverged, where there are some."""
    arms = (chosen, FROM_SCRATCH)
    lost = curves.diverged(*arms)
    if not lost:
        return ""
    asked = {point["seed"] for point in curves.asked if _arm(point) in arms}
    count = f"; compared are {n_seeds} of {len(asked)} seeds" if n_seeds < len(asked) else ""
    many = f"{len(lost)} of {' and '.join(dict.fromkeys(arm for arm, *_ in lost))}"
    return f" Runs that diverged are left out: {runs_in_words(lost) if len(lost) <= SEVERAL else many}{count}."


def _at_hand(needed: Estimate, error: str, labels: int) -> str:
    """Whether the labels at hand are enough."""
    if needed.value == math.inf and needed.most <= labels:
        return f"The curve ends at {short(needed.most)} labels above {error}: measure more, up to {labels}."
    if needed.low == -math.inf and needed.high == math.inf:
        return f"Whether the {labels} labels at hand are enough cannot be said."
    if needed.high <= labels:
        return f"The {labels} labels at hand are enough."
    if needed.value <= labels:
        most = f"more than {short(needed.most)}" if needed.high == math.inf else short(needed.high)
        return f"The {labels} labels at hand are probably enough, though it may take {most}."
    more = needed.times(1.0, -labels)
    more = more._replace(low=max(more.low, 0.0))
    return f"With {labels} labels at hand, {more} {'are missing' if more.value == math.inf else 'more are needed'}."


def pretraining_sizes(curves: Curves, margin: float = MARGIN) -> dict[str, Any]:
    """What structures to pre-train on are worth: a law of their number at each number of labels, whether its slope is
    that of the labels, and a law of both numbers."""
    grown: dict[str, list[Arm]] = {}
    for arm in curves.arms:
        if arm[1] is not None:
            grown.setdefault(arm[0], []).append(arm)
    result: dict[str, Any] = {}
    for name, arms in grown.items():
        arms = sorted((arm for arm in arms if curves.has_curve(arm)), key=lambda arm: arm[1] or 0)
        arms = [arm for arm in arms if curves.sizes(arm) == curves.sizes(arms[-1])]
        if len(arms) < 2 or not set.intersection(*(set(curves.seeds(arm)) for arm in arms)):
            continue
        result[name] = {q: _of_both(curves, arms, q, margin) for q in curves.quantities}
    return result


def _of_both(curves: Curves, arms: Sequence[Arm], quantity: str, margin: float) -> dict[str, Any]:
    sizes = curves.sizes(arms[-1])
    seeds = tuple(s for s in curves.seeds(arms[-1]) if all(s in curves.seeds(arm) for arm in arms))
    many = [arm[1] or 0 for arm in arms]
    table = np.stack([curves.errors(arm, quantity, seeds) for arm in arms], axis=1)  # (seeds, bases, sizes, test)
    laws = {n: fits(many, table[:, :, i], groups=curves.groups) for i, n in enumerate(sizes)}
    found: dict[str, Any] = {
        "sizes": many,
        "fits": {str(n): [law.record() for law in own] for n, own in laws.items()},
    }
    if len(many) >= 4 and len(sizes) >= 4:
        power = fit(many, table[:, :, -1], "power", groups=curves.groups)
        of_labels = curves.fit(arms[-1], quantity, seeds, "power")
        compared = slopes(of_labels, power, margin)
        found["slopes"] = {
            "labels": list(of_labels.interval("a")),
            "pre-training": list(power.interval("a")),
            "difference": list(compared.difference),
            "margin": margin,
            "answer": compared.answer,
        }
    if len(many) >= 3 and len(sizes) >= 4:
        n, m = np.meshgrid(sizes, many)
        cells = table.reshape(len(seeds), -1, table.shape[-1])
        found["surface"] = [law.record() for law in surfaces(n.ravel(), m.ravel(), cells, groups=curves.groups)]
    return found


def in_order(quantities: Iterable[str], learned: Sequence[str] = ()) -> list[str]:
    """Those that were learned first, of these forces, energies and stress in this order; the first one is judged."""
    order = ("forces", "energy_per_atom", "stress")

    def place(name: str) -> tuple[bool, int]:
        told = not learned or name.removesuffix("_per_atom") in learned or name in learned
        return not told, order.index(name) if name in order else len(order)

    return sorted(quantities, key=place)


def recorded(estimate: Estimate) -> dict[str, Any]:
    """Value and interval, as they are and as they are said."""
    return {"value": estimate.value, "ci": [estimate.low, estimate.high], "said": str(estimate)}


def name_of(arm: Arm) -> str:
    """Its name, and of a base of so many structures their number too: full (120)."""
    return arm[0] if arm[1] is None else f"{arm[0]} ({arm[1]:,})"


def runs_in_words(runs: Iterable[Sequence[Any]]) -> str:
    """Of arms, sizes and seeds: "full at 20 labels (seed 1)"."""
    seeds: dict[tuple[str, int], list[int]] = {}
    for arm, n, seed in runs:
        seeds.setdefault((arm, n), []).append(seed)
    return ", ".join(
        f"{arm} at {n:,} labels ({'seed' if len(own) == 1 else 'seeds'} {', '.join(map(str, own))})"
        for (arm, n), own in seeds.items()
    )


def _arm(point: Point) -> Arm:
    return point["arm"], point["n_pretraining"]


def _spoken(quantity: str) -> str:
    words = {"energy_per_atom": "Energies"}
    return words.get(quantity, quantity[0].upper() + quantity[1:])

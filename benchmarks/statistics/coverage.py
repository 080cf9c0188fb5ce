"""How often the 95 % intervals of learning curves hold the truth, on synthetic curves with known laws.

Takes about a quarter of an hour on one core; `--quick` takes seconds and keeps no result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq

from transfermium.study.forms import BREAK
from transfermium.study.intervals import Interval
from transfermium.study.laws import Estimate, fit
from transfermium.study.savings import factors, ratio

RESULTS = Path(__file__).with_name("results.json")
SIX, FOUR, THREE = (10, 20, 40, 80, 160, 320), (10, 30, 90, 270), (10, 40, 160)
PROMISED = (0.91, 0.99)
Truth = Callable[[np.ndarray], np.ndarray]  # log n -> log error


class Case(NamedTuple):
    """Two arms with known laws, and how their seeds scatter; standard deviations are of log errors."""

    name: str
    sizes: tuple[int, ...]
    scratch: Truth
    transfer: Truth
    targets: dict[str, float]  # numbers of labels of the transfer arm, whose true error is asked for
    exponent: float | None = None  # of the transfer arm
    law: str = "power"
    known: bool = False  # else chosen by AICc, as users have it
    both: float = 0.06  # offset of a seed in both arms: the draw of labels
    own: float = 0.05  # offset of a seed in one arm
    scatter: float = 0.05  # of each cell
    slope: float = 0.0  # of the exponents of seeds
    tails: float = math.inf  # degrees of freedom of all of these
    materials: int = 0  # of the test set, with lognormal errors; 0: errors without them


def power(A: float, a: float) -> Truth:
    return lambda x: math.log(A) - a * x


def floor(C: float, A: float, a: float) -> Truth:
    return lambda x: np.log(C + A * np.exp(-a * x))


def broken(A: float, a: float, b: float, n_b: float) -> Truth:
    return lambda x: math.log(A) - a * x - (b - a) * BREAK * np.logaddexp(0, (x - math.log(n_b)) / BREAK)


SCRATCH, TRANSFER = power(3.0, 0.45), power(1.2, 0.35)
INSIDE = {"labels": 120.0}
BOTH = {"labels": 120.0, "labels, twice beyond": 640.0}
CASES = (
    Case("power", SIX, SCRATCH, TRANSFER, BOTH, 0.35),
    Case("power, the law known", SIX, SCRATCH, TRANSFER, BOTH, 0.35, known=True),
    Case("power, heavy tails", SIX, SCRATCH, TRANSFER, BOTH, 0.35, tails=3.0),
    Case("power, exponents of seeds differ", SIX, SCRATCH, TRANSFER, BOTH, 0.35, slope=0.04),
    Case("power, large scatter", SIX, SCRATCH, TRANSFER, BOTH, 0.35, scatter=0.2),
    Case("power, four sizes", FOUR, SCRATCH, TRANSFER, INSIDE, 0.35),
    Case("power, three sizes", THREE, SCRATCH, TRANSFER, {"labels": 80.0}),
    Case("power, 100 test materials", SIX, SCRATCH, TRANSFER, BOTH, 0.35, materials=100),
    Case("power, 20 test materials", SIX, SCRATCH, TRANSFER, BOTH, 0.35, materials=20),
    Case("floor", SIX, floor(0.15, 4.0, 0.7), floor(0.12, 1.5, 0.7), INSIDE, 0.7, "floor"),
    Case("floor, four sizes", FOUR, floor(0.15, 4.0, 0.7), floor(0.12, 1.5, 0.7), INSIDE),
    Case("floor, the law known", SIX, floor(0.15, 4.0, 0.7), floor(0.12, 1.5, 0.7), INSIDE, 0.7, "floor", known=True),
    Case("broken", SIX, broken(3.0, 0.2, 0.7, 60.0), broken(1.5, 0.2, 0.7, 60.0), INSIDE, 0.7, "broken"),
    Case("no pre-training effect", SIX, SCRATCH, SCRATCH, BOTH, 0.45),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--only", help="one case by its name; the result is only printed")
    parser.add_argument("--quick", action="store_true", help="20 repeats of the first case; results are only printed")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in (None, case.name)][: 1 if options.quick else None]
    rows = []
    for case in cases:
        for n_seeds in (3, 5):
            rows.append(measured(case, n_seeds, 20 if options.quick else options.repeats))
            print(json.dumps(rows[-1]), flush=True)
    results = {
        "date": date.today().isoformat(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("numpy", "scipy")},
        "repeats": options.repeats,
        "promised": PROMISED,
        "outside": outside(rows),
        "cases": rows,
    }
    if not options.quick and options.only is None:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def outside(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is held more or less often than is asked for, factors at single sizes too."""
    sizes = {case.name: case.sizes for case in CASES}
    found = []
    for row in rows:
        single = zip(sizes[row["case"]], row["coverage of factors by size"], strict=True)
        shares = [*row["coverage"].items(), *((f"factor at {n} labels", value) for n, value in single)]
        found += [
            f"{row['case']}, {row['seeds']} seeds: {name} {value}"
            for name, value in shares
            if not PROMISED[0] <= value <= PROMISED[1]
        ]
    return found


def measured(case: Case, n_seeds: int, repeats: int) -> dict[str, Any]:
    """Share of repeats whose interval holds the truth, for each quantity; factors are asked at each size."""
    rng = np.random.default_rng(n_seeds)
    x = np.log(case.sizes)
    held: dict[str, list[list[bool]]] = {}
    widths: dict[str, list[float]] = {}
    forms: list[str] = []
    true_factors = [inverse(case.scratch, float(case.transfer(at))) / math.exp(at) for at in x]
    true_ratio = math.exp(float(np.mean(case.transfer(x) - case.scratch(x))))
    for _ in range(repeats):
        errors, other = reversed(drawn(case, rng, n_seeds))
        transfer, scratch = (fit(case.sizes, arm, case.law if case.known else None) for arm in (errors, other))
        forms.append(transfer.form)
        found: dict[str, list[tuple[Estimate | Interval, float]]] = {
            name: [(transfer.inverse(math.exp(float(case.transfer(np.log(n))))), n)] for name, n in case.targets.items()
        }
        found["factor"] = list(zip(factors(transfer, scratch), true_factors, strict=True))
        found["ratio of errors"] = [(ratio(transfer, scratch), true_ratio)]
        if case.exponent is not None:
            found["exponent, the law known"] = [(fit(case.sizes, errors, case.law).exponent, case.exponent)]
            if transfer.weights:
                found["exponent"] = [(transfer.exponent, case.exponent)]
            if case.law == "power":
                found["exponent, seeds by percentile bootstrap"] = [(percentiles(x, errors, rng), case.exponent)]
        for name, pairs in found.items():
            held.setdefault(name, []).append([not interval.excludes(truth) for interval, truth in pairs])
            widths.setdefault(name, []).extend(width(name, interval) for interval, _ in pairs)
    return {
        "case": case.name,
        "seeds": n_seeds,
        "coverage": {name: round(float(np.mean(each)), 4) for name, each in held.items()},
        "coverage of factors by size": np.mean(held["factor"], axis=0).round(4).tolist(),
        "median width": {name: shown(float(np.median(values))) for name, values in widths.items()},
        "forms": {form: forms.count(form) for form in dict.fromkeys(forms)},
    }


def drawn(case: Case, rng: np.random.Generator, n_seeds: int) -> list[np.ndarray]:
    """Errors of scratch and transfer, (n_seeds, n_sizes) or (n_seeds, n_sizes, n_materials)."""

    def noise(*shape: int) -> np.ndarray:
        if math.isinf(case.tails):
            return rng.normal(size=shape)
        return rng.standard_t(case.tails, size=shape) / math.sqrt(case.tails / (case.tails - 2))

    x = np.log(case.sizes)
    both = case.both * noise(n_seeds, 1)
    hard = rng.normal(size=(1, 1, case.materials))  # some materials are hard for all
    arms = []
    for truth in (case.scratch, case.transfer):
        logs = truth(x) + both + case.own * noise(n_seeds, 1) + case.scatter * noise(n_seeds, len(x))
        logs = logs + case.slope * noise(n_seeds, 1) * (x - x.mean())
        if not case.materials:
            arms.append(np.exp(logs))
            continue
        single = 0.6 * hard + 0.3 * rng.normal(size=(1, 1, case.materials))
        single = single + 0.3 * rng.normal(size=(n_seeds, len(x), case.materials))
        arms.append(np.exp(logs[..., None] + single - (0.6**2 + 0.3**2 + 0.3**2) / 2))
    return arms


def inverse(truth: Truth, log_error: float) -> float:
    """The n at which a law has an error; inf where it never has."""
    if truth(np.array(60.0)) > log_error:
        return math.inf
    return math.exp(brentq(lambda x: float(truth(x)) - log_error, -20.0, 60.0))


def percentiles(x: np.ndarray, errors: np.ndarray, rng: np.random.Generator) -> Interval:
    """What is often done: seeds drawn with replacement, percentiles of the exponent."""
    means = errors.mean(axis=2) if errors.ndim == 3 else errors
    centred = x - x.mean()
    each = -np.log(means) @ centred / (centred @ centred)
    low, high = np.quantile(rng.choice(each, (500, len(each))).mean(axis=1), [0.025, 0.975])
    return Interval(float(each.mean()), float(low), float(high))


def shown(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None  # JSON has no infinity


def width(name: str, interval: Estimate | Interval) -> float:
    """Of exponents high - low, of all else high / low."""
    if name.startswith("exponent"):
        return interval.high - interval.low
    return interval.high / interval.low if 0 < interval.low < math.inf else math.inf


if __name__ == "__main__":
    main()

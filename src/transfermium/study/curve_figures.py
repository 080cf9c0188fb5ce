"""What a learning curve says, as figures: of its result, as JSON holds it."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from ..report import label_curves
from .curve_tables import SPOKEN, Result, arms_of, errors_of, factors_of, shown

Points = list[tuple[float, float, float, float, list[float]]]


def drawn(result: Result, quantity: str) -> Figure:
    """Errors of all arms, and of the best baseline, against the number of labels."""
    unit, scale = shown(result, quantity)
    label = f"MAE of {SPOKEN.get(quantity, quantity)} ({unit})"
    return label_curves(_series(result, quantity, scale), "labels, validation included", label)


def worth_drawn(result: Result, quantity: str) -> Figure | None:
    """How many labels from scratch one label is worth with each arm, at equal compute where that was measured, in the
    colours that the arms have beside it; sizes without bounds are left out, and nothing is drawn of one size."""
    series: dict[str, Points] = {arm: [] for arm in arms_of(result["errors"], quantity)}
    for arm, found in factors_of(result, quantity, "equal compute" if "equal compute" in result else "factors").items():
        known = [row for row in found if row["value"] and any(end is not None for end in row["ci"])]
        series[arm] = [(row["n_train"], row["value"], *(_or_nan(x) for x in row["ci"]), []) for row in known]
    return (
        label_curves(series, "labels, validation included", "labels from scratch for one")
        if any(len(points) > 1 for points in series.values())
        else None
    )


def grown_drawn(result: Result, quantity: str) -> Figure | None:
    """Errors against the number of structures to pre-train on, one line for each number of labels; None for one."""
    unit, scale = shown(result, quantity)
    series: dict[str, Points] = {}
    for arm in result.get("pre-training sizes", {}):
        for n in result["sizes"]:
            for m in result["base sizes"]:
                errors = [scale * e for e in errors_of(result["errors"], quantity, f"{arm} ({m:,})", n)]
                if errors:
                    point = (m, float(np.mean(errors)), min(errors), max(errors), errors)
                    series.setdefault(f"{n:,} labels", []).append(point)
    label = f"MAE of {SPOKEN.get(quantity, quantity)} ({unit})"
    return label_curves(series, "structures to pre-train on", label) if series else None


def _series(result: Result, quantity: str, scale: float) -> dict[str, Points]:
    """Of each arm, and of the best baseline, the mean and the range of the seeds."""
    series: dict[str, Points] = {}
    for source in ("errors", "baselines"):
        found: dict[str, Points] = {}
        for arm in arms_of(result[source], quantity):
            for n in result["sizes"]:
                errors = [scale * e for e in errors_of(result[source], quantity, arm, n)]
                if errors:
                    found.setdefault(arm, []).append((n, float(np.mean(errors)), min(errors), max(errors), errors))
        if source == "baselines" and found:
            best = min(found, key=lambda arm: np.mean([p[1] for p in found[arm]]))
            found = {best: found[best]}
        series |= found
    return series


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value

"""What a learning curve says, as tables and sentences: of its result, as JSON holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluate import PRINTED
from .baselines import AS_IT_IS
from .laws import UNBOUNDED

Result = Mapping[str, Any]  # of `curve`
SPOKEN = {"energy_per_atom": "energies"}
SIDES = ("before", "after")
SLOPES = ("labels", "pre-training", "difference")


def shown(result: Result, quantity: str) -> tuple[str, float]:
    """The unit that errors are printed in, and the factor to it."""
    unit = result["units"][quantity]
    return PRINTED.get(unit, (unit or "no unit", 1.0))


def rows(result: Result, quantity: str, source: str = "errors", ranges: bool = True) -> list[dict[str, str]]:
    """A row of each number of labels, a column of each arm, or of each of the "baselines"; in the unit printed."""
    _, scale = shown(result, quantity)
    table = []
    for n in result["sizes"]:
        row = {"labels": f"{n:,}"}
        for arm in arms_of(result[source], quantity):
            found = [scale * e for e in errors_of(result[source], quantity, arm, n)]
            span = f" ({min(found):.4g} to {max(found):.4g})" if len(found) > 1 and ranges else ""
            row[arm] = f"{np.mean(found):.4g}{span}" if found else ""
        table.append(row)
    return table


def has_baselines(result: Result, quantity: str) -> bool:
    return bool(arms_of(result["baselines"], quantity))


def told_of_baselines(result: Result) -> str:
    if result["cheap"]:
        return f"without a network, through the label {result['cheap']}"
    through = any(row["arm"] == AS_IT_IS for row in result["baselines"])
    return "without training on them, through what the base says" if through else "without a network"


def worths(result: Result, quantity: str, what: str, source: str = "factors") -> list[dict[str, str]]:
    """A row of each number of labels: what each label is worth with each arm ("said"), or the "hours saved".

    Against scratch, or at "equal compute"; without arms whose intervals have no bounds.
    """
    table: dict[int, dict[str, str]] = {}
    for arm, found in factors_of(result, quantity, source).items():
        for row in found if not open_ended(found) else []:
            if what in row:
                said = row[what] if what == "said" else row[what]["said"]
                table.setdefault(row["n_train"], {"labels": f"{row['n_train']:,}"})[arm] = said
    return [table[n] for n in sorted(table)]


def forgotten(result: Result) -> dict[str, list[dict[str, str]]]:
    """Of each quantity of the bases' own task, by the title of its table: errors before and after, means over seeds."""
    tables: dict[str, list[dict[str, str]]] = {}
    own = [e for e in result["errors"] if e.get("forgetting") and e["quantity"] == next(iter(result["units"]))]
    for quantity in dict.fromkeys(name for entry in own for name in entry["forgetting"]):
        known = [entry for entry in own if quantity in entry["forgetting"]]
        unit = known[0]["forgetting"][quantity]["unit"]
        printed, scale = PRINTED.get(unit, (unit or "no unit", 1.0))
        table = []
        for n in result["sizes"]:
            row = {"labels": f"{n:,}"}
            for arm in dict.fromkeys(map(_title, known)):
                found = [e["forgetting"][quantity] for e in known if _title(e) == arm and e["n_train"] == n]
                means = [f"{scale * np.mean([f[side] for f in found]):.4g}" for side in SIDES if found]
                row[arm] = " → ".join(means)
            table.append(row)
        tables[f"Errors of {SPOKEN.get(quantity, quantity)} on the bases' own task ({printed}), before → after"] = table
    return tables


def of_slopes(result: Result) -> list[str]:
    """Sentences: how errors fall with both numbers, and whether alike."""
    said = []
    for arm, quantities in result.get("pre-training sizes", {}).items():
        for quantity, found in quantities.items():
            if "slopes" in found:
                slopes = found["slopes"]
                of = {side: "{:.2f} ({:.2f} to {:.2f})".format(*slopes[side]) for side in SLOPES}
                said.append(
                    f"{SPOKEN.get(quantity, quantity).capitalize()}, {arm}: errors fall with the number of labels to "
                    f"the power {of['labels']}, with that of structures to pre-train on to the power "
                    f"{of['pre-training']}; the difference is {of['difference']}; within a margin of "
                    f"{slopes['margin']:g} they are: {slopes['answer']}."
                )
    return said


def factors_of(result: Result, quantity: str, source: str) -> dict[str, list[dict[str, Any]]]:
    """Of each arm; at "equal compute" they are kept beside ratios."""
    found = result[source][quantity]
    return {arm: entry if source == "factors" else entry["factors"] for arm, entry in found.items()}


def open_ended(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether nothing certain can be said at any size."""
    return bool(rows) and all(row["said"].endswith(UNBOUNDED) for row in rows)


def vague(result: Result, quantity: str, source: str) -> str:
    """Arms whose factors have no bounds, and what there is too little of; older results do not say that."""
    scarce = result.get("scarce", {}).get(quantity, {})
    if source != "factors":
        scarce = {arm: entry.get("scarce") for arm, entry in result[source][quantity].items()}
    arms: dict[str, list[str]] = {}
    for arm, found in factors_of(result, quantity, source).items():
        if open_ended(found):
            lack = scarce.get(arm)
            arms.setdefault(f", mostly for want of {lack}" if lack else "", []).append(arm)
    said = "; ".join(f"{', '.join(own)}{why}" for why, own in arms.items())
    return f" There are no bounds at any size for {said}." if said else ""


def arms_of(entries: Sequence[Mapping[str, Any]], quantity: str) -> list[str]:
    return list(dict.fromkeys(_title(e) for e in entries if e["quantity"] == quantity))


def _title(entry: Mapping[str, Any]) -> str:
    many = entry.get("n_pretraining")
    return str(entry["arm"]) if many is None else f"{entry['arm']} ({many:,})"


def errors_of(entries: Sequence[Mapping[str, Any]], quantity: str, arm: str, n: int) -> list[float]:
    return [e["mae"] for e in entries if e["quantity"] == quantity and _title(e) == arm and e["n_train"] == n]

"""The page of a learning curve."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from ..evaluate import PRINTED, Pairs
from ..report import Column, Page, label_row, parity, parity_columns
from .bounds import in_words
from .curve_figures import drawn, grown_drawn, worth_drawn
from .curve_laws import runs_in_words
from .curve_tables import (
    SPOKEN,
    Result,
    forgotten,
    has_baselines,
    of_slopes,
    rows,
    shown,
    told_of_baselines,
    vague,
    worths,
)
from .manifest import WHAT_FOR, labels_of
from .points import FEW, LONG, TOGETHER, VALID, validating_in_words

FROM_LAWS = (
    "From laws through the curves; the interval holds other seeds and other test materials, and other laws that are "
    "about as likely, of four or five sizes also the straight lines between them. Nothing is said beyond four times "
    "the largest size."
)


class Example(NamedTuple):
    """One model against its test set."""

    arm: str
    n_train: int
    structures: Sequence[Atoms]
    pairs: Pairs
    units: Mapping[str, str]  # of the quantities that have parity plots


def page(result: Result, example: Example | None = None, viewer: bool = False) -> Page:
    """One page with the verdict, curves, what a label is worth, laws, one model in detail, and how it was done.

    With a `viewer` its test structures are shown beside the parity plot.
    """
    page = Page("How many labels pre-training saves", "Error against number of labels")
    page.verdict(result["verdict"])
    if result["beyond the rates"]:
        page.text(result["beyond the rates"])
    for quantity in result["units"]:
        name = SPOKEN.get(quantity, quantity)
        page.figure(
            drawn(result, quantity), f"Error of {name} on {_unseen(result)}; {_seeds(result, 'bands span the')}."
        )
        if worth := worth_drawn(result, quantity):
            fair = ", trained for as long as both stages," if "equal compute" in result else ""
            caption = f"Labels from scratch{fair} that one label is worth with pre-training, by the errors of {name}."
            page.figure(worth, caption)
    for quantity in result["units"]:
        unit, _ = shown(result, quantity)
        name = SPOKEN.get(quantity, quantity)
        page.table(
            rows(result, quantity), f"Errors of {name} ({unit}): {_seeds(result, 'mean over', ' (lowest to highest)')}"
        )
        if has_baselines(result, quantity):
            page.table(
                rows(result, quantity, "baselines"),
                f"Errors of {name} ({unit}) {told_of_baselines(result)}",
            )
        page.table(
            worths(result, quantity, "said"),
            f"What a label is worth, by the errors of {name}: equivalent labels from scratch, with 95 % intervals",
            f"{FROM_LAWS}{vague(result, quantity, 'factors')}" if any(result["factors"][quantity].values()) else None,
        )
        if "equal compute" in result:
            page.table(
                worths(result, quantity, "said", "equal compute"),
                f"The same at equal compute, against {LONG}: equivalent labels from scratch, by the errors of {name}",
                f"From scratch for as long as both stages together.{vague(result, quantity, 'equal compute')}",
            )
        page.table(worths(result, quantity, "hours saved"), f"Hours of calculations saved, by the errors of {name}")
    for title, table in forgotten(result).items():
        page.table(table, title, "On structures that were set apart from those that bases learned from.")
    if needed := result.get("labels needed"):
        goal = result["goal"]
        unit = result["units"][goal["quantity"]]
        spoken = SPOKEN.get(goal["quantity"], goal["quantity"])
        listed = [{"arm": arm, "labels needed": found["said"]} for arm, found in needed.items()]
        page.table(listed, f"Labels needed for an error of {spoken} of {goal['error']:g} {unit}")
    if example is not None:
        _show_example(page, example, viewer)
    _show_laws(page, result)
    _show_pretraining(page, result)
    _show_method(page, result)
    _show_data(page, result)
    page.details("All settings", json.dumps(result["settings"], indent=1, ensure_ascii=False))
    return page.numbers(result)


def _seeds(result: Result, said: str, spread: str = "") -> str:
    """What of all seeds is shown."""
    return f"{said} seeds{spread}" if len({entry["seed"] for entry in result["errors"]}) > 1 else "one seed"


def _unseen(result: Result) -> str:
    many = f"{result['test structures']} test structures"
    if result["base sizes"]:
        return f"{many} that no model has seen"
    if result.get("copies that the base has seen") is None:
        return f"{many} (whether the base has seen them is not known)"
    return f"{many} (no copies of any that the base has seen)"


def _show_example(page: Page, example: Example, viewer: bool) -> None:
    """Parity of every quantity, and with a viewer structures beside the one with a number per structure."""
    if not example.units:  # classes
        return
    page.heading("One model against the test structures")
    said = f"{example.arm}, {example.n_train:,} labels, one seed"
    columns: dict[str, Column] = {}
    scalars = []
    for quantity, unit in example.units.items():
        label, prediction = (
            [np.ravel(np.asarray(row[side], float)) for row in example.pairs[quantity]] for side in (0, 1)
        )
        name = SPOKEN.get(quantity, quantity)
        points = {"label": np.concatenate(label), "prediction": np.concatenate(prediction), "unit": unit}
        page.figure(parity(points, name), f"{name[0].upper()}{name[1:]}: {said}.")
        if all(len(values) == 1 for values in label):
            scalars.append(name)
            given, said_of = ([float(v[0]) for v in values] for values in (label, prediction))
            columns |= parity_columns(name, given, said_of, unit)
        else:
            printed, factor = PRINTED.get(unit, (unit, 1.0))
            spread = [factor * _rms(p - y) for y, p in zip(label, prediction, strict=True)]
            columns[f"{name}, RMSE"] = Column(spread, printed)
    if viewer and scalars:
        columns["formula"] = Column([str(atoms.symbols) for atoms in example.structures])
        x, y = (f"{scalars[0]}, {what}" for what in ("label", "prediction"))
        colour = f"{scalars[0]}, absolute error"
        page.structures(example.structures, columns, f"Test structures: {said}", x=x, y=y, colour=colour, parity=True)


def _rms(errors: np.ndarray) -> float:
    known = errors[np.isfinite(errors)]
    return float(np.sqrt(np.square(known).mean())) if len(known) else math.nan


def _show_laws(page: Page, result: Result) -> None:
    laws = []
    for quantity, arms in result["fits"].items():
        for arm, found in arms.items():
            for rank, law in enumerate(found):
                laws.append(
                    {
                        "quantity": SPOKEN.get(quantity, quantity),
                        "arm": arm,
                        "law": law["form"] + (" *" if rank == 0 else ""),
                        "AICc": law["aicc"],
                        "exponents": _exponents(law),
                        "error at the largest size, left out": _percent(law["extrapolation"]),
                    }
                )
    page.table(
        laws,
        "Laws of error against number of labels; * has the least AICc",
        "power: A n^-a. floor: C + A n^-a. broken: two powers. interpolation: straight lines in log n. Fewer than four "
        "sizes allow no law, fewer than six no floor and no break.",
    )


def _exponents(law: Mapping[str, Any]) -> str:
    said = []
    for name, (low, high) in law["ci"].items():
        bounds = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else " (not determined)"
        said.append(f"{name} = {law['parameters'][name]:.2f}{bounds}")
    return ", ".join(said)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.0f} %"


def _show_pretraining(page: Page, result: Result) -> None:
    grown = result.get("pre-training sizes", {})
    for quantity in result["units"] if grown else ():
        if (figure := grown_drawn(result, quantity)) is not None:
            name = SPOKEN.get(quantity, quantity)
            page.figure(figure, f"Error of {name} against the number of structures that bases were pre-trained on.")
    laws, surfaces = [], []
    for arm, quantities in grown.items():
        for quantity, found in quantities.items():
            of = {"quantity": SPOKEN.get(quantity, quantity), "arm": arm}
            for n, own in found["fits"].items():
                laws.append({**of, "labels": f"{int(n):,}", "law": own[0]["form"], "exponents": _exponents(own[0])})
            for rank, law in enumerate(found.get("surface", [])):
                form = law["form"] + (" *" if rank == 0 else "")
                surfaces.append({**of, "law": form, "AICc": law["aicc"], "exponents": _exponents(law)})
    page.table(laws, "Laws of error against number of structures to pre-train on", of_slopes(result) or None)
    page.table(
        surfaces,
        "Laws of both numbers, n of labels and m of structures to pre-train on; * has the least AICc",
        "product: A n^-a (1 + m / n_0)^-b. sum: C + A n^-a + B m^-b.",
    )


def _show_data(page: Page, result: Result) -> None:
    """The sets of the study, and their labels."""
    data = result.get("data", {})  # older results have none
    sets, labels = [], []
    for side, known in data.items():
        sets.append(
            {
                "set": WHAT_FOR[side],
                "structures": f"{known['structures']:,}",
                "atoms": f"{known['atoms']:,}",
                "elements": " ".join(known["elements"]),
                "level of theory": known["level of theory"] or "not said",
                "files": ", ".join(known["files"]),
                "fingerprint": known["fingerprint"],
            }
        )
        labels += [{"set": WHAT_FOR[side], **label_row(entry)} for entry in labels_of(known).entries]
    page.table(sets, "Structures")
    page.table(labels, "Their labels")
    if "base" not in data:
        page.text(f"Level of theory of the base: {result['theory']['base'] or 'not said'}.")


def _show_method(page: Page, result: Result) -> None:
    settings, counts = result["settings"], validating_in_words(result.get("validation labels", {}))
    page.heading("How it was done")
    page.text(
        f"Each arm was trained for {in_words(settings['tuning'])} on the same labels, each size within the next, "
        f"in batches of at most {settings['edges']} edges, {_rate(result)}. "
        f"Of the labels at least {VALID:.0%}, with materials kept whole, choose the checkpoint and are counted"
        f"{': ' if counts else ''}{counts}; below {FEW} all train and the last weights are taken. "
        "What is not trained (zero-shot, aligned, probe) fits all of them. "
        f"{_bases(result, in_words(settings['pretraining']))} {CHOSEN[result['verdict by']]}"
    )
    page.text(" ".join(_tests(result)))


CHOSEN = {
    None: "",
    "validation errors": "Of the arms that train a base further, the verdict is about the one with the smallest "
    "validation errors.",
    "its place among the arms": "Nothing chose between the arms on validation labels: the verdict is about the first "
    "one that trains a base further, or else about the one that fits most to labels.",
}


def _rate(result: Result) -> str:
    rates, sizes = result["settings"]["rates"], result["sizes"]
    if len(rates) == 1 or max(sizes) < FEW:
        return f"at the learning rate {rates[0]:g}"
    said = f"at the learning rate among {', '.join(f'{rate:g}' for rate in rates)} with the smallest validation loss "
    fewer = (
        f"; below {FEW} labels it is that of the next larger size, whose labels chose it" if min(sizes) < FEW else ""
    )
    return f"{said}of the first seed{fewer}"


def _bases(result: Result, time: str) -> str:
    longer = [arm for arm in (LONG, TOGETHER) if arm in result["arms"]]
    have = f" ({' and '.join(longer)} had {time} more)" if longer else ""
    if not result["base sizes"]:
        return f"Base: {result['base']}. What pre-training took, scratch did not have{have}."
    return f"Bases: {result['base']}; pre-training takes {time}, which scratch did not have{have}."


def _tests(result: Result) -> list[str]:
    n, materials = result["test structures"], result["test materials"]
    said = [f"{n} structures of {materials} materials test; they were set apart before anything was trained."]
    if materials == 1:
        said = [f"{n} structures of one material test; intervals take them as independent, and hold no other material."]
    if result["leaks"]:
        said.append(f"Of what there was to pre-train on, {result['leaks']}.")
    if new := result["elements without labels"]:
        said.append(f"No label has {', '.join(new)}, which test structures have: energies there rest on a guess.")
    if result["left out of the labels"]:
        said.append(f"Labels: {result['left out of the labels']}.")
    if lacking := result["not judged"]:
        said.append(f"There are no errors of {', '.join(lacking)}: not all test structures have such a label.")
    if lost := result.get("diverged"):
        said.append(f"Runs that diverged are left out: {runs_in_words(lost)}; laws and factors are of the other seeds.")
    if result["dropped"]:
        said.append(f"Dropped to stay within the budget: {', '.join(result['dropped'])}.")
    return said

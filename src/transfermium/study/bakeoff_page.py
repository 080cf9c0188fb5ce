"""The page and the tables of a comparison of ways to pre-train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from ..report import Page, forest
from .bounds import bound_of, in_words
from .intervals import ENOUGH
from .ranking import LONG, SCRATCH, diverged

Result = Mapping[str, Any]  # of `bakeoff`


def page(result: Result, counts: Mapping[str, int]) -> Page:
    """One page with the verdict, the answers, every arm on every target, and how it was done."""
    settings = result["settings"]
    page = Page("Which pre-training helps", "Objectives and backbones at equal compute")
    page.verdict(result["verdict"])
    if result["beyond the rates"]:
        page.text(result["beyond the rates"])
    page.table(
        questions(result),
        "Ratio of errors over all targets, with its 95 % interval over seeds",
        [
            "Below one the arm has the lower errors. An answer is yes or no where neither other seeds nor other test "
            f"materials, each at 95 %, explain the difference, and {ENOUGH} materials or more were tested; the "
            "interval shown is that of the seeds.",
            "Questions are not corrected for their number: of twenty, one may be answered by chance.",
        ],
    )
    if compared := panels(result):
        caption = "Errors relative to scratch with the same fine-tuning: ratio and 95 % interval over seeds."
        page.figure(forest(compared), caption)
    page.table(rows(result), "Every arm on every target; clear: neither other seeds nor other materials explain it")
    page.heading("How it was done")
    rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
    page.text(
        f"Every arm was pre-trained for {in_words(bound_of(settings['pretraining']))} on the same materials "
        f"({counts['structures']} structures; noise is learned on {counts['relaxed']}, of each material the one "
        f"nearest to equilibrium), and fine-tuned for {in_words(bound_of(settings['tuning']))}, in batches of at most "
        f"{settings['edges']} edges. {SCRATCH} skips pre-training, {LONG} spends its time on fine-tuning. "
        f"{settings['valid fraction']:.0%} of the labels choose the checkpoint and are counted. The learning rate of "
        f"fine-tuning was chosen once for each arm, backbone and target among {rates}, by the validation loss with "
        f"seed 0. Structures to pre-train on that match a test structure were left out: {result['leaks']}."
    )
    for arm, text in result["own structures"].items():
        page.text(f"{arm} was pre-trained on other materials than the rest: {text}.")
    page.table(result["rates"], "Learning rates that were chosen")
    page.table(costs(result), "What it took: processor seconds and steps of one run, in the middle")
    return page.numbers(result)


def finite(content: Any) -> Any:
    """The same with None for bounds that are infinite, which JSON does not know."""
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def questions(result: Result) -> list[dict[str, str]]:
    """Rows of a table of questions and answers."""
    several = len(result["backbones"]) > 1
    return [
        {
            "question": answer["question"],
            **({"backbone": answer["backbone"]} if several else {}),
            "answer": answer["answer"],
            "ratio": f"{answer['ratio']:.3f}{_bounds(answer['low'], answer['high'])}",
        }
        for answer in result["answers"]
    ]


def _bounds(low: float, high: float) -> str:
    """An interval over seeds in brackets; nothing of one seed."""
    return f" ({low:.3f} to {high:.3f})" if math.isfinite(high) else ""


def rows(result: Result, short: bool = False) -> list[dict[str, str]]:
    """Rows of a table of errors; `short` ones fit a terminal."""
    found = [_row(one) for one in result["comparisons"]]
    told = ("backbone", "labels", "target") if short else ("backbone", "labels")
    dull = [key for key in told if len({row[key] for row in found}) == 1] + ["other materials"] * short
    return [{name: cell for name, cell in row.items() if name not in dull} for row in found]


def _row(one: Mapping[str, Any]) -> dict[str, str]:
    row = {"target": one["target"], "backbone": one["backbone"], "labels": str(one["n_train"]), "arm": one["arm"]}
    row["MAE"] = f"{one['mae']:.4g} {one['unit']}".strip()
    row |= dict.fromkeys(("/ scratch", "other seeds", "other materials", "clear"), "")
    if "ratio" in one:
        low, high = one["seeds interval"]
        row |= {"/ scratch": f"{one['ratio']:.3f}", "other seeds": f"{low:.2f} to {high:.2f}" if low else ""}
        row["other materials"] = "{:.2f} to {:.2f}".format(*one["materials interval"])
        row["clear"] = "yes" if one["clear"] else ""
    return row


def costs(result: Result) -> list[dict[str, str]]:
    """Rows of a table of what runs of each arm took: where operations were counted, seconds differ."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        if not diverged(run):
            found.setdefault((run["backbone"], run["arm"]), []).append(run)
    shown = {"pretrain_seconds": "pre-training (s)", "train_seconds": "fine-tuning (s)", "steps": "steps of it"}
    return [
        {
            "backbone": backbone,
            "arm": arm,
            **{title: f"{median(r[key] for r in own):,.4g}" for key, title in shown.items()},
        }
        for (backbone, arm), own in found.items()
    ]


def panels(result: Result) -> dict[str, list[tuple[str, float, float, float]]]:
    """For each target: arms with ratio and interval; of several sizes and backbones, each on its own line."""
    found: dict[str, list[tuple[str, float, float, float]]] = {}
    for one in result["comparisons"]:
        beside = [other for other in result["comparisons"] if other["target"] == one["target"]]
        told = [str(one[key]) for key in ("backbone", "n_train") if len({other[key] for other in beside}) > 1]
        name = f"{one['arm']} ({', '.join(told)})" if told else one["arm"]
        if "ratio" in one:
            found.setdefault(one["target"], []).append((name, one["ratio"], *one["seeds interval"]))
    return found

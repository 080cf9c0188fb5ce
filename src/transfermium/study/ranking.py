"""What runs of several arms say: ratios of errors with intervals, questions with answers, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .intervals import Interval, compare, paired, student

SCRATCH, LONG = "scratch", "scratch_long"
QUESTIONS = {  # arm and what it is compared with
    "Does pre-training beat the same fine-tuning from scratch?": ("efs_derivative", SCRATCH),
    "Does it beat training from scratch for as long as both stages took?": ("efs_derivative", LONG),
    "Do derivatives beat direct outputs, with labels?": ("efs_derivative", "efs_direct"),
    "Do derivatives beat direct outputs, with noise?": ("denoise_derivative", "denoise_direct"),
    "Do labels beat noise, as derivatives?": ("efs_derivative", "denoise_derivative"),
    "Do energy, forces and stress beat the energy alone?": ("efs_derivative", "e_derivative"),
    "Do energy, forces and stress beat the forces alone?": ("efs_derivative", "f_derivative"),
    "Do energy, forces and stress beat forces and stress?": ("efs_derivative", "fs_derivative"),
}

Run = Mapping[str, Any]  # "target", "backbone", "arm", "seed", "n_train", "mae", "quantity", "unit", "errors"


def comparisons(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each arm on each target: its error, and its ratio to that from scratch over seeds and over test materials."""
    rows = []
    for case in dict.fromkeys(_case(run) for run in runs):
        here = [run for run in runs if _case(run) == case]
        for arm in dict.fromkeys(run["arm"] for run in here):
            own = [run for run in here if run["arm"] == arm]
            mean = student([run["mae"] for run in own])
            row = {
                **dict(zip(("target", "backbone", "n_train"), case, strict=True)),
                "arm": arm,
                "quantity": own[0]["quantity"],
                "unit": own[0]["unit"],
                "seeds": len(own),
                "mae": mean.value,
                "mae interval": [mean.low, mean.high],
            }
            if arm != SCRATCH:
                found = compare(_errors(here, arm), _errors(here, SCRATCH))
                row |= {
                    "ratio": found.seeds.value,
                    "seeds interval": list(found.seeds[1:]),
                    "materials interval": list(found.materials[1:]),
                    "clear": found.clear,
                }
            rows.append(row)
    return rows


def answers(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The questions that the arms allow, each answered by the ratio of errors over all targets and sizes.

    Ratios are averaged over targets, as logarithms, before seeds are compared: the interval is that of other seeds on
    these targets, not that of other targets.
    """
    rows = []
    for backbone in dict.fromkeys(run["backbone"] for run in runs):
        here = [run for run in runs if run["backbone"] == backbone]
        targets = {target: [run for run in here if run["target"] == target] for target in _values(here, "target")}
        for question, (arm, other) in _questions(_values(here, "arm")).items():
            ratio = _ratio(here, arm, other)
            rows.append(
                {
                    "question": question,
                    "backbone": backbone,
                    "arm": arm,
                    "against": other,
                    "ratio": ratio.value,
                    "low": ratio.low,
                    "high": ratio.high,
                    "answer": "yes" if ratio.high < 1 else "no" if ratio.low > 1 else "not clear",
                    "targets": {target: _ratio(own, arm, other).value for target, own in targets.items()},
                }
            )
    return rows


def verdict(found: Sequence[Mapping[str, Any]]) -> str:
    """What the answers say in a few sentences, for each backbone: the order of the arms, and the best against both
    ways of training from scratch."""
    sentences = []
    for backbone in _values(found, "backbone"):
        here = {(a["arm"], a["against"]): a for a in found if a["backbone"] == backbone}
        against = {arm: answer for (arm, other), answer in here.items() if other == SCRATCH}
        ranked = sorted([(a["ratio"], arm) for arm, a in against.items()] + [(1.0, SCRATCH)])
        order = " < ".join(f"{arm} ({ratio:.2f})" for ratio, arm in ranked)
        sentences.append(f"{backbone}: errors relative to scratch, over all targets: {order}.")
        pretrained = {arm: answer for arm, answer in against.items() if arm != LONG}
        if not pretrained:
            continue
        best = min(pretrained, key=lambda arm: pretrained[arm]["ratio"])
        sentences.append(_said(best, "the same fine-tuning from scratch", pretrained[best]))
        if (best, LONG) in here:
            sentences.append(_said(best, "training from scratch for as long as both stages took", here[best, LONG]))
    return " ".join(sentences)


def _said(arm: str, other: str, answer: Mapping[str, Any]) -> str:
    interval = f"{answer['ratio']:.2f} times the errors, {answer['low']:.2f} to {answer['high']:.2f}"
    words = {"yes": "beats", "no": "is worse than", "not clear": "cannot be told from"}[answer["answer"]]
    return f"{arm} {words} {other} ({interval} over seeds)."


def _questions(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    asked = {text: pair for text, pair in QUESTIONS.items() if set(pair) <= set(arms)}
    for other in (SCRATCH, LONG):
        for arm in arms:
            sensible = other in arms and (arm not in (SCRATCH, LONG) or (arm, other) == (LONG, SCRATCH))
            if sensible and (arm, other) not in asked.values():
                asked[f"Does {arm} beat {other}?"] = (arm, other)
    return asked


def _ratio(runs: Sequence[Run], arm: str, other: str) -> Interval:
    return paired(_per_seed(runs, arm), _per_seed(runs, other), ratio=True)


def _per_seed(runs: Sequence[Run], arm: str) -> list[float]:
    """Geometric mean of the errors over targets and sizes, for each seed."""
    own = [run for run in runs if run["arm"] == arm]
    seeds = sorted({run["seed"] for run in own})
    logs = [[math.log(max(run["mae"], 1e-300)) for run in own if run["seed"] == seed] for seed in seeds]
    return [math.exp(float(np.mean(values))) for values in logs]


def _errors(runs: Sequence[Run], arm: str) -> np.ndarray:
    """Of each seed on each test structure: (n_seeds, n_test)."""
    own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: int(run["seed"]))
    return np.array([run["errors"] for run in own])


def _case(run: Run) -> tuple[str, str, int]:
    return run["target"], run["backbone"], run["n_train"]


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))

"""What runs of several arms say: ratios of errors with intervals, questions with answers, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .intervals import ENOUGH, Interval, bootstrap, compare, paired, student

SCRATCH, LONG = "scratch", "scratch_long"
WRONG = "wrong"  # unit of errors of classes
QUESTIONS = {  # arm and what it is compared with
    "Does pre-training beat the same fine-tuning from scratch?": ("efs_derivative", SCRATCH),
    "Does it beat training from scratch for as long as both stages took?": ("efs_derivative", LONG),
    "Do derivatives beat direct outputs, with labels?": ("efs_derivative", "efs_direct"),
    "Do derivatives beat direct outputs, with energies and forces?": ("ef_derivative", "ef_direct"),
    "Do derivatives beat direct outputs, with noise?": ("denoise_derivative", "denoise_direct"),
    "Do labels beat noise, as derivatives?": ("efs_derivative", "denoise_derivative"),
    "Do energies and forces beat noise, as derivatives?": ("ef_derivative", "denoise_derivative"),
    "Do energy, forces and stress beat the energy alone?": ("efs_derivative", "e_derivative"),
    "Do energy, forces and stress beat the forces alone?": ("efs_derivative", "f_derivative"),
    "Do energy, forces and stress beat forces and stress?": ("efs_derivative", "fs_derivative"),
}

Run = Mapping[str, Any]  # "target", "backbone", "arm", "seed", "n_train", "mae", "quantity", "unit", "errors"; of runs
# that diverged the first five alone


def comparisons(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each arm on each target: its error, and its ratio to that from scratch over seeds and over test materials."""
    rows = []
    for case in dict.fromkeys(_case(run) for run in runs):
        here = [run for run in runs if _case(run) == case]
        for arm in _values(here, "arm"):
            own = [run for run in here if run["arm"] == arm and not diverged(run)]
            if not own:
                continue
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
            if arm != SCRATCH and (both := _of_both(here, arm, SCRATCH)):
                found = compare(_errors(both, arm), _errors(both, SCRATCH), groups=_materials(both))
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

    Ratios are averaged over targets, as logarithms. An answer is clear where neither other seeds nor other test
    materials explain it, on these targets; what other targets would say is not asked. Seeds with which one of the two
    diverged, on any target, are left out.
    """
    rows = []
    for backbone in _values(runs, "backbone"):
        here = [run for run in runs if run["backbone"] == backbone]
        for question, (arm, other) in _questions(_values(here, "arm")).items():
            both = _of_both(here, arm, other)
            if not both:
                continue
            ratio, others = _ratio(both, arm, other), _other_materials(both, arm, other)
            sure = ratio.excludes(1.0) and others.excludes(1.0) and _n_materials(both) >= ENOUGH
            targets = {target: [run for run in both if run["target"] == target] for target in _values(both, "target")}
            rows.append(
                {
                    "question": question,
                    "backbone": backbone,
                    "arm": arm,
                    "against": other,
                    "ratio": ratio.value,
                    "low": ratio.low,
                    "high": ratio.high,
                    "seeds": len(_values(both, "seed")),
                    "materials interval": list(others[1:]),
                    "answer": ("yes" if ratio.value < 1 else "no") if sure else "not clear",
                    "targets": {target: _ratio(own, arm, other).value for target, own in targets.items()},
                }
            )
    return rows


def diverged(run: Run) -> bool:
    return "mae" not in run


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
        if len(pretrained) > 1:
            sentences.append(f"The best of {len(pretrained)} was chosen by these same errors, which flatters it:")
        sentences.append(_said(best, "the same fine-tuning from scratch", pretrained[best]))
        if (best, LONG) in here:
            sentences.append(_said(best, "training from scratch for as long as both stages took", here[best, LONG]))
    return " ".join(sentences)


def _said(arm: str, other: str, answer: Mapping[str, Any]) -> str:
    interval = f"{answer['ratio']:.2f} times the errors, {_over_seeds(answer['low'], answer['high'])}"
    words = {"yes": "beats", "no": "is worse than", "not clear": "cannot be told from"}[answer["answer"]]
    return f"{arm} {words} {other} ({interval})."


def _over_seeds(low: float, high: float) -> str:
    """For people, an interval that is there with two seeds or more."""
    return f"{low:.2f} to {high:.2f} over seeds" if math.isfinite(high) else "one seed has no interval"


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


def _other_materials(runs: Sequence[Run], arm: str, other: str) -> Interval:
    """The ratio over all targets, had other materials been tested: those of each test set are drawn by themselves, and
    for all sizes and properties that are tested on it alike."""
    logs, variance = [], 0.0
    for test in dict.fromkeys(_test(run) for run in runs):
        here = [run for run in runs if _test(run) == test]
        n = len(dict.fromkeys(_case(run) for run in here))
        found = bootstrap(_errors(here, arm), _errors(here, other), groups=_materials(here), ratio=True)
        logs += [math.log(found.value)] * n
        width = math.log(found.high / found.low) if found.low > 0 and math.isfinite(found.high) else math.inf
        variance += (n * width / 2 / 1.96) ** 2
    mean, half = float(np.mean(logs)), 1.96 * math.sqrt(variance) / len(logs)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(min(mean + half, 700.0)))


def _of_both(runs: Sequence[Run], arm: str, other: str) -> list[Run]:
    """Runs of two arms with the seeds with which neither diverged."""
    both = [run for run in runs if run["arm"] in (arm, other)]
    lost = {run["seed"] for run in both if diverged(run)}
    return [run for run in both if run["seed"] not in lost]


def _n_materials(runs: Sequence[Run]) -> int:
    """Test materials of all test sets."""
    sets = {_test(run): run for run in runs}
    return sum(len(set(run.get("materials") or range(len(run["errors"])))) for run in sets.values())


def _per_seed(runs: Sequence[Run], arm: str) -> list[float]:
    """Geometric mean of the errors over targets and sizes, for each seed."""
    own = [run for run in runs if run["arm"] == arm]
    seeds = sorted({int(run["seed"]) for run in own})
    logs = [[math.log(_mean(run)) for run in own if run["seed"] == seed] for seed in seeds]
    return [math.exp(float(np.mean(values))) for values in logs]


def _mean(run: Run) -> float:
    return float(run["mae"]) or _least(run)


def _errors(runs: Sequence[Run], arm: str) -> np.ndarray:
    """Of each target, size and seed on each test structure: (n_runs, n_test)."""
    own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: (*_case(run), int(run["seed"])))
    return np.array([np.array(run["errors"], float) + (0.0 if any(run["errors"]) else _least(run)) for run in own])


def _least(run: Run) -> float:
    """What an error that is measured as zero stands for in a ratio: half a mistake in all, of numbers next to none."""
    return 0.5 / len(run["errors"]) if run["unit"] == WRONG else float(np.finfo(np.float32).eps)


def _materials(runs: Sequence[Run]) -> list[int] | None:
    """The material of each test structure."""
    found: list[int] | None = runs[0].get("materials")
    return found


def _test(run: Run) -> tuple[str, str]:
    """A test set, by what it holds or else by the name of its target, and the backbone."""
    return run.get("test_ids_sha") or run["target"], run["backbone"]


def _case(run: Run) -> tuple[str, str, int]:
    return run["target"], run["backbone"], run["n_train"]


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))

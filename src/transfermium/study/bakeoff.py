"""Which pre-training helps: objectives, derivatives or direct outputs, and backbones, at equal compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from itertools import chain
from pathlib import Path
from typing import Any

from rich.text import Text

from ..backbones import Backbone, TensorNet
from ..console import console, results, table
from ..data import read
from ..data.read import Source
from ..errors import InputError
from ..model import described
from ..objectives import Objective
from ..run import write_json
from .bakeoff_page import finite, page, questions, rows
from .bounds import both, fair, seconds_of
from .cells import Cell, run
from .plan import ARMS, Arm, Plan, Target
from .ranking import LONG, SCRATCH, Run, answers, comparisons, diverged, verdict
from .rates import RATES, beyond
from .stages import VALID, check_options

__all__ = ["ARMS", "Arm", "Target", "bakeoff"]


def bakeoff(
    structures: Source | Mapping[str, Source],
    targets: Mapping[str, Target],
    out: str | Path,
    *,
    arms: Sequence[str] | Mapping[str, Objective | Arm] | None = None,
    backbones: Mapping[str, Backbone] | None = None,
    pretraining: str = "5min",
    tuning: str = "1min",
    sizes: Sequence[int] | None = None,
    seeds: int = 3,
    rates: Sequence[float] = RATES,
    edges: int = 5_000,
    label: Mapping[str, str] | None = None,
    unit: Mapping[str, str] | None = None,
    executor: Executor | str | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare ways of pre-training by what they do for a target, everything else being equal.

    Every arm pre-trains for the same processor time, or the same number of floating-point operations, on the same
    materials, then fine-tunes for the same time or number on the same labels with the same settings. "scratch" skips
    the first stage; "scratch_long" spends it on fine-tuning instead. The learning rate of fine-tuning is chosen once
    per arm, backbone and target, by the validation labels of the first seed. Pre-training structures
    that match a test structure are left out.

    Args:
        structures: to pre-train on; noise is learned on the frame of each material that is nearest to equilibrium. Of
            several levels of theory, names to structures: potentials learn each with an energy of its own.
        targets: name to what is fine-tuned on.
        out: folder of the study; the same call goes on where it was stopped.
        arms: names among `ARMS`, "scratch" and "scratch_long", or names to objectives of one's own (with structures of
            their own: `Arm`); by default all that the labels of `structures` allow, of energies and forces alone only
            where there is no stress.
        backbones: name to architecture.
        pretraining, tuning: processor time of the two stages, such as "5min", or floating-point operations, such as
            "20TFLOP", by which the same call finds the same on any machine, however busy.
        sizes: numbers of labels, validation included, each set within the next; by default all there are, up to 500.
        seeds: of weights, labels and noise; at least two, or there are no intervals.
        rates: learning rates that each arm tries; arms that chose the largest or the smallest are named under "beyond
            the rates".
        edges: most edges in a batch.
        label, unit: keys and units of the labels of `structures`.
        executor, workers: where cells are computed; see `cells.run`.
        dry_run: only say how many cells there are and how long they take; an empty result is returned.

    Returns:
        What is also in results.json: "runs", "rates", "comparisons", "leaks", "verdict".
    """
    out = Path(out)
    if not targets:
        raise InputError("a comparison needs a target: give labelled structures and what to learn of them")
    for name, target in targets.items():
        if not isinstance(target, Target):
            raise InputError(f"the target {name} is {target!r}: give Target(structures, objective)")
    check_options(rates, edges, seeds, workers)
    fair(pretraining), fair(tuning)
    backbones = {"TensorNet": TensorNet(32, 2)} if backbones is None else dict(backbones)
    if not backbones:
        raise InputError("there is no backbone to compare with: leave backbones out, or name one")
    arms = [arms] if isinstance(arms, str) else arms
    levels = (
        {name: read(source) for name, source in structures.items()}
        if isinstance(structures, Mapping)
        else {"": read(structures)}
    )
    if not levels or not all(map(len, levels.values())):
        raise InputError("there are no structures to pre-train on: give some")
    own = {name: arm for name, arm in arms.items() if isinstance(arm, Arm)} if isinstance(arms, Mapping) else {}
    plan = Plan(levels, own, targets, out, label or {}, unit or {}, sizes, quiet)
    objectives = plan.objectives(arms, backbones)
    if LONG in objectives:
        both(fair(pretraining), fair(tuning))
    settings = {"pretraining": pretraining, "tuning": tuning, "edges": edges}

    if not quiet or dry_run:
        console.print(
            _price(objectives, len(backbones), seeds, list(map(len, plan.sizes.values())), len(rates), settings)
        )
    if dry_run:
        return {}
    plan.packs.write()

    def cells(wanted: Iterable[tuple[Any, ...]]) -> list[Cell]:
        return [plan.cell(objectives, backbones, settings, *each) for each in wanted]

    cases = [(target, backbone, arm) for backbone in backbones for target in targets for arm in objectives]
    search = {case: cells((*case, plan.sizes[case[0]][-1], 0, rate) for rate in rates) for case in cases}
    found = dict(run(chain(*search.values()), out, executor=executor, workers=workers, quiet=quiet))
    chosen = {}
    for case, tried in search.items():
        results_of = [found[cell] for cell in tried]
        ranks = [(diverged(one), _or_infinite(one.get("validation loss"))) for one in results_of]
        chosen[case] = rates[ranks.index(min(ranks))]

    grid = [
        (target, backbone, arm, size, seed, chosen[target, backbone, arm])
        for backbone in backbones
        for seed in range(seeds)
        for target in targets
        for size in plan.sizes[target]
        for arm in objectives
    ]
    found |= dict(run(cells(grid), out, executor=executor, workers=workers, quiet=quiet))
    runs = [found[cell] for cell in cells(grid)]
    lost = [run for run in runs if diverged(run)]
    if not any(run["arm"] == SCRATCH and not diverged(run) for run in runs):
        raise InputError(
            f"all training from scratch diverged, at all of {', '.join(map(str, rates))}: try smaller rates"
        )
    result: dict[str, Any] = {
        "settings": {**settings, "valid fraction": VALID, "rates": list(rates), "seeds": seeds},
        "arms": {name: None if objective is None else described(objective) for name, objective in objectives.items()},
        "backbones": {name: described(backbone) for name, backbone in backbones.items()},
        "rates": [{"target": t, "backbone": b, "arm": a, "lr": rate} for (t, b, a), rate in chosen.items()],
        "beyond the rates": beyond([(arm, rate) for (_, _, arm), rate in chosen.items()], rates),
        "own structures": plan.own_counts,
        "leaks": plan.leaks,
        "diverged": [{name: one[name] for name in ("target", "backbone", "arm", "n_train", "seed")} for one in lost],
        "runs": [{k: v for k, v in one.items() if k not in ("errors", "materials")} for one in runs],
        "comparisons": comparisons(runs),
        "answers": answers(runs),
    }
    result["verdict"] = f"{verdict(result['answers'])}{_lost(lost)}{_guessed(runs)}"
    write_json(out / "results.json", finite(result))
    path = page(result, plan.counts).write(out / "report.html")
    if not quiet:
        results.print(table("Errors", rows(result, short=True)))
        results.print(table("Answers", questions(result)))
        results.print(Text(result["verdict"]))
        if result["beyond the rates"]:
            console.print(Text(result["beyond the rates"]))
        console.print(f"Report: {path.resolve()}")
    return result


def _price(
    objectives: Mapping[str, Objective | None],
    backbones: int,
    seeds: int,
    sizes: Sequence[int],
    rates: int,
    settings: Mapping[str, Any],
) -> str:
    """How many cells there are, and how long they take."""
    first, second = (seconds_of(fair(settings[name])) for name in ("pretraining", "tuning"))
    bases = backbones * seeds * sum(objective is not None for objective in objectives.values())
    tunings = backbones * (seeds * sum(sizes) + (rates - 1) * len(sizes))  # the search has one of the grid's
    cells = f"{bases} pre-trainings and {tunings * len(objectives)} fine-tunings"
    if first is None or second is None:
        return cells
    seconds = bases * first + tunings * (len(objectives) * second + (LONG in objectives) * first)
    return f"{cells}: {seconds / 3600:.2g} hours of processor time"


def _lost(runs: Sequence[Run]) -> str:
    """A sentence about runs that diverged, where there are any."""
    if not runs:
        return ""
    seeds: dict[str, list[str]] = {}
    for one in runs:
        seeds.setdefault(f"{one['arm']} on {one['target']} ({one['backbone']})", []).append(str(one["seed"]))
    said = ", ".join(f"{what} with seed {' and '.join(dict.fromkeys(own))}" for what, own in seeds.items())
    return f" Runs that diverged: {said}; what is compared with them leaves these seeds out."


def _guessed(runs: Sequence[Run]) -> str:
    """A sentence about energies that rest on a guess."""
    symbols = sorted({symbol for run in runs for symbol in run.get("guessed references", ())})
    if not symbols:
        return ""
    return (
        f" Test structures have {', '.join(symbols)}, of which some runs had no label: their energies there rest on a "
        "guessed reference (give more labels, or other test structures)."
    )


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss

"""How many labels pre-training saves: error against number of labels, with and without it, and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from .. import __version__
from ..backbones import Backbone
from ..console import and_, console, results, table
from ..data.read import Source
from ..errors import InputError
from ..evaluate import PRINTED
from ..model import Model, described
from ..objectives import Objective
from ..report import need_viewer
from ..run import write_json
from ..train import parse_time
from .bakeoff_page import finite
from .baselines import ALONE, AS_IT_IS
from .bounds import both, bound_of
from .cells import cores
from .curve_laws import FROM_SCRATCH, MARGIN, Arm, Curves, Goal, goal_of, name_of, summary
from .curve_page import page
from .curve_study import Study
from .curve_tables import SPOKEN, forgotten, has_baselines, of_slopes, rows, shown, told_of_baselines, worths
from .intervals import compare
from .laws import short
from .points import DELTA, LONG, TOGETHER
from .rates import RATES, beyond
from .stages import check_options

PRETRAINING, TUNING = "5min", "30s"  # of the stages, where nothing else is said


def curve(
    structures: Source,
    objective: Objective,
    out: str | Path,
    *,
    base: str | Path | Model | None = None,
    part: str | None = None,
    base_data: Source | None = None,
    base_objective: Objective | None = None,
    base_sizes: Sequence[int] | None = None,
    backbone: Backbone | None = None,
    arms: Sequence[str] | None = None,
    cheap: str | None = None,
    sizes: Sequence[int] | None = None,
    seeds: int = 3,
    test: Source | None = None,
    split_key: str | None = None,
    pretraining: str | None = None,
    tuning: str | None = None,
    budget: str | None = None,
    rates: Sequence[float] = RATES,
    edges: int = 5_000,
    target: str | float | None = None,
    cost_per_label: str | float | None = None,
    margin: float = MARGIN,
    label: Mapping[str, str] | None = None,
    unit: Mapping[str, str] | None = None,
    base_label: Mapping[str, str] | None = None,
    base_unit: Mapping[str, str] | None = None,
    level: str | None = None,
    base_level: str | None = None,
    provenance: Mapping[str, str] | None = None,
    base_provenance: Mapping[str, str] | None = None,
    executor: Executor | str | None = None,
    workers: int | None = None,
    viewer: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Measure how many labels pre-training saves, and how many more an error takes.

    Every arm gets the same labels (each size within the next, all labels that are touched counted, validation
    included), the same time and the same choice of learning rates, by validation labels of the first seed. Test
    structures are frozen before anything is trained: no material of theirs is among the labels, or in `base_data`.

    Args:
        structures: with the expensive labels.
        objective: what to learn of them.
        out: folder of the study; the same call goes on where it was stopped.
        base: a pre-trained model, or its file; `part` names one of its several objectives, or of `base_objective`.
        base_data: or structures to pre-train bases on, one for each seed, by `base_objective` (as `objective` by
            default), each for the time `pretraining`.
        base_sizes: numbers of those structures, for a curve over them too; all of them by default.
        backbone: of bases that are pre-trained here, TensorNet(32, 2) by default.
        arms: by default "scratch", "aligned" (where bases have the output), "full", and "delta" with a `cheap` label;
            or "scratch" and any of "scratch_long" (from scratch for the time of both stages), "zero-shot", "aligned",
            "probe", "head", "lora", "full" and "replay" (see `finetune`; a tenth of `base_data` is then set aside to
            measure what each arm forgets; with a finished `base` it is of generated structures), or "multi-fidelity":
            both levels together from the start (`Fidelities`), for the time of both stages; or "delta" (see `cheap`).
        cheap: name of a cheap label of the same quantity that all structures have, test structures too: the arm "delta"
            learns the difference from it (`Property(minus=...)`), and baselines go through it instead of the base.
        sizes: numbers of labels; by default doubled from ten on, or where that makes fewer than four, four from five to
            all. Below ten all labels train and nothing is validated.
        seeds: of labels, weights and bases; at least two, or there are no intervals.
        test: structures to test on; by default those that `split_key` names ("split", or "fold=0"), or a fifth.
        pretraining, tuning: of the stages: processor time ("5min" and "30s" by default), operations, such as "20TFLOP",
            or "300steps".
        budget: time of the whole study instead, such as "30min", if each worker has a core; after each seed the half of
            the trained arms with the larger validation errors is dropped, scratch never.
        rates: learning rates that each trained arm tries; the first where no size has ten labels, and none validates.
            Arms that chose the largest or the smallest are named under "beyond the rates".
        edges: most edges in a batch.
        target: an error to reach, such as "43meV/atom".
        cost_per_label: hours, or a time such as "90min", of one expensive calculation.
        margin: difference of exponents below which two slopes are said to be equal.
        label, unit: keys and units of the expensive labels; `base_label`, `base_unit` those of `base_data`.
        level: use structures at this level of theory only, of those to test on too; `base_level` of `base_data`.
        provenance: what else is known of the labels, as in `finetune`; `base_provenance` of those of `base_data`.
        executor, workers: where cells are computed; see `cells.run`.
        viewer: show test structures beside the parity plot, which makes the page 1.3 MB larger.
        dry_run: only say how many cells are left to do and how long they take; an empty result is returned.

    Returns:
        What is also in curve.json: "arms", "sizes", "seeds", "errors", "fits", "factors", "baselines", "verdict", ...

    Raises:
        InputError: for arms, sizes, labels or a budget that make no curve.
    """
    check_options(rates, edges, seeds, workers)
    cost = None if cost_per_label is None else _hours(cost_per_label)
    bounds = {"pretraining": bound_of(pretraining or PRETRAINING), "tuning": bound_of(tuning or TUNING)}
    seconds = None if budget is None else parse_time(budget)
    if seconds is not None and (given := pretraining or tuning):
        raise InputError(f"a budget shares out the time of both stages, but {given} is given for one: leave one out")
    if base is not None and base_data is None:
        own = {
            "backbone": backbone, "base_objective": base_objective, "base_sizes": base_sizes,
            "pretraining": pretraining, "base_label": base_label, "base_unit": base_unit, "base_level": base_level,
            "base_provenance": base_provenance,
        }  # fmt: skip
        if unused := [name for name, value in own.items() if value not in (None, {})]:
            raise InputError(f"{unused[0]} is of bases that are pre-trained here: leave it out, or give base_data")
    if not margin > 0:
        raise InputError(f"margin is {margin}, but must be above zero")
    study = Study(
        structures, objective, Path(out), base, part, base_data, base_objective, base_sizes, backbone, arms, cheap,
        sizes, seeds, test, split_key, rates, edges, (label or {}, unit or {}), (base_label or {}, base_unit or {}),
        (level, base_level), (provenance or {}, base_provenance or {}), quiet,
    )  # fmt: skip
    if target is not None:  # what is no error here is said before hours of work
        study.judged = [goal_of(target, study.units()).quantity.removesuffix("_per_atom")]
    if seconds is None:
        study.bounds = bounds
    else:
        study.bounds = study.within(seconds, workers or (1 if executor else cores()))
    if {LONG, TOGETHER} & set(study.arms):
        both(study.bounds["pretraining"], study.bounds["tuning"])
    if viewer:
        need_viewer()
    if not quiet or dry_run:
        for text in study.warnings():
            console.print(f"[yellow]{text}[/yellow]")
        console.print(study.price())
    if dry_run:
        return {}
    study.write()
    fan_out: dict[str, Any] = {"executor": executor, "workers": workers, "quiet": quiet}
    points = study.run(fan_out, halving=budget is not None)

    curves, best = Curves(points, study.groups, study.wanted), study.best(points)
    goal = None if target is None else goal_of(target, curves.units)
    result: dict[str, Any] = {
        "settings": {
            **study.bounds, "budget": budget, "rates": list(rates), "edges": edges, "cost per label (h)": cost,
            "margin": margin, "split key": split_key, "objective": described(objective),
            "backbone": described(study.backbone), **_of_bases(study),
            "labels": {"keys": dict(label or {}), "units": dict(unit or {})}, "transfermium": __version__,
        },
        "data": study.data,
        "arms": list(dict.fromkeys(name_of(arm) for arm in curves.arms)),
        "sizes": study.sizes,
        "base sizes": study.base_sizes,
        "seeds": seeds,
        "test structures": study.n_test,
        "test materials": study.n_materials,
        "labels at hand": study.n_pool,
        "validation labels": study.validating,
        "elements without labels": study.new_elements,
        "leaks": study.leaks,
        "left out of the labels": study.left_out,
        "base": study.said_of_base,
        "copies that the base has seen": study.copies,
        "theory": {
            **{side: study.data[side]["level of theory"] for side in ("labels", "test")},
            "base": study.theory_of_base or _said_of_base(points),
        },
        "dropped": study.dropped,
        "beyond the rates": beyond(study.chosen_rates(points), rates),
        "not judged": [name for name in study.wanted if not {name, f"{name}_per_atom"} & curves.units.keys()],
        "verdict by": None if best is None else study.chosen_by(best, points),
        "errors": [row for point in points for row in _rows(point)],
        "cheap": cheap,
        "baselines": study.baselines(curves.units, fan_out),
        **summary(curves, chosen=best, goal=goal, cost=cost, margin=margin, labels=study.n_pool),
    }  # fmt: skip
    if best is not None:
        result["verdict"] += _at_one_size(curves, best, goal) + _without_training(result, name_of(best))
    result = finite(result)
    write_json(study.out / "curve.json", result)
    example = None if best is None else study.example(best, points)
    path = page(result, example, viewer).write(study.out / "report.html")
    if not quiet:
        _print(result)
        if result["beyond the rates"]:
            console.print(Text(result["beyond the rates"]))
        console.print(f"Report: {path.resolve()}")
    return result


def _print(result: Mapping[str, Any]) -> None:
    """Errors, what a label is worth, what was forgotten, and the verdict."""
    for quantity in result["units"]:
        printed, _ = shown(result, quantity)
        spoken = SPOKEN.get(quantity, quantity)
        tables = {f"Errors of {spoken} ({printed})": rows(result, quantity, ranges=False)}
        if has_baselines(result, quantity):
            tables[f"The same {told_of_baselines(result)}"] = rows(result, quantity, "baselines", ranges=False)
        tables["Labels from scratch that one label is worth (95 %)"] = worths(result, quantity, "said")
        if "equal compute" in result:
            tables[f"The same against {LONG}"] = worths(result, quantity, "said", "equal compute")
        tables["Hours of calculations saved (95 %)"] = worths(result, quantity, "hours saved")
        for title, found in tables.items():
            if found:
                results.print(table(title, found))
    for title, found in forgotten(result).items():
        results.print(table(title, found))
    for said in of_slopes(result):
        results.print(Text(said))
    results.print(Text(result["verdict"]))


def _hours(cost: str | float) -> float:
    try:
        hours = float(cost)
    except ValueError:
        hours = parse_time(str(cost)) / 3600
    if not 0 < hours < math.inf:
        raise InputError(
            f"a label costs {cost}, but must cost something that can be counted: give the hours of one, or a time such "
            "as 90min"
        )
    return hours


def _at_one_size(curves: Curves, arm: Arm, goal: Goal | None) -> str:
    """How errors compare where there is one size, which makes no curve."""
    quantity = curves.quantities[0] if goal is None else goal.quantity
    sizes = {point["n_train"] for point in curves.points}
    seeds = [seed for seed in curves.seeds(arm) if seed in curves.seeds(FROM_SCRATCH)]
    if len(sizes) > 1 or not seeds:
        return ""
    found = compare(*(curves.errors(case, quantity, seeds)[:, 0] for case in (arm, FROM_SCRATCH)), groups=curves.groups)
    more = len(seeds) > 1
    said = f"{short(found.seeds.low)} to {short(found.seeds.high)} with other seeds, " if more else ""
    said += f"{short(found.materials.low)} to {short(found.materials.high)} on other test materials"
    said += "" if more else "; one seed, so that others may say otherwise"
    return (
        f" At {min(sizes)} labels errors of {SPOKEN.get(quantity, quantity)} with {name_of(arm)} are "
        f"{short(found.seeds.value)} times those from scratch ({said})."
    )


def _without_training(result: Mapping[str, Any], arm: str) -> str:
    """A sentence where a fit without training is better than the arm of the verdict, with all seeds: at which sizes."""
    errors: dict[str, dict[tuple[str, int], dict[int, float]]] = {}  # of each quantity, arm or fit, size and seed
    for row in (*result["errors"], *result["baselines"]):
        case = (name_of((row["arm"], row.get("n_pretraining"))), row["n_train"])
        errors.setdefault(row["quantity"], {}).setdefault(case, {})[row["seed"]] = row["mae"]
    fits: dict[str, list[str]] = {}
    for row in result["baselines"]:
        fits.setdefault(row["quantity"], []).append(row["arm"])
    said = (
        _best_fit(result, quantity, errors[quantity], list(dict.fromkeys(own)), arm) for quantity, own in fits.items()
    )
    return next(filter(None, said), "")


def _best_fit(
    result: Mapping[str, Any],
    quantity: str,
    errors: Mapping[tuple[str, int], Mapping[int, float]],
    fits: Sequence[str],
    arm: str,
) -> str:
    """Of one quantity: the fit that is better than the arm at most sizes, if there is one."""

    def better(fit: str) -> list[int]:
        pairs = {n: (errors.get((fit, n), {}), errors.get((arm, n), {})) for n in result["sizes"]}
        return [n for n, (own, its) in pairs.items() if its and all(own.get(s, math.inf) < its[s] for s in its)]

    def mean(name: str, n: int) -> float:
        return float(np.mean([*errors.get((name, n), {}).values()] or [math.nan]))

    fit = max(fits, key=lambda each: (len(better(each)), -mean(each, result["sizes"][-1])))
    if not (sizes := better(fit)):
        return ""
    unit, factor = PRINTED.get(result["units"][quantity], (result["units"][quantity], 1.0))
    numbers = (
        f"{short(factor * mean(fit, sizes[-1]))} instead of {short(factor * mean(arm, sizes[-1]))} {unit}".rstrip()
    )
    other = mean(DELTA, sizes[-1])
    delta = f", and {short(factor * other)} with {DELTA}" if math.isfinite(other) and arm != DELTA else ""
    last = f" at {sizes[-1]:,}" if len(sizes) > 1 else ""
    of_base = not result["cheap"] and fit not in ALONE
    start = "Without training on them" if of_base else "Without a network"
    through = " of what the base says" if of_base and fit != AS_IT_IS else ""
    return (
        f" {start}, the {fit}{through} makes smaller errors of {SPOKEN.get(quantity, quantity)} with "
        f"{and_([f'{n:,}' for n in sizes])} labels ({numbers}{delta}{last})."
    )


def _of_bases(study: Study) -> dict[str, Any]:
    """What bases learn that are pre-trained here."""
    if study.base_objective is None:
        return {}
    keys, units = study.base_named
    return {
        "base objective": described(study.base_objective),
        "base labels": {"keys": dict(keys), "units": dict(units)},
    }


def _said_of_base(points: Sequence[Mapping[str, Any]]) -> str:
    """What bases know of the origin of their labels, where these are of several parts."""
    return next((said for p in points if p["arm"] != TOGETHER and (said := p.get("base theory"))), "")


def _rows(point: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row of each quantity, without the errors of each structure."""
    kept = (
        "arm", "n_train", "n_pretraining", "seed", "lr", "steps", "train_seconds", "pretrain_seconds", "forgetting",
        "cell",
    )  # fmt: skip
    for quantity, errors in (point["errors"] or {}).items():
        yield {
            **{name: point[name] for name in kept if name in point},
            "quantity": quantity,
            "mae": float(np.mean(errors)),
            "unit": point["units"][quantity],
        }

"""How many labels pre-training saves: error against number of labels, with and without it, and intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from rich.text import Text

from ..backbones import Backbone, TensorNet
from ..console import console, results, table
from ..data import read, resolve
from ..data.columns import isolated_atoms
from ..data.leakage import summary as leaked
from ..data.leakage import without
from ..data.read import Source
from ..data.sequences import Subset
from ..data.split import by_key, independent, nested, split
from ..errors import InputError
from ..evaluate import PRINTED
from ..model import Model, copied, described, load
from ..objectives import Fidelities, Objective, Property
from ..objectives.together import Parts
from ..probe import probes
from ..report import need_viewer
from ..run import fingerprint, write_json
from ..train import parse_time
from ..transfer import weights_fingerprint
from .bakeoff_page import finite
from .baselines import baselines, compositions_of, unlabelled
from .bounds import both, bound_of, in_words, seconds_of
from .cells import Cell, cores, run
from .curve_laws import MARGIN, Arm, Curves, goal_of, in_order, name_of, summary
from .curve_page import Example, has_baselines, page, rows, shown
from .judged import labelled_for, tested
from .laws import short
from .plan import Packs, Target, divided
from .points import (
    CHEAP,
    DEAR,
    DELTA,
    FEW,
    LONG,
    REPLAY,
    SCRATCH,
    TOGETHER,
    UNTRAINED,
    based,
    point,
    scalar_of,
    scalars,
    untouched,
)
from .stages import check_options

ARMS = (SCRATCH, LONG, "zero-shot", "aligned", "probe", "head", "lora", "full", REPLAY, TOGETHER, DELTA)
ASIDE = 0.1  # of what bases are pre-trained on, for a ledger, where something is replayed
BASELESS = (SCRATCH, LONG, TOGETHER, DELTA)
USUAL = (SCRATCH, "aligned", "full")
RATES = (2e-3, 5e-4)
FEWEST = 5  # labels of the smallest size
SHARE = 0.7  # of a budget that is trained: the rest is reading, testing and starting
TINY = 1e-12  # an error of nothing, whose logarithm is taken
LEAST = 2.0  # seconds of a fine-tuning below which a budget is refused


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
    arms: Sequence[str] = USUAL,
    cheap: str | None = None,
    sizes: Sequence[int] | None = None,
    seeds: int = 3,
    test: Source | None = None,
    split_key: str | None = None,
    pretraining: str = "5min",
    tuning: str = "30s",
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
        base: a pre-trained model, or its file; `part` names one of its several objectives.
        base_data: or structures to pre-train bases on, one for each seed, by `base_objective` (as `objective` by
            default), each for the time `pretraining`.
        base_sizes: numbers of those structures, for a curve over them too; all of them by default.
        backbone: of bases that are pre-trained here, TensorNet(32, 2) by default.
        arms: "scratch" and any of "scratch_long" (from scratch for the time of both stages), "zero-shot", "aligned",
            "probe", "head", "lora", "full" and "replay" (see `finetune`; a tenth of `base_data` is then set aside to
            measure what each arm forgets), or "multi-fidelity": both levels together from the start (`Fidelities`), for
            the time of both stages; or "delta" (see `cheap`).
        cheap: name of a cheap label of the same quantity that all structures have, test structures too: the arm "delta"
            learns the difference from it (`Property(minus=...)`), and baselines go through it instead of the base.
        sizes: numbers of labels, doubled from ten on by default. Below ten all labels train and nothing is validated.
        seeds: of labels, weights and bases; at least two, or there are no intervals.
        test: structures to test on; by default those that `split_key` names ("split", or "fold=0"), or a fifth.
        pretraining, tuning: of the stages: processor time, such as "30s", operations, such as "20TFLOP", or "300steps".
        budget: wall-clock time of the whole study instead, such as "30min"; after each seed the half of the trained
            arms with the larger validation errors is dropped, scratch never.
        rates: learning rates that each trained arm tries.
        edges: most edges in a batch.
        target: an error to reach, such as "43meV/atom".
        cost_per_label: hours, or a time such as "90min", of one expensive calculation.
        margin: difference of exponents below which two slopes are said to be equal.
        label, unit: keys and units of the expensive labels; `base_label`, `base_unit` those of `base_data`.
        executor, workers: where cells are computed; see `cells.run`.
        viewer: show test structures beside the parity plot, which makes the page 1.3 MB larger.
        dry_run: only say how many cells there are and how long they take; an empty result is returned.

    Returns:
        What is also in curve.json: "arms", "sizes", "seeds", "errors", "fits", "factors", "baselines", "verdict", ...

    Raises:
        InputError: for arms, sizes, labels or a budget that make no curve.
    """
    check_options(rates, edges, seeds, workers)
    cost = None if cost_per_label is None else _hours(cost_per_label)
    bounds = {"pretraining": bound_of(pretraining), "tuning": bound_of(tuning)}
    seconds = None if budget is None else parse_time(budget)
    if not margin > 0:
        raise InputError(f"margin is {margin}, but must be above zero")
    study = Study(
        structures, objective, Path(out), base, part, base_data, base_objective, base_sizes, backbone, arms, cheap,
        sizes, seeds, test, split_key, rates, edges, (label or {}, unit or {}), (base_label or {}, base_unit or {}),
        quiet,
    )  # fmt: skip
    if target is not None:
        goal_of(target, study.units())  # what is no error here is said before hours of work
    if seconds is None:
        study.bounds = bounds
    else:
        study.bounds = study.within(seconds, workers or (1 if executor else cores()))
    if {LONG, TOGETHER} & set(study.arms):
        both(study.bounds["pretraining"], study.bounds["tuning"])
    if viewer:
        need_viewer()
    if not quiet or dry_run:
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
            "objective": described(objective), "backbone": described(study.backbone),
        },
        "arms": list(dict.fromkeys(name_of(arm) for arm in curves.arms)),
        "sizes": study.sizes,
        "base sizes": study.base_sizes,
        "seeds": seeds,
        "test structures": study.n_test,
        "test materials": study.n_materials,
        "labels at hand": study.n_pool,
        "elements without labels": study.new_elements,
        "leaks": study.leaks,
        "left out of the labels": study.left_out,
        "base": study.said_of_base,
        "theory": {side: _said_most(points, name) for side, name in (("labels", "theory"), ("base", "base theory"))},
        "dropped": study.dropped,
        "not judged": [name for name in study.wanted if not {name, f"{name}_per_atom"} & curves.units.keys()],
        "verdict by": None if best is None else study.chosen_by(best, points),
        "errors": [row for point in points for row in _rows(point)],
        "baselines from": f"through the label {cheap}" if cheap else "through what the base says, if anything",
        "baselines": study.baselines(curves.units, fan_out),
        **summary(curves, chosen=best, goal=goal, cost=cost, margin=margin, labels=study.n_pool),
    }  # fmt: skip
    result["verdict"] += "" if best is None else _without_network(result, name_of(best))
    result = finite(result)
    write_json(study.out / "curve.json", result)
    example = None if best is None else study.example(best, points)
    path = page(result, example, viewer).write(study.out / "report.html")
    if not quiet:
        for quantity in result["units"]:
            printed, _ = shown(result, quantity)
            results.print(table(f"Errors of {quantity} ({printed})", rows(result, quantity, ranges=False)))
            if has_baselines(result, quantity):
                title = f"The same without a network, {result['baselines from']}"
                results.print(table(title, rows(result, quantity, "baselines", ranges=False)))
        results.print(Text(result["verdict"]))
        console.print(f"Report: {path.resolve()}")
    return result


class Study:
    """The data of a curve, divided and to be packed, and its cells."""

    def __init__(
        self,
        structures: Source,
        objective: Objective,
        out: Path,
        base: str | Path | Model | None,
        part: str | None,
        base_data: Source | None,
        base_objective: Objective | None,
        base_sizes: Sequence[int] | None,
        backbone: Backbone | None,
        arms: Sequence[str],
        cheap: str | None,
        sizes: Sequence[int] | None,
        seeds: int,
        test: Source | None,
        split_key: str | None,
        rates: Sequence[float],
        edges: int,
        named: tuple[Mapping[str, str], Mapping[str, str]],
        base_named: tuple[Mapping[str, str], Mapping[str, str]],
        quiet: bool,
    ):
        self.out, self.objective, self.part, self.seeds = out, objective, part, seeds
        self.rates, self.edges, self.base_named, self.cheap = rates, edges, base_named, cheap
        label, unit = ({k: v for k, v in pairs.items() if k != cheap} for pairs in named)
        self.named, self.both_named = (label, unit), named  # the second with what is said of the cheap label
        self.bounds: dict[str, Any] = {}
        self.dropped: list[str] = []
        self.arms = list(dict.fromkeys([SCRATCH, *arms]))
        if (base is None) == (base_data is None):
            asked = "one of the two" if base is None else "one of them, not both"
            raise InputError(
                f"a curve needs a base model, or else data to pre-train one on: give {asked} (--base, --base-data)"
            )
        for arm in self.arms:
            if arm not in ARMS:
                raise InputError(f"there is no arm '{arm}': choose among {', '.join(ARMS)}")
        if isinstance(objective, Parts):
            raise InputError(f"a curve is of one objective, not of {type(objective).__name__}")
        if not objective.labels():
            raise InputError(
                f"{type(objective).__name__} learns no labels that a curve could count: give another objective"
            )
        if "probe" in self.arms and not probes(objective):
            raise InputError(
                f"the arm 'probe' learns one number per structure, not {type(objective).__name__} as it is given here: "
                "leave the arm out"
            )
        if TOGETHER in self.arms and base_objective is not None:
            Fidelities({CHEAP: base_objective, DEAR: objective})  # or says why they are not learned together
        self.wanted = [name for name in objective.labels() if name != getattr(objective, "minus", None)]

        if base_data is None and (needy := {REPLAY, TOGETHER} & set(self.arms)):
            raise InputError(f"the arm '{min(needy)}' learns the base's structures too: give them as base_data")
        if base_data is None and LONG in self.arms:
            raise InputError(
                f"the arm '{LONG}' trains as long as both stages took, but what a finished base took was not measured "
                "here: leave it out, or give base_data"
            )

        if (cheap is not None or DELTA in self.arms) and not isinstance(objective, Property):
            raise InputError(
                f"a difference from a cheap label is learned of a property, not of {type(objective).__name__}"
            )
        if DELTA in self.arms and cheap is None:
            raise InputError("the arm 'delta' learns the difference from a cheap label: name it as cheap (--cheap)")
        if split_key is not None and test is not None:
            raise InputError("test structures are given, and named by a key too: leave one out")
        if split_key is not None:
            structures, test = _by(split_key, read(structures))
        structures, test = _bonded(structures), None if test is None else _bonded(test)
        pool, tests, self.left_out, self.tolerance = divided("target", Target(structures, objective, test, *self.named))
        self.n_pool, self.n_test = len(pool), len(tests)
        if self.n_test < 2:
            raise InputError("one test structure gives no interval: give several (--test)")
        self.groups = independent(tests).tolist()
        self.n_materials = len(set(self.groups))
        if self.n_materials == 1:  # its frames are what other tests would draw from
            self.groups = list(range(self.n_test))
        self.ids = fingerprint(tests)
        self.sizes = chosen_sizes(sizes, len(pool))
        self.pool_atoms, self.test_atoms = pool, tests
        self.known = {} if cheap is None else self._cheap_labels()
        in_tests = compositions_of(tests).any(axis=0)
        summed = scalar_of(objective)[1] == "extensive"  # over atoms, with a reference for each element
        self.new_elements = unlabelled(compositions_of(pool), compositions_of(tests)) if summed else []
        if self.new_elements and not quiet:
            console.print(
                f"[yellow]No label has {', '.join(self.new_elements)}, but test structures do: energies there rest on "
                "a guessed reference (choose other test structures with --test or --split-key)[/yellow]"
            )
        self.varied = not compositions_of(pool)[:, in_tests].all()  # a few labels may lack an element of the tests
        self.packs = Packs(out)
        self.pool, self.test = self.packs.add("pool", pool), self.packs.add("test", tests)

        self.base: Model | None = None
        self.model: str | None = None
        self.base_sizes: list[int] = []
        self.leaks = ""
        if base is not None:
            self._take(base, backbone, base_objective, base_sizes)
        else:
            assert base_data is not None
            self.backbone = TensorNet(32, 2) if backbone is None else backbone
            self._prepare(read(base_data), base_objective or objective, base_sizes, tests, quiet)

    def _take(
        self, base: str | Path | Model, backbone: Backbone | None, objective: Objective | None, sizes: Any
    ) -> None:
        """A model as the base of all seeds, saved beside the study under a name that changes with it."""
        for given, name in ((backbone, "backbone"), (objective, "base_objective"), (sizes, "base_sizes")):
            if given is not None:
                raise InputError(f"{name} is of bases that are pre-trained here: leave it out, or give base_data")
        found = base if isinstance(base, Model) else load(base)
        self.backbone = copied(found.whole(self.part, list(self.objective.labels())).backbone)
        self.base, self.model = found, f"base-{weights_fingerprint(found)}.safetensors"
        self.said_of_base = (
            f"{base if not isinstance(base, Model) else 'a model'}: what it was trained on is not compared with the "
            "test structures; if it has seen them, its arms look better than they are"
        )

    def write(self) -> None:
        """Put data and base into the folder, once nothing is left to be refused."""
        self.packs.write()
        if self.base is not None and self.model is not None and not (self.packs.folder / self.model).exists():
            self.base.save(self.packs.folder / self.model)

    def _prepare(
        self,
        data: Sequence[Atoms],
        objective: Objective,
        sizes: Sequence[int] | None,
        tests: Sequence[Atoms],
        quiet: bool,
    ) -> None:
        if wanted := {} if isinstance(objective, Parts) else objective.labels():
            label, unit = self.base_named
            optional = [name for name, needed in wanted.items() if not needed]
            try:
                labels = resolve(data, list(wanted), labels=label, units=unit, optional=optional)
            except InputError as error:
                raise InputError(f"structures to pre-train on: {error}") from None
            if not labels.entries:
                raise InputError(f"no structure to pre-train on has any of {', '.join(wanted)}: name their keys")
        kept, found = without(data, tests, tolerance=self.tolerance, quiet=quiet)
        self.leaks = leaked(found, len(data))
        if not len(kept):
            raise InputError("every structure to pre-train on is also in the test set: there is nothing to learn from")
        self.ledger: str | None = None
        if REPLAY in self.arms:
            sides = split(kept, ASIDE, seed=0)
            self.ledger = self.packs.add("ledger", Subset(kept, sides.valid))
            kept = Subset(kept, sides.train)
        self.base_sizes = sorted(set(sizes or [len(kept)]))
        if not 0 < self.base_sizes[0] <= self.base_sizes[-1] <= len(kept):
            raise InputError(f"base sizes {self.base_sizes} cannot be taken from {len(kept)} structures: ask for fewer")
        self.base_objective, self.base_pack, self.n_base = objective, self.packs.add("base", kept), len(kept)
        many = " or ".join(f"{n:,}" for n in self.base_sizes)
        self.said_of_base = f"pre-trained on {many} structures, anew for each seed"
        if not quiet:
            console.print(f"Pre-training on {many} structures; {self.leaks}")

    def units(self) -> dict[str, str]:
        """Of the quantities that will be judged, which all test structures have; the most important first."""
        known = {"energy": ("energy_per_atom", "eV/atom"), "forces": ("forces", "eV/Å"), "stress": ("stress", "eV/Å^3")}
        entries = labelled_for(self.objective, self.test_atoms, *self.named).labels.entries
        judged = (e for e in entries if e.quantity in self.wanted and e.count == e.total)
        found = dict(known.get(e.quantity, (e.quantity, e.unit or "")) for e in judged)
        if isinstance(self.objective, Property) and self.objective.task == "classification":
            found = dict.fromkeys(found, "wrong")
        return {name: found[name] for name in in_order(found, self.wanted)}

    # ------------------------------------------------------------------------------------------------------- cells

    def cases(self) -> list[Arm]:
        """Arms and the sizes of their bases; only one, if possible a trained one, is drawn over all of these."""
        based = [arm for arm in self.arms if arm not in BASELESS]
        trained = [arm for arm in based if arm not in UNTRAINED]
        swept = next((arm for arm in ("full", *trained, *based) if arm in based), None)
        several = len(self.base_sizes) > 1
        found: list[Arm] = []
        for arm in self.arms:
            if arm in BASELESS or not several:
                found.append((arm, None))
            else:
                found += [(arm, m) for m in (self.base_sizes if arm == swept else self.base_sizes[-1:])]
        return found

    def cell(self, case: Arm, n_train: int, seed: int, lr: float) -> Cell:
        arm, m = case
        bound = dict(self.bounds["tuning"])
        if arm in (LONG, TOGETHER):
            bound = both(bound, self.bounds["pretraining"])
        key = {"arm": arm, "n_train": n_train, "seed": seed, "lr": lr}
        arguments: dict[str, Any] = {
            "pool": self.pool, "test": self.test, "ids": self.ids, "objective": self.objective,
            "architecture": self.backbone, "bound": bound, "edges": self.edges, "label": dict(self.named[0]),
            "unit": dict(self.named[1]),
        }  # fmt: skip
        if arm in BASELESS and self.varied and "energy" in self.wanted:
            arguments["guess"] = True
        if arm == DELTA:
            arguments |= {"objective": copied(self.objective, minus=self.cheap)}
            arguments |= {"label": dict(self.both_named[0]), "unit": dict(self.both_named[1])}
        if arm in (REPLAY, TOGETHER):
            arguments["old"] = {
                "data": self.base_pack, "objective": self.base_objective, "label": dict(self.base_named[0]),
                "unit": dict(self.base_named[1]),
            }  # fmt: skip
            if (n := m or self.base_sizes[-1]) < self.n_base:
                arguments["old"]["n"] = n
        if arm in BASELESS:
            return Cell(key, point, arguments)
        if self.base_sizes and self.ledger is not None:
            arguments["ledger"] = self.ledger
        if m is not None:
            key["n_pretraining"] = m
        base, needs = self._base(m, seed)
        return Cell(key, point, {**arguments, **base}, needs)

    def _base(self, m: int | None, seed: int) -> tuple[dict[str, Any], dict[str, Cell]]:
        part = {} if self.part is None else {"part": self.part}
        if self.model is not None:
            return {"model": self.model, **part}, {}
        key = {"n_pretraining": m or self.base_sizes[-1], "seed": seed}
        arguments = {
            "data": self.base_pack, "objective": self.base_objective, "architecture": self.backbone,
            "bound": self.bounds["pretraining"], "edges": self.edges, "label": dict(self.base_named[0]),
            "unit": dict(self.base_named[1]),
        }  # fmt: skip
        return part, {"base": Cell(key, based, arguments)}

    def run(self, fan_out: Mapping[str, Any], halving: bool) -> list[dict[str, Any]]:
        """All points, at learning rates that validation labels of the first seed chose."""
        cases = self.cases()
        trained = [case for case in cases if case[0] not in UNTRAINED]
        search = {
            (case, n): [self.cell(case, n, 0, rate) for rate in self.rates]
            for case in trained
            for n in self.sizes
            if n >= FEW
        }
        found = self._done((cell for tried in search.values() for cell in tried), fan_out)
        rate_of = {at: self._rate([found[cell] for cell in tried]) for at, tried in search.items()}

        def cells(seed: int, cases: Iterable[Arm]) -> Iterator[Cell]:
            for n in self.sizes:
                for case in cases:
                    near = min((at for at in rate_of if at[0] == case and at[1] >= n), default=None, key=lambda a: a[1])
                    yield self.cell(case, n, seed, rate_of[near] if near else self.rates[0])

        if not halving:
            every = [cell for seed in range(self.seeds) for cell in cells(seed, cases)]
            found = self._done(every, fan_out)
            return [found[cell] for cell in every]
        points: list[dict[str, Any]] = []
        for seed in range(self.seeds):
            every = list(cells(seed, cases))
            found = self._done(every, fan_out)
            points += [found[cell] for cell in every]
            cases = self._halved(cases, points) if seed < self.seeds - 1 else cases
        return points

    def _done(self, cells: Iterable[Cell], fan_out: Mapping[str, Any]) -> dict[Cell, dict[str, Any]]:
        """Points of all cells, each with the name of its folder."""
        return {cell: {**found, "cell": cell.name} for cell, found in run(cells, self.out, **fan_out)}

    def _rate(self, tried: Sequence[Mapping[str, Any]]) -> float:
        losses = [math.inf if p.get("validation loss") is None else p["validation loss"] for p in tried]
        return self.rates[int(np.argmin(losses))]

    def _halved(self, cases: Sequence[Arm], points: Sequence[Mapping[str, Any]]) -> list[Arm]:
        """Without the worse half of the trained arms other than scratch, by validation errors; of an arm that has bases
        of several sizes the largest counts, and all stay or go."""
        rivals = {case[0]: case for case in cases if case[0] not in (SCRATCH, LONG, *UNTRAINED)}
        ranked = sorted(rivals, key=lambda arm: validation_error(rivals[arm], points, self.wanted))
        gone = ranked[math.ceil(len(ranked) / 2) :]
        self.dropped += [name_of(case) for case in cases if case[0] in gone]
        return [case for case in cases if case[0] not in gone]

    def best(self, points: Sequence[Mapping[str, Any]]) -> Arm | None:
        """The pre-trained arm with the smallest validation errors; nothing was tested to choose it.

        Where nothing validates it is the first one that was named; a difference only where there is no other arm.
        """
        cases = [case for case in self.cases() if case[0] not in (SCRATCH, LONG)]
        cases = [case for case in cases if case[0] != DELTA] or cases
        cases = [
            case for case in cases if case[1] in (None, *self.base_sizes[-1:]) and name_of(case) not in self.dropped
        ]
        trained = [case for case in cases if case[0] not in UNTRAINED]
        return min(trained or cases, key=lambda case: validation_error(case, points, self.wanted), default=None)

    def chosen_by(self, case: Arm, points: Sequence[Mapping[str, Any]]) -> str:
        validated = math.isfinite(validation_error(case, points, self.wanted))
        return "validation errors" if validated else "its place among the arms"

    def example(self, case: Arm, points: Sequence[Mapping[str, Any]]) -> Example | None:
        """One model of an arm, of the most labels and the first seed, against its test set."""
        own = [p for p in points if (p["arm"], p["n_pretraining"]) == case and p["errors"]]
        if not own:
            return None
        most = max(own, key=lambda p: (p["n_train"], -p["seed"]))
        folder = self.cell(case, most["n_train"], most["seed"], most["lr"]).folder(self.out)
        model = load(folder / "run/model.safetensors").whole(DEAR if case[0] == TOGETHER else None)
        named = self.both_named if case[0] == DELTA else self.named
        pairs, labels = tested(model, self.test_atoms, *named)
        units = {name: unit for name, unit in most["units"].items() if unit != "wrong"}
        return Example(name_of(case), most["n_train"], self.test_atoms, pairs, units, labels)

    # ---------------------------------------------------------------------------------------------------- baselines

    def baselines(self, units: Mapping[str, str], fan_out: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Errors of what takes no network: shifts and lines, through what the base says where it says anything."""
        name, kind = scalar_of(self.objective)
        quantity = f"{name}_per_atom" if name == "energy" else name
        if kind == "per-atom" or units.get(quantity, "wrong") == "wrong":
            return []
        labels, wanted = (scalars(self.objective, some, *self.named) for some in (self.pool_atoms, self.test_atoms))
        if not np.isfinite(wanted).all():
            return []
        own, tested = compositions_of(self.pool_atoms), compositions_of(self.test_atoms)
        per = tested.sum(axis=1) if name == "energy" else 1
        base = [] if self.cheap else [self._said(seed) for seed in range(self.seeds)]
        said = dict(run(base, self.out, **fan_out))
        found = []
        for seed, n in product(range(self.seeds), self.sizes):
            members = nested(np.arange(len(labels)), [n], seed=seed)[0]
            members = members[np.isfinite(labels[members])]
            if not len(members):
                continue
            cheap = said[base[seed]] if base else self.known
            through = {"cheap": np.array(cheap["pool"])[members], "test_cheap": cheap["test"]} if cheap else {}
            for law, predicted in baselines(labels[members], own[members], tested, kind=kind, **through).items():
                mae = float(np.mean(np.abs(predicted - wanted) / per))
                found.append({"arm": law, "n_train": n, "seed": seed, "quantity": quantity, "mae": mae})
        return found

    def _cheap_labels(self) -> dict[str, np.ndarray]:
        """In the unit of the expensive ones; an error where a structure has none."""
        if scalar_of(self.objective)[1] == "per-atom":
            return {}
        difference = copied(self.objective, minus=self.cheap)
        sides = {"pool": self.pool_atoms, "test": self.test_atoms}
        found = {
            side: scalars(self.objective, some, *self.named) - scalars(difference, some, *self.both_named)
            for side, some in sides.items()
        }
        if lacking := sum(int(np.count_nonzero(~np.isfinite(values))) for values in found.values()):
            raise InputError(
                f"{lacking} of {self.n_pool + self.n_test} structures have no cheap label '{self.cheap}': name its key "
                f"(--label {self.cheap}=KEY), or leave such structures out"
            )
        return found

    def _said(self, seed: int) -> Cell:
        """What the base of a seed says of all structures without training."""
        given, needs = self._base(None, seed)
        arguments = {
            "pool": self.pool, "test": self.test, "objective": self.objective, "edges": self.edges,
            "label": dict(self.named[0]), "unit": dict(self.named[1]), **given,
        }  # fmt: skip
        return Cell({"seed": seed} if needs else {}, untouched, arguments, needs)

    # ------------------------------------------------------------------------------------------------------- price

    def price(self) -> str:
        """How many cells there are, and how long they take."""
        bases = len({(m, s) for m in self.base_sizes for s in range(self.seeds)})
        tunings = self._tunings(halving=False)
        seconds = [seconds_of(self.bounds[name]) for name in ("pretraining", "tuning")]
        cells = f"{bases} pre-trainings and {tunings} fine-tunings"
        if None in seconds:
            first, second = (in_words(self.bounds[name]) for name in ("pretraining", "tuning"))
            return f"{cells}: {first} for each of the former, {second} for each of the latter"
        hours = ((bases + self._both_stages()) * (seconds[0] or 0.0) + tunings * (seconds[1] or 0.0)) / 3600
        return f"{cells}: at most {hours:.2g} hours of processor time"

    def _both_stages(self) -> int:
        """Fine-tunings that take the time of a pre-training too."""
        arms = sum(arm in (LONG, TOGETHER) for arm in self.arms)
        searched = sum(n >= FEW for n in self.sizes) * (len(self.rates) - 1)
        return arms * (len(self.sizes) * self.seeds + searched)

    def _tunings(self, halving: bool) -> int:
        """Fine-tunings with those that search learning rates."""
        trained = [case for case in self.cases() if case[0] not in UNTRAINED]
        fixed = sum(case[0] in (SCRATCH, LONG) for case in trained)
        rivals = sorted(Counter(arm for arm, _ in trained if arm not in (SCRATCH, LONG)).values(), reverse=True)
        total = 0
        for _ in range(self.seeds):
            total += (fixed + sum(rivals)) * len(self.sizes)
            rivals = rivals[: math.ceil(len(rivals) / 2)] if halving else rivals
        return total + len(trained) * sum(n >= FEW for n in self.sizes) * (len(self.rates) - 1)

    def within(self, seconds: float, workers: int) -> dict[str, Any]:
        """Bounds of the stages that fit into a time: a third of it for bases, the rest for fine-tunings."""
        work = SHARE * seconds * workers
        bases = len(self.base_sizes) * self.seeds + self._both_stages()
        tunings = self._tunings(halving=True)
        each = (2 / 3 if bases else 1.0) * work / max(tunings, 1)
        first = work / 3 / max(bases, 1)
        if min(each, first) < LEAST:
            of_bases = f"{first:.1f} s for each of {bases} pre-trainings and " if bases else ""
            raise InputError(
                f"a budget of {seconds:g} s leaves {of_bases}{each:.1f} s for each of {tunings} fine-tunings: "
                "give more time, or fewer sizes, arms, rates or seeds"
            )
        return {
            name: {"processor_time": f"{math.floor(10 * t) / 10:g}s"}
            for name, t in (("pretraining", first), ("tuning", each))
        }


def validation_error(case: Arm, points: Iterable[Mapping[str, Any]], learned: Sequence[str] = ()) -> float:
    """Geometric mean over sizes and seeds of the error that is judged on validation labels; infinite without any, and
    where a run diverged."""
    own = [p for p in points if (p["arm"], p["n_pretraining"]) == case]
    said = [p["validation"] for p in own if p["validation"]]
    if not said or any(p["errors"] is None for p in own):
        return math.inf
    found = [each[in_order(each, learned)[0]] for each in said]
    return math.exp(float(np.mean(np.log(np.maximum(found, TINY)))))


def _hours(cost: str | float) -> float:
    try:
        hours = float(cost)
    except ValueError:
        hours = parse_time(str(cost)) / 3600
    if not hours > 0:
        raise InputError(
            f"a label costs {cost}, but must cost something: give the hours of one, or a time such as 90min"
        )
    return hours


def chosen_sizes(sizes: Sequence[int] | None, most: int) -> list[int]:
    """In ascending order; by default doubled from ten on, or all where there are fewer."""
    if sizes is None:
        doubled = [10 * 2**k for k in range(40) if 10 * 2**k <= most]
        return doubled or [most]
    found = sorted(set(sizes))
    if not found or found[0] < FEWEST:
        raise InputError(f"sizes {list(sizes)} begin below {FEWEST} labels: a model needs some")
    if found[-1] > most:
        raise InputError(f"there are {most} labels to train on, not {found[-1]}: ask for fewer")
    return found


def _bonded(source: Source) -> Sequence[Atoms]:
    """Without isolated atoms, which are references of energies, and no labels that a curve could count."""
    structures = read(source)
    if not (lone := isolated_atoms(structures)):
        return structures
    console.print(f"{len(lone)} isolated atoms are no structures of a curve, and are left out")
    return Subset(structures, np.setdiff1d(np.arange(len(structures)), lone))


def _by(key: str, structures: Sequence[Atoms]) -> tuple[Sequence[Atoms], Sequence[Atoms]]:
    name, _, value = key.partition("=")
    found = by_key(structures, name, value or None, fraction=0)
    if found.test is None or not len(found.test):
        raise InputError(f"'{key}' names no test structures")
    rest = np.union1d(found.train, found.valid)
    return Subset(structures, rest), Subset(structures, found.test)


def _without_network(result: Mapping[str, Any], arm: str) -> str:
    """A sentence where something without a network is better than the arm of the verdict, at the largest size."""
    most = max(result["sizes"])
    laws = {row["arm"] for row in result["baselines"]}
    for quantity in dict.fromkeys(row["quantity"] for row in result["baselines"]):
        found: dict[str, list[float]] = {}
        for row in (*result["errors"], *result["baselines"]):
            if row["quantity"] == quantity and row["n_train"] == most:
                found.setdefault(name_of((row["arm"], row.get("n_pretraining"))), []).append(row["mae"])
        means = {name: float(np.mean(errors)) for name, errors in found.items()}
        law = min(laws & means.keys(), key=means.__getitem__, default=None)
        if arm in means and law is not None and means[law] < means[arm]:
            unit, factor = PRINTED.get(result["units"][quantity], (result["units"][quantity], 1.0))
            numbers = f"{short(factor * means[law])} instead of {short(factor * means[arm])} {unit}".rstrip()
            return f" Without a network, the {law} does better at {most} labels ({numbers})."
    return ""


def _said_most(points: Sequence[Mapping[str, Any]], name: str) -> str:
    """What is known of the origin of labels, of the most of them that any point had."""
    said = [p[name] for p in sorted(points, key=lambda p: p["n_train"]) if p.get(name) and p["arm"] != TOGETHER]
    return said[-1] if said else ""


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

"""Which pre-training helps: objectives, derivatives or direct outputs, and backbones, at equal compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich
import torch
from ase import Atoms

from ..backbones import Backbone, TensorNet
from ..console import console, table
from ..data import Labelled, nested, pack, read, resolve, split
from ..data.labels import KEYS
from ..data.leakage import summary, without
from ..data.read import Source
from ..data.sequences import Joined, Subset
from ..data.split import materials
from ..errors import InputError
from ..evaluate import compared, objective_of
from ..model import Model, described
from ..objectives import Denoise, Objective, Potential, Together
from ..run import fingerprint, write_json
from ..train import parse_time
from ..transfer import finetune, pretrain
from .bakeoff_page import finite, page, questions, rows
from .cells import Cell, Done, run
from .ranking import LONG, SCRATCH, answers, comparisons, verdict

ARMS: dict[str, Objective] = {
    "denoise_direct": Denoise(conservative=False),
    "denoise_derivative": Denoise(),
    "dens_derivative": Denoise(told_forces=True),
    "e_derivative": Potential(forces=0.0, stress=0.0),
    "f_derivative": Potential(energy=0.0, stress=0.0),
    "fs_derivative": Potential(energy=0.0),
    "efs_direct": Potential(conservative=False),
    "efs_derivative": Potential(),
}
RATES = (2e-3, 5e-4)
VALID = 0.2  # of the labels of each fine-tuning, which choose the checkpoint and, once, the learning rate


class Target(NamedTuple):
    """What is fine-tuned on: labelled structures and an objective with one output that is judged."""

    structures: Source
    objective: Objective
    test: Source | None = None  # by default a fifth of the structures, with no material on both sides
    label: Mapping[str, str] = {}
    unit: Mapping[str, str] = {}


def bakeoff(
    structures: Source | Mapping[str, Source],
    targets: Mapping[str, Target],
    out: str | Path,
    *,
    arms: Sequence[str] | Mapping[str, Objective] | None = None,
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
    quiet: bool = False,
) -> dict[str, Any]:
    """Compare ways of pre-training by what they do for a target, everything else being equal.

    Every arm pre-trains for the same processor time on the same materials, then fine-tunes for the same processor time
    on the same labels with the same settings. "scratch" skips the first stage; "scratch_long" spends its time on
    fine-tuning instead. The learning rate of fine-tuning is chosen once per arm and backbone, by the validation labels
    of the first target. Pre-training structures that match a test structure are left out.

    Args:
        structures: to pre-train on; noise is learned on the frame of each material that is nearest to equilibrium. Of
            several levels of theory, names to structures: potentials learn each with an energy of its own.
        targets: name to what is fine-tuned on.
        out: folder of the study; the same call goes on where it was stopped.
        arms: names among `ARMS`, "scratch" and "scratch_long", or names to objectives of one's own; by default all that
            the labels of `structures` allow.
        backbones: name to architecture.
        pretraining, tuning: processor time of the two stages, such as "5min".
        sizes: numbers of labels, validation included, each set within the next; by default all there are, up to 500.
        seeds: of weights, labels and noise; at least two, or there are no intervals.
        rates: learning rates that each arm tries.
        edges: most edges in a batch.
        label, unit: keys and units of the labels of `structures`.
        executor, workers: where cells are computed; see `cells.run`.

    Returns:
        What is also in results.json: "runs", "rates", "comparisons", "leaks", "verdict".
    """
    out = Path(out)
    if not targets:
        raise InputError("a comparison needs a target: give labelled structures and what to learn of them")
    if seeds < 1:
        raise InputError(f"seeds is {seeds}, but must be at least one; three are usual")
    if not rates:
        raise InputError("no learning rate to try: give at least one")
    backbones = {"TensorNet": TensorNet(32, 2)} if backbones is None else dict(backbones)
    levels = (
        {name: read(source) for name, source in structures.items()}
        if isinstance(structures, Mapping)
        else {"": read(structures)}
    )
    plan = _Plan(levels, targets, out, label or {}, unit or {}, sizes, quiet)
    objectives = plan.objectives(arms)
    settings = {"pretraining": pretraining, "tuning": tuning, "edges": edges}

    if not quiet:
        console.print(
            _price(objectives, len(backbones), seeds, sum(map(len, plan.sizes.values())), len(rates), settings)
        )

    def cells(wanted: Iterable[tuple[str, str, str, int, int, float]]) -> list[Cell]:
        return [plan.cell(objectives, backbones, settings, *each) for each in wanted]

    first, largest = next(iter(targets)), plan.sizes[next(iter(targets))][-1]
    search = [(first, b, arm, largest, 0, rate) for b in backbones for arm in objectives for rate in rates]
    found = dict(run(cells(search), out, executor=executor, workers=workers, quiet=quiet))
    chosen: dict[tuple[str, str], float] = {}
    for backbone in backbones:
        for arm in objectives:
            tried = cells((first, backbone, arm, largest, 0, rate) for rate in rates)
            losses = [_or_infinite(found[cell]["validation loss"]) for cell in tried]
            chosen[backbone, arm] = rates[int(np.argmin(losses))]

    grid = [
        (target, backbone, arm, size, seed, chosen[backbone, arm])
        for backbone in backbones
        for seed in range(seeds)
        for target in targets
        for size in plan.sizes[target]
        for arm in objectives
    ]
    found |= dict(run(cells(grid), out, executor=executor, workers=workers, quiet=quiet))
    runs = [found[cell] for cell in cells(grid)]
    result: dict[str, Any] = {
        "settings": {**settings, "valid fraction": VALID, "rates": list(rates), "seeds": seeds},
        "arms": {name: None if objective is None else described(objective) for name, objective in objectives.items()},
        "backbones": {name: described(backbone) for name, backbone in backbones.items()},
        "rates": [{"backbone": b, "arm": a, "lr": rate} for (b, a), rate in chosen.items()],
        "leaks": plan.leaks,
        "runs": [{k: v for k, v in one.items() if k not in ("errors", "materials")} for one in runs],
        "comparisons": comparisons(runs),
        "answers": answers(runs),
    }
    result["verdict"] = verdict(result["answers"])
    write_json(out / "results.json", finite(result))
    path = page(result, plan.counts).write(out / "report.html")
    if not quiet:
        rich.print(table("Errors", rows(result, short=True)))
        rich.print(table("Answers", questions(result)))
        rich.print(result["verdict"])
        console.print(f"Report: {path.resolve()}")
    return result


class _Plan:
    """The data of a study, packed into its folder, and the cells that work on it."""

    def __init__(
        self,
        levels: Mapping[str, Sequence[Atoms]],
        targets: Mapping[str, Target],
        out: Path,
        label: Mapping[str, str],
        unit: Mapping[str, str],
        sizes: Sequence[int] | None,
        quiet: bool,
    ):
        self.out, self.targets, self.label, self.unit = out, targets, dict(label), dict(unit)
        self.given = list(levels)
        known = [resolve(own, [], labels=label, units=unit, optional=list(KEYS)) for own in levels.values()]
        self.labels = {name for name in KEYS if all(name in labels for labels in known)}
        self.pools: dict[str, str] = {}  # names of packed sets
        self.tests: dict[str, str] = {}
        self.sizes: dict[str, list[int]] = {}
        self.ids: dict[str, str] = {}
        tests: list[Sequence[Atoms]] = []
        for name, target in targets.items():
            pool, test = self._divided(name, target)
            tests.append(test)
            self.pools[name], self.tests[name] = self._packed(f"{name}-pool", pool), self._packed(f"{name}-test", test)
            self.ids[name] = fingerprint(test)
            self.sizes[name] = sorted(set(sizes)) if sizes else [min(len(pool), 500)]
            if self.sizes[name][-1] > len(pool):
                raise InputError(
                    f"{name} has {len(pool)} structures to train on, not {self.sizes[name][-1]}: ask for fewer"
                )
        held_out = [atoms for test in tests for atoms in test]
        divided = {name: without(own, held_out, quiet=quiet) for name, own in levels.items()}
        self.leaks = summary([leak for _, found in divided.values() for leak in found], sum(map(len, levels.values())))
        near = []
        self.levels: dict[str, str] = {}
        for name, (kept, _) in divided.items():
            if not len(kept):
                raise InputError(
                    "every structure to pre-train on is also in a test set: there is nothing to learn from"
                )
            near.append(Subset(kept, nearest_equilibrium(kept, label, unit)))
            self.levels[name] = self._packed(f"pretraining{name and '-'}{name}", kept)
        relaxed = Joined(near) if len(near) > 1 else near[0]
        self.relaxed = self._packed("relaxed", relaxed)
        self.counts = {"structures": sum(len(kept) for kept, _ in divided.values()), "relaxed": len(relaxed)}
        if not quiet:
            for text in Denoise().warnings(
                [relaxed[i] for i in np.unique(np.linspace(0, len(relaxed) - 1, 500).astype(int))]
            ):
                console.print(f"[yellow]Noise: {text}[/yellow]")
            counts = self.counts
            console.print(
                f"Pre-training on {counts['structures']} structures, {counts['relaxed']} for noise; {self.leaks}"
            )

    def objectives(self, arms: Sequence[str] | Mapping[str, Objective] | None) -> dict[str, Objective | None]:
        """Arms and their objectives of pre-training, None where there is no such stage."""
        controls = {SCRATCH: None, LONG: None}
        if isinstance(arms, Mapping):
            if taken := controls.keys() & arms.keys():
                raise InputError(f"'{min(taken)}' is the name of a control: choose another one for your arm")
            return {**controls, **arms}
        known: dict[str, Objective | None] = {**controls, **ARMS}
        for arm in arms or []:
            if arm not in known:
                raise InputError(f"there is no arm '{arm}': choose among {', '.join(known)}")
        possible = {name: o for name, o in known.items() if o is None or self._possible(name, o)}
        if missing := [arm for arm in arms or [] if arm not in possible]:
            raise InputError(
                f"the arm '{missing[0]}' needs labels that the structures lack: they have {self._listed()}"
            )
        return {name: possible[name] for name in possible if arms is None or name in {SCRATCH, *arms}}

    def _possible(self, name: str, objective: Objective) -> bool:
        letters = {"e": "energy", "f": "forces", "s": "stress"}
        needed = (
            {letters[c] for c in name.split("_")[0]} if isinstance(objective, Potential) else set(objective.labels())
        )
        return needed <= self.labels

    def _listed(self) -> str:
        return ", ".join(sorted(self.labels)) or "none"

    def cell(
        self,
        objectives: Mapping[str, Objective | None],
        backbones: Mapping[str, Backbone],
        settings: Mapping[str, Any],
        target: str,
        backbone: str,
        arm: str,
        n_train: int,
        seed: int,
        rate: float,
    ) -> Cell:
        """One fine-tuning, and the pre-training that it needs."""
        objective = objectives[arm]
        needs: dict[str, Cell] = {}
        seconds = parse_time(settings["tuning"])
        if objective is not None:
            relaxed = isinstance(objective, Denoise) and not objective.told_forces
            data: Any = self.relaxed if relaxed else list(self.levels.values())
            if isinstance(objective, Potential) and len(self.levels) > 1:
                data, objective = self.levels, Together(dict.fromkeys(self.levels, objective))
            arguments: dict[str, Any] = {
                "data": data,
                "objective": objective,
                "architecture": backbones[backbone],
                "time": settings["pretraining"],
                "edges": settings["edges"],
                "label": self.label,
                "unit": self.unit,
            }
            needs["base"] = Cell({"backbone": backbone, "arm": arm, "seed": seed}, pretrained, arguments)
        elif arm == LONG:
            seconds += parse_time(settings["pretraining"])
        goal = self.targets[target]
        key = {"target": target, "backbone": backbone, "arm": arm, "n_train": n_train, "seed": seed, "lr": rate}
        arguments = {
            "pool": self.pools[target],
            "test": self.tests[target],
            "ids": self.ids[target],
            "objective": goal.objective,
            "architecture": backbones[backbone],
            "time": f"{seconds:g}s",
            "edges": settings["edges"],
            "label": dict(goal.label),
            "unit": dict(goal.unit),
        }
        return Cell(key, tuned, arguments, needs)

    def _divided(self, name: str, target: Target) -> tuple[Sequence[Atoms], Sequence[Atoms]]:
        """Structures to fine-tune on and to test on, all with the label that is judged, and none on both sides."""
        if isinstance(target.objective, Together):
            raise InputError(f"the target {name} is {target.objective!r}, but only one objective can be judged")
        if isinstance(target.objective, Potential) and len(self.given) > 1:
            raise InputError(
                f"the target {name} has energies, and {', '.join(self.given)} each have their own: choose one level"
            )
        everything = _labelled(name, read(target.structures), target)
        if target.test is not None:
            pool, test = everything, _labelled(f"{name} (test)", read(target.test), target)
        else:
            parts = split(everything, 0.2, seed=0)
            pool, test = Subset(everything, parts.train), Subset(everything, parts.valid)
        pool, found = without(pool, test, quiet=True)
        if found:
            console.print(f"{name}: {summary(found, len(pool) + len(found))} into its test set; they are left out")
        if len(pool) < 5 or not len(test):
            raise InputError(
                f"{name} has {len(pool)} labelled structures to train on and {len(test)} to test on: too few"
            )
        return pool, test

    def _packed(self, name: str, structures: Sequence[Atoms]) -> str:
        """Pack them into the folder of the study; their name there is part of what makes a cell another one."""
        name = f"{name}-{fingerprint(structures)}"
        pack(structures, self.out / "data" / name, progress=False)
        return name


def _price(
    objectives: Mapping[str, Objective | None],
    backbones: int,
    seeds: int,
    cases: int,
    rates: int,
    settings: Mapping[str, Any],
) -> str:
    """How many cells there are, and how long they take."""
    first, second = parse_time(settings["pretraining"]), parse_time(settings["tuning"])
    bases = backbones * seeds * sum(objective is not None for objective in objectives.values())
    tunings = backbones * (seeds * cases + rates - 1)  # of each arm: the search has one of the grid's
    seconds = bases * first + tunings * (len(objectives) * second + (LONG in objectives) * first)
    cells = f"{bases} pre-trainings and {tunings * len(objectives)} fine-tunings"
    return f"{cells}: {seconds / 3600:.2g} hours of processor time"


def _data(cell: Path, names: Any) -> Any:
    """Paths of packed sets, from the folder of a cell of the same study."""
    if isinstance(names, str):
        return str(cell.parents[1] / "data" / names)
    if isinstance(names, Mapping):
        return {level: _data(cell, name) for level, name in names.items()}
    return [_data(cell, name) for name in names]


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def pretrained(
    folder: Path,
    backbone: str,
    arm: str,
    seed: int,
    data: Any,
    objective: Objective,
    architecture: Backbone,
    time: str,
    edges: int,
    label: Mapping[str, str],
    unit: Mapping[str, str],
) -> dict[str, Any]:
    """Pre-train one arm; returns what it took."""
    torch.set_num_threads(1)  # or threads that wait would count as work
    model = pretrain(
        _data(folder, data), objective, architecture, processor_time=time, seed=seed, edges=edges,
        label=_of(objective, label), unit=_of(objective, unit), out=folder / "run", verbose=False, device="cpu",
    )  # fmt: skip
    return _cost(model)


def tuned(
    folder: Path,
    target: str,
    backbone: str,
    arm: str,
    n_train: int,
    seed: int,
    lr: float,
    pool: str,
    test: str,
    ids: str,
    objective: Objective,
    architecture: Backbone,
    time: str,
    edges: int,
    label: Mapping[str, str],
    unit: Mapping[str, str],
    base: Done | None = None,
) -> dict[str, Any]:
    """Fine-tune one arm on some labels of a target, and test it; a run that diverges has no validation loss."""
    torch.set_num_threads(1)
    everything = read(_data(folder, pool))
    members = nested(np.arange(len(everything)), [n_train], seed=seed)[0]
    options: dict[str, Any] = {
        "processor_time": time, "lr": lr, "seed": seed, "edges": edges, "label": label, "unit": unit,
        "valid_fraction": VALID, "out": folder / "run", "verbose": False, "device": "cpu",
    }  # fmt: skip
    chosen = Subset(everything, members)
    try:
        if base is None:
            model = pretrain(chosen, objective, architecture, **options)
        else:
            model = finetune(base.folder / "run/model.safetensors", chosen, objective, **options)
    except InputError as error:
        if "not finite" not in str(error):
            raise
        return {"arm": arm, "lr": lr, "validation loss": None}  # never chosen
    tests = read(_data(folder, test))
    quantity, wanted, errors = _errors(model, tests, label, unit)
    cost = _cost(model)
    return {
        "target": target, "backbone": backbone, "arm": arm, "seed": seed, "n_train": n_train, "lr": lr,
        "quantity": quantity, "mae": float(np.mean(errors)), "unit": wanted, "steps": cost["steps"],
        "train_seconds": cost["seconds"], "pretrain_seconds": 0.0 if base is None else base.result["seconds"],
        "test_ids_sha": ids, "n_test": len(errors), "validation loss": cost["validation loss"], "errors": errors,
        "materials": materials(tests).tolist(),
    }  # fmt: skip


def _labelled(name: str, structures: Sequence[Atoms], target: Target) -> Subset:
    """Those that have what is judged: the property, or the forces, or else the energy."""
    wanted = target.objective.labels()
    optional = [quantity for quantity, needed in wanted.items() if not needed]
    labels = resolve(structures, list(wanted), labels=target.label, units=target.unit, optional=optional)
    judged = next((quantity for quantity in ("forces", *wanted) if quantity in labels), None)
    if judged is None:
        raise InputError(f"no structure of {name} has any of {', '.join(wanted)}")
    has = [labels[judged].value(atoms) is not None for atoms in structures]
    if not all(has):
        console.print(f"{name}: {has.count(False)} of {len(has)} structures have no {judged} and are left out")
    return Subset(structures, np.flatnonzero(has))


def nearest_equilibrium(structures: Sequence[Atoms], label: Mapping[str, str], unit: Mapping[str, str]) -> np.ndarray:
    """Of each material the structure with the smallest RMS force, to 0.01 eV/Å, and then the smallest stress.

    Forces may vanish by symmetry where the volume is wrong. The first one where neither is known.
    """
    names = ["forces", "stress"]
    named = [{k: v for k, v in one.items() if k in names} for one in (label, unit)]
    labels = resolve(structures, [], labels=named[0], units=named[1], optional=names)
    group = materials(structures)
    sizes = np.full((2, len(structures)), np.inf)
    for row, name in enumerate(names):
        if name in labels:
            for i, atoms in enumerate(structures):
                value = labels[name].value(atoms)
                if value is not None:
                    sizes[row, i] = float(np.sqrt(np.square(value).mean()))
    order = np.lexsort((np.arange(len(group)), sizes[1], np.round(sizes[0], 2), group))
    first = np.r_[True, group[order][1:] != group[order][:-1]]
    return np.sort(order[first])


def _errors(
    model: Model, structures: Sequence[Atoms], label: Mapping[str, str], unit: Mapping[str, str]
) -> tuple[str, str, list[float]]:
    """The quantity that is judged, its unit, and the mean absolute error of each structure (of classes: 0 or 1)."""
    objective = objective_of(model).comparable()
    wanted = objective.labels()
    optional = [name for name, needed in wanted.items() if not needed]
    labels = resolve(structures, list(wanted), labels=label, units=unit, optional=optional)
    pairs = compared(model, objective, Labelled(structures, labels), 10_000)
    name = "forces" if "forces" in pairs else next(iter(pairs))
    rows = pairs[name]
    if rows[0][1].shape != np.shape(rows[0][0]):
        return name, "wrong", [float(np.mean(output.argmax(axis=-1) != target)) for target, output in rows]
    errors = [float(np.nanmean(np.abs(output - target))) for target, output in rows]
    meaning = model.card["quantities"].get(name.removesuffix("_per_atom"), ["", ""])
    return name, f"{meaning[1]}/atom" if name == "energy_per_atom" else meaning[1], errors


def _cost(model: Model) -> dict[str, Any]:
    stage = model.card["history"][-1]
    return {
        "steps": stage["steps"],
        "seconds": stage["processor seconds"],
        "validation loss": stage["best validation loss"],
    }


def _of(objective: Objective, named: Mapping[str, str]) -> dict[str, str]:
    """What is said of labels, as far as the objective wants them; of several levels, for each."""
    if isinstance(objective, Together):
        return {f"{n}.{k}": text for n, part in objective.parts.items() for k, text in _of(part, named).items()}
    return {name: text for name, text in named.items() if name in objective.labels()}

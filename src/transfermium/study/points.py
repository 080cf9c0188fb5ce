"""The cells of a learning curve: a base, a model from some labels with its errors, and what a base says untouched."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ..backbones import Backbone
from ..card import theory
from ..data import nested, read
from ..data.labels import UNITS, ratio_of_units
from ..data.sequences import Subset
from ..data.split import split
from ..errors import InputError
from ..evaluate import compared
from ..model import Model, load, stored_as
from ..objectives import Fidelities, Objective, Property
from ..transfer import finetune, pretrain
from .cells import Done
from .judged import errors_of, guess_references, labelled_for
from .stages import cost_of, packed_at

VALID = 0.2  # of the labels of a model that is trained
FEW = 10  # labels below which all of them train, and nothing is validated
UNTRAINED = ("zero-shot", "aligned", "probe")  # all labels go into what they fit; each fits more than the one before
SCRATCH, LONG = "scratch", "scratch_long"
REPLAY, TOGETHER = "replay", "multi-fidelity"
DELTA = "delta"
DIRECT = (SCRATCH, LONG, DELTA)  # arms that see nothing but the labels
CHEAP, DEAR = "cheap", "target"  # levels of what is learned together


def valid_fraction(arm: str, n_train: int) -> float:
    """Part of the labels that is set apart to choose the checkpoint, and the learning rate."""
    return VALID if n_train >= FEW and arm not in UNTRAINED else 0.0


def validating(structures: Sequence[Atoms], n_train: int, seed: int) -> int:
    """How many of so many labels validate where an arm is trained: materials stay whole, so that it may be many."""
    if not (fraction := valid_fraction(SCRATCH, n_train)):
        return 0
    members = nested(np.arange(len(structures)), [n_train], seed=seed)[0]
    return len(split(Subset(structures, members), fraction, seed=seed).valid)


def validating_in_words(counts: Mapping[str, Sequence[int]]) -> str:
    """For people, of numbers of labels and how many of them validate with each seed: "2 to 4 of 10, 13 of 39"."""
    spans = {n: dict.fromkeys((min(each), max(each))) for n, each in counts.items()}
    return ", ".join(f"{' to '.join(map(str, span))} of {n}" for n, span in spans.items())


def based(
    folder: Path,
    n_pretraining: int,
    seed: int,
    data: str,
    objective: Objective,
    architecture: Backbone,
    bound: Mapping[str, Any],
    edges: int,
    label: Mapping[str, str],
    unit: Mapping[str, str],
) -> dict[str, Any]:
    """Pre-train a base on so many structures, each set within the next; returns what it took."""
    torch.set_num_threads(1)  # or threads that wait would count as work
    everything = read(packed_at(folder, data))
    members = np.sort(nested(np.arange(len(everything)), [n_pretraining], seed=seed)[0])
    model = pretrain(
        Subset(everything, members), objective, architecture, **bound, seed=seed, edges=edges, label=label, unit=unit,
        out=folder / "run", verbose=False, device="cpu", calibrate=False,
    )  # fmt: skip
    return {**cost_of(model), "theory": theory(model.card)}


def point(
    folder: Path,
    arm: str,
    n_train: int,
    seed: int,
    lr: float,
    pool: str,
    test: str,
    ids: str,
    objective: Objective,
    architecture: Backbone,
    bound: Mapping[str, Any],
    edges: int,
    label: Mapping[str, str],
    unit: Mapping[str, str],
    n_pretraining: int | None = None,
    model: str | None = None,
    part: str | None = None,
    old: Mapping[str, Any] | None = None,
    ledger: str | None = None,
    guess: bool = False,
    base: Done | None = None,
) -> dict[str, Any]:
    """Train one arm on some labels, and test it; a run that diverges has no errors.

    Args:
        old: the base's structures ("data"), its "objective", "label" and "unit", for arms that learn of them too; of
            these structures as many as the base was given ("n", or all). Without them replay generates its own.
        ledger: structures on which it is measured what a base forgot.
        guess: reference energies of elements that no label has, of arms without a base that knows them; those of bases
            move with the others (`unseen="group"`).

    Returns:
        What is said of the point, "errors" (quantity to the mean absolute error of each test structure), "units", and
        "validation" (quantity to the mean absolute error on the validation labels, of classes to the cross entropy).
    """
    torch.set_num_threads(1)
    everything = read(packed_at(folder, pool))
    members = nested(np.arange(len(everything)), [n_train], seed=seed)[0]
    chosen = Subset(everything, members)
    options: dict[str, Any] = {
        **bound, "lr": lr, "seed": seed, "edges": edges, "label": label, "unit": unit, "out": folder / "run",
        "valid_fraction": valid_fraction(arm, n_train), "verbose": False, "device": "cpu", "calibrate": False,
    }  # fmt: skip
    prior: Tensor | None = None
    said: dict[str, Any] = {"arm": arm, "n_train": n_train, "n_pretraining": n_pretraining, "seed": seed, "lr": lr}
    began = time.process_time()
    try:
        if arm in DIRECT:
            trained = pretrain(chosen, objective, architecture, **options)
        elif arm == TOGETHER:
            trained, prior = _jointly(folder, chosen, objective, architecture, n_train, old or {}, options)
        else:
            if arm == REPLAY:
                options["replay"] = "generated" if old is None else _learned_before(folder, old, seed)
            if ledger is not None:
                options["ledger"] = read(packed_at(folder, ledger))
            if arm in UNTRAINED:  # what it fits is no matter of steps or of their rate
                options = {name: value for name, value in options.items() if name not in (*bound, "lr")}
            trained = finetune(
                _base(folder, model, base), chosen, objective, part=part, strategy=arm, unseen="group", **options
            )
    except InputError as error:
        if "not finite" not in str(error):
            raise
        return {**said, "errors": None, "validation": {}}  # never chosen
    cost = cost_of(trained)
    if arm in UNTRAINED:  # which fit without steps
        cost["seconds"] = round(time.process_time() - began, 2)
    validation = trained.card["metrics"].get("validation", {})
    tests = read(packed_at(folder, test))
    if guess:
        guess_references(trained, tests, prior)
    errors, units = errors_of(trained, tests, label, unit)
    return {
        **said, **_forgotten(trained), "steps": cost["steps"], "train_seconds": cost["seconds"],
        "test_ids_sha": ids, "units": units,
        "base theory": "" if base is None else base.result.get("theory", ""),
        "pretrain_seconds": _before(trained),
        "validation": {name: found.get("mae", found.get("cross_entropy")) for name, found in validation.items()},
        "validation loss": cost["validation loss"], "errors": errors,
    }  # fmt: skip


def _jointly(
    folder: Path,
    chosen: Subset,
    objective: Objective,
    architecture: Backbone,
    n_train: int,
    old: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[Model, Tensor | None]:
    """One model of both levels, trained on both from the start: the part of the target, and the reference energies of
    the cheap one."""
    cheap = _learned_before(folder, old, options["seed"])
    sides: dict[str, Any] = {"valid_fraction": 0.0}
    train: Sequence[Atoms] = chosen
    if fraction := valid_fraction(TOGETHER, n_train):
        divided = split(chosen, fraction, seed=options["seed"])
        train, sides = Subset(chosen, divided.train), {"valid": {DEAR: Subset(chosen, divided.valid)}}
    named = {
        name: {f"{CHEAP}.{k}": v for k, v in old[name].items()} | {f"{DEAR}.{k}": v for k, v in options[name].items()}
        for name in ("label", "unit")
    }
    both = Fidelities({CHEAP: old["objective"], DEAR: objective})
    joint = pretrain({CHEAP: cheap, DEAR: train}, both, architecture, **{**options, **named, **sides})
    found = joint.part(DEAR)
    metrics = joint.card["metrics"]
    own = {k.removeprefix(f"{DEAR} "): v for k, v in metrics.get("validation", {}).items() if k.startswith(f"{DEAR} ")}
    found.card = {**found.card, "history": joint.card["history"], "metrics": {**metrics, "validation": own}}
    heads = joint.part(CHEAP).heads
    return found, getattr(heads["energy"], "references", None) if "energy" in heads else None


def _learned_before(folder: Path, old: Mapping[str, Any], seed: int) -> Sequence[Atoms]:
    """The structures that the base of a seed was pre-trained on."""
    everything = read(packed_at(folder, old["data"]))
    if "n" not in old:
        return everything
    return Subset(everything, np.sort(nested(np.arange(len(everything)), [old["n"]], seed=seed)[0]))


def _before(model: Model) -> float | None:
    """Processor time of the stages before the last one (s), None where the card of the base does not say."""
    found = [stage.get("processor seconds") for stage in model.card["history"][:-1]]
    return None if None in found else float(sum(found))


def _forgotten(model: Model) -> dict[str, Any]:
    """Errors on the base's own task, before and after, where they were measured."""
    found = model.card["history"][-1].get("forgetting")
    return {} if found is None else {"forgetting": found["errors"]}


def untouched(
    folder: Path,
    pool: str,
    test: str,
    objective: Objective,
    edges: int,
    label: Mapping[str, str],
    unit: Mapping[str, str],
    seed: int = 0,
    model: str | None = None,
    part: str | None = None,
    base: Done | None = None,
) -> dict[str, Any]:
    """What the base says of the quantity of the target on all structures, with no label of them: (n,) each."""
    name, _ = scalar_of(objective)
    found = load(_base(folder, model, base)).whole(part, [name])
    if name not in found.outputs or stored_as(found, name) != name:  # the "energy" of a denoising model is none
        return {}
    given, wanted = found.card.get("quantities", {}).get(name, ["", ""])[1], unit.get(name, "")
    factor = ratio_of_units(given, wanted) if given and wanted and name not in UNITS else 1.0
    if factor is None:
        return {}
    result: dict[str, Any] = {}
    for side, pack in (("pool", pool), ("test", test)):
        labelled = labelled_for(objective, read(packed_at(folder, pack)), label, unit)
        rows = compared(found, objective, labelled, edges)[f"{name}_per_atom" if name == "energy" else name]
        sizes = np.array([len(atoms) if name == "energy" else 1 for atoms in labelled])
        result[side] = (np.array([float(np.ravel(output)[0]) for _, output in rows]) * sizes * factor).tolist()
    return result


def scalar_of(objective: Objective) -> tuple[str, Any]:
    """The one number per structure that is learned, and its kind: "extensive" or "intensive" (or "per-atom")."""
    if isinstance(objective, Property):
        return objective.name, objective.kind
    return "energy", "extensive"


def scalars(
    objective: Objective, structures: Sequence[Atoms], label: Mapping[str, str], unit: Mapping[str, str]
) -> np.ndarray:
    """Labels of `scalar_of`, in the units that are learned; NaN where there is none: (n,)."""
    name = objective.output if isinstance(objective, Property) else "energy"
    labelled = labelled_for(objective, structures, label, unit)
    rng = np.random.default_rng(0)  # no label looks at it
    samples = (objective.prepare(labelled[i], rng) for i in range(len(labelled)))
    return np.array([float(sample.targets[name][0]) if name in sample.targets else np.nan for sample in samples])


def _base(folder: Path, model: str | None, base: Done | None) -> Path:
    """The file of the base: of a cell that was needed, or a model that lies in the folder of the study."""
    return base.folder / "run/model.safetensors" if base is not None else Path(packed_at(folder, model))

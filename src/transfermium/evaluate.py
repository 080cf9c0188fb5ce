"""Errors in physical units, and predictions for structures without labels."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ase
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers, chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from . import distributed
from .console import and_, console, track
from .data.columns import count_elements, elements, has
from .data.labels import KEYS, Labelled, Labels, available, ratio_of_units, resolve
from .data.load import VALIDATION, Batches, count_edges, plan, rng_of
from .data.read import Source, read
from .data.sequences import Subset, spoken
from .data.split import by_key
from .dataset import subtractable
from .errors import InputError
from .graph import to_batch, to_graph
from .heads import EnergyHead
from .levels import apart
from .model import Model, check_file, load, rebuilt, stored_as, write_whole
from .objectives import Objective, Together
from .objectives.base import has_volume
from .objectives.base import label as as_label
from .objectives.mask import Removal
from .run import fingerprint
from .seen import copies_of_seen
from .train import chosen_device, evaluate_loss, in_parts
from .uncertainty import OF_ATOMS, Uncertainty, of_atoms, percent, why_not
from .unseen import WITHOUT

T = TypeVar("T")

FEW_MATERIALS = 10  # fewer say little of others
BOUND = re.compile(r"\w+_(low|high|error)[\d.]+|training_distance|far")  # keys of intervals
PRINTED = {"eV/atom": ("meV/atom", 1e3), "eV/Å": ("meV/Å", 1e3), "eV/Å^3": ("GPa", 160.21766208)}


def evaluate(
    model: str | Path | Model,
    structures: Source,
    *,
    part: str | None = None,
    split_key: str | None = None,
    label: Mapping[str, str] | None = None,
    unit: Mapping[str, str] | None = None,
    edges: int = 10_000,
    device: str = "auto",
    seed: int = 0,
    interval: float | None = None,
    verbose: bool = True,
) -> dict[str, Any]:
    """Errors of a model on every structure that has labels for what it predicts.

    Keys and units that were named in training are used again, and said so, unless others are named.

    Args:
        part: which part of a model that learned several objectives, each with its own energy.
        split_key: only the test structures that this key names, as in training: "split", or "test_fold=0".
        interval: a probability, such as 0.9; quantities that have intervals (see `predict`) then have "coverage", the
            share of structures whose label lies within.

    Returns:
        `{"n": structures, quantity: {"mae", "rmse", "r2", "n", "unit", "per_element"}}`, in eV/atom
        ("energy_per_atom"), eV/Å ("forces") and eV/Å^3 ("stress"), or in the unit of a property; classes have
        "accuracy", "cross_entropy" and, where there are two, "roc_auc".

    Raises:
        InputError: when no structure has such a label, or nothing can be compared.
    """
    distributed.join()
    model = (model if isinstance(model, Model) else load(model)).whole(part)
    _check_level(interval)
    given = read(structures)
    if split_key is not None:
        name, _, value = split_key.partition("=")
        test = by_key(given, name, value or None, fraction=0).test
        if test is None or not len(test):
            raise InputError(f"'{split_key}' names no test structures")
        given = Subset(given, test)
        if verbose:
            console.print(f"{len(given)} test structures, as {split_key} says")
    objective = objective_of(model).comparable()
    if isinstance(objective, Together):
        return _of_parts(model, objective, given, label, unit, edges, device, seed, interval, verbose)
    wanted = objective.labels()
    unit = {**_following(model, objective, unit or {}), **(unit or {})}
    label, unit = _as_in_training(model, given, label or {}, unit, verbose)
    some = len(wanted) > 1 and not objective.differences()
    either = list(wanted) if some else []  # whatever it was trained on, any of its labels can be compared
    labels = resolve(given, list(wanted), labels=label, units=unit, optional=either)
    labels = subtractable(given, _in_units_of(model, labels), objective)
    if wanted and not labels.entries:
        raise InputError(
            f"no structure has any of the labels {', '.join(wanted)}; there are "
            f"{', '.join(available(given)) or 'none'}; name their keys with --label NAME=KEY"
        )
    labelled = Labelled(given, labels)
    if verbose and (told := _told_of_seen(model, labelled)):
        console.print(f"[yellow]The model was trained on {told}: on others it may err more[/yellow]")
    if verbose and labels.entries:
        console.print(labels.table())
    if verbose and (other := apart(model.card, objective, given, labels)) and other.wholly:
        console.print(
            f"The {other.told('model')}: errors have the difference between levels in them",
            style="yellow", markup=False,
        )  # fmt: skip
    if verbose and (lacking := without_reference(model, np.flatnonzero(count_elements(given)))):
        console.print(
            f"[yellow]No label that this model learned from has {and_(lacking)}: errors of energies with these "
            "elements are those of references that nothing determined[/yellow]"
        )

    model = model.to(chosen_device(device)).eval()
    pairs = compared(model, objective, labelled, edges, seed, quiet=not verbose)
    found = scores(model, objective, pairs, [atoms.numbers for atoms in given])
    if interval is not None:
        cheap = {minus for _, minus in objective.differences().values()}  # what predictions are added to
        label, unit = ({k: v for k, v in one.items() if k in cheap} for one in (label, unit))
        predicting = {"label": label, "unit": unit, "edges": edges, "device": device, "verbose": verbose}
        for name, share in _coverage(model, given, labels, interval, predicting).items():
            found.get("energy_per_atom" if name == "energy" else name, {})["coverage"] = share
    found = found if pairs else losses(model, objective, labelled, edges, seed)
    if not found:
        reasons = "; ".join(objective.warnings(given)) or f"none has what {type(objective).__name__} asks for"
        raise InputError(f"nothing in these structures can be compared: {reasons}")
    return {"n": len(labelled), **found}


def _coverage(
    model: Model, given: Sequence[ase.Atoms], labels: Labels, level: float, predicting: Mapping[str, Any]
) -> dict[str, float]:
    """Shares of structures whose labels lie within the intervals of a level, by quantity."""
    predicted = predict(model, given, interval=level, allow_unseen=True, **predicting)
    quantities = {entry.quantity: entry for entry in labels.entries}
    found: dict[str, list[bool]] = {}
    for atoms, result in zip(given, predicted, strict=True):
        for name, entry in quantities.items():
            low, high, bound = (result.info.get(f"{name}_{end}{percent(level)}") for end in ENDS)
            value = None if low is bound is None else entry.value(atoms)
            if value is None:
                continue
            if bound is None:
                held = low <= value <= high
            elif name == "stress":
                held = np.abs(result.get_stress(voigt=False) - value).max() <= bound
            else:
                said = result.get_forces() if name == "forces" else result.arrays.get(name, result.info.get(name))
                error = np.asarray(said) - np.asarray(value)
                held = (of_atoms(error) if entry.per == "atom" else np.abs(error).max()) <= bound
            found.setdefault(name, []).append(bool(held))
    return {name: float(np.mean(own)) for name, own in found.items()}


def _told_of_seen(model: Model, structures: Labelled) -> str:
    """How many of the structures a model has seen, in words; empty where none is known to be."""
    copies = copies_of_seen(model, structures)
    if copies is None:
        trained = fingerprint(structures) in [stage.get("data") for stage in model.card.get("history", [])]
        return "these structures" if trained else ""
    return f"{copies.found:,} of these {copies.of:,} structures" if copies.found else ""


def losses(
    model: Model, objective: Objective, structures: Sequence[ase.Atoms], edges: int, seed: int = 0
) -> dict[str, Any]:
    """Terms of the loss, where outputs have no values to be compared with; of masking, in units, beside floors."""
    batches = Batches(structures, objective, model.backbone.edges, seed, VALIDATION)
    terms = evaluate_loss(model, batches, [np.array(members) for members in parts(model, structures, edges)])
    n = objective.teaching(structures) if isinstance(objective, Removal) else len(structures)
    found: dict[str, Any] = {name: {"loss": loss, "n": n, "unit": ""} for name, loss in terms.items()}
    if isinstance(objective, Removal) and found:
        for name, (weight, unit) in objective.units().items():
            found[name] |= {"loss": found[name]["loss"] / weight, "unit": unit}
        for name, floor in objective.floors(structures).items():
            found[name] |= {"floor": floor} if np.isfinite(floor) else {}
    return found


def _of_parts(
    model: Model,
    objective: Together,
    given: Sequence[ase.Atoms],
    label: Mapping[str, str] | None,
    unit: Mapping[str, str] | None,
    *options: Any,
) -> dict[str, Any]:
    """Errors of each part whose labels the structures have."""
    edges, device, seed, interval, verbose = options
    known = objective.comparable().labels()
    for name in {**(label or {}), **(unit or {})}:
        if name not in known:
            raise InputError(f"'{name}' is not a label of this model, which has {', '.join(known)}")
    result: dict[str, Any] = {"n": len(given)}
    missing = []
    for name, part in objective.parts.items():
        wanted = part.comparable().labels()
        own = [{k: v for k, v in (named or {}).items() if k in wanted} for named in (label, unit)]
        try:
            found = evaluate(
                model.part(name), given, label=own[0], unit=own[1], edges=edges, device=device, seed=seed,
                interval=interval, verbose=verbose,
            )  # fmt: skip
        except InputError as error:
            if any(name in wanted for name in label or {}) or isinstance(error, distributed.Lost):
                raise
            missing.append(str(error))
            continue
        result |= {key: value for key, value in found.items() if key != "n"}
    if len(missing) == len(objective.parts):
        raise InputError(missing[0])
    return result


Pairs = dict[str, list[tuple[np.ndarray, np.ndarray]]]  # output -> (label, prediction) of each structure, in order


def compared(
    model: Model, objective: Objective, labelled: Sequence[ase.Atoms], edges: int, seed: int = 0, quiet: bool = True
) -> Pairs:
    """Labels and predictions of every structure, for each output that the objective has targets for.

    Energies are per atom, in both. What the model learned as a difference is here the quantity itself, in both.
    """
    model.eval()
    differences = objective.differences()

    def work(members: list[int]) -> Pairs:
        pairs: Pairs = {}
        samples = [objective.prepare(labelled[i], rng_of(seed, VALIDATION, 0, i)) for i in members]
        names = [name for name in samples[0].targets if name in model.outputs]
        outputs = model(to_batch(samples, model.backbone.edges).graph, names)
        sizes = [len(s.atoms) for s in samples]
        for name in names:
            parts = _by_structure(model, name, outputs[name], sizes)
            if name == "energy":
                found = [(s.targets[name] / n, o / n) for s, o, n in zip(samples, parts, sizes, strict=True)]
                pairs["energy_per_atom"] = found
            elif name in differences:
                quantity, minus = differences[name]
                added = [as_label(s.atoms, minus, o.shape) for s, o in zip(samples, parts, strict=True)]
                found = [(s.targets[name] + a, o + a) for s, o, a in zip(samples, parts, added, strict=True)]
                pairs[quantity] = found
            else:
                pairs[name] = [(s.targets[name], o) for s, o in zip(samples, parts, strict=True)]
        return pairs

    together: Pairs = {}
    for pairs in shared(parts(model, labelled, edges), work, labelled, "evaluating", quiet):
        for name, rows in pairs.items():
            together.setdefault(name, []).extend(rows)
    return together


def scores(model: Model, objective: Objective, pairs: Pairs, numbers: Sequence[np.ndarray]) -> dict[str, Any]:
    """Errors of each output that has labels; `numbers` are the atomic numbers of each structure."""
    result = {}
    for name, rows in pairs.items():
        classes = getattr(objective, "task", None) == "classification"
        if found := _class_scores(rows) if classes else _errors(rows, numbers, name, model):
            result[name] = found
    return result


def without_elements(errors: Mapping[str, Any]) -> dict[str, Any]:
    """Errors without their breakdown by element."""
    return {name: {k: v for k, v in found.items() if k != "per_element"} for name, found in errors.items()}


def predict(
    model: str | Path | Model,
    structures: Source,
    out: str | Path | None = None,
    *,
    part: str | None = None,
    label: Mapping[str, str] | None = None,
    unit: Mapping[str, str] | None = None,
    edges: int = 10_000,
    device: str = "auto",
    allow_unseen: bool = False,
    interval: float | None = None,
    verbose: bool = True,
) -> list[ase.Atoms]:
    """Copies of the structures with what the model predicts in place of any labels.

    Energy, forces and stress are results of a calculator; other outputs are in `atoms.info` or `atoms.arrays`. Classes
    are numbered, with their probabilities under NAME_probabilities, in a table NAME_probability_CLASS. An output that
    means something else than its name, as the "forces" of a denoising model, is stored under its meaning
    ("denoising_displacement"). To what was learned as a difference from a cheap value, that value is added.

    Args:
        out: an extended XYZ or, by its ending, a CSV file with one line per structure.
        part: which part of a model that learned several objectives, each with its own energy.
        label, unit: the key of a cheap value, and the unit it is given in; by default those of training.
        allow_unseen: give energies also of structures with elements that no label had (see `without_reference`), which
            are left out, and said to be so, by default; forces and stresses do not depend on it.
        interval: with this probability, such as 0.9, a new label lies between NAME_low90 and NAME_high90, which are
            stored in `atoms.info`; of forces, stress and what else has many components, NAME_error90 is a bound of the
            error (`transfermium.uncertainty.scores`). Then "training_distance" is how far a structure lies from the
            training data, one being the edge of what validation had, and "far" says whether it is beyond, or has an
            element that the model never saw. Models that were not calibrated have none of these, which is said.

    Raises:
        InputError: naming a structure that lacks such a value.
    """
    distributed.join()
    model = (model if isinstance(model, Model) else load(model)).whole(part)
    given = read(structures)
    ending = Path(out).suffix.lower() if out is not None else ".extxyz"
    check_file(out)
    if ending not in (".extxyz", ".xyz", ".csv"):
        raise InputError(f"{out} ends in '{ending}', but predictions are written to .extxyz, .xyz or .csv")
    tell_unseen(model, given, verbose)
    lacking = _lacking(model, given, allow_unseen, verbose)
    added, cheap = _cheap(model, given, label or {}, unit or {}, verbose)
    doubt = _doubt(model, interval, verbose)

    model = model.to(chosen_device(device)).eval()

    def work(members: list[int]) -> dict[int, ase.Atoms]:
        chosen = [given[i] for i in members]
        graph = to_graph(chosen, model.backbone.edges)
        outputs = model(graph)
        sizes = [len(atoms) for atoms in chosen]
        parts = {name: _by_structure(model, name, values, sizes) for name, values in outputs.items()}
        for name, minus in added.items():
            whole = [o + as_label(cheap[i], minus, o.shape) for i, o in zip(members, parts[name], strict=True)]
            parts[name] = whole
        for k, i in enumerate(members):
            if lacking[i]:
                parts["energy"][k] = np.full(1, np.nan)
        own = ({n: r[k] if model.per_atom(n) else r[k][0] for n, r in parts.items()} for k in range(len(members)))
        found = {i: _with_outputs(a, o, model) for i, a, o in zip(members, chosen, own, strict=True)}
        if doubt is not None and interval is not None:
            bounds = doubt.bounds(model, graph, parts, interval)
            for k, i in enumerate(members):
                found[i].info |= _bounded(model, found[i], {name: values[k] for name, values in bounds.items()})
        return found

    predicted: dict[int, ase.Atoms] = {}
    for some in shared(parts(model, given, edges), work, given, "predicting", not verbose):
        predicted |= some
    results = [predicted[index] for index in range(len(given))]
    if doubt is not None and interval is not None and verbose:
        _tell_doubt(doubt, results, interval)
    if out is not None and distributed.rank() == 0:
        text = io.StringIO()
        if ending == ".csv":
            _write_csv(text, results, model)
            if verbose and (left := [stored_as(model, name) for name in model.outputs if model.per_atom(name)]):
                console.print(f"A table has no room for {and_(left)}, which each atom has: an .extxyz file does")
        else:
            from ase.io import write  # it takes half a second

            write(text, results, format="extxyz")
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(out), text.getvalue().encode())
    return results


def printable(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table for people: meV/atom, meV/Å, GPa."""
    rows = []
    for name, found in result.items():
        if not isinstance(found, Mapping):
            continue
        unit, factor = PRINTED.get(found.get("unit", ""), (found.get("unit", ""), 1.0))
        cells = {"quantity": name.replace("_", " "), "labels": str(found["n"])}
        for measure in ("mae", "rmse", "r2", "accuracy", "roc_auc", "cross_entropy", "loss", "floor", "coverage"):
            if measure in found:
                scale = factor if measure in ("mae", "rmse") else 1.0
                name = measure.upper() if measure in ("mae", "rmse", "r2") else measure
                cells[name] = f"{found[measure] * scale:.4g}"
        rows.append({**cells, "unit": unit})
    return rows


def printable_elements(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table of mean absolute errors by element."""
    known = {n: f["per_element"] for n, f in result.items() if isinstance(f, Mapping) and "per_element" in f}
    names = [n for n, found in known.items() if len(found) == 1 or len(set(found.values())) > 1]  # or they tell nothing
    elements = list(dict.fromkeys(e for n in names for e in result[n]["per_element"]))
    rows = []
    for element in elements:
        row = {"element": element}
        for name in names:
            unit, factor = PRINTED.get(result[name]["unit"], (result[name]["unit"], 1.0))
            error = result[name]["per_element"].get(element)
            row[f"{name.replace('_', ' ')} ({unit})"] = "" if error is None else f"{error * factor:.4g}"
        rows.append(row)
    return rows


def objective_of(model: Model) -> Objective:
    """The objective a model was last trained on, from its card."""
    if "objective" not in model.card:
        raise InputError("this model was never trained: its card names no objective")
    try:
        return rebuilt(model.card["objective"], Objective)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the objective in the model's card cannot be made: {error}; train the model again") from None


def _as_in_training(
    model: Model,
    given: Sequence[ase.Atoms],
    label: Mapping[str, str],
    unit: Mapping[str, str],
    verbose: bool,
    only: Collection[str] | None = None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Keys and units of labels (`only` of these), completed with those that were named in training."""
    labels, units = dict(label), dict(unit)
    differences = objective_of(model).differences().values()
    for entry in model.card.get("labels", {}).get("labels", []):
        name, key, declared = entry["quantity"], entry["keys"][0][1], entry["given_unit"]
        if only is not None and name not in only:
            continue
        if name not in label and key not in KEYS.get(name, (name,)) and key in available(given):
            labels[name] = key
        compared_with = any(name in pair for pair in differences)  # even our own unit says what the other is not in
        if name not in unit and declared is not None and (declared != entry["unit"] or compared_with):
            units[name] = declared
    used = [f"{n}={k}" for n, k in labels.items() if n not in label] + [
        f"{n}={u}" for n, u in units.items() if n not in unit
    ]
    if used and verbose:
        console.print(f"As in training: {', '.join(used)}", markup=False)
    return labels, units


def _following(model: Model, objective: Objective, unit: Mapping[str, str]) -> dict[str, str]:
    """Units of cheap labels that had those of their labels in training, where only these are given another now."""
    declared = {entry["quantity"]: entry["given_unit"] for entry in model.card.get("labels", {}).get("labels", [])}
    pairs = objective.differences().values()
    return {minus: unit[name] for name, minus in pairs if name in unit and declared.get(name) == declared.get(minus)}


def _in_units_of(model: Model, labels: Labels) -> Labels:
    """Labels of properties in the units of what they are compared with, where both are known."""
    entries = []
    for entry in labels.entries:
        unit = "" if entry.quantity in KEYS else _unit(model, entry.quantity)
        factor = ratio_of_units(entry.unit, unit) if entry.unit and unit else 1.0
        if factor is None:
            raise InputError(
                f"'{entry.quantity}' is in {entry.unit} here, and in {unit} in the model, which cannot be converted: "
                f"give it in {unit}, or, if both are one, declare it so (--unit {entry.quantity}='{unit}')"
            )
        entries.append(entry if factor == 1 else entry.times(factor, unit))
    return Labels(tuple(entries))


def _cheap(
    model: Model, given: Sequence[ase.Atoms], label: Mapping[str, str], unit: Mapping[str, str], verbose: bool
) -> tuple[dict[str, str], Sequence[ase.Atoms]]:
    """Outputs to the labels that are added to them, and the structures with these at their places, in the right unit.

    Raises `InputError` for a structure that lacks one.
    """
    differences = objective_of(model).differences() if "objective" in model.card else {}
    added = {name: minus for name, (_, minus) in differences.items() if name in model.outputs}
    for name in {**label, **unit}:
        if name not in added.values():
            of = f"only {', '.join(added.values())}" if added else "no label"
            raise InputError(f"'{name}' is not needed: for a prediction this model needs {of}")
    if not added:
        return {}, given
    labels, units = _as_in_training(model, given, label, unit, verbose, list(added.values()))
    entries = resolve(given, list(added.values()), labels=labels, units=units).entries
    for entry in entries:
        if entry.count < len(given):
            lacking = ~has(given, {(place, key) for place, key, _ in entry.keys})
            first = spoken(given, int(np.flatnonzero(lacking)[0]))
            raise InputError(
                f"{first} has no '{entry.quantity}', to which this model adds what it "
                f"predicts ({len(given) - entry.count} of {len(given)} structures lack it): give it, or leave them out"
            )
    trained = {entry.quantity.rpartition(".")[2]: entry for entry in Labels.from_json(model.card["labels"]).entries}
    expensive = {differences[name][1]: trained[differences[name][0].rpartition(" ")[2]] for name in added}
    return added, Labelled(given, Labels(tuple(entry.in_unit_of(expensive[entry.quantity]) for entry in entries)))


def parts(model: Model, structures: Sequence[ase.Atoms], budget: int) -> list[list[int]]:
    """Batches of at most `budget` edges, as indices."""
    if budget < 1:
        raise InputError(f"edges is {budget}, but must be above zero")
    counts = count_edges(structures, model.backbone.edges)
    return [[int(i) for i in part] for part in plan(counts, budget, np.arange(len(structures)))]


def shared(
    members: list[list[int]], work: Callable[[list[int]], T], structures: Sequence[ase.Atoms], title: str, quiet: bool
) -> Iterator[T]:
    """What `work` makes of each part, in order; processes share the parts, and each gets all results."""
    own = track(distributed.own(members), title, quiet=quiet)
    mine = [list(in_parts(work, some, structures)) for some in own]
    everyones = distributed.gathered(mine)
    return (found for k in range(len(members)) for found in everyones[k % len(everyones)][k // len(everyones)])


def output_of(model: Model, quantity: str) -> str:
    """The output that a quantity comes from: that of its name, or the one that learned a difference of it."""
    meanings = {meaning: name for name, (meaning, _) in model.card.get("quantities", {}).items()}
    return quantity if quantity in model.outputs else meanings.get(quantity, quantity)


def _by_structure(model: Model, name: str, values: Tensor, sizes: list[int]) -> list[np.ndarray]:
    """An output cut into the rows of each structure."""
    rows = torch.split(values.detach().double().cpu(), sizes if model.per_atom(name) else 1)
    return [part.numpy() for part in rows]


def _unit(model: Model, name: str) -> str:
    quantities = model.card.get("quantities", {})
    if name == "energy_per_atom":
        return f"{quantities.get('energy', ['', 'eV'])[1]}/atom"
    return str(quantities.get(output_of(model, name), ["", ""])[1])


def _errors(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], numbers: Sequence[np.ndarray], name: str, model: Model
) -> dict[str, Any]:
    """Errors over all finite components; by element over its atoms, or over the structures that contain it."""
    target = np.concatenate([np.asarray(t, float) for t, _ in rows])
    output = np.concatenate([np.asarray(o, float) for _, o in rows])
    known = np.isfinite(target) & np.isfinite(output)
    if not known.any():
        return {}
    difference = (output - target)[known]
    spread = target[known] - target[known].mean()
    variance = float(np.square(spread).mean())
    found: dict[str, Any] = {
        "mae": float(np.abs(difference).mean()),
        "rmse": float(np.sqrt(np.square(difference).mean())),
        "r2": 1 - float(np.square(difference).mean()) / variance if variance > 0 else float("nan"),
        "n": int(known.reshape(len(known), -1).any(axis=1).sum()),
        "unit": _unit(model, name),
    }
    if not np.isfinite(found["r2"]):
        del found["r2"]
    output_name = output_of(model, name)
    per_atom = output_name in model.outputs and model.per_atom(output_name)
    return {**found, "per_element": dict(_by_element(rows, numbers, per_atom))}


def _by_element(
    rows: Sequence[tuple[np.ndarray, np.ndarray]], numbers: Sequence[np.ndarray], per_atom: bool
) -> Iterator[tuple[str, float]]:
    sums: dict[int, list[float]] = {}
    for (target, output), z in zip(rows, numbers, strict=True):
        error = np.abs(np.asarray(output, float) - np.asarray(target, float)).reshape(len(target), -1)
        for element in np.unique(z):
            part = error[z == element] if per_atom else error
            part = part[np.isfinite(part)]
            if part.size:
                pair = sums.setdefault(int(element), [0.0, 0])
                pair[0] += float(part.sum())
                pair[1] += part.size
    for element in sorted(sums):
        yield chemical_symbols[element], sums[element][0] / sums[element][1]


def _class_scores(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    target = np.concatenate([np.asarray(t, float) for t, _ in rows])
    scores = np.concatenate([o.reshape(len(t), -1) for t, o in rows])
    known = np.isfinite(target)
    if not known.any():
        return {}
    truth, scores = target[known].astype(int), scores[known]
    shifted = scores - scores.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    found: dict[str, Any] = {
        "accuracy": float((scores.argmax(axis=1) == truth).mean()),
        "cross_entropy": float(-logs[np.arange(len(truth)), truth].mean()),
        "n": len(truth),
        "unit": "",
    }
    if scores.shape[1] == 2 and 0 < truth.sum() < len(truth):
        from scipy.stats import rankdata  # it takes half a second

        margin = scores[:, 1] - scores[:, 0]
        ones = int(truth.sum())
        ranks = rankdata(margin)  # the Mann-Whitney statistic
        found["roc_auc"] = float((ranks[truth == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(truth) - ones)))
    return found


def _with_outputs(atoms: ase.Atoms, outputs: Mapping[str, np.ndarray], model: Model) -> ase.Atoms:
    result = atoms.copy()
    result.calc = None
    meanings = [name if KEYS.get(name) else stored_as(model, name) for name in outputs]
    bounds = {"training_distance", "far"} | {f"{name}_{end}" for name in meanings for end in ENDS}
    for key in [key for key in result.info if BOUND.fullmatch(key) and key.rstrip("0123456789.") in bounds]:
        del result.info[key]  # perhaps of another model
    for key in [key for name in dict.fromkeys([*outputs, *meanings]) for key in (name, *KEYS.get(name, ()))]:
        result.info.pop(key, None)
        if key not in ("numbers", "positions"):
            result.arrays.pop(key, None)
    standard = {}
    for name, value in outputs.items():
        meaning = stored_as(model, name)
        classes = _classes(model, name)
        store = result.arrays if model.per_atom(name) else result.info
        if meaning in ("energy", "forces", "stress"):
            if np.isfinite(value).all() and (meaning != "stress" or has_volume(atoms)):
                standard[meaning] = float(value) if meaning == "energy" else value
        elif classes:
            numbers = value.argmax(axis=-1)
            store[meaning] = classes[int(numbers)] if numbers.ndim == 0 else numbers
            weights = np.exp(value - value.max(axis=-1, keepdims=True))
            store[f"{meaning}_probabilities"] = weights / weights.sum(axis=-1, keepdims=True)
        else:
            store[meaning] = float(value) if value.ndim == 0 else value
    if "stress" in standard:
        standard["stress"] = full_3x3_to_voigt_6_stress(standard["stress"])
    if standard:
        result.calc = SinglePointCalculator(result, **standard)
    return result


def _classes(model: Model, name: str) -> list[Any]:
    """The classes that an output tells apart, by their words or numbers; none for numbers."""
    n = getattr(model.heads[name], "classes", 0) if name in model.heads else 0
    words = getattr(objective_of(model), "classes", None) if n else None
    return words if isinstance(words, list) else list(range(n))


def _check_level(interval: float | None) -> None:
    if interval is not None and not 0 < interval < 1:
        raise InputError(f"the interval is {interval}, but must be a probability between 0 and 1, such as 0.9")


def _doubt(model: Model, interval: float | None, verbose: bool) -> Uncertainty | None:
    """What is known of the errors of a model, where intervals are wanted; says why there is nothing."""
    _check_level(interval)
    if interval is None:
        return None
    found = Uncertainty.of(model)
    if found is None and verbose:
        console.print(f"No intervals with this model: {why_not(model)}", style="dim", markup=False)
    for one in (found.intervals if found else {}).values():
        one.width(interval)  # a level that it cannot give is said before any work
    return found


def _bounded(model: Model, atoms: ase.Atoms, bounds: Mapping[str, Any]) -> dict[str, Any]:
    """What to store of the bounds of one structure; unseen elements are far, whatever the distance."""
    far = bool(bounds["far"]) or bool(unseen_elements(model, atoms.numbers))
    known = {name: float(value) for name, value in bounds.items() if name != "far" and np.isfinite(value)}
    return {**known, "far": far}


def _tell_doubt(doubt: Uncertainty, results: Sequence[ase.Atoms], level: float) -> None:
    """Typical widths of intervals, and how many structures they mean little for."""
    told = []
    sizes = np.array([max(len(atoms), 1) for atoms in results])
    for one in doubt.intervals.values():
        ends = [[atoms.info.get(f"{one.quantity}_{end}{percent(level)}", np.nan) for atoms in results] for end in ENDS]
        low, high, bound = np.array(ends)
        half = np.where(np.isfinite(bound), bound, (high - low) / 2) / (sizes if one.label.kind == "sum" else 1)
        if np.isfinite(half).any():
            unit, factor = PRINTED.get(one.unit, (one.unit, 1.0))
            which = {"atoms": f" (for {OF_ATOMS:.0%} of the atoms)", "tensor": " (all components)"}
            told.append(
                f"{one.quantity} ± {np.nanmedian(half) * factor:.3g} {unit}".strip() + which.get(one.label.kind, "")
            )
    if told:
        console.print(f"{percent(level)} % intervals, of a typical structure: {', '.join(told)}", markup=False)
        if doubt.materials is not None and doubt.materials < FEW_MATERIALS:
            console.print(
                f"[yellow]They were judged on structures of {doubt.materials} "
                f"{'material' if doubt.materials == 1 else 'materials'} only: of others fewer may lie within[/yellow]"
            )
    if n := sum(bool(atoms.info.get("far")) for atoms in results):
        console.print(
            f"[yellow]Far from the training data, where intervals promise nothing: {n:,} of {len(results):,} "
            "structures, marked as far[/yellow]"
        )


ENDS = ("low", "high", "error")


def _write_csv(file: io.StringIO, results: Sequence[ase.Atoms], model: Model) -> None:
    """One line per structure: index, any id, formula, what there is per structure, and how likely each class is."""
    ids = [key for key in ("id", "mbid", "material_id", "name", "file") if any(key in a.info for a in results)]
    names = [stored_as(model, name) for name in model.outputs if not model.per_atom(name)]
    stress = ["stress_xx", "stress_yy", "stress_zz", "stress_yz", "stress_xz", "stress_xy"]
    columns = [c for name in names for c in (stress if name == "stress" else [name])]
    likely = {
        f"{name}_probabilities": [f"{name}_probability_{one}" for one in _classes(model, output)]
        for output, name in ((output, stored_as(model, output)) for output in model.outputs)
        if name in names and _classes(model, output)
    }
    columns += [column for own in likely.values() for column in own]
    columns += dict.fromkeys(key for atoms in results for key in atoms.info if BOUND.fullmatch(key))
    writer = csv.writer(file)
    writer.writerow(["index", *ids, "formula", *columns])
    for index, atoms in enumerate(results):
        found = {**atoms.info, **(atoms.calc.results if atoms.calc is not None else {})}
        if "stress" in found:
            found |= dict(zip(stress, found["stress"], strict=True))
        for key, own in likely.items():
            found |= dict(zip(own, found[key], strict=True))
        writer.writerow(
            [
                index,
                *(found.get(i, "") for i in ids),
                atoms.get_chemical_formula(),
                *(found.get(c, "") for c in columns),
            ]
        )


def tell_unseen(model: Model, structures: Sequence[ase.Atoms], verbose: bool) -> None:
    unseen = unseen_elements(model, np.unique(np.concatenate([a.numbers for a in structures] or [[]]).astype(int)))
    if unseen and verbose:
        console.print(
            f"[yellow]The model never saw {', '.join(unseen)}: predictions with these elements mean little[/yellow]"
        )


def _lacking(model: Model, structures: Sequence[ase.Atoms], allow_unseen: bool, verbose: bool) -> np.ndarray:
    """Whether the energy of each structure is to be left out: (n_structures,)."""
    present = np.unpackbits(elements(structures), axis=1).astype(bool)
    symbols = without_reference(model, np.flatnonzero(present.any(axis=0)))
    lacking = np.asarray(present[:, [atomic_numbers[symbol] for symbol in symbols]].any(axis=1))
    if lacking.any() and verbose:
        n = int(lacking.sum())
        told = f"energies of {n:,} structures are" if n > 1 else "the energy of 1 structure is"
        told += " given all the same" if allow_unseen else " left out (--allow-unseen, allow_unseen=True, gives it)"
        console.print(f"[yellow]No label that this model learned from has {and_(symbols)}: {told}[/yellow]")
    return np.zeros_like(lacking) if allow_unseen else lacking


def without_reference(model: Model, numbers: np.ndarray) -> list[str]:
    """Symbols of elements among these whose reference energy no label determined; none for models without energies.

    They are those that the model never saw, and those that an earlier stage saw at another level of theory but no label
    of the last one had, unless `finetune` was told what to do with them (`unseen`).
    """
    card = model.card
    if not isinstance(model.outputs.get("energy"), EnergyHead) or stored_as(model, "energy") != "energy":
        return []
    symbols = [chemical_symbols[int(z)] for z in np.unique(numbers)]
    return [s for s in symbols if s in card.get(WITHOUT, ()) or s not in card.get("elements", symbols)]


def unseen_elements(model: Model, numbers: np.ndarray) -> list[str]:
    """Symbols of elements that are in none of the model's training structures."""
    seen = model.card.get("elements", {})
    return [chemical_symbols[int(z)] for z in np.unique(numbers) if chemical_symbols[int(z)] not in seen]

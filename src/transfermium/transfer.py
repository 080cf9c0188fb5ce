"""Pre-train, transfer, align: from structures to a model."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import ase
import numpy as np
import torch
from ase.data import chemical_symbols

from . import __version__, distributed
from .backbones import Backbone, TensorNet
from .console import bar, console, table
from .data.columns import codes, count_elements, elements, has, isolated_atoms, listed
from .data.labels import Labelled, Labels, available, resolve
from .data.leakage import Leak, leaks, summary
from .data.load import CALIBRATION, count_edges, plan, rng_of
from .data.read import Source, read
from .data.sequences import Joined, Subset
from .data.split import Split, by_key, found_split_keys, split
from .errors import InputError
from .evaluate import compared, scores, without_elements
from .graph import Sample, is_isolated_atom, to_batch
from .heads import (
    AtomHead,
    EnergyHead,
    ScalarHead,
    VectorHead,
    fit_references,
    labelled_totals,
    values,
)
from .model import Model, described, load
from .objectives import Objective, Together
from .objectives.base import told
from .rehearsal import rehearse
from .run import claim, fingerprint, write_json
from .train import Progress, TrainConfig, chosen_device, read_metrics, train

MOST_SAMPLES = 10_000  # structures that references and scales are fitted on
MOST_WARNED = 500  # that are looked at for what a user should know
MOST_POINTS = 2_000  # of a parity plot


def pretrain(
    structures: Source | Mapping[str, Source],
    objective: Objective,
    backbone: Backbone | None = None,
    *,
    out: str | Path | None = None,
    valid: Source | Mapping[str, Source] | None = None,
    valid_fraction: float = 0.1,
    split_by: str = "auto",
    split_key: str | None = None,
    label: Mapping[str, str] | None = None,
    unit: Mapping[str, str] | None = None,
    held_out: Source | None = None,
    dry_run: bool = False,
    verbose: bool = True,
    **config: Any,
) -> Model:
    """Train a new model on any objective.

    Args:
        structures: files, folders or `ase.Atoms`; for `Together`, also names of its parts to such.
        objective: what to learn.
        backbone: the architecture, TensorNet(64, 2) by default; its weights are drawn anew from `seed`.
        out: run folder; the same call goes on where a killed one stopped, and returns at once when it had finished.
        valid: structures that choose the checkpoint; by default a fraction of `structures`.
        valid_fraction: that fraction; zero validates nothing and returns the last weights.
        split_by: "auto", "random", "composition", "prototype", an info key whose groups stay together, or the
            split.json of an earlier run on the same structures.
        split_key: info key that says where each structure belongs ("train", "val", "test"), or KEY=VALUE for the value
            that is the test set, such as "test_fold=0"; test structures are left out.
        label: quantity to the key that holds it, such as {"band_gap": "gap_pbe"}; of one part of several, as
            {"pbesol.energy": "E_pbesol"}.
        unit: quantity to the unit it is given in, such as {"energy": "hartree"}.
        held_out: structures on which the model will be judged: what matches one of them (see `leaks`) is left out.
        dry_run: only say what the run would take, or what is left of it where `out` holds a part of it, measured on a
            few steps; nothing is written. The model that is returned was not trained; its card has the numbers under
            "dry run".
        config: fields of `TrainConfig`.

    Raises:
        InputError: for data, labels or options that cannot be used.
    """
    distributed.join()
    settings = _train_config(config)
    _check_objective(objective)
    backbone = TensorNet() if backbone is None else backbone
    data = _Data(
        structures, objective, valid, valid_fraction, split_by, split_key, label, unit, held_out, settings.seed, verbose
    )

    with torch.random.fork_rng(devices=[]):
        architecture = described(told(backbone, objective))
    asked = {
        "verb": "pretrain",
        "backbone": architecture,
        **data.asked,
        "train": _lasting(settings),
    }
    folder, finished = distributed.from_first(lambda: _claimed(out, asked, dry_run, verbose))
    if finished is not None:
        return finished

    samples = data.samples(objective)
    settled = distributed.from_first(lambda: objective.settled(samples))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Model(told(backbone, objective), settled.outputs(backbone.width))
    for name, head in model.heads.items():
        head.calibrate(*settled.calibration(name, samples))  # type: ignore[operator]
    if dry_run:
        return _rehearsed(model, settled, data, settings, folder, verbose)
    return _trained(model, settled, data, settings, folder, asked, history=[], report={}, verbose=verbose)


def finetune(
    base: str | Path | Model,
    structures: Source | Mapping[str, Source],
    objective: Objective,
    *,
    out: str | Path | None = None,
    part: str | None = None,
    align: bool = True,
    valid: Source | Mapping[str, Source] | None = None,
    valid_fraction: float = 0.1,
    split_by: str = "auto",
    split_key: str | None = None,
    label: Mapping[str, str] | None = None,
    unit: Mapping[str, str] | None = None,
    held_out: Source | None = None,
    dry_run: bool = False,
    verbose: bool = True,
    **config: Any,
) -> Model:
    """Train a copy of `base` on new labels.

    Heads that both objectives have are kept, others are new. Before the first step, the references of kept heads are
    fitted again to the residuals (`align`), which is reported; apart from that, zero steps leave the base as it is.

    Args:
        base: a model or its file.
        part: which part of a base that learned several objectives, each with its own energy.
        align: fit references (and the scale of a head that was trained on another quantity) to the new labels.
        config: fields of `TrainConfig`; `backbone_lr` is the learning rate of the backbone: zero freezes it.

    The other arguments, and what is raised, are those of `pretrain`.
    """
    distributed.join()
    _check_objective(objective)
    base = (base if isinstance(base, Model) else load(base)).whole(part, _names(objective))
    settings = _train_config(config, base.architecture()["dtype"])
    data = _Data(
        structures, objective, valid, valid_fraction, split_by, split_key, label, unit, held_out, settings.seed, verbose
    )

    identity = {"card": base.card.get("history", []), "weights": _weights_fingerprint(base)}
    asked = {"verb": "finetune", "base": identity, "align": align, **data.asked, "train": _lasting(settings)}
    folder, finished = distributed.from_first(lambda: _claimed(out, asked, dry_run, verbose))
    if finished is not None:
        return finished

    samples = data.samples(objective)
    settled = distributed.from_first(lambda: objective.settled(samples))
    model, kept = _transferred(base, settled, samples, settings.seed)
    model.to(chosen_device(settings.device))
    report: dict[str, Any] = {"kept heads": kept}
    if align and kept:
        report |= align_references(model, settled, samples, base.card.get("quantities", {}), kept)
        if verbose:
            _show_alignment(report)
    if dry_run:
        return _rehearsed(model, settled, data, settings, folder, verbose)
    return _trained(model, settled, data, settings, folder, asked, base.card.get("history", []), report, verbose, base)


def align_references(
    model: Model,
    objective: Objective,
    samples: Sequence[Sample],
    was: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """Fit the references of heads to the residuals of labels, in place, and say what changed.

    An energy's references move per element, by ridge-regularised least squares; other heads move by one constant. The
    scale of a head that was trained on another quantity (noise, say) is fitted first.

    Args:
        samples: with targets in the units of `objective`.
        was: quantities that the outputs meant before: name to [name, unit].
        names: of the heads.
    """
    report: dict[str, Any] = {}
    meaning = objective.quantities()
    for name in names:
        head = model.heads[name]
        own, seen = objective.calibration(name, samples)
        before, now = was.get(name), meaning.get(name)
        if isinstance(head, EnergyHead | VectorHead) and before and now and before[0] != now.name:
            report.setdefault("scale", {})[name] = _fit_scale(model, head, name, own, seen)
        if isinstance(head, EnergyHead):
            shifts = _shift_elements(model, head, name, own, seen)
            report |= {key if name == "energy" else f"{key} of {name}": found for key, found in shifts.items()}
        elif isinstance(head, ScalarHead | AtomHead) and not getattr(head, "classes", 0) and seen:
            predictions = _predictions(model, seen, name)
            targets = np.concatenate([np.asarray(s.targets[own], float) for s in seen])
            sizes = np.array([len(s.atoms) for s in seen]) if getattr(head, "pooling", "") == "sum" else 1
            residuals = (targets - predictions) / sizes
            if np.isfinite(residuals).any():
                shift = float(np.nanmean(residuals))
                head.shift += shift
                report.setdefault("shift", {})[name] = shift
    return report


def _shift_elements(model: Model, head: EnergyHead, name: str, own: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Fit the references of the head called `name` to what is left of targets called `own`."""
    labelled = [s for s in samples if np.isfinite(s.targets.get(own, [np.nan])[0])]
    labelled = [s for s in labelled if not is_isolated_atom(s.atoms)]  # no model is trained on lone atoms
    if not labelled:
        return {}
    predicted = _predictions(model, labelled, name)
    residuals = [s._replace(targets={own: s.targets[own] - p}) for s, p in zip(labelled, predicted, strict=True)]
    numbers, energies = labelled_totals(own, residuals)
    shift = fit_references(numbers, energies, ridge=1e-4)
    head.references += torch.from_numpy(shift).to(head.references.device)

    composition = np.stack([np.bincount(z, minlength=len(shift)) for z in numbers])
    present = np.flatnonzero(composition.any(axis=0))
    return {
        "reference shift (eV)": {chemical_symbols[z]: float(shift[z]) for z in present},
        "elements told apart": f"{np.linalg.matrix_rank(composition[:, present])} of {len(present)}",
    }


def _fit_scale(model: Model, head: EnergyHead | VectorHead, name: str, own: str, samples: Sequence[Sample]) -> float:
    """Give the head the scale at which its vectors best fit the labelled forces; at least a tenth of their RMS."""
    old = float(head.scale)
    vectors = "forces" if isinstance(head, EnergyHead) else own
    labels = values(vectors, samples)
    output = name.removesuffix(own) + vectors
    if len(labels) and output in model.outputs:
        predicted = _predictions(model, samples, output)
        targets = np.concatenate([s.targets[vectors] for s in samples])
        known = np.isfinite(targets).all(axis=1)
        p, t = predicted[known], targets[known]
        spread = float(np.square(p).mean()) or 1.0
        slope = float((p * t).mean()) / spread
        head.scale.fill_(old * max(slope, 0.1 * math.sqrt(float(np.square(t).mean()) / spread)))
    else:
        head.calibrate(own, samples)
    return float(head.scale) / old


@torch.no_grad()
def _predictions(model: Model, samples: Sequence[Sample], name: str, budget: int = 10_000) -> np.ndarray:
    model.eval()
    counts = count_edges([s.atoms for s in samples], model.backbone.edges)
    parts = []
    for members in plan(counts, budget, np.arange(len(samples))):
        graph = to_batch([samples[i] for i in members], model.backbone.edges).graph
        parts.append(model(graph, [name])[name].double().cpu().numpy())
    return np.concatenate(parts)


def _transferred(base: Model, objective: Objective, samples: Sequence[Sample], seed: int) -> tuple[Model, list[str]]:
    """A copy of the base with the objective's outputs, and the names of the heads that both have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = told(base.backbone, objective)
        model = Model(backbone, objective.outputs(backbone.width))
    model.to(dtype=next(base.parameters()).dtype)

    kept = [
        name
        for name, head in model.heads.items()
        if name in base.heads and described(head) == described(base.heads[name])
    ]
    weights = base.state_dict()
    shared = ("backbone.", "bond_vectors.", *(f"heads.{name}." for name in kept))
    own = model.state_dict()
    model.load_state_dict({**own, **{k: v for k, v in weights.items() if k.startswith(shared) and k in own}})
    for name, head in model.heads.items():
        if name not in kept:
            head.calibrate(*objective.calibration(name, samples))  # type: ignore[operator]
    return model, kept


class _Data:
    """Structures read, labelled, checked and split."""

    def __init__(
        self,
        structures: Source | Mapping[str, Source],
        objective: Objective,
        valid: Source | Mapping[str, Source] | None,
        valid_fraction: float,
        split_by: str,
        split_key: str | None,
        label: Mapping[str, str] | None,
        unit: Mapping[str, str] | None,
        held_out: Source | None,
        seed: int,
        verbose: bool,
    ):
        if not 0 <= valid_fraction < 1:
            raise InputError(f"valid_fraction is {valid_fraction}, but must be zero or more and below one")
        everything, labelled, self.labels = _labelled(structures, objective, label, unit)
        if verbose and self.labels.entries:
            console.print(self.labels.table())
        lone = distributed.from_first(lambda: isolated_atoms(everything))
        if len(lone) == len(everything):
            raise InputError("all structures are isolated atoms: there is nothing else to train on")
        self.isolated = [labelled[i] for i in lone]

        self.split = distributed.from_first(
            lambda: self._split(everything, valid is not None, valid_fraction, split_by, split_key, seed)
        )
        found: list[Leak] = []
        if held_out is not None:
            found = distributed.from_first(lambda: leaks(everything, read(held_out), quiet=not verbose))
        away = np.union1d(lone, [leak.index for leak in found]).astype(int)
        kept = np.setdiff1d(self.split.train, away) if len(away) else self.split.train
        if not len(kept):
            raise InputError("every structure to train on is also held out: there is nothing to learn from")
        self.train: Sequence[ase.Atoms] = Subset(labelled, kept)
        self.unlabelled = Subset(everything, kept)  # the same, as they were read
        self.valid: Sequence[ase.Atoms] = Subset(labelled, np.setdiff1d(self.split.valid, away))
        if verbose and held_out is not None:
            console.print(f"Held out: {summary(found, len(everything))}{'; they are left out' if found else ''}")
        if valid is not None:
            try:
                others, others_labelled, _ = _labelled(valid, objective, label, unit)
            except InputError as error:
                raise InputError(f"validation structures: {error}") from None
            kept = np.setdiff1d(np.arange(len(others)), isolated_atoms(others))
            if held_out is not None:
                kept = np.setdiff1d(kept, [leak.index for leak in leaks(others, read(held_out), quiet=True)])
            self.valid = Subset(others_labelled, kept)
        if verbose:
            distributed.from_first(lambda: self._tell(everything, valid is None, split_key, objective))
        own = {"fraction": valid_fraction, "by": split_by, "key": split_key}
        self.asked = {
            "objective": described(objective),
            "data": distributed.from_first(lambda: fingerprint(labelled)),
            "valid": own if valid is None else distributed.from_first(lambda: fingerprint(self.valid)),
            "labels": self.labels.to_json(),
            **({} if held_out is None else {"leaks": [leak.index for leak in found]}),
        }

    def samples(self, objective: Objective) -> list[Sample]:
        """What the objective sees of the training structures, for fitting references and scales."""
        chosen = [self.train[i] for i in self._representative(objective)] + self.isolated
        return [objective.prepare(atoms, rng_of(0, CALIBRATION, 0, i)) for i, atoms in enumerate(chosen)]

    def _representative(self, objective: Objective) -> list[int]:
        """At most about `MOST_SAMPLES` labelled training structures, with every element that occurs among them."""
        if len(self.train) <= MOST_SAMPLES:
            return list(range(len(self.train)))
        keys: set[tuple[str, str]] = {(place, key) for label in self.labels.entries for place, key, _ in label.keys}
        labelled = np.flatnonzero(has(self.unlabelled, keys)) if objective.labels() else np.arange(len(self.train))
        if not len(labelled):
            return []
        present = elements(self.unlabelled)[labelled]
        picked = np.unique(np.linspace(0, len(labelled) - 1, MOST_SAMPLES).astype(int))
        missing = listed(present) - listed(present[picked])
        first = [int(np.argmax(present[:, z // 8] & (128 >> z % 8) > 0)) for z in missing]
        return sorted({int(i) for i in labelled[[*picked, *first]]})

    def _split(
        self,
        structures: Sequence[ase.Atoms],
        given: bool,
        fraction: float,
        by: str,
        key: str | None,
        seed: int,
    ) -> Split:
        everyone, nobody = np.arange(len(structures)), np.zeros(0, int)
        if given:
            if key is not None or by != "auto":
                raise InputError(
                    "validation structures were given, so nothing is split: leave out split_key and split_by"
                )
            return Split(everyone, nobody, by="given", reason="validation structures were given", total=len(everyone))
        if key is not None:
            name, _, value = key.partition("=")
            return by_key(structures, name, value or None, fraction=fraction, by=by, seed=seed)
        if by.endswith(".json"):
            return _again(Split.load(by), by, len(structures))
        if fraction == 0 or len(structures) == 1:
            return Split(everyone, nobody, by="none", reason="nothing is validated", total=len(everyone))
        return split(structures, fraction, by=by, seed=seed)

    def _tell(self, structures: Sequence[ase.Atoms], own: bool, split_key: str | None, objective: Objective) -> None:
        parts = f"{len(self.train)} to train on, {len(self.valid)} to validate"
        lone = f", {len(self.isolated)} isolated atoms as references" if self.isolated else ""
        console.print(f"{parts}{lone} ({self.split.reason})" if own else f"{parts}{lone}")
        if own and "only validation has" in self.split.reason:
            console.print(
                "[yellow]Some elements are in validation only, so its energies mean little: keep the groups, or choose "
                "another split, such as --split-by random[/yellow]"
            )
        if isinstance(objective, Together) and len(self.valid):
            meant = {self.valid[i].info.get("part") for i in range(len(self.valid))}
            for part in objective.parts:
                if not meant & {None, part}:
                    console.print(
                        f"[yellow]Nothing of the part {part} validates, so it does not choose the checkpoint[/yellow]"
                    )
        found = found_split_keys(structures)
        if found and split_key is None:
            keys = ", ".join(found)
            console.print(f"[dim]The data has split keys that are not used: {keys} (use one with --split-key)[/dim]")
        some = np.unique(np.linspace(0, len(self.train) - 1, min(len(self.train), MOST_WARNED)).astype(int))
        for text in objective.warnings([self.train[int(i)] for i in some]):
            console.print(f"[yellow]{text[0].upper()}{text[1:]}[/yellow]")


def _labelled(
    structures: Source | Mapping[str, Source],
    objective: Objective,
    label: Mapping[str, str] | None,
    unit: Mapping[str, str] | None,
) -> tuple[Sequence[ase.Atoms], Sequence[ase.Atoms], Labels]:
    """Structures as they were read, the same with labels at their canonical places, and those labels.

    Of several parts, labels are called PART.QUANTITY.
    """
    if not isinstance(structures, Mapping):
        everything = _some(read(structures))
        labels = distributed.from_first(lambda: _resolved(everything, objective.labels(), label, unit))
        return everything, _ready(Labelled(everything, labels)), labels
    if not isinstance(objective, Together):
        raise InputError(f"structures have the names {', '.join(structures)}: only Together has parts to give them to")
    for name in [*structures, *(key.partition(".")[0] for key in {**(label or {}), **(unit or {})})]:
        if name not in objective.parts:
            raise InputError(
                f"'{name}' is not a part of this objective, which has {', '.join(objective.parts)}; labels and "
                f"units of a part are named {next(iter(objective.parts))}.LABEL=..."
            )
    parts, labelled, entries = [], [], []
    for name, source in structures.items():
        own = _some(read(source))
        labels = distributed.from_first(
            lambda own=own, name=name: _resolved(  # type: ignore[misc]
                own, objective.parts[name].labels(), _of(name, label), _of(name, unit), name
            )
        )
        parts.append(own)
        labelled.append(_ready(Labelled(own, labels, name)))
        entries += [replace(entry, quantity=f"{name}.{entry.quantity}") for entry in labels.entries]
    return Joined(parts, list(structures)), Joined(labelled, list(structures)), Labels(tuple(entries))


def _some(structures: Sequence[ase.Atoms]) -> Sequence[ase.Atoms]:
    if len(structures) == 0:
        raise InputError("there is no structure to train on")
    return structures


def _of(part: str, named: Mapping[str, str] | None) -> dict[str, str]:
    """What is said of the labels of one part."""
    return {key[len(part) + 1 :]: value for key, value in (named or {}).items() if key.startswith(f"{part}.")}


def _resolved(
    structures: Sequence[ase.Atoms],
    wanted: Mapping[str, bool],
    label: Mapping[str, str] | None,
    unit: Mapping[str, str] | None,
    part: str | None = None,
) -> Labels:
    named = {**(label or {}), **(unit or {})}
    for name in named:
        if name not in wanted:
            raise InputError(f"'{name}' is not a label of this objective, which has {', '.join(wanted) or 'none'}")
    optional = [name for name, needed in wanted.items() if not needed and name not in named]
    try:
        labels = resolve(structures, list(wanted), labels=label, units=unit, optional=optional)
    except InputError as error:
        if part is None:
            raise
        raise InputError(f"part {part}: {error}".replace("--label ", f"--label {part}.")) from None
    if wanted and not labels.entries:
        keys = ", ".join(available(structures)) or "no labels at all"
        of, prefix = ("", "") if part is None else (f"part {part}: ", f"{part}.")
        raise InputError(
            f"{of}no structure has any of {', '.join(wanted)}; there are {keys}; name keys with "
            f"--label {prefix}{next(iter(wanted))}=KEY"
        )
    return labels


def _ready(labelled: Labelled) -> Sequence[ase.Atoms]:
    """Structures that are in memory get their labels once; those on disk, whenever they are read."""
    return list(labelled) if isinstance(labelled.structures, list) else labelled


def _again(found: Split, path: str, total: int) -> Split:
    """A split of an earlier run, on the same structures."""
    if found.total != total:
        raise InputError(f"{path} splits {found.total} structures, but there are {total}: is it of other data?")
    return replace(found, reason=f"as in {path}")


def _trained(
    model: Model,
    objective: Objective,
    data: _Data,
    config: TrainConfig,
    folder: Path | None,
    asked: Mapping[str, Any],
    history: Sequence[Any],
    report: Mapping[str, Any],
    verbose: bool,
    base: Model | None = None,
) -> Model:
    """Run the loop, fill the card, write the run folder: the first process alone writes."""
    folder = folder if distributed.rank() == 0 else None
    if folder is not None:
        write_json(folder / "labels.json", data.labels.to_json())
        data.split.save(folder / "split.json")

    last = None
    with bar(quiet=not verbose) as bars:
        counting = bars.add_task("finding neighbours", total=len(data.train), note="")
        task = bars.add_task("training", total=1.0, note="", start=False)
        progress = train(
            model, objective, data.train, config, valid=data.valid, out=folder,
            counting=lambda done: bars.update(counting, completed=done),
        )  # fmt: skip
        bars.remove_task(counting)
        for first, last in zip(chain([True], repeat(False)), progress, strict=False):
            bars.start_task(task)
            if first and last.step > 1 and verbose:
                console.print(f"Going on after step {last.step - 1}")
            best = "" if last.best is None else f" · best validation {last.best:.4g}"
            bars.update(task, completed=last.fraction, note=f"step {last.step} · loss {last.loss:.4g}{best}")

    stage = {
        "verb": asked["verb"],
        "objective": described(objective),
        "data": asked["data"],
        "structures": len(data.train),
        **({"leaks left out": len(asked["leaks"])} if "leaks" in asked else {}),
        "validation structures": len(data.valid),
        **distributed.from_first(lambda: _ending(last, folder)),
        "alignment": dict(report),
        "transfermium": __version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    model.card = distributed.from_first(lambda: _card(model, objective, data, [*history, stage], base))
    if len(data.valid):
        errors, parity = _validated(model, objective, data.valid, config)
        model.card["metrics"]["validation"] = without_elements(errors)
        if folder is not None:
            write_json(folder / "validation.json", {"errors": errors, "parity": parity})
    model.to("cpu")
    if folder is not None:
        model.save(folder / "model.safetensors")
    return model.eval()


def _rehearsed(
    model: Model, objective: Objective, data: _Data, config: TrainConfig, folder: Path | None, verbose: bool
) -> Model:
    with bar(quiet=not verbose) as bars:
        task = bars.add_task("finding neighbours", total=len(data.train), note="")
        cost = rehearse(
            model, objective, data.train, config, valid=data.valid, out=folder,
            counting=lambda done: bars.update(task, completed=done),
        )  # fmt: skip
    if verbose:
        console.print(table("", cost.rows()))
    model.card = {"dry run": cost._asdict()}
    return model.to("cpu").eval()


def _validated(
    model: Model, objective: Objective, structures: Sequence[ase.Atoms], config: TrainConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Errors, and points of parity plots, by output; of several objectives, each on the structures that are for it."""
    if isinstance(objective, Together):
        errors: dict[str, Any] = {}
        parity: dict[str, Any] = {}
        meant = [structures[i].info.get("part") for i in range(len(structures))]
        for name, part in objective.parts.items():
            own = Subset(structures, [i for i, other in enumerate(meant) if other in (None, name)])
            if len(own):
                found = _validated(model.part(name), part, own, config)
                for all_of_them, one in zip((errors, parity), found, strict=True):
                    all_of_them.update({f"{name} {key}": value for key, value in one.items()})
        return errors, parity
    pairs = compared(model, objective, structures, config.edges, config.seed)
    errors = scores(model, objective, pairs, [atoms.numbers for atoms in structures])
    return errors, _parity(pairs, errors)


def _parity(pairs: Mapping[str, Any], errors: Mapping[str, Any]) -> dict[str, Any]:
    """Labels and predictions, component by component, of at most `MOST_POINTS` per quantity."""
    result = {}
    for name, rows in pairs.items():
        label = np.concatenate([np.ravel(target) for target, _ in rows])
        prediction = np.concatenate([np.ravel(output) for _, output in rows])
        if label.shape == prediction.shape:
            known = np.flatnonzero(np.isfinite(label) & np.isfinite(prediction))
            chosen = known[np.unique(np.linspace(0, len(known) - 1, min(len(known), MOST_POINTS)).astype(int))]
            unit = errors.get(name, {}).get("unit", "")
            result[name] = {"label": label[chosen].tolist(), "prediction": prediction[chosen].tolist(), "unit": unit}
    return result


def _card(model: Model, objective: Objective, data: _Data, history: list[Any], base: Model | None) -> dict[str, Any]:
    counts = count_elements(data.unlabelled) + count_elements(data.isolated)
    seen = Counter({chemical_symbols[z]: int(counts[z]) for z in np.flatnonzero(counts)})
    levels: Counter[str] = Counter()
    for structures in (data.unlabelled, data.isolated):
        level_of, names = codes(structures, "level", str)
        levels.update({str(name): int((level_of == i).sum()) for i, name in enumerate(names)})
    earlier = base.card.get("elements", {}) if base is not None else {}

    quantities = _quantities(model.outputs, objective, data.labels)
    return {
        "objective": described(objective),
        "quantities": quantities,
        "labels": data.labels.to_json(),
        "levels": dict(levels),
        "elements": {symbol: int(n) for symbol, n in (Counter(earlier) + seen).items()},
        "elements in last stage": sorted(seen),
        "references (eV)": _references(model, list(model.heads)),
        "history": history,
        "metrics": {"validation loss": history[-1]["best validation loss"]},
        **({"parts": dict(_parts_of(model, objective, data.labels))} if isinstance(objective, Together) else {}),
    }


def _references(model: Model, names: Sequence[str]) -> dict[str, float]:
    """Of the first of these heads that is an energy."""
    heads = [head for name in names if isinstance(head := model.heads[name], EnergyHead)]
    references = heads[0].references.tolist() if heads else []
    return {chemical_symbols[z]: energy for z, energy in enumerate(references) if energy}


def _quantities(names: Container[str], objective: Objective, labels: Labels) -> dict[str, list[str]]:
    """What outputs mean, with the units of labels of the same meaning."""
    quantities = {name: list(quantity) for name, quantity in objective.quantities().items() if name in names}
    for entry in labels.entries:
        if entry.unit and quantities.get(entry.quantity, [""])[0] == entry.quantity:
            quantities[entry.quantity][1] = entry.unit
    return quantities


def _parts_of(model: Model, objective: Together, labels: Labels) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a model needs to know to be used as one of its parts."""
    for name, outputs in objective.names.items():
        part = objective.parts[name]
        named = [e for e in labels.entries if e.quantity.startswith(f"{name}.") or e.quantity in part.labels()]
        own = Labels(tuple(replace(e, quantity=e.quantity.removeprefix(f"{name}.")) for e in named))
        card = {
            "objective": described(part),
            "labels": own.to_json(),
            "quantities": _quantities(outputs, part, own),
            "references (eV)": _references(model, [full for full in outputs.values() if full in model.heads]),
        }
        yield name, {"outputs": outputs, "card": card}


def _show_alignment(report: Mapping[str, Any]) -> None:
    for name, factor in report.get("scale", {}).items():
        console.print(f"Alignment: the scale of '{name}' was fitted to the labels (×{factor:.3g})")
    for name, shift in report.get("shift", {}).items():
        console.print(f"Alignment: '{name}' was shifted by {shift:.4g}")
    for of, shifts in reference_shifts(report).items():
        rows = [{"element": symbol, "shift (eV)": f"{value:+.3f}"} for symbol, value in shifts.items()]
        told_apart = f"{report[f'elements told apart{of}']} elements told apart"
        console.print(table(f"Alignment: reference energies{of}, {told_apart}", rows))


def reference_shifts(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Shifts per element of what `align_references` says, by " of " and the head; the only energy goes without."""
    start = "reference shift (eV)"
    return {key.removeprefix(start): found for key, found in report.items() if key.startswith(start) and found}


def _names(objective: Objective) -> list[str]:
    """Of its outputs."""
    with torch.random.fork_rng(devices=[]):
        return list(objective.outputs(2))


def _check_objective(objective: Any) -> None:
    if not isinstance(objective, Objective):
        raise InputError(f"the objective is {objective!r}, but must be one such as Potential() or Property('band_gap')")


def _train_config(options: Mapping[str, Any], dtype: Literal["float32", "float64"] = "float32") -> TrainConfig:
    try:
        config = TrainConfig(**options)
    except TypeError as error:
        raise InputError(f"{str(error).split('__init__() ')[-1]}: TrainConfig lists the options of a run") from None
    chosen_device(config.device)  # one that is not there is said before any work
    return replace(config, dtype=config.dtype or dtype)


def _finished(folder: Path | None) -> Model | None:
    if folder is None or not (folder / "model.safetensors").exists():
        return None
    return load(folder / "model.safetensors")


def _lasting(config: TrainConfig) -> dict[str, Any]:
    """The options of a run, and over how many batches a step is shared, which decides what a step is."""
    return {**asdict(config), "batches per step": distributed.size() * config.accumulate}


def _claimed(
    out: str | Path | None, asked: Mapping[str, Any], dry_run: bool, verbose: bool
) -> tuple[Path | None, Model | None]:
    """The folder of a run, and its model when it had finished; a dry run leaves the folder as it is."""
    folder = claim(out, asked, read_only=dry_run)
    finished = None if dry_run else _finished(folder)
    if finished is not None and verbose:
        console.print(f"{folder} is finished already: nothing is left to do", markup=False)
    return folder, finished


def _ending(last: Progress | None, folder: Path | None) -> dict[str, Any]:
    """How far training came; from its metrics where no step was left to do."""
    if last is not None:
        best = last.best if last.best is None or math.isfinite(last.best) else None
        seconds = {"seconds": round(last.elapsed, 1), "processor seconds": round(last.cpu, 1)}
        return {"steps": last.step, **seconds, "best validation loss": best}
    rows = read_metrics(folder) if folder is not None else []
    losses = [row["valid"] for row in rows if "valid" in row]
    return {
        "steps": rows[-1]["step"] if rows else 0,
        "seconds": round(rows[-1].get("elapsed", 0.0), 1) if rows else 0.0,
        "processor seconds": round(rows[-1].get("cpu", 0.0), 1) if rows else 0.0,
        "best validation loss": min(losses, default=None),
    }


def _weights_fingerprint(model: Model) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

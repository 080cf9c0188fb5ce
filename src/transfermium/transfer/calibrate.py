"""What a finished model's validation structures tell of its errors, for its card and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ase
import numpy as np
import torch
from torch import Tensor

from ..data.load import VALIDATION, rng_of
from ..data.sequences import Subset
from ..data.split import independent
from ..evaluate import parts, shared
from ..graph import Sample, to_batch
from ..model import Model
from ..objectives import Objective, Property
from ..uncertainty import KINDS, LEAST, WORTH, CrossChoice, Judged, Spread, scale, seen

MOST = 2_000  # training structures whose features are looked at
LEVEL = 0.9  # of the widths that a card shows


class Calibration(NamedTuple):
    """The entry of a card, and tensors that go with it."""

    entry: dict[str, Any]
    tensors: dict[str, Tensor]


def calibrated(
    model: Model,
    objective: Objective,
    cross: CrossChoice | None,
    train: Sequence[ase.Atoms],
    valid: Sequence[ase.Atoms],
    edges: int,
    part: str = "",
) -> Calibration:
    """Intervals from cross-validated scores, and the spread of training structures in the space of features.

    Args:
        cross: of the training run; None where it was not wanted.
        train, valid: as they were trained on and validated, with labels at their places.
        edges: most edges in a batch.
        part: the prefix of targets in `cross`, where a run also learned another task.
    """
    if reason := _reason(cross, len(valid)):
        return Calibration({"none": reason}, {})
    assert cross is not None
    some = np.unique(np.linspace(0, len(train) - 1, min(len(train), MOST)).astype(int))
    spread = Spread.of(_table(model, objective, Subset(train, some), edges)[0])
    features, deviations = _table(model, objective, valid, edges)
    distance2 = spread.distance2(features)
    typical = float(np.median(distance2)) or 1.0
    edge = float(np.sqrt(np.quantile(distance2, 0.99))) or 1.0

    kept: dict[str, np.ndarray] = {**spread._asdict(), "folds": cross.folds}
    targets: dict[str, Any] = {}
    for full, label in cross.judged.items():
        name = full.removeprefix(part)
        if not full.startswith(part):
            continue
        label = label._replace(output=_own(label.output, name, model))
        found = cross.scores[full]
        known = np.isfinite(found)
        entry = _entry(model, label, int(known.sum()))
        if entry["n"] >= LEAST:
            scales = {"distance": scale("distance", distance2 / typical)}
            scales |= {n: scale(n, distance2, said) for n, said in deviations.items() if n == f"{label.output}_std"}
            chosen = narrowest(found[known], {n: values[known] for n, values in scales.items()})
            entry |= {"scaled by": chosen, "scores": f"scores {name}"}
            entry[f"half-width {LEVEL:.0%}"] = _half(found, scales.get(chosen))
            kept[f"scores {name}"] = found
            if chosen:
                kept[f"scale {chosen}"] = scales[chosen]
        else:
            entry["none"] = f"{entry['n']} labels are too few for an interval, which needs {LEAST}"
        targets[name] = entry
    n_folds = len(np.unique(cross.folds))
    content = {
        "structures": len(valid), "materials": len(np.unique(independent(valid))), "folds": n_folds,
        "typical": typical, "edge": edge, "targets": targets,
    }  # fmt: skip
    return Calibration(content, {name: torch.from_numpy(np.asarray(array, np.float32)) for name, array in kept.items()})


def judge_choice(best: Model, candidates: Sequence[Model]) -> None:
    """Score each fold of the validation structures by the model that the others would have chosen, in place.

    The best of several models was chosen by the structures that calibrated it; so folds are judged as those of
    `CrossChoice`. What would have been chosen is told by the geometric mean over targets of mean scores.
    """
    known = best.card.get("uncertainty", {})
    names = {name: entry["scores"] for name, entry in known.get("targets", {}).items() if "scores" in entry}
    able = [m.attached for m in candidates if {"folds", *names.values()} <= m.attached.keys()]
    if not names or len(able) < 2:
        return
    folds = best.attached["folds"].numpy()
    everyones = {name: np.stack([kept[key].numpy() for kept in able]) for name, key in names.items()}
    fresh = {name: np.full(len(folds), np.nan) for name in names}
    for fold in np.unique(folds):
        others, here = folds != fold, folds == fold
        logs = [np.log(np.nanmean(each[:, others], axis=1) + 1e-300) for each in everyones.values()]
        chosen = int(np.argmin(np.sum(logs, axis=0)))
        for name, each in everyones.items():
            fresh[name][here] = each[chosen, here]
    targets = dict(known["targets"])
    for name, key in names.items():
        scaled = targets[name]["scaled by"]
        scales = best.attached[f"scale {scaled}"].double().numpy() if scaled else None
        targets[name] = {**targets[name], f"half-width {LEVEL:.0%}": _half(fresh[name], scales)}
        best.attached = {**best.attached, key: torch.from_numpy(fresh[name].astype(np.float32))}
    best.card["uncertainty"] = {**known, "targets": targets, "chosen among": len(able)}


def narrowest(found: np.ndarray, scales: Mapping[str, np.ndarray]) -> str:
    """The scale that makes scores most alike; "" for none, where the gain is not worth it.

    It is judged by mean scores: choosing by the quantile itself would make the intervals too narrow.
    """
    gains = {name: float((found / own).mean() * own.mean()) for name, own in scales.items()}
    best = min(gains, key=gains.__getitem__, default="")
    return best if best and gains[best] < WORTH * float(found.mean()) else ""


def _half(found: np.ndarray, scales: np.ndarray | None, level: float = LEVEL) -> float:
    """Half the mean width of intervals."""
    known = np.isfinite(found)
    own = np.ones(int(known.sum())) if scales is None else scales[known]
    ascending = np.sort(found[known] / own)
    k = min(int(np.ceil((len(own) + 1) * level - 1e-9)), len(own))
    return float(ascending[k - 1] * own.mean())


def _entry(model: Model, label: Judged, n: int) -> dict[str, Any]:
    unit = str(model.card.get("quantities", {}).get(label.output, ["", ""])[1])
    return {
        "output": label.output,
        "unit": f"{unit}/atom" if label.kind == "sum" else unit,
        "kind": label.kind,
        "score": KINDS[label.kind],
        "n": n,
        "scaled by": "",
    }


def _own(output: str, name: str, model: Model) -> str:
    """The output of a model that was trained beside another task, under a name of both."""
    return output if output in model.outputs else name


def _reason(cross: CrossChoice | None, n: int) -> str:
    """Why there is nothing to calibrate by; empty where there is."""
    if cross is None:
        return "no calibration was asked for"
    if not n:
        return "nothing was validated"
    if n < LEAST:
        return f"{n} validation structures are too few for an interval, which needs {LEAST}"
    if not cross.judged:
        return "what it learned has no labels to be compared with"
    if not cross.whole:
        return "the run was begun by an earlier version, or without calibration"
    return ""


def _table(
    model: Model, objective: Objective, structures: Sequence[ase.Atoms], edges: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What the backbone sees of each structure, and what it says of its own errors, where it learned to."""
    model.eval()
    own = isinstance(objective, Property) and objective.uncertainty and objective.kind == "intensive"
    names = [objective.deviation] if isinstance(objective, Property) and own else []

    def work(members: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        samples = [objective.prepare(structures[i], rng_of(0, VALIDATION, 0, i)) for i in members]
        graph = to_batch([Sample(s.atoms, {}, s.inputs) for s in samples], model.backbone.edges).graph
        outputs = model(graph, names) if names else {}
        said = np.stack([np.zeros(len(members)), *(outputs[name].double().cpu().numpy() for name in names)], axis=1)
        return dict(zip(members, zip(seen(model, graph), said, strict=True), strict=True))

    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for some in shared(parts(model, structures, edges), work, structures, "calibrating", True):
        found |= some
    rows = [found[i] for i in range(len(structures))]
    said = np.stack([row[1] for row in rows])
    return np.stack([row[0] for row in rows]), {name: said[:, k + 1] for k, name in enumerate(names)}

"""The two stages of a transfer, each the work of a cell: pre-train, and fine-tune and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..backbones import Backbone
from ..data import nested, read
from ..data.sequences import Subset
from ..data.split import independent
from ..errors import InputError
from ..model import Model
from ..objectives import Objective
from ..objectives.together import Parts
from ..train import TrainConfig
from ..transfer import finetune, pretrain
from .bounds import bound_of
from .cells import Done
from .judged import errors_of, guess_references

VALID = 0.2  # of the labels of each fine-tuning, which choose the checkpoint and, once, the learning rate


def check_options(rates: Sequence[float], edges: int, seeds: int, workers: int | None) -> None:
    """Refuse what no cell could use before there are any."""
    if not isinstance(seeds, int) or seeds < 1:
        raise InputError(f"seeds is {seeds}, but must be a number of at least one; three are usual")
    if not rates:
        raise InputError("no learning rate to try: give at least one")
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}, but must be at least one")
    for rate in rates:
        TrainConfig(lr=rate, edges=edges)


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
        packed_at(folder, data), objective, architecture, **bound_of(time), seed=seed, edges=edges,
        label=_of(objective, label, data), unit=_of(objective, unit, data), out=folder / "run", verbose=False,
        device="cpu", calibrate=False,
    )  # fmt: skip
    return cost_of(model)


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
    """Fine-tune one arm on some labels of a target, and test it; a run that diverges has no errors."""
    torch.set_num_threads(1)
    everything = read(packed_at(folder, pool))
    members = nested(np.arange(len(everything)), [n_train], seed=seed)[0]
    options: dict[str, Any] = {
        **bound_of(time), "lr": lr, "seed": seed, "edges": edges, "label": label, "unit": unit,
        "valid_fraction": VALID, "out": folder / "run", "verbose": False, "device": "cpu", "calibrate": False,
    }  # fmt: skip
    chosen = Subset(everything, members)
    said = {"target": target, "backbone": backbone, "arm": arm, "seed": seed, "n_train": n_train, "lr": lr}
    try:
        if base is None:
            model = pretrain(chosen, objective, architecture, **options)
        else:
            model = finetune(base.folder / "run/model.safetensors", chosen, objective, unseen="group", **options)
    except InputError as error:
        if "not finite" not in str(error):
            raise
        return said  # never chosen
    tests = read(packed_at(folder, test))
    lacking = guess_references(model, tests)
    errors_by, units = errors_of(model, tests, label, unit)
    quantity = "forces" if "forces" in errors_by else next(iter(errors_by))
    wanted, errors = units[quantity], errors_by[quantity]
    cost = cost_of(model)
    groups = independent(tests)
    one = len(np.unique(groups)) == 1  # its frames are what other tests would draw from
    return {
        **said, "quantity": quantity, "mae": float(np.mean(errors)), "unit": wanted, "steps": cost["steps"],
        "train_seconds": cost["seconds"], "pretrain_seconds": 0.0 if base is None else base.result["seconds"],
        "test_ids_sha": ids, "n_test": len(errors), "validation loss": cost["validation loss"], "errors": errors,
        "materials": (np.arange(len(tests)) if one else groups).tolist(), "guessed references": lacking,
    }  # fmt: skip


def cost_of(model: Model) -> dict[str, Any]:
    stage = model.card["history"][-1]
    return {
        "steps": stage["steps"],
        "seconds": stage["processor seconds"],
        "validation loss": stage["best validation loss"],
    }


def packed_at(cell: Path, names: Any) -> Any:
    """Paths of packed sets, from the folder of a cell of the same study."""
    if isinstance(names, str):
        return str(cell.parents[1] / "data" / names)
    if isinstance(names, Mapping):
        return {level: packed_at(cell, name) for level, name in names.items()}
    return [packed_at(cell, name) for name in names]


def _of(objective: Objective, named: Mapping[str, str], data: Any) -> dict[str, str]:
    """What is said of labels, as far as the objective wants them; of several levels, for each."""
    if isinstance(objective, Parts) and isinstance(data, Mapping):
        parts = objective.parts.items()
        return {f"{n}.{k}": text for n, part in parts for k, text in _of(part, named, None).items()}
    return {name: text for name, text in named.items() if name in objective.labels()}

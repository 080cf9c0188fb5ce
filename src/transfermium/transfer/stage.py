"""One stage of a model: its options, its folder, the training or its rehearsal, and its entry in the card."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import ase
import torch

from .. import __version__, distributed
from ..card import card_of, examples, known_of, validated
from ..console import bar, console, table
from ..dataset import TrainingData
from ..equivariance import equivariance_error, told_of_equivariance
from ..errors import InputError
from ..evaluate import without_elements
from ..jacobian import direct_forces, jacobian_asymmetry
from ..lora import merged
from ..model import Model, described, load, write_whole
from ..objectives import Objective
from ..rehearsal import rehearse
from ..run import claim, write_json
from ..seen import KEY, seen_by
from ..train import Progress, TrainConfig, chosen_device, is_out_of_memory, read_metrics, train
from ..uncertainty import CrossChoice
from .calibrate import calibrated
from .replay import NEW, Beside, Ledger, show_forgetting


def configured(options: Mapping[str, Any], dtype: Literal["float32", "float64"] = "float32") -> TrainConfig:
    """The options of a run, in the precision of its base where they name none."""
    try:
        config = TrainConfig(**options)
    except TypeError as error:
        raise InputError(f"{str(error).split('__init__() ')[-1]}: TrainConfig lists the options of a run") from None
    chosen_device(config.device)  # one that is not there is said before any work
    return replace(config, dtype=config.dtype or dtype)


def lasting(config: TrainConfig) -> dict[str, Any]:
    """The options of a run, and over how many batches a step is shared, which decides what a step is."""
    return {**asdict(config), "batches per step": distributed.size() * config.accumulate}


def claimed(
    out: str | Path | None, asked: Mapping[str, Any], dry_run: bool, verbose: bool
) -> tuple[Path | None, Model | None]:
    """The folder of a run, and its model when it had finished; a dry run leaves the folder as it is."""
    folder = claim(out, asked, read_only=dry_run)
    finished = None if dry_run else _finished(folder)
    if finished is not None and verbose:
        console.print(f"{folder} is finished already: nothing is left to do", markup=False)
    return folder, finished


def trained(
    model: Model,
    objective: Objective,
    data: TrainingData,
    config: TrainConfig,
    folder: Path | None,
    asked: Mapping[str, Any],
    history: Sequence[Any],
    report: Mapping[str, Any],
    verbose: bool,
    base: Model | None = None,
    *,
    two: Beside | None = None,
    ledger: Ledger | None = None,
    updates: Mapping[str, int] | None = None,
    calibrate: bool = True,
) -> Model:
    """Run the loop, fill the card, write the run folder: the first process alone writes."""
    folder = folder if distributed.rank() == 0 else None
    if folder is not None:
        write_json(folder / "labels.json", data.labels.to_json())
        data.split.save(folder / "split.json")

    last = None
    learned, valid = _learned(model, objective, data, two), two.valid if two else data.valid
    cross = CrossChoice(*learned[:2], valid) if calibrate else None
    with bar(quiet=not verbose or config.n_steps == 0) as bars:
        counting = bars.add_task("finding neighbours", total=len(two.train if two else data.train), note="")
        task = bars.add_task("training", total=1.0, note="", start=False)
        progress = train(
            *learned, config, valid=valid, out=folder,
            counting=lambda done: bars.update(counting, completed=done), cross=cross,
        )  # fmt: skip
        bars.remove_task(counting)
        for first, last in zip(chain([True], repeat(False)), progress, strict=False):
            bars.start_task(task)
            if first and last.step > 1 and verbose:
                console.print(f"Going on after step {last.step - 1}")
            best = "" if last.best is None else f" · best validation {last.best:.4g}"
            bars.update(task, completed=last.fraction, note=f"step {last.step} · loss {last.loss:.4g}{best}")

    model.backbone = merged(model.backbone)
    stage = {
        "verb": asked["verb"],
        "objective": described(objective),
        "data": asked["data"],
        "structures": len(data.train),
        **({"leaks left out": len(asked["leaks"])} if "leaks" in asked else {}),
        **known_of(data),
        **({"teacher": asked["teacher"]} if "teacher" in asked else {}),
        "validation structures": len(data.valid),
        **distributed.from_first(lambda: _ending(last, folder)),
        "alignment": dict(report),
        **({"lora": dict(updates)} if updates else {}),
        **({"replay": two.said} if two else {}),
        **({"forgetting": ledger.entry(two.base if two else model)} if ledger else {}),
        "transfermium": __version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if ledger and verbose:
        show_forgetting(stage["forgetting"])
    model.card = distributed.from_first(lambda: card_of(model, objective, data, [*history, stage], base))
    if len(data.valid):
        found = validated(model, objective, data.valid, config)
        model.card["metrics"]["validation"] = without_elements(found.errors)
        if folder is not None:
            some, known = examples(data.valid, found.by_structure)
            write_whole(folder / "validation.extxyz", some)
            content = {"errors": found.errors, "parity": found.parity, "structures": known}
            write_json(folder / "validation.json", content)
    prefix = f"{NEW} " if two else ""
    model.card["uncertainty"], model.attached = calibrated(
        model, objective, cross, data.train, data.valid, config.edges, prefix
    )
    seen = (data.unlabelled, data.unlabelled_valid)
    model.attached[KEY] = distributed.from_first(lambda: seen_by(seen, base, quiet=not verbose))
    if "rotation" not in model.backbone.laws:
        error = equivariance_error(model, data.valid if len(data.valid) else data.train, objective, seed=config.seed)
        model.card["equivariance error"] = error
        if verbose and error:
            console.print(f"Equivariance error of {type(model.backbone).__name__}: {told_of_equivariance(error)}")
    if direct_forces(model):
        asymmetry = _asymmetry(model, data.valid if len(data.valid) else data.train, objective, config.seed)
        if math.isfinite(asymmetry):
            model.card["jacobian asymmetry"] = asymmetry
            if verbose:
                console.print(f"Asymmetry of the Jacobian of direct forces: {asymmetry:.2g}, where energy needs 0")
    model.to("cpu")
    if folder is not None:
        model.save(folder / "model.safetensors")
    return model.eval()


def rehearsed(
    model: Model,
    objective: Objective,
    data: TrainingData,
    config: TrainConfig,
    folder: Path | None,
    verbose: bool,
    two: Beside | None = None,
) -> Model:
    """Measure what the run would take, and say it; the model is not trained."""
    with bar(quiet=not verbose) as bars:
        task = bars.add_task("finding neighbours", total=len(two.train if two else data.train), note="")
        cost = rehearse(
            *_learned(model, objective, data, two), config, valid=two.valid if two else data.valid, out=folder,
            counting=lambda done: bars.update(task, completed=done),
        )  # fmt: skip
    if verbose:
        console.print(table("", cost.rows()))
    model.backbone = merged(model.backbone)
    model.card = {"dry run": cost._asdict()}
    return model.to("cpu").eval()


def _learned(
    model: Model, objective: Objective, data: TrainingData, two: Beside | None
) -> tuple[Model, Objective, Sequence[ase.Atoms]]:
    """What is trained, on what: with replay a model of two tasks, whose backbone and heads are those of the one."""
    return (two.model, two.objective, two.train) if two else (model, objective, data.train)


def _asymmetry(model: Model, structures: Sequence[ase.Atoms], objective: Objective, seed: int) -> float:
    """Of the Jacobian of the forces; NaN where memory has no room for it, which training needed less of."""
    try:
        return jacobian_asymmetry(model, structures, objective, seed=seed)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return math.nan


def _finished(folder: Path | None) -> Model | None:
    if folder is None or not (folder / "model.safetensors").exists():
        return None
    return load(folder / "model.safetensors")


def _ending(last: Progress | None, folder: Path | None) -> dict[str, Any]:
    """How far training came; from its metrics where no step was left to do."""
    if last is not None:
        best = last.best if last.best is None or math.isfinite(last.best) else None
        seconds = {"seconds": round(last.elapsed, 1), "processor seconds": round(last.cpu, 1)}
        back = {"went back at step": last.went_back} if last.went_back else {}
        return {"steps": last.step, **seconds, "best validation loss": best, **back}
    rows = read_metrics(folder) if folder is not None else []
    losses = [row["valid"] for row in rows if "valid" in row]
    steps_back = [row["step"] for row in rows if row.get("went back")]
    return {
        "steps": rows[-1]["step"] if rows else 0,
        "seconds": round(rows[-1].get("elapsed", 0.0), 1) if rows else 0.0,
        "processor seconds": round(rows[-1].get("cpu", 0.0), 1) if rows else 0.0,
        "best validation loss": min(losses, default=None),
        **({"went back at step": steps_back[0]} if steps_back else {}),
    }

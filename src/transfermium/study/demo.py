"""The whole main job on the crystals of the package: PBE to r2SCAN from 10, 20 and 40 labels."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from ..backbones import PaiNN
from ..console import console, results, table
from ..crystals import crystals
from ..data.split import nested
from ..evaluate import evaluate, predict
from ..model import Model, load
from ..objectives import Potential
from ..report import Page, label_curves, parity
from ..run import write_json
from ..transfer import finetune, pretrain
from .cells import Cell, Done, run
from .intervals import paired

SIZES = (10, 20, 40)
SEEDS = (0, 1, 2)
PRETRAINING, TUNING = 800, 300  # steps
ARMS = {"shift": "PBE model + element shifts", "scratch": "from scratch", "transfer": "pre-trained on PBE"}
WIDTH, DEPTH, EDGES = 32, 2, 2_000
RATES = (3e-3, 5e-4)  # learning rates that each trained arm tries; its own validation labels choose
QUANTITIES = {"forces": ("forces", "meV/Å"), "energy_per_atom": ("energy", "meV/atom")}


def demo(
    out: str | Path = "transfermium-demo",
    sizes: Sequence[int] = SIZES,
    seeds: Sequence[int] = SEEDS,
    steps: int = TUNING,
    pretraining: int = PRETRAINING,
    workers: int = 2,
) -> Path:
    """Pre-train on PBE, transfer to r2SCAN, compare with training from scratch; returns the path of the report.

    Validation labels are counted in the sizes. Test materials appear in no training set, at neither level. The same
    call goes on where it was stopped.
    """
    out, start = Path(out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    many = len(crystals("PBE", "train"))
    console.print(f"Pre-training on {many} PBE crystals, {len(seeds)} seeds, then transfer to r2SCAN.")

    bases = {seed: Cell({"seed": seed}, _base, {"steps": pretraining}, steps=pretraining) for seed in seeds}
    cells = {
        (arm, n, seed): _planned(arm, n, seed, steps, bases[seed]) for n in sizes for seed in seeds for arm in ARMS
    }
    found = dict(run([*bases.values(), *cells.values()], out, workers=workers))

    costs = [found[base] for base in bases.values()]
    result = _result([found[cell] for cell in cells.values()], costs, time.monotonic() - start)
    example = cells["transfer", max(sizes), seeds[0]].folder(out)
    return _shown(out, result, steps, pretraining, load(example / "model.safetensors"))


def _planned(arm: str, n: int, seed: int, steps: int, base: Cell) -> Cell:
    """One arm with `n` labels; the one from scratch needs no base, the shift takes no step."""
    key, needs = {"arm": arm, "labels": n, "seed": seed}, {} if arm == "scratch" else {"base": base}
    if arm == "shift":
        return Cell(key, _arm, {"steps": 0}, needs)
    return Cell(key, _arm, {"steps": steps}, needs, steps=len(RATES) * steps)


def _base(folder: Path, seed: int, steps: int) -> float:
    """Pre-train on the PBE labels of the training materials; returns processor seconds."""
    model = pretrain(
        crystals("PBE", "train"), Potential(), PaiNN(WIDTH, DEPTH), steps=steps, seed=seed, edges=EDGES, lr=max(RATES),
        split_by="material", out=folder / "run", verbose=False,
    )  # fmt: skip
    return _seconds(model)


def _arm(folder: Path, arm: str, labels: int, seed: int, steps: int, base: Done | None = None) -> dict[str, Any]:
    """One model from so many r2SCAN labels, and its errors on the materials that no model has seen."""
    pool = crystals("r2SCAN", "train")
    members = [int(i) for i in nested(np.arange(len(pool)), [labels], seed=seed)[0]]
    chosen = [pool[i] for i in members]
    options: dict[str, Any] = {"steps": steps, "seed": seed, "edges": EDGES, "verbose": False}
    if arm == "shift":  # all labels go into the shifts: nothing is trained, so nothing is validated
        options["valid_fraction"] = 0
    else:
        options |= {"valid_fraction": 0.2, "split_by": "random"}
    models = []
    for rate in RATES if steps else RATES[:1]:
        options |= {"lr": rate, "out": folder / f"{rate:g}"}
        if base is None:
            models.append(pretrain(chosen, Potential(), PaiNN(WIDTH, DEPTH), **options))
        else:
            models.append(finetune(base.folder / "run/model.safetensors", chosen, Potential(), **options))
    model = min(models, key=lambda m: m.card["metrics"]["validation loss"] or 0.0)
    model.save(folder / "model.safetensors")
    errors = evaluate(model, crystals("r2SCAN", "test"), verbose=False)
    found = {name: errors[name]["mae"] for name in ("forces", "energy_per_atom")}
    seconds = sum(_seconds(m) for m in models)
    return {"arm": arm, "labels": labels, "seed": seed, "members": members, "seconds": seconds, **found}


def _seconds(model: Model) -> float:
    """Processor seconds of the last stage of a model; zero where nothing was trained."""
    return float(model.card["history"][-1]["processor seconds"])


def _result(cells: Sequence[Mapping[str, Any]], costs: Sequence[float], seconds: float) -> dict[str, Any]:
    """All cells, and how the pre-trained model compares with the one from scratch."""
    sizes = sorted({cell["labels"] for cell in cells})
    errors = {(c["arm"], c["labels"], c["seed"], q): c[q] for c in cells for q in QUANTITIES}
    seeds = sorted({cell["seed"] for cell in cells})

    def compared(other: str, n: int, q: str) -> dict[str, Any]:
        before, after = ([errors[arm, n, seed, q] for seed in seeds] for arm in (other, "transfer"))
        ratio = paired(before, after, ratio=True)
        return {"quantity": q, "labels": n, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}

    others = ("scratch", "shift")
    return {
        "cells": [dict(cell) for cell in cells],
        "ratios": {
            f"{other} / transfer": [compared(other, n, q) for q in QUANTITIES for n in sizes] for other in others
        },
        "pretraining seconds": list(costs),
        "seconds in all": round(seconds, 1),
    }


def verdict(result: Mapping[str, Any]) -> str:
    """What the comparison says, in one or two sentences."""
    forces = [c for c in result["ratios"]["scratch / transfer"] if c["quantity"] == "forces"]
    better = [c for c in forces if c["low"] > 1]
    worse = [c for c in forces if c["high"] < 1]
    if not better:
        place = f", and hurts at {_and([c['labels'] for c in worse])}" if worse else ""
        return f"Pre-training does not help the forces beyond the scatter of the seeds{place}.{_beyond_shift(result)}"

    mean = {n: _mean(result, "scratch", n, "forces") for n in (c["labels"] for c in forces)}
    first = better[0]
    reached = _mean(result, "transfer", first["labels"], "forces")
    enough = [n for n, error in mean.items() if error <= reached and n > first["labels"]]
    many = max(mean)
    if enough:
        saved = f"from scratch it takes between {max(n for n in mean if n < enough[0])} and {enough[0]} labels"
    else:
        saved = f"from scratch {many} labels are not enough ({1000 * mean[many]:.0f} meV/Å)"
    cut = f"divides the force error by {first['ratio']:.2f} (95 % interval {first['low']:.2f} to {first['high']:.2f})"
    unclear = [c["labels"] for c in forces if c not in better]
    rest = f" At {_and(unclear)} labels the gain is within the scatter of the seeds." if unclear else ""
    gained = f"With {first['labels']} labels, pre-training {cut}; to reach its {1000 * reached:.0f} meV/Å {saved}."
    return gained + rest + _beyond_shift(result)


def _beyond_shift(result: Mapping[str, Any]) -> str:
    """What fine-tuning adds to the base model with shifted references; its forces do not know the shift."""
    forces = [c for c in result["ratios"]["shift / transfer"] if c["quantity"] == "forces"]
    gains = [c["labels"] for c in forces if c["low"] > 1]
    if not gains:
        return " Fine-tuning adds nothing measurable to the forces of the PBE model itself."
    return f" Fine-tuning improves on the forces of the PBE model itself at {_and(gains)} labels."


def _shown(out: Path, result: Mapping[str, Any], steps: int, pretraining: int, example: Model) -> Path:
    """Print the table, write the page and results.json."""
    write_json(out / "results.json", result)
    for quantity, (name, unit) in QUANTITIES.items():
        title = f"Error of {name} on unseen materials, {unit} (mean of seeds, lowest to highest)"
        results.print(table(title, _table(result, quantity)))
    sentence = verdict(result)
    results.print(sentence)

    page = _page(result, sentence, steps, pretraining, example)
    path = page.write(out / "report.html")
    console.print(f"Report: {path.resolve()}")
    return path


def _page(result: Mapping[str, Any], sentence: str, steps: int, pretraining: int, example: Model) -> Page:
    test = crystals("r2SCAN", "test")
    materials = sorted({atoms.info["material"] for atoms in test})
    page = Page("From PBE to r2SCAN", "What pre-training saved, on crystals computed for this package")
    page.verdict(sentence)
    for quantity, (name, unit) in QUANTITIES.items():
        series = {ARMS[arm]: _points(result, arm, quantity) for arm in ARMS}
        figure = label_curves(series, "r2SCAN labels, validation included", f"MAE of {name} ({unit})")
        page.figure(figure, f"Error of {name} on {len(test)} structures of {len(materials)} unseen materials.")
    for quantity, (name, unit) in QUANTITIES.items():
        page.table(_table(result, quantity), f"Error of {name}, {unit}: mean over seeds (lowest to highest)")

    page.heading("One model against its test set")
    predicted = predict(example, test, allow_unseen=True, verbose=False)
    for name, unit in (("forces", "eV/Å"), ("energy", "eV/atom")):
        label, prediction = (np.concatenate([_per_atom(a, name) for a in side]).tolist() for side in (test, predicted))
        points = {"label": label, "prediction": prediction, "unit": unit}
        page.figure(parity(points, name), f"Pre-trained, {max(_sizes(result))} labels, the first seed.")

    page.heading("How it was done")
    page.text(
        f"PaiNN ({WIDTH} channels, {DEPTH} blocks) was pre-trained for {pretraining} steps on energies, forces and "
        f"stress of {len(crystals('PBE', 'train'))} PBE structures, then fine-tuned for {steps} steps on energies and "
        f"forces of r2SCAN structures drawn from {len(crystals('r2SCAN', 'train'))}; the model from scratch took the "
        f"same {steps} steps. Both tried the learning rates {' and '.join(f'{rate:g}' for rate in RATES)}. A fifth of "
        "the labels chose between them, and the checkpoint, and is counted. "
        f"Pre-training took {np.mean(result['pretraining seconds']):.0f} s of processor time for each "
        "seed, a cost that the model from scratch did not have. The third arm is the PBE model with its reference "
        "energies fitted to the same labels, without a step of training. Each seed draws its own labels and weights."
    )
    page.text(f"Test materials, in no training set at either level: {', '.join(materials)}.")
    page.text(
        "An element that no label contains keeps its PBE reference energy, so with few labels the energy errors of all "
        "arms are mostly those of missing elements. Forces do not depend on references."
    )
    return page.numbers(result)


def _table(result: Mapping[str, Any], quantity: str) -> list[dict[str, str]]:
    rows = []
    for match in (c for c in result["ratios"]["scratch / transfer"] if c["quantity"] == quantity):
        row = {"labels": str(match["labels"])}
        for arm, title in ARMS.items():
            found = [1000 * value for value in _values(result, arm, match["labels"], quantity)]
            row[title] = f"{np.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})"
        rows.append({**row, "scratch / pre-trained": "{ratio:.2f} ({low:.2f} to {high:.2f})".format(**match)})
    return rows


def _points(result: Mapping[str, Any], arm: str, quantity: str) -> list[tuple[int, float, float, float, list[float]]]:
    """Errors in printed units, with the range of the seeds, as `label_curves` wants them."""
    points = []
    for n in _sizes(result):
        found = [1000 * value for value in _values(result, arm, n, quantity)]
        points.append((n, float(np.mean(found)), min(found), max(found), found))
    return points


def _sizes(result: Mapping[str, Any]) -> list[int]:
    return sorted({cell["labels"] for cell in result["cells"]})


def _values(result: Mapping[str, Any], arm: str, n: int, quantity: str) -> list[float]:
    return [c[quantity] for c in result["cells"] if (c["arm"], c["labels"]) == (arm, n)]


def _mean(result: Mapping[str, Any], arm: str, n: int, quantity: str) -> float:
    return float(np.mean(_values(result, arm, n, quantity)))


def _per_atom(atoms: Atoms, name: str) -> np.ndarray:
    """Forces, component by component, or the energy per atom."""
    return np.ravel(atoms.get_forces() if name == "forces" else atoms.get_potential_energy() / len(atoms))


def _and(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))

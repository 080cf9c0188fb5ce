"""Why does masking help so little? What pre-trained models say of forces before they see a label.

    python recipes/masking/run.py --data DIR --only pbe0ts --backbone EGNN      and others: their pre-trained models
    python recipes/masking/why.py --data DIR

Of every pre-trained model that `run.py` left in `--runs`, on whole structures that test: the cosine between the vectors
that it learned to predict and the forces of the labels, and the force error of a probe of its frozen features on a few
labels, beside that of models that learned nothing. Noise of a structure at rest is a force up to a factor; where a
missing atom was is not. Results go into why.json beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import arguments
from run import BACKBONES, MASK, STUDIES

import transfermium as tm
from transfermium.data import nested
from transfermium.run import write_json

HERE = Path(__file__).parent
MEANINGS = ("denoising_displacement", "masking_direction", "masking_displacement")  # of the vectors, as predicted


def main() -> None:
    args = arguments(__doc__, only="", backbones=",".join(BACKBONES), labels=30)
    backbones = args.backbones.split(",")
    file = HERE / "why.json"
    kept = json.loads(file.read_text()) if file.exists() else []
    for name, study in STUDIES.items():
        cells = sorted((args.runs / "masking" / name / "cells").glob("based-*/result.json"))
        bases = [file.parent for file in cells if read_cell(file.parent)["architecture"]["class"] in backbones]
        if not bases or args.only not in ("", name):
            continue
        found: list[dict[str, Any]] = []
        pool, test = study.pool(args.data), study.test(args.data)
        labelled = [pool[int(i)] for i in nested(range(len(pool)), [args.labels], seed=0)[0]]
        for base in bases:
            found.append({"set": name, **asked(base, labelled, test)})
            print(json.dumps(found[-1]), flush=True)
        for backbone in sorted({one["backbone"] for one in found}):
            for seed in range(3) if BACKBONES[backbone][1] else ():
                model = untrained(backbone, seed, labelled)
                said = {"set": name, "backbone": backbone, "objective": "none", "seed": seed, "steps": 0}
                found.append({**said, "probe": probed(model, labelled, test)})
                print(json.dumps(found[-1]), flush=True)
        kept = [one for one in kept if one["set"] != name or one["backbone"] not in backbones] + found
        write_json(file, kept)


def asked(base: Path, labelled: list[Atoms], test: list[Atoms]) -> dict[str, Any]:
    """What one pre-trained model has in common with forces."""
    of = read_cell(base)
    objective, backbone = of["objective"], of["architecture"]["class"]
    model = tm.load(base / "run/model.safetensors")
    part = MASK if objective["class"] == "Together" else None
    said = {
        "backbone": backbone, "objective": objective["class"], "arguments": objective["arguments"],
        "seed": of["seed"], "frames": of["n_pretraining"], "steps": of["bound"]["steps"],
        "cosine": agreement(model, test, part),
    }  # fmt: skip
    return {**said, "probe": probed(model, labelled, test, part)} if BACKBONES[backbone][1] else said


def read_cell(base: Path) -> dict[str, Any]:
    """What a pre-training was asked for."""
    cell = json.loads((base / "cell.json").read_text())
    return {**cell["key"], **cell["arguments"]}


def agreement(model: tm.Model, test: list[Atoms], part: str | None = None) -> dict[str, float]:
    """Mean cosine between predicted vectors and forces, over all atoms and those of each element; none of others."""
    predicted = tm.predict(model, test, part=part, verbose=False)
    key = next((name for name in MEANINGS if name in predicted[0].arrays), None)
    if key is None:
        return {}
    vectors = np.concatenate([atoms.arrays[key] for atoms in predicted])
    forces = np.concatenate([atoms.get_forces() for atoms in test])
    symbols = np.concatenate([atoms.get_chemical_symbols() for atoms in test])
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(forces, axis=1)
    cosines = (vectors * forces).sum(axis=1) / np.where(lengths > 0, lengths, np.inf)
    own = {str(symbol): cosines[symbols == symbol] for symbol in np.unique(symbols)}
    return {name: round(float(some.mean()), 4) for name, some in {"all": cosines, **own}.items()}


def probed(model: tm.Model, labelled: list[Atoms], test: list[Atoms], part: str | None = None) -> dict[str, float]:
    """Errors of a linear function of frozen features as a potential: eV/atom and eV/Å."""
    options: dict[str, Any] = {"strategy": "probe", "part": part, "split_by": "random", "verbose": False}
    errors = tm.evaluate(
        tm.finetune(model, labelled, tm.Potential(stress=0.0), **options), test, verbose=False
    )  # fmt: skip
    return {name: round(errors[name]["mae"], 6) for name in ("energy_per_atom", "forces")}


def untrained(backbone: str, seed: int, structures: list[Atoms]) -> tm.Model:
    """A model as it is before anything is learned."""
    return tm.pretrain(
        structures, tm.Potential(stress=0.0), BACKBONES[backbone][0], steps=0, seed=seed, split_by="random",
        verbose=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""How often 90 % intervals hold the label: random re-splits of structures that no model has seen, and whole runs.

Takes about three minutes of one core; `--quick` takes seconds and keeps no result. Public data as in docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ase
import numpy as np
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

import transfermium as tm
from transfermium.data import Labelled, resolve
from transfermium.data.load import VALIDATION, Batches
from transfermium.evaluate import objective_of, parts
from transfermium.train import evaluate_loss
from transfermium.transfer.calibrate import _table, narrowest
from transfermium.uncertainty import CrossChoice, Interval, Spread, scale

HERE = Path(__file__).parent
RESULTS = HERE / "coverage.json"
LEVEL = 0.9
RESPLITS = 200
SIZES = (20, 50, 200)  # calibration structures; the others test
PROMISED = (0.88, 0.92)  # of the mean coverage


class Case(NamedTuple):
    """A real set, what is learned of a part of it, and on what all others judge the intervals."""

    name: str
    file: str
    objective: tm.Objective
    labels: dict[str, str]
    train: int
    test: int  # structures that are neither trained on nor chosen by


CASES = (
    Case("matbench_phonons", "all.extxyz.xz", tm.Property("peak"), {"peak": "last_phdos_peak"}, 300, 965),
    Case("nomad2018", "train.extxyz.xz", tm.Property("gap"), {"gap": "bandgap_energy_ev"}, 400, 2000),
    Case("nacl_water", "revPBE0-D3.extxyz.xz", tm.Potential(stress=0.0), {}, 100, 600),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few re-splits of the first set, and two runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ.get("TRANSFERMIUM_DATA") or HERE.resolve().parents[2] / "shared" / "data")
    rows = []
    for case in CASES[: 1 if options.quick else None]:
        rows += resplit(case, folder, 20 if options.quick else RESPLITS)
    rows_of_runs = whole_runs(2 if options.quick else 30)
    results = {
        "date": date.today().isoformat(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("numpy", "torch", "ase")}},
        "level": LEVEL,
        "promised": PROMISED,
        "outside": [f"{r['set']} {r['target']}" for r in rows if not PROMISED[0] <= r["coverage"] <= PROMISED[1]],
        "re-splits": rows,
        "whole runs": rows_of_runs,
    }
    print("\n".join(table(results)))
    if not options.quick:
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def resplit(case: Case, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Train once; then calibrate and test on random halves of what was left."""
    start = time.process_time()
    structures = list(tm.read(folder / case.name / case.file))
    order = np.random.default_rng(0).permutation(len(structures))
    train, test = ([structures[i] for i in part] for part in np.split(order[: case.train + case.test], [case.train]))
    options: dict[str, Any] = {"label": case.labels, "device": "cpu", "verbose": False, "calibrate": False}
    if isinstance(case.objective, tm.Property):
        model = tm.finetune("small", train, case.objective, strategy="probe", valid_fraction=0, **options)
    else:
        backbone = tm.PaiNN(width=32, depth=2, cutoff=4.0)
        model = tm.pretrain(train, case.objective, backbone, processor_time="60s", lr=5e-3, edges=8_000, **options)
    found, distance2 = judged(model, train, test, case.labels)

    rows = []
    for target, scores in found.items():
        for size in SIZES:
            rng = np.random.default_rng(size)
            coverages, scaled, widths = [], 0, []
            for _ in range(repeats):
                lot = rng.permutation(len(scores))
                own, others = lot[:size], lot[size:]
                typical = float(np.median(distance2[own]))
                scales = {"distance": scale("distance", distance2 / typical), "": np.ones(len(scores))}
                chosen = narrowest(scores[own], {"distance": scales["distance"][own]})
                interval = Interval(None, target, "", np.sort(scores[own] / scales[chosen][own]), chosen)  # type: ignore[arg-type]
                half = interval.width(LEVEL) * scales[chosen]
                coverages.append(float((scores[others] <= half[others]).mean()))
                widths.append(float(half[others].mean()))
                scaled += bool(chosen)
            low, high = np.quantile(coverages, [0.05, 0.95])
            rows.append({
                "set": case.name, "target": target, "trained on": case.train, "calibrated on": size,
                "tested on": len(scores) - size, "re-splits": repeats, "coverage": round(float(np.mean(coverages)), 4),
                "5 % to 95 %": [round(float(low), 4), round(float(high), 4)], "scaled": round(scaled / repeats, 2),
                "mean half width": float(f"{np.mean(widths):.4g}"), "mean score": float(f"{scores.mean():.4g}"),
            })  # fmt: skip
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    print(f"{case.name}: {time.process_time() - start:.0f} processor seconds", flush=True)
    return rows


def judged(
    model: tm.Model, train: Sequence[ase.Atoms], test: Sequence[ase.Atoms], labels: dict[str, str]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Scores of structures by target, as the package has them, and their squared distances from the training data."""
    objective = objective_of(model)
    wanted = list(objective.labels())
    one, other = (Labelled(some, resolve(some, [], labels=labels, optional=wanted)) for some in (train, test))
    cross = CrossChoice(model, objective, other)
    members = [np.array(part) for part in parts(model, test, 10_000)]
    evaluate_loss(model, Batches(other, objective, model.backbone.edges, 0, VALIDATION), members, cross)
    cross.settle()  # of one checkpoint only: each fold is judged by it
    spread = Spread.of(_table(model, objective, one, 10_000)[0])
    return cross.scores, spread.distance2(_table(model, objective, other, 10_000)[0])


def whole_runs(n: int) -> list[dict[str, Any]]:
    """Coverage of the intervals that models have from the validation structures that also chose their checkpoint."""
    tests = alloys(500, 999)
    found: dict[str, list[float]] = {}
    for seed in range(n):
        own = alloys(60, seed)
        model = tm.pretrain(
            own[:20], tm.Potential(), tm.PaiNN(width=8, depth=1, cutoff=4.0, radial=6), valid=own[20:], steps=60,
            validate_every=3, lr=0.02, ema=0.0, edges=400, seed=seed, device="cpu", verbose=False,
        )  # fmt: skip
        predicted = tm.predict(model, tests, interval=LEVEL, verbose=False)
        held: dict[str, list[bool]] = {}
        for atoms, label in zip(predicted, tests, strict=True):
            truth, info = label.calc.results, atoms.info
            held.setdefault("energy", []).append(info["energy_low90"] <= truth["energy"] <= info["energy_high90"])
            lengths = np.linalg.norm(atoms.calc.results["forces"] - truth["forces"], axis=1)
            held.setdefault("forces", []).append(bool(np.quantile(lengths, 0.9) <= info["forces_error90"]))
            error = np.abs(atoms.calc.results["stress"] - truth["stress"]).max()
            held.setdefault("stress", []).append(bool(error <= info["stress_error90"]))
        for name, each in held.items():
            found.setdefault(name, []).append(float(np.mean(each)))
    rows = []
    for name, each in found.items():
        low, high = np.quantile(each, [0.05, 0.95])
        rows.append({
            "target": name, "runs": n, "trained on": 20, "validated on": 40, "tested on": len(tests),
            "coverage": round(float(np.mean(each)), 4), "5 % to 95 %": [round(float(low), 4), round(float(high), 4)],
        })  # fmt: skip
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    return rows


def alloys(n: int, seed: int) -> list[ase.Atoms]:
    """Rattled and strained copper-gold cells of 4 atoms, labelled by effective medium theory."""
    rng, result = np.random.default_rng((1, seed)), []
    for _ in range(n):
        atoms = bulk("Cu", "fcc", a=3.7 + 0.3 * rng.random(), cubic=True)
        atoms.numbers[:] = rng.choice([29, 79], size=4)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), scale_atoms=True)
        atoms.positions += 0.1 * rng.normal(size=(4, 3))
        atoms.calc = EMT()
        labels = {name: atoms.calc.get_property(name, atoms) for name in ("energy", "forces", "stress")}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        result.append(atoms)
    return result


def table(results: dict[str, Any]) -> list[str]:
    """Rows of Markdown."""
    lines = [
        "| set, label | calibrated on | tested on | coverage, % | 5 to 95 % of re-splits | scaled |",
        "|" + "---|" * 6,
    ]
    for r in results["re-splits"]:
        low, high = r["5 % to 95 %"]
        lines.append(
            f"| {r['set']}, {r['target']} | {r['calibrated on']} | {r['tested on']} | {100 * r['coverage']:.1f} | "
            f"{100 * low:.1f} to {100 * high:.1f} | {r['scaled']:.0%} |"
        )
    return lines


if __name__ == "__main__":
    main()

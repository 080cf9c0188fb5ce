"""Learning curves of a probe on labels that were suggested and on labels that were drawn at random, on two real sets.

Takes about ten minutes of one core; `--quick` takes one and keeps no result. Public data as in docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import transfermium as tm
from transfermium.data.split import materials
from transfermium.suggest import METHODS, chosen, components
from transfermium.transfer.probe import ProbeHead, fitted

HERE = Path(__file__).parent
RESULTS = HERE / "suggest.json"
SIZES = (20, 40, 80, 160, 320)
TEST = 300
POOL = 900
SETS = {
    "matbench_phonons": ("all.extxyz.xz", "last_phdos_peak", "cm^-1"),
    "nomad2018": ("train.extxyz.xz", "bandgap_energy_ev", "eV"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="one seed, three sizes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ.get("TRANSFERMIUM_DATA") or HERE.resolve().parents[2] / "shared" / "data")
    sizes, seeds = (SIZES[:3], 1) if options.quick else (SIZES, options.seeds)
    sets = {name: measured(folder / name, *given, sizes, seeds) for name, given in SETS.items()}
    results = {
        "date": date.today().isoformat(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("numpy", "torch", "scikit-learn")},
        "pool": POOL, "test": TEST, "sizes": sizes, "seeds": seeds, "sets": sets,
    }  # fmt: skip
    print("\n".join(table(results)))
    if not options.quick:
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def measured(folder: Path, file: str, key: str, unit: str, sizes: tuple[int, ...], seeds: int) -> dict[str, Any]:
    """Mean absolute errors on test structures, by method, seed and number of labels."""
    start = time.process_time()
    structures = list(tm.read(folder / file))
    labels = np.array([float(atoms.info[key]) for atoms in structures])
    x = tm.features("small", structures, device="cpu", verbose=False).values
    groups = materials(structures)
    errors: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(structures))
        test, pool = order[:TEST], order[TEST : TEST + POOL]
        z = components(x[pool], POOL)
        for method in METHODS:
            lot, _ = chosen(z, max(sizes), z[:0], method, rng)
            row = []
            for n in sizes:
                own = pool[lot[:n]]
                head, _ = fitted(x[own], labels[own], groups=groups[own])
                row.append(float(np.abs(predicted(head, x[test]) - labels[test]).mean()))
            errors[method].append(row)
            print(folder.name, seed, method, [float(f"{e:.4g}") for e in row], flush=True)
    return {"label": key, "unit": unit, "errors": errors, "processor seconds": round(time.process_time() - start)}


def predicted(head: ProbeHead, x: np.ndarray) -> np.ndarray:
    """What a probe says of the features of structures."""
    z = (x - head.center.numpy()) * head.stretch.numpy()
    if head.support:
        points = head.points.numpy()
        distance2 = np.square(z).sum(axis=1)[:, None] + np.square(points).sum(axis=1) - 2 * z @ points.T
        z = np.exp(-0.5 * distance2 / float(head.length) ** 2)
    return np.asarray(z @ head.weights.numpy() * float(head.scale) + float(head.shift))


def table(results: dict[str, Any]) -> list[str]:
    """Rows of Markdown: mean errors, and the paired ratio to random choice with its standard error."""
    lines = [f"| set | method | {' | '.join(map(str, results['sizes']))} |", "|" + "---|" * (2 + len(results["sizes"]))]
    for name, found in results["sets"].items():
        random = np.array(found["errors"]["random"])
        for method in METHODS:
            own = np.array(found["errors"][method])
            ratios = np.log(own / random)
            spread = ratios.std(axis=0, ddof=1) / np.sqrt(len(own)) if len(own) > 1 else np.zeros(own.shape[1])
            cells = [
                f"{mean:.3g}" if method == "random" else f"{mean:.3g} ({100 * (np.exp(r) - 1):+.0f} ± {100 * s:.0f} %)"
                for mean, r, s in zip(own.mean(axis=0), ratios.mean(axis=0), spread, strict=True)
            ]
            lines.append(f"| {name} ({found['unit']}) | {method} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()

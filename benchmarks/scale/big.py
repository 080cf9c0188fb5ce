"""Train on packed sets of ten thousand to a million structures: start-up, structures per second, resident memory.

    python benchmarks/scale/big.py                    # 10^4, 10^5 and 10^6 structures, about 15 minutes on two cores
    python benchmarks/scale/big.py --sizes 3000000    # and more, up to what the disk holds
    python benchmarks/scale/big.py --quick            # seconds; keeps no result

Sets are kept in `--sets` and made only once. Each training runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

RESULTS = Path(__file__).with_name("results.json")
SIZES = (10_000, 100_000, 1_000_000)
VALIDATED = 500  # structures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sets", type=Path, default=None, help="folder for the packed sets; else a temporary one")
    parser.add_argument("--quick", action="store_true", help="1,000 and 2,000 structures; results are only printed")
    options = parser.parse_args()
    sizes, steps = ((1_000, 2_000), 20) if options.quick else (options.sizes, options.steps)

    with tempfile.TemporaryDirectory() as name:
        sets = options.sets or Path(name)
        for n in sizes:
            result = {"structures": n, **alone(make, sets / f"{n}", n), **alone(trained, sets / f"{n}", n, steps)}
            print(json.dumps(result, indent=1), flush=True)
            if not options.quick:
                keep("big", result, "structures")


def make(path: Path, n: int) -> dict[str, Any]:
    """Pack structures that are made up one by one, unless they are there."""
    import transfermium as tm

    start, there = time.perf_counter(), path.exists()
    packed = tm.PackedSet.open(path) if there else tm.pack(made_up(n), path, progress=False)
    size = sum(file.stat().st_size for file in path.iterdir())
    seconds = {} if there else {"pack_s": round(time.perf_counter() - start, 1)}
    return {**seconds, "bytes_per_structure": round(size / len(packed), 1)}


def trained(path: Path, n: int, steps: int) -> dict[str, Any]:
    """A run as a user starts it, by `pretrain`; times and memory are seen from the loop's own steps."""
    import torch

    import transfermium as tm

    torch.set_num_threads(1)
    loop = sys.modules["transfermium.transfer.stage"]
    sys.modules["transfermium.data.load"].Batches.keep = lambda *_: None  # neighbours fill up to 256 MB in any run
    seen: list[
        tuple[float, float, float, float]
    ] = []  # seconds by clock and of processor, MB with mapped files, without
    plain = loop.train

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        return steps_of(plain(*arguments, **options))  # what comes before the first step begins at once

    def steps_of(run: Iterator[Any]) -> Iterator[Any]:
        for progress in run:
            seen.append((time.perf_counter(), time.process_time(), resident_mb("VmRSS"), resident_mb("RssAnon")))
            yield progress

    loop.train = watched
    imported = resident_mb("RssAnon")
    start, cpu_start = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        tm.pretrain(
            path, tm.Potential(1.0, 1.0), tm.PaiNN(16, 2, cutoff=4.0), out=Path(out) / "run", steps=steps, edges=4_000,
            valid_fraction=VALIDATED / n, validate_every=steps, device="cpu", split_by="random", verbose=False,
        )  # fmt: skip
        rows = [json.loads(line) for line in (Path(out) / "run/metrics.jsonl").read_text().splitlines()]
    ended = time.perf_counter()
    third = len(seen) // 3
    return {
        "steps": steps,
        "start_s": round(seen[0][0] - start, 1),
        "start_cpu_s": round(seen[0][1] - cpu_start, 1),
        "ms_per_step": round(1e3 * (seen[-2][0] - seen[third][0]) / (len(seen) - 2 - third), 2),
        "cpu_ms_per_step": round(1e3 * (seen[-2][1] - seen[third][1]) / (len(seen) - 2 - third), 2),
        "end_s": round(ended - seen[-1][0], 1),
        "imported_mb": round(imported, 1),
        "first_step_mb": round(seen[0][3], 1),
        "last_step_mb": round(seen[-1][3], 1),
        "last_step_mb_with_mapped_files": round(seen[-1][2], 1),
        "peak_mb_with_mapped_files": round(resident_mb("VmHWM"), 1),
        "loss": [round(rows[0]["valid"], 4), round(rows[-1]["valid"], 4)],
    }


def made_up(n: int) -> Iterator[Atoms]:
    """Crystals of 2 to 6 atoms with the energy and forces of springs to the sites of a lattice."""
    rng = np.random.default_rng(0)
    sites = np.array([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]) * 2.0
    for _ in range(n):
        size = int(rng.integers(2, 7))
        moved = rng.normal(scale=0.1, size=(size, 3))
        atoms = Atoms(rng.choice([1, 6, 8, 14, 29], size), sites[:size] + moved, cell=[4.0, 4.0, 4.0], pbc=True)
        atoms.calc = SinglePointCalculator(atoms, energy=float((moved**2).sum() * 5), forces=-10.0 * moved)
        yield atoms


def alone(work: Any, *arguments: Any) -> dict[str, Any]:
    """Run something in a process of its own."""
    print(work.__name__, *arguments[1:], file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result: dict[str, Any] = pool.submit(work, *arguments).result()
    return result


def keep(kind: str, result: dict[str, Any], key: str) -> None:
    """Put a result into the file, in place of an earlier one of the same `key`."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {"date": date.today().isoformat(), "machine": machine(), "load": round(os.getloadavg()[0], 2)}
    others = [row for row in kept.get(kind, []) if row[key] != result[key]]
    kept[kind] = sorted([*others, {**result, **about}], key=lambda row: row[key])
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def resident_mb(field: str) -> float:
    """Memory of this process in MB (`VmRSS`; `VmHWM`: its peak; `RssAnon`: without mapped files); NaN without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), float("nan"))


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()

"""Pack small labelled structures and read them at random, beside an ASE database of the same structures.

Takes about three minutes on two cores; `--quick` takes seconds and keeps no result.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect

from transfermium.data.pack import PackedSet, pack

RESULTS = Path(__file__).with_name("results.json")


def main() -> None:
    """Run every measurement in a fresh process, so that each has its own peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--structures", type=int, default=200_000)
    parser.add_argument("--ase-structures", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="2,000 and 500 structures; results are only printed")
    options = parser.parse_args()
    n, n_ase = (2_000, 500) if options.quick else (options.structures, options.ase_structures)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {
            "date": date.today().isoformat(),
            "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.system()},
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in ("ase", "numpy", "pyarrow")},
            "packed_write": alone(pack_all, folder / "packed", n),
            "packed_read": alone(read_packed, folder / "packed", n),
            "ase_db_write": alone(write_database, folder / "structures.db", n_ase),
            "ase_db_read": alone(read_database, folder / "structures.db", n_ase),
            "in_memory": alone(build_structures, folder, min(n, 20_000)),
        }
    print(json.dumps(results, indent=1))
    if not options.quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def pack_all(path: Path, n: int) -> dict[str, Any]:
    """Pack structures that are generated one by one; what generating them costs is measured first and subtracted."""
    start = time.perf_counter()
    for _ in generated(n):
        pass
    generating = time.perf_counter() - start
    memory = {"0": round(resident_mb(), 1)}  # the imported packages

    def watched() -> Iterator[Atoms]:
        for i, atoms in enumerate(generated(n), start=1):
            yield atoms
            if i in (n // 4, n // 2, n):
                memory[str(i)] = round(resident_mb(), 1)

    start = time.perf_counter()
    packed = pack(watched(), path, progress=False)
    seconds = time.perf_counter() - start - generating
    return {
        "structures": n,
        "mean_atoms": round(float(packed.n_atoms.mean()), 2),
        "us_per_structure": microseconds(seconds, n),
        "bytes_per_structure": round(sum(file.stat().st_size for file in path.iterdir()) / n, 1),
        "resident_mb_after": memory,
        "peak_mb": peak_mb(),
    }


def read_packed(path: Path, n: int) -> dict[str, Any]:
    """Read every structure once in random order, twice: the second time all shards are open and in the page cache."""
    packed = PackedSet.open(path)
    order = np.random.default_rng(1).permutation(n).tolist()
    first = timed(lambda: read_all(packed.__getitem__, order))
    anonymous = resident_mb("RssAnon")
    second = timed(lambda: read_all(packed.__getitem__, order))
    return {
        "structures": n,
        "us_per_structure_first": microseconds(first, n),
        "us_per_structure_again": microseconds(second, n),
        "resident_mb_without_mapped_files": [round(anonymous, 1), round(resident_mb("RssAnon"), 1)],
        "peak_mb_with_mapped_files": peak_mb(),
    }


def write_database(path: Path, n: int) -> dict[str, Any]:
    """Write an ASE database (SQLite) in one transaction, the fastest way it has."""
    structures = list(generated(n))
    start = time.perf_counter()
    with connect(path) as database:
        for atoms in structures:
            database.write(atoms)
    seconds = time.perf_counter() - start
    return {
        "structures": n,
        "us_per_structure": microseconds(seconds, n),
        "bytes_per_structure": round(path.stat().st_size / n, 1),
    }


def read_database(path: Path, n: int) -> dict[str, Any]:
    """Read every structure of the database once, in random order, through one connection."""
    order = (np.random.default_rng(1).permutation(n) + 1).tolist()
    with connect(path) as database:
        seconds = timed(lambda: read_all(lambda i: database.get_atoms(id=i), order))
    return {"structures": n, "us_per_structure": microseconds(seconds, n), "peak_mb": peak_mb()}


def build_structures(_: Path, n: int) -> dict[str, Any]:
    """What ASE needs to build the same objects from arrays in memory: no reader can be faster."""
    arrays = [(a.numbers, a.positions, a.cell.array, a.pbc, a.calc.results) for a in generated(n)]

    def build() -> None:
        for numbers, positions, cell, pbc, results in arrays:
            atoms = Atoms(numbers=numbers, positions=positions, cell=cell, pbc=pbc)
            atoms.calc = SinglePointCalculator(atoms, **results)

    return {"structures": n, "us_per_structure": microseconds(min(timed(build) for _ in range(3)), n)}


def generated(n: int) -> Iterator[Atoms]:
    """Random crystals of 5 to 15 atoms with energy, forces and stress."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        size = int(rng.integers(5, 16))
        cell = np.diag(rng.uniform(4.0, 8.0, 3)) + rng.normal(scale=0.2, size=(3, 3))
        atoms = Atoms(rng.integers(1, 90, size), rng.uniform(size=(size, 3)) @ cell, cell=cell, pbc=True)
        results = {"energy": float(rng.normal()), "forces": rng.normal(size=(size, 3)), "stress": rng.normal(size=6)}
        atoms.calc = SinglePointCalculator(atoms, **results)
        yield atoms


def alone(measure: Callable[[Path, int], dict[str, Any]], path: Path, n: int) -> dict[str, Any]:
    """Run a measurement in a process of its own."""
    print(f"{measure.__name__} ({n} structures)", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, path, n).result()


def read_all(read: Callable[[int], Atoms], order: list[int]) -> None:
    for i in order:
        read(i)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def microseconds(seconds: float, n: int) -> float:
    return round(seconds / n * 1e6, 1)


def resident_mb(field: str = "VmRSS") -> float:
    """Memory of this process in MB (`VmRSS`; `VmHWM`: the peak; `RssAnon`: without files); NaN without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":")), float("nan"))


def peak_mb() -> float:
    return round(resident_mb("VmHWM"), 1)


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()

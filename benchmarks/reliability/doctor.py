"""What `doctor` finds in data that was spoiled in known ways, and what it says of data that was not.

`python benchmarks/reliability/doctor.py` takes about ten minutes on one core; `--quick` takes one and keeps nothing.
The public data is looked for as in the tests (docs/data.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from ase import Atoms

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import transfermium as tm  # noqa: E402
from benchmarks.reliability.corruptions import (  # noqa: E402
    CORRUPTIONS,
    EF,
    HA,
    Corruption,
    copied,
    each,
    energy,
    found,
    set_energy,
)

RESULTS = Path(__file__).with_suffix(".json")
SETS = {  # and of how many of their structures
    "mattersim_benchmarks/mpf-TP": 300,
    "mattersim_benchmarks/mptrj-random-1k": 300,
    "mlearn/Ge_train": 228,
    "bo2_polymorphs_4xc/PBE": 150,
    "md17_ethanol/all": 200,
    "botnet_molecules/3bpa_train_300K": 200,
    "water_pbe0ts/train": 60,
}


def opposite(atoms: Atoms, _: int) -> None:
    atoms.calc.results["forces"] = -atoms.calc.results["forces"]


HALVES = (  # of which neither is the rule
    Corruption(
        "every second energy in hartree", each(set_energy(lambda a: energy(a) / HA), 2), "energy-mixed-units", "hartree"
    ),
    Corruption("every second forces are gradients", each(opposite, 2), "forces-mixed-sign", "gradients", EF),
)
TIMED = ("mpf-TP", "mpf-alkali-TP", "mptrj-random-1k", "alexandria-random-1k", "random-TP", "mptrj-highest-stress-1k")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one set, and no sweep; results are only printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = Path(os.environ.get("TRANSFERMIUM_DATA") or ROOT.parent / "shared" / "data")
    sets = dict(list(SETS.items())[:1]) if options.quick else SETS
    results: dict[str, Any] = {"date": date.today().isoformat(), "corruptions": {}, "clean": {}}
    for name, n in sets.items():
        results["corruptions"][name] = spoiled(data / f"{name}.extxyz.xz", n)
    if options.quick:
        return
    for file in sorted(data.glob("*/*.extxyz.xz")):
        results["clean"][str(file.relative_to(data)).removesuffix(".extxyz.xz")] = clean(file)
        print(file, results["clean"][str(file.relative_to(data)).removesuffix(".extxyz.xz")], flush=True)
    results["speed"] = speed([data / "mattersim_benchmarks" / f"{name}.extxyz.xz" for name in TIMED])
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(table(results))


def spoiled(file: Path, n: int) -> dict[str, Any]:
    """Whether each corruption is found with its cause, and which other errors are told."""
    structures = list(tm.read(file))[:n]
    for atoms in structures:
        atoms.info.pop("split", None)
    has = set(structures[0].calc.results)
    before = {(one.kind, one.cause) for one in tm.doctor(structures).findings}
    rows: dict[str, Any] = {}
    for corruption in (*CORRUPTIONS, *HALVES):
        if not set(corruption.needs) <= has:
            continue
        told = tm.doctor(corruption.spoil(copied(structures))).findings
        others = [one.kind for one in told if one.severity == "error" and one.kind not in corruption.kind.split("|")]
        good = found([(one.kind, one.cause) for one in told], corruption)
        rows[corruption.name] = {"found": good, "other errors": others, "told before": found(list(before), corruption)}
        word = "found" if good else "MISSED"
        print(f"{file.parent.name}/{file.name:32s} {word:7s}{corruption.name} {others}", flush=True)
    return rows


def clean(file: Path) -> dict[str, Any]:
    """Findings in a file as it is: kinds by severity."""
    findings = tm.doctor(file).findings
    return {name: [one.kind for one in findings if one.severity == name] for name in ("error", "warning", "note")}


def speed(files: list[Path]) -> dict[str, Any]:
    """Processor seconds for 10,000 structures, reading aside."""
    structures = [atoms for file in files for atoms in tm.read(file)]
    start, wall = time.process_time(), time.perf_counter()
    diagnosis = tm.doctor(structures)
    seconds = time.process_time() - start
    n = len(structures)
    return {
        "structures": n,
        "atoms": diagnosis.summary["atoms"],
        "processor seconds": round(seconds, 2),
        "seconds": round(time.perf_counter() - wall, 2),
        "processor seconds per 10,000 structures": round(1e4 * seconds / n, 2),
    }


def table(results: dict[str, Any]) -> str:
    """The corruptions as a table in Markdown: a row for each, a column for each set."""
    sets = results["corruptions"]
    lines = [f"| corruption | {' | '.join(sets)} |", f"|---|{'---|' * len(sets)}"]
    for name in dict.fromkeys(name for rows in sets.values() for name in rows):
        cells = ("" if name not in rows else "found" if rows[name]["found"] else "**missed**" for rows in sets.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts = (f"{sum(row['found'] for row in rows.values())} of {len(rows)}" for rows in sets.values())
    return "\n".join([*lines, f"| found | {' | '.join(counts)} |"])


if __name__ == "__main__":
    main()

"""Turn the log of `compute.py` into the files inside the package.

    python datasets/crystals/collect.py datasets/crystals/log.jsonl src/transfermium/crystals

Writes one compressed extended XYZ file per level of theory, and summary.json with settings, counts and failures.
"""

import io
import json
import lzma
import sys
from collections import Counter
from pathlib import Path

import ase
import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator


def main(log: str, folder: str) -> None:
    records = [json.loads(line) for line in Path(log).read_text().splitlines()]
    good = [r for r in records if "failure" not in r]
    out = Path(folder)
    summary = {
        "settings": {key: good[0][key] for key in ("cutoff_eV", "smearing_eV", "gpaw")},
        "code": "GPAW, plane waves, PAW setups of gpaw-data 0.9.20000, spin-paired, free energies",
        "kpts": {r["material"]: r["kpts"] for r in good},
        "failures": [{k: r[k] for k in ("material", "level", "frame", "failure")} for r in records if "failure" in r],
        "levels": {},
    }
    for level in dict.fromkeys(r["level"] for r in good):
        chosen = sorted((r for r in good if r["level"] == level), key=lambda r: (r["material"], r["frame"]))
        net = [np.abs(np.mean(r["forces"], axis=0)).max() for r in chosen]
        summary["levels"][level] = {
            "xc": chosen[0]["xc"],
            "structures": len(chosen),
            "per split": dict(Counter(r["split"] for r in chosen)),
            "materials": len({r["material"] for r in chosen}),
            "processor hours": round(sum(r["seconds"] for r in chosen) / 3600, 2),
            "largest mean force removed (eV/Å)": round(float(max(net)), 4),
        }
        text = io.StringIO()
        ase.io.write(text, [structure(r) for r in chosen], format="extxyz")
        (out / f"{level}.extxyz.xz").write_bytes(lzma.compress(text.getvalue().encode(), preset=9))
        print(level, summary["levels"][level])
    (out / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def structure(record: dict) -> ase.Atoms:
    """Atoms with labels; the mean force, an error of the real-space grid, is taken out."""
    atoms = ase.Atoms(record["symbols"], record["positions"], cell=record["cell"], pbc=True)
    atoms.info = {k: record[k] for k in ("material", "split", "level", "frame")}
    forces = np.array(record["forces"])
    labels = {"energy": record["energy"], "forces": forces - forces.mean(axis=0)}
    if "stress" in record:
        stress = np.array(record["stress"])
        labels["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    atoms.calc = SinglePointCalculator(atoms, **labels)
    return atoms


if __name__ == "__main__":
    main(*sys.argv[1:])

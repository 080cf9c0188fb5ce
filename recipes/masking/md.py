"""Does the best potential hold together? Dynamics of 64 waters; and how fast force-centric models heat up.

    python recipes/masking/md.py --data DIR

The model with the smallest validation loss among those of run.py, 2 ps of Langevin at 300 K, from there 5 ps at
constant energy and 10 ps with a thermostat; of each force-centric backbone the best model 2 ps at constant energy. The
reference frames are of path-integral dynamics: only oxygen-oxygen distances are compared, and even these are a little
broader there.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import arguments
from run import BACKBONES

import transfermium as tm
from transfermium.run import write_json

HERE = Path(__file__).parent
SET = "pbe0ts"


def main() -> None:
    args = arguments(__doc__, warm="2ps", nve="5ps", nvt="10ps", forces="2ps")
    reference = tm.read(args.data / "water_pbe0ts/val.extxyz.xz")
    start = reference[0].copy()
    rows = [row for row in json.loads((HERE / "results.json").read_text()) if row["set"] == SET]
    found = []
    groups = {"conservative": [name for name, (_, conservative) in BACKBONES.items() if conservative]}
    groups |= {name: [name] for name in BACKBONES if name not in groups["conservative"]}
    for group, backbones in groups.items():
        own = [row for row in rows if row["backbone"] in backbones]
        if own:
            best = min(own, key=lambda row: row["validation_loss"])
            found.append(simulated(args, best, start, reference, group == "conservative"))
            write_json(HERE / "simulations.json", found)


def simulated(args: Any, row: dict[str, Any], start: Any, reference: Any, whole: bool) -> dict[str, Any]:
    model = args.runs / "masking" / SET / "cells" / row["cell"] / "run/model.safetensors"
    out = args.runs / "masking/md" / row["cell"]
    runs = {"warm": tm.md(model, start, out / "warm", time=args.warm, device="cpu")}
    if runs["warm"]["stopped"] is None:
        warm = out / "warm/final.extxyz"
        runs["nve"] = tm.md(
            model, warm, out / "nve", ensemble="nve", time=args.nve if whole else args.forces, device="cpu"
        )
        if whole:
            runs["nvt"] = tm.md(
                model, warm, out / "nvt", thermostat="bussi", time=args.nvt, reference=reference, pairs=["O-O"],
                device="cpu",
            )  # fmt: skip
    kept = ("backbone", "arm", "n_train", "seed", "forces_mae", "energy_mae")
    return {**{name: row[name] for name in kept}, "simulations": {name: short(run) for name, run in runs.items()}}


def short(run: dict[str, Any]) -> dict[str, Any]:
    """Without curves."""
    return {name: value for name, value in run.items() if len(json.dumps(value, default=str)) < 2_000}


if __name__ == "__main__":
    main()

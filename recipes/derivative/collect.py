"""Finished cells of the study, into results.json and errors.npz beside this file.

    python recipes/derivative/collect.py --runs runs

Runs that are there already stay, in place of which come cells of the same description. results.json has one line for
each run; errors.npz, for each target, the errors of every test structure (a row for each
run, numbered in results.json) and the materials that the structures are of.
"""

import argparse
import datetime
import json
import os
import platform
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from run import RATES

import transfermium as tm

HERE = Path(__file__).parent

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--runs", default="runs")
cells = Path(parser.parse_args().runs) / "derivative/cells"
machine = {
    "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
    "torch": torch.__version__,
    "transfermium": tm.__version__,
}
IDENTITY = ("target", "backbone", "n_train", "seed", "arm", "lr", "pretraining")


def pretraining(cell: dict) -> str | None:
    """How long the base was trained that a cell needed."""
    if "base" not in cell["needs"]:
        return None
    return json.loads((cells / cell["needs"]["base"] / "result.json").read_text())["arguments"]["time"]


old = json.loads((HERE / "results.json").read_text()) if (HERE / "results.json").exists() else []
kept = dict(np.load(HERE / "errors.npz")) if old else {}
materials = {name.removesuffix(" materials"): list(m) for name, m in kept.items() if name.endswith(" materials")}
rows = {}
for row in old:
    rows[tuple(str(row[name]) for name in IDENTITY)] = row, kept[row["target"]][row["row"]]

found = {}
for file in sorted(cells.glob("tuned-*/result.json")):
    cell = json.loads(file.read_text())
    run = cell["result"]
    if run["lr"] not in RATES or "errors" not in run:  # of another search; or it diverged, and was never chosen
        continue
    run["pretraining"] = pretraining(cell)
    key = tuple(str(run[name]) for name in IDENTITY)
    if key in found:
        raise SystemExit(f"{file.parent} and {found[key][1].parent} are the same run with other settings: keep one")
    run |= {"tuning": cell["arguments"]["time"], "edges": cell["arguments"]["edges"]}
    found[key] = run, file
    own, materials[run["target"]] = run.pop("errors"), run.pop("materials")
    when = datetime.date.fromtimestamp(file.stat().st_mtime).isoformat()
    rows[key] = {**run, **machine, "date": when}, own

errors = defaultdict(list)
for key in sorted(rows):
    row, own = rows[key]
    errors[row["target"]].append(own)
    row["row"] = len(errors[row["target"]]) - 1

(HERE / "results.json").write_text("[\n" + ",\n".join(json.dumps(rows[key][0]) for key in sorted(rows)) + "\n]\n")
arrays = {name: np.array(own, np.float16) for name, own in errors.items()}
np.savez_compressed(
    HERE / "errors.npz", **arrays, **{f"{name} materials": np.array(m) for name, m in materials.items()}
)
print(f"{len(rows)} runs, of which {len(found)} are cells")

"""Finished cells of the study, into results.json and errors.npz beside this file.

    python recipes/derivative/collect.py --runs runs

results.json has one line for each run; errors.npz, for each target, the errors of every test structure (a row for each
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
files = sorted(cells.glob("tuned-*/result.json"))
found = [(json.loads(file.read_text())["result"], file.stat().st_mtime) for file in files]
found = [(run, date) for run, date in found if "target" in run]  # others diverged, and were never chosen
found.sort(key=lambda one: [str(one[0][k]) for k in ("target", "backbone", "n_train", "seed", "arm", "lr")])

rows, errors, materials = [], defaultdict(list), {}
for run, date in found:
    own = errors[run["target"]]
    own.append(run.pop("errors"))
    materials[run["target"]] = run.pop("materials")
    when = datetime.date.fromtimestamp(date).isoformat()
    rows.append({**run, "row": len(own) - 1, **machine, "date": when})

(HERE / "results.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
arrays = {name: np.array(own, np.float16) for name, own in errors.items()}
np.savez_compressed(
    HERE / "errors.npz", **arrays, **{f"{name} materials": np.array(m) for name, m in materials.items()}
)
print(f"{len(rows)} runs")

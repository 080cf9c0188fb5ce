"""Finished cells of the study, into results.json beside this file.

python recipes/derivative/collect.py --runs runs
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

import torch

import transfermium as tm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--runs", default="runs")
folder = Path(parser.parse_args().runs) / "derivative" / "cells"
machine = {
    "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
    "torch": torch.__version__,
    "transfermium": tm.__version__,
}
rows = []
for file in sorted(folder.glob("tuned-*/result.json")):
    result = json.loads(file.read_text())["result"]
    when = datetime.date.fromtimestamp(file.stat().st_mtime).isoformat()
    errors = [float(f"{error:.5g}") for error in result.pop("errors")]
    rows.append({**result, "errors": errors, **machine, "date": when})
rows.sort(key=lambda row: [str(row[k]) for k in ("target", "backbone", "n_train", "seed", "arm", "lr")])
path = Path(__file__).with_name("results.json")
path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
print(f"{len(rows)} runs in {path}")

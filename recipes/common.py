"""What the recipes share: where the data is, how much a step costs, where results go."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import transfermium as tm

HERE = Path(__file__).parent


def arguments(description: str | None, **options: Any) -> argparse.Namespace:
    """`--data`, `--runs` and `--threads`, and any other option with its default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default=os.environ.get("TRANSFERMIUM_DATA"), help="folder of the public data sets")
    parser.add_argument("--runs", default="runs", help="folder for models; finished ones are kept")
    parser.add_argument("--threads", type=int, default=1)
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    if not args.data or not Path(args.data).is_dir():
        parser.error("the public data sets are needed: --data DIR or TRANSFERMIUM_DATA (see docs/data.md)")
    args.data, args.runs = Path(args.data), Path(args.runs)
    torch.set_num_threads(args.threads)
    return args


def timed(train: Any, *args: Any, **kwargs: Any) -> tuple[tm.Model, float]:
    """A model and the processor seconds of its training, interruptions or not."""
    model = train(*args, **kwargs)
    return model, float(model.card["history"][-1]["processor seconds"])


def short(errors: dict[str, Any]) -> dict[str, Any]:
    """Errors without the breakdown by element, rounded."""
    kept = ("mae", "rmse", "r2", "unit")
    return {
        name: {k: round(v, 6) if isinstance(v, float) else v for k, v in found.items() if k in kept}
        for name, found in errors.items()
        if isinstance(found, dict)
    }


def record(recipe: str, **result: Any) -> None:
    """Append one finished run to results.json, in place of an earlier one with the same description."""
    path = HERE / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transfermium": tm.__version__,
        "date": datetime.date.today().isoformat(),
    }
    row = {"recipe": recipe, **result, **machine}
    identity = ("recipe", "task", "arm", "seed", "fold")
    rows = [r for r in rows if any(r.get(k) != row.get(k) for k in identity)]
    path.write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in [*rows, row]) + "\n]\n")
    print(json.dumps(row, ensure_ascii=False), flush=True)

"""What does it cost to choose learning rates by few validation labels? Against choosing in hindsight, by test errors.

    python recipes/masking/run.py --data DIR      any part of it: its fine-tunings at every rate
    python recipes/masking/rates.py

Of every arm and number of labels in `--runs` whose first seed was fine-tuned at each rate: validation losses and test
errors, and by how much the rate that a rule takes is worse than the best of them. Results go into rates.json beside
this file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from run import RATES

from transfermium.run import write_json

Tried = dict[float, dict[str, float]]  # rate -> validation loss, force error (eV/Å)
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs", type=Path, help="folder of the models")
    searches = found(parser.parse_args().runs / "masking")
    write_json(HERE / "rates.json", [row for group in searches for row in group])
    rules: dict[str, Callable[[list[Tried], Tried], float]] = {
        "smallest validation loss": lambda _, tried: min(tried, key=lambda rate: tried[rate]["validation_loss"]),
        "the same, all numbers of labels together": lambda group, _: min(RATES, key=lambda rate: pooled(group, rate)),
        **{f"always {rate:g}": (lambda _, __, rate=rate: rate) for rate in RATES},
    }
    print("| rule | searches | worse than the best rate in hindsight, mean | at most |\n|---|---|---|---|")
    for rule, choose in rules.items():
        worse = []
        for group in searches:
            of_group = [row["tried"] for row in group]
            for tried in of_group:
                best = min(one["forces_mae"] for one in tried.values())
                worse.append(tried[choose(of_group, tried)]["forces_mae"] / best)
        mean, most = 100 * np.exp(np.mean(np.log(worse))) - 100, 100 * max(worse) - 100
        print(f"| {rule} | {len(worse)} | {mean:.1f} % | {most:.0f} % |")


def pooled(group: list[Tried], rate: float) -> float:
    return sum(math.log(tried[rate]["validation_loss"]) for tried in group)


def found(folder: Path) -> list[list[dict[str, Any]]]:
    """Complete searches of first seeds, those of one arm together."""
    arms: dict[tuple[str, ...], dict[int, Tried]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.glob("*/cells/point-*/result.json")):
        cell = json.loads(file.read_text())
        (setting, key), result = cell["in full"], cell["result"]
        if key["seed"] or result.get("validation loss") is None or "forces" not in (result.get("errors") or {}):
            continue
        arm = (
            file.parents[2].name, setting["architecture"]["class"], str(setting["bound"]["steps"]), key["arm"],
            cell.get("needs", {}).get("base", ""),
        )  # fmt: skip
        arms[arm][key["n_train"]][key["lr"]] = {
            "validation_loss": result["validation loss"], "forces_mae": float(np.mean(result["errors"]["forces"]))
        }  # fmt: skip
    names = ("set", "backbone", "tuning_steps", "arm", "base")
    whole = (
        [
            {**dict(zip(names, arm, strict=True)), "n_train": n, "tried": {rate: tried[rate] for rate in RATES}}
            for n, tried in sorted(sizes.items())
            if set(RATES) <= set(tried)
        ]
        for arm, sizes in sorted(arms.items())
    )
    return [group for group in whole if group]


if __name__ == "__main__":
    main()

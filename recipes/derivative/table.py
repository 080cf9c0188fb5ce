"""What results.json says, as tables for the README and a figure.

python recipes/derivative/table.py
"""

import json
from pathlib import Path

import numpy as np
from run import RATES

from transfermium.report import forest
from transfermium.study.bakeoff_page import panels
from transfermium.study.ranking import answers, comparisons, verdict
from transfermium.train import parse_time

HERE = Path(__file__).parent
DOSED = "efs_derivative"


def chosen_runs(pretraining: str = "180s") -> list[dict]:
    """Every run at the learning rate that its arm chose on its target (of a whole search), with its errors."""
    rows = json.loads((HERE / "results.json").read_text())
    rows = [row for row in rows if row["pretraining"] in (None, pretraining)]
    arrays = np.load(HERE / "errors.npz")
    search: dict[tuple, dict[float, float]] = {}
    for row in rows:
        if row["seed"] == 0:
            loss = row["validation loss"]
            search.setdefault(case(row), {})[row["lr"]] = np.inf if loss is None else loss
    rates = {key: min(tried, key=tried.__getitem__) for key, tried in search.items() if tried.keys() == set(RATES)}
    return [
        {
            **row,
            "errors": arrays[row["target"]][row["row"]].astype(float).tolist(),
            "materials": arrays[f"{row['target']} materials"].tolist(),
        }
        for row in rows
        if row["lr"] == rates.get(case(row))
    ]


def case(row: dict) -> tuple[str, str, str]:
    return row["target"], row["backbone"], row["arm"]


def complete(runs: list[dict]) -> list[dict]:
    """Of each backbone the arms that have been tried on all targets, and the seeds that all of these have."""
    kept = []
    for backbone in dict.fromkeys(run["backbone"] for run in runs):
        here = [run for run in runs if run["backbone"] == backbone]
        targets = {run["target"] for run in here}
        done = {
            arm: {s for s in range(10) if all(find(here, arm, target, s) for target in targets)}
            for arm in dict.fromkeys(run["arm"] for run in here)
        }
        arms = {arm for arm, seeds in done.items() if len(seeds) == max(map(len, done.values()))}
        if late := done.keys() - arms:
            print(f"{backbone}: not finished, and left out: {', '.join(sorted(late))}")
        seeds = set.intersection(*(done[arm] for arm in arms))
        kept += [run for run in here if run["arm"] in arms and run["seed"] in seeds]
    return kept


def find(runs: list[dict], arm: str, target: str, seed: int) -> bool:
    return any((run["arm"], run["target"], run["seed"]) == (arm, target, seed) for run in runs)


def doses() -> list[dict[str, str]]:
    """Errors relative to scratch by how long was pre-trained, of the targets that all times have."""
    known = {row["pretraining"] for row in json.loads((HERE / "results.json").read_text())} - {None}
    table = []
    for time in sorted(known, key=parse_time):
        runs = [run for run in chosen_runs(time) if run["arm"] in ("scratch", DOSED) and run["backbone"] == "TensorNet"]
        answered = answers(complete(runs)) if {run["arm"] for run in runs} == {"scratch", DOSED} else []
        for one in answered:
            seeds = len({run["seed"] for run in complete(runs)})
            ratios = {target: f"{ratio:.2f}" for target, ratio in one["targets"].items()}
            whole = (
                f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})" if seeds > 1 else f"{one['ratio']:.3f}"
            )
            table.append({"pre-training": time, "seeds": str(seeds), **ratios, "all": whole})
    return table


def markdown(rows: list[dict[str, str]]) -> str:
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    runs = complete(chosen_runs())
    if not runs:
        raise SystemExit("no target has been finished by every arm yet")
    compared, answered = comparisons(runs), answers(runs)
    for backbone in dict.fromkeys(run["backbone"] for run in runs):
        here = [one for one in compared if one["backbone"] == backbone]
        print(f"\n{backbone}\n")
        rows = []
        for arm in dict.fromkeys(one["arm"] for one in here):
            row = {"arm": f"`{arm}`"}
            for one in (one for one in here if one["arm"] == arm):
                mark = "**" if one.get("clear") else ""
                ratio = f" ({mark}{one['ratio']:.2f}{mark})" if "ratio" in one else ""
                row[f"{one['target']} {one['unit']}".strip()] = f"{one['mae']:.3g}{ratio}"
            rows.append(row)
        print(markdown(rows))
    print()
    print(
        markdown(
            [
                {
                    "question": one["question"],
                    "backbone": one["backbone"],
                    "answer": one["answer"],
                    "ratio of errors": f"{one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})",
                }
                for one in answered
            ]
        )
    )
    print("\n" + verdict(answered))
    print(f"\n{DOSED}, errors relative to scratch\n\n{markdown(doses())}")
    backbones = {run["backbone"] for run in runs}
    figure = forest(panels({"comparisons": compared, "backbones": backbones}))
    figure.savefig(HERE.parents[1] / "docs/images/derivative.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()

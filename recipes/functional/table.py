"""What the pairs of functionals say together: a matrix for the README, and a figure.

python recipes/functional/table.py
"""

import json
from itertools import permutations
from pathlib import Path

from run import FUNCTIONALS

from transfermium.report import forest

HERE = Path(__file__).parent
QUANTITIES = {"energy_per_atom": "energies", "stress": "stress"}
ARMS = ("full", "probe", "aligned")
FEWEST = 10


def main() -> None:
    pairs = {
        (base, target): json.loads(path.read_text())
        for base, target in permutations(FUNCTIONALS, 2)
        if (path := HERE / f"oxides-{base}-{target}.json").exists()
    }
    panels: dict[str, list[tuple[str, float, float, float]]] = {}
    for quantity, spoken in QUANTITIES.items():
        print(f"\n| {spoken}: to | arm |", *(f"from {base} |" for base in FUNCTIONALS))
        print("|---" * (2 + len(FUNCTIONALS)) + "|")
        for target in FUNCTIONALS:
            for arm in ARMS:
                row = [_said(pairs.get((base, target), {}), quantity, arm) for base in FUNCTIONALS]
                print(f"| {target} | {arm} |", *(f"{cell} |" for cell in row))
        print(f"\n| a label of {FEWEST} is worth, by {spoken}: to |", *(f"from {base} |" for base in FUNCTIONALS))
        print("|---" * (1 + len(FUNCTIONALS)) + "|")
        for target in FUNCTIONALS:
            print(f"| {target} |", *(f"{_worth(pairs.get((base, target), {}), quantity)} |" for base in FUNCTIONALS))
        for (base, target), study in pairs.items():
            row = (f"{base} to {target}", *study["ratios"][quantity]["full"])
            panels.setdefault(f"{spoken}, full", []).append(row)
    figure = forest(panels)
    figure.savefig(HERE / "oxides.svg", bbox_inches="tight", metadata={"Date": None})


def _said(study: dict, quantity: str, arm: str) -> str:
    found = study.get("ratios", {}).get(quantity, {}).get(arm)
    if not found:
        return ""
    ratio, low, high = found
    said = f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    return f"**{said}**" if high < 1 or low > 1 else said


def _worth(study: dict, quantity: str) -> str:
    """Of the fewest labels, where factors reach farthest before they leave what was measured."""
    rows = study.get("factors", {}).get(quantity, {}).get("full", [])
    return next((row["said"] for row in rows if row["n_train"] == FEWEST), "")


if __name__ == "__main__":
    main()

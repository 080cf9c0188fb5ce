"""What results.json says, as tables for the README and a figure.

python recipes/masking/table.py
"""

import json
from pathlib import Path

import numpy as np

from transfermium.report import forest
from transfermium.study.intervals import Interval, paired

HERE = Path(__file__).parent
ARMS = ("scratch", "scratch_long", "denoise", "mask", "mask_denoise")


def values(rows: list[dict], arm: str, name: str) -> dict[int, float]:
    """Of each seed."""
    return {row["seed"]: row[name] for row in rows if row["arm"] == arm and row.get(name) is not None}


def against_scratch(rows: list[dict], arm: str, name: str) -> Interval | None:
    """Ratio of the geometric means over the seeds that both have, with its 95 % interval by Student's t."""
    own, other = values(rows, arm, name), values(rows, "scratch", name)
    seeds = sorted(own.keys() & other.keys())
    return paired([own[s] for s in seeds], [other[s] for s in seeds], ratio=True) if len(seeds) > 1 else None


def errors(rows: list[dict], arm: str) -> str:
    found = list(values(rows, arm, "forces_mae").values())
    if not found:
        return ""
    text = f"{1000 * np.mean(found):.0f}"
    ratio = None if arm == "scratch" else against_scratch(rows, arm, "forces_mae")
    if ratio is None:
        return text
    shown = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"{text}; **{shown}**" if ratio.excludes(1.0) else f"{text}; {shown}"


def steps(rows: list[dict]) -> str:
    """Median of the steps until fine-tuning is as good as training from scratch ever was."""
    shown = []
    for arm in ARMS:
        every = [row for row in rows if row["arm"] == arm]
        if every:
            reached = [row["steps_to_error"] if row["steps_to_error"] is not None else np.inf for row in every]
            middle = float(np.median(reached))
            shown.append(f"{arm} {middle:.0f}" if np.isfinite(middle) else f"{arm} never")
    return ", ".join(shown)


def main() -> None:
    rows = json.loads((HERE / "results.json").read_text())
    cases = sorted(
        {(r["set"], r["backbone"], r["tuning_steps"], r["pretrain_source"] or "own", r["n_train"]) for r in rows}
    )
    arms = " | ".join(f"`{arm}`" for arm in ARMS)
    print(f"| set | backbone | steps | labels | {arms} | steps to scratch's best |")
    print("|---" * (len(ARMS) + 5) + "|")
    panels: dict[str, list[tuple[tuple[int, int], tuple[str, float, float, float]]]] = {}
    sets = {name for name, *_ in cases}
    for name, backbone, tuning, source, n in cases:
        case = (name, backbone, tuning, n)
        own = [r for r in rows if (r["set"], r["backbone"], r["tuning_steps"], r["n_train"]) == case]
        own = [r for r in own if r["pretrain_source"] in (None, source)]
        said = "" if source == "own" else f" ({source})"
        cells = [f"{name}{said}", backbone, f"{tuning:,}", str(n), *(errors(own, arm) for arm in ARMS), steps(own)]
        print("| " + " | ".join(cells) + " |")
        longer = "" if tuning == 800 else f", {tuning:,} steps"
        for arm in ARMS[1:]:
            ratio = against_scratch(own, arm, "forces_mae")
            if ratio is not None:
                title = f"{backbone}{longer}" if len(sets) == 1 else f"{name}{said}, {backbone}{longer}"
                row = (f"{n} labels, {arm}", *ratio)
                panels.setdefault(title, []).append(((n, ARMS.index(arm)), row))
    masked = [r for r in rows if r["arm"] == "mask"]
    for name, backbone in sorted({(r["set"], r["backbone"]) for r in masked}):
        own = [r for r in masked if (r["set"], r["backbone"]) == (name, backbone)]
        losses = sorted({round(r["pretrain_loss"], 3) for r in own})
        print(f"{name}, {backbone}: masking loss {losses[0]} to {losses[-1]}, floor {own[0]['floor']:.3f}")
    others = [r for r in rows if r["arm"] not in ARMS]
    if others:
        print("\n| set | backbone | labels | arm | force error; relative to scratch | loss of pre-training | floor |")
        print("|---" * 7 + "|")
    for arm in dict.fromkeys(r["arm"] for r in others):
        mine = [r for r in others if r["arm"] == arm]
        for name, backbone, n in sorted({(r["set"], r["backbone"], r["n_train"]) for r in mine}):
            own = [r for r in rows if (r["set"], r["backbone"], r["n_train"]) == (name, backbone, n)]
            losses = [r["pretrain_loss"] for r in own if r["arm"] == arm]
            floor = next(r["floor"] for r in mine)
            print(f"| {name} | {backbone} | {n} | {arm} | {errors(own, arm)} | {np.mean(losses):.3f} | {floor:.3f} |")
    if panels:
        figure = forest({title: [row for _, row in sorted(own)] for title, own in panels.items()})
        figure.savefig(HERE.parents[1] / "docs/images/masking.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()

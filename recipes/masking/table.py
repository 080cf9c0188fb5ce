"""What results.json says, as tables for the README and a figure.

python recipes/masking/table.py
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from transfermium.study.intervals import Interval, paired

HERE = Path(__file__).parent
ARMS = ("scratch", "scratch_long", "denoise", "mask", "mask_denoise")
MARKS = dict(zip(ARMS[1:], "sovD", strict=True))


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
    panels: dict[tuple[str, str], list[tuple[int, str, Interval]]] = {}
    for name, backbone, tuning, source, n in cases:
        case = (name, backbone, tuning, n)
        own = [r for r in rows if (r["set"], r["backbone"], r["tuning_steps"], r["n_train"]) == case]
        own = [r for r in own if r["pretrain_source"] in (None, source)]
        said = "" if source == "own" else f" ({source})"
        cells = [f"{name}{said}", backbone, f"{tuning:,}", str(n), *(errors(own, arm) for arm in ARMS), steps(own)]
        print("| " + " | ".join(cells) + " |")
        for arm in ARMS[1:]:
            ratio = against_scratch(own, arm, "forces_mae")
            if ratio is not None:
                panels.setdefault((name + said, f"{backbone}, {tuning:,} steps"), []).append((n, arm, ratio))
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
        drawn(panels).savefig(HERE.parents[1] / "docs/images/masking.svg", bbox_inches="tight", metadata={"Date": None})


def drawn(panels: dict[tuple[str, str], list[tuple[int, str, Interval]]]) -> Figure:
    """Force errors relative to scratch against the number of labels."""
    figure = Figure(figsize=(3.2 * len(panels), 3.0))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, ((name, backbone), points) in zip(axes, panels.items(), strict=True):
        for k, arm in enumerate(ARMS[1:]):
            own = [(n, ratio) for n, of, ratio in points if of == arm]
            if own:
                n = np.array([n for n, _ in own]) * 1.08 ** (k - 1.5)
                middle = np.array([ratio.value for _, ratio in own])
                spread = np.abs(np.array([[r.low, r.high] for _, r in own]).T - middle)
                axis.errorbar(n, middle, spread, fmt=MARKS[arm], capsize=2, label=arm, ms=4)
        axis.axhline(1, color="0.6", lw=0.8)
        axis.set(xscale="log", yscale="log", title=f"{name}\n{backbone}", xlabel="labels")
        axis.set_xticks(sorted({n for n, _, _ in points}), [str(n) for n in sorted({n for n, _, _ in points})])
        axis.minorticks_off()
    low, high = axes[0].get_ylim()
    ticks = [tick for tick in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0) if low < tick < high]
    axes[0].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[0].set_ylabel("force error relative to scratch")
    axes[0].legend(fontsize=7)
    return figure


if __name__ == "__main__":
    main()

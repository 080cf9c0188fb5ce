"""What results.json says, as tables for the README and a figure.

python recipes/masking/table.py
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transfermium.report import forest
from transfermium.study.intervals import Interval, paired

HERE = Path(__file__).parent
ARMS = ("scratch", "scratch_long", "denoise", "mask", "mask_denoise")
TITLES = {"pbe0ts": "water", "rpbed3": "water and ices", "revpbe0d3": "dense and dilute water", "nacl": "salt water"}
USUAL = 800  # steps of either stage; older rows do not say how many pre-training had

Rows = list[dict[str, Any]]


class Case(NamedTuple):
    """What arms must have in common to be compared, but for their number of labels."""

    name: str
    backbone: str
    tuning: int
    source: str
    pretraining: int

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a run belongs here; what never saw another stage belongs to all that are fine-tuned as long."""
        alike = (row["set"], row["backbone"], row["tuning_steps"]) == self[:3]
        source, steps = row["pretrain_source"], pretraining(row)
        return alike and source in (None, self.source) and steps in (None, self.pretraining)

    @property
    def set(self) -> str:
        return self.name if self.source == "own" else f"{self.name} ({self.source})"

    @property
    def steps(self) -> str:
        if self.pretraining == USUAL:
            return f"{self.tuning:,}"
        return f"{self.tuning:,} after {self.pretraining:,}"


def pretraining(row: dict[str, Any]) -> int | None:
    """Steps of the first stage, also of one that `scratch_long` makes up for; None without any."""
    found = row.get("pretraining_steps", None if row["arm"] == "scratch" else USUAL)
    return None if found is None else int(found)


def cases(rows: Rows) -> list[Case]:
    """Those of everything pre-trained, and of the rest where nothing is."""
    said = [(r["set"], r["backbone"], r["tuning_steps"], r["pretrain_source"], pretraining(r)) for r in rows]
    found = {Case(*some) for some in said if some[3] is not None}
    begun = {case[:3] for case in found}
    found |= {Case(*some[:3], "own", USUAL) for some in said if some[:3] not in begun}
    return sorted(found)


def values(rows: Rows, arm: str, name: str) -> dict[int, float]:
    """Of each seed."""
    return {row["seed"]: row[name] for row in rows if row["arm"] == arm and row.get(name) is not None}


def against(rows: Rows, arm: str, name: str, other_arm: str = "scratch") -> Interval | None:
    """Ratio of the geometric means over the seeds that both have, with its 95 % interval by Student's t."""
    own, other = values(rows, arm, name), values(rows, other_arm, name)
    seeds = sorted(own.keys() & other.keys())
    return paired([own[s] for s in seeds], [other[s] for s in seeds], ratio=True) if len(seeds) > 1 else None


def over_all(runs: Sequence[Rows], arm: str, name: str, other_arm: str = "scratch") -> Interval | None:
    """The same over all numbers of labels that both arms have, which count alike in each seed."""
    both = [(values(rows, arm, name), values(rows, other_arm, name)) for rows in runs]
    both = [(own, other) for own, other in both if own and other]
    seeds = sorted(set.intersection(*(set(own) & set(other) for own, other in both))) if both else []
    if len(seeds) < 2:
        return None
    own, other = (
        [float(np.exp(np.mean([np.log(side[seed]) for side in sides]))) for seed in seeds]
        for sides in zip(*both, strict=True)
    )
    return paired(own, other, ratio=True)


def told(ratio: Interval) -> str:
    """Bold where it excludes one."""
    shown = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    return f"**{shown}**" if ratio.excludes(1.0) else shown


def errors(rows: Rows, arm: str, name: str = "forces_mae") -> str:
    """The mean in meV, and relative to scratch."""
    found = list(values(rows, arm, name).values())
    if not found:
        return ""
    text = f"{1000 * np.mean(found):.{0 if name == 'forces_mae' else 2}f}"
    ratio = None if arm == "scratch" else against(rows, arm, name)
    return text if ratio is None else f"{text}; {told(ratio)}"


def steps(rows: Rows) -> str:
    """Median of the steps until fine-tuning is as good as training from scratch ever was."""
    shown = []
    for arm in ARMS[1:]:
        every = [row for row in rows if row["arm"] == arm]
        if every:
            reached = [row["steps_to_error"] if row["steps_to_error"] is not None else np.inf for row in every]
            middle = float(np.median(reached))
            shown.append(f"{arm} {middle:.0f}" if np.isfinite(middle) else f"{arm} never")
    return ", ".join(shown)


def heading(*columns: str) -> None:
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")


def named(case: Case, rows: Rows, arms: Sequence[str] = ARMS) -> str:
    """The set, with a mark where only the two rates of the first runs were tried, of which all chose the larger."""
    return case.set if all("rates" in row for row in rows if row["arm"] in arms) else f"{case.set} †"


def line(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def compared(runs: Sequence[tuple[Case, int, Rows]]) -> None:
    """Force errors of all arms, then energy errors."""
    arms = [f"`{arm}`" for arm in ARMS]
    for name, title in (("forces_mae", "Force errors (meV/Å)"), ("energy_mae", "Energy errors (meV/atom)")):
        extra = ["`mask` over `denoise`", *(["steps to scratch's best"] if name == "forces_mae" else [])]
        print(f"\n{title}\n")
        heading("set", "backbone", "steps", "labels", *arms, *extra)
        for case, some in groupby(runs, key=lambda run: run[0]):
            found = [(n, own) for _, n, own in some]
            for n, own in found:
                cells = [errors(own, arm, name) for arm in ARMS]
                ratio = against(own, "mask", name, "denoise")
                cells += [told(ratio) if ratio else "", steps(own)][: len(extra)]
                line(named(case, own), case.backbone, case.steps, str(n), *cells)
            if len(found) > 1:
                several = [[own for _, own in found if values(own, arm, name)] for arm in ARMS[1:]]
                ratios = [over_all(all_of, arm, name) for all_of, arm in zip(several, ARMS[1:], strict=True)]
                every = [told(r) if r and len(all_of) > 1 else "" for r, all_of in zip(ratios, several, strict=True)]
                of_set = named(case, [row for _, own in found for row in own])
                ratio = over_all([own for _, own in found], "mask", name, "denoise")
                every += [told(ratio) if ratio else "", ""][: len(extra)]
                line(of_set, case.backbone, case.steps, "all", "1", *every)


def equal_compute(runs: Sequence[tuple[Case, int, Rows]]) -> None:
    """Errors after both stages relative to training from scratch for the steps of both."""
    print("\nRelative to scratch with the steps of both stages\n")
    heading(
        "set", "backbone", "steps", "labels", *(f"`{arm}`, {of}" for arm in ARMS[2:] for of in ("forces", "energy"))
    )
    for case, n, own in runs:
        pairs = [(arm, name) for arm in ARMS[2:] for name in ("forces_mae", "energy_mae")]
        ratios = [against(own, arm, name, "scratch_long") for arm, name in pairs]
        if any(ratios):
            line(named(case, own), case.backbone, case.steps, str(n), *(told(r) if r else "" for r in ratios))


def departures(runs: Sequence[tuple[Case, int, Rows]]) -> None:
    """What forces lack that are no derivatives: turning with the structure, and an energy."""
    print("\nForces of their own: error of turning (meV/Å, root mean square), asymmetry of the Jacobian\n")
    heading("set", "backbone", "steps", "labels", *(f"`{arm}`" for arm in ARMS))
    for case, n, own in runs:
        if any("equivariance_error" in row for row in own):
            sides = [
                [values(own, arm, of).values() for of in ("equivariance_error", "jacobian_asymmetry")] for arm in ARMS
            ]
            means = [[float(np.mean(list(side))) for side in both] for both in sides]
            line(named(case, own), case.backbone, case.steps, str(n), *(f"{1000 * e:.1f}, {j:.3f}" for e, j in means))


def losses(rows: Rows) -> None:
    """Of masking, with each backbone."""
    print()
    for case in cases(rows):
        own = [row for row in rows if row["arm"] == "mask" and case.holds(row)]
        if own:
            found = sorted({round(row["pretrain_loss"], 3) for row in own})
            told = f"{case.set}, {case.backbone}, {case.steps} steps"
            print(f"{told}: masking loss {found[0]} to {found[-1]}, floor {own[0]['floor']:.3f}")


def ablations(runs: Sequence[tuple[Case, int, Rows]]) -> None:
    """Each way of masking below the usual one, on as many labels of the same set."""
    changed = [
        (case, n, own, others) for case, n, own in runs if (others := sorted({r["arm"] for r in own} - set(ARMS)))
    ]
    if not changed:
        return
    print()
    heading("set", "backbone", "steps", "labels", "arm", "force error; relative to scratch",
            "energy error; relative to scratch", "loss of pre-training", "floor")  # fmt: skip
    for case, n, own, others in changed:
        for arm in ["mask", *others]:
            mine = [row for row in own if row["arm"] == arm]
            if mine:
                loss = np.mean([row["pretrain_loss"] for row in mine])
                line(named(case, own, ["scratch", arm]), case.backbone, case.steps, str(n), arm, errors(own, arm),
                     errors(own, arm, "energy_mae"), f"{loss:.3f}", f"{mine[0]['floor']:.3f}")  # fmt: skip


def worth() -> None:
    """How many labels from scratch one label is worth after pre-training, by force errors, where curves have two sizes.

    The steps of pre-training are not counted here; `scratch_long` spends them on labels.
    """
    print("\nWhat a label is worth, by force errors\n")
    heading("curve", "labels: times as many from scratch (95 %)")
    for file in sorted((HERE / "curves").glob("*.json")):
        for found in json.loads(file.read_text())["factors"].get("forces", {}).values():
            if found:
                line(file.stem, "; ".join(f"{one['n_train']}: {one['said']}" for one in found))


def reasons() -> None:
    """What pre-trained models know of forces before any label: means over seeds."""
    groups: dict[tuple[str, ...], Rows] = {}
    for one in json.loads((HERE / "why.json").read_text()):
        sigma = one.get("arguments", {}).get("sigma", 0.1)
        what = f"Denoise, {sigma} Å" if one["objective"] == "Denoise" else one["objective"]
        frames = f"{one['frames']:,}" if "frames" in one else ""
        groups.setdefault((one["set"], one["backbone"], what, frames, f"{one['steps']:,}"), []).append(one)
    print("\nWhat is known of forces before any label\n")
    heading(
        "set", "backbone", "learned", "frames", "steps", "seeds", "cosine with forces", "force error of a probe (meV/Å)"
    )
    for group, own in sorted(groups.items()):
        cosines = [one["cosine"]["all"] for one in own if one.get("cosine")]
        probes = [1000 * one["probe"]["forces"] for one in own if "probe" in one]
        line(*group, str(len(own)), spread(cosines, 2), spread(probes, 0))


def spread(found: Sequence[float], digits: int) -> str:
    """Mean, smallest and largest."""
    if len(found) < 2:
        return "".join(f"{one:.{digits}f}" for one in found)
    return f"{np.mean(found):.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})"


def panels(runs: Sequence[tuple[Case, int, Rows]]) -> dict[str, list[tuple[str, float, float, float]]]:
    """Force errors relative to scratch over all numbers of labels: rows of the figure, by title."""
    found: dict[str, list[tuple[str, float, float, float]]] = {}
    for case, some in groupby(runs, key=lambda run: run[0]):
        own = [rows for _, _, rows in some]
        mark = " †" if named(case, [row for rows in own for row in rows]) != case.set else ""
        usual = case.tuning == case.pretraining == USUAL
        what = TITLES.get(case.name, case.name) + ("" if case.source == "own" else f", {case.source} TIP3P") + mark
        title = f"{what}\n{case.backbone}{'' if usual else f', {case.steps} steps'}"
        ratios = {arm: over_all(own, arm, "forces_mae") for arm in ("mask", "mask_denoise", "denoise", "scratch_long")}
        found[title] = [(arm, *ratio) for arm, ratio in ratios.items() if ratio is not None]
    return found


def main() -> None:
    rows = json.loads((HERE / "results.json").read_text())
    begun = {(r["set"], r["backbone"], r["tuning_steps"], r["n_train"]) for r in rows if r["pretrain_source"]}
    runs = []
    for case in cases(rows):
        held = [row for row in rows if case.holds(row)]
        for n in sorted({row["n_train"] for row in held}):
            own = [row for row in held if row["n_train"] == n]
            if any(row["pretrain_source"] for row in own) or (*case[:3], n) not in begun:
                runs.append((case, n, own))
    compared([(case, n, own) for case, n, own in runs if {row["arm"] for row in own} & set(ARMS[1:])])
    equal_compute([run for run in runs if run[0].source == "own"])
    losses(rows)
    departures(runs)
    ablations(runs)
    worth()
    reasons()
    shown = panels(runs)
    if shown:
        figure = forest(shown)
        figure.savefig(HERE.parents[1] / "docs/images/masking.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()

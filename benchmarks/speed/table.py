"""Tables, ratios and losses, computed from the records: into README.md beside this file, or the short one, printed.

python benchmarks/speed/table.py            rewrites what stands between the two markers of README.md
python benchmarks/speed/table.py --short    prints the table of the main README
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import records
from records import Record

OURS = "transfermium"
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results: written by table.py -->", "<!-- end of results -->"

FASTER = {"train": 1.5}  # how many times a peer's speed we mean to have; 1 where nothing is said
SLOWER_IMPORT = 1.3  # times `import torch`
PEAK_MB = 1.5 * 2**30 / 1e6  # of W1 training
PEAK_OF = ("TensorNet", "PaiNN")

Cost = Callable[[Record], float | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    found = records.load(options.results)
    if options.short:
        print(short(found))
    else:
        README.write_text(between_markers(README.read_text(), full(found)))


def full(found: Sequence[Record]) -> str:
    """Everything that was measured, what it means, and where we lose."""
    parts = [
        section(f"Training, {workload}", training(found, workload), training_note(found, workload))
        for workload in ("W1", "W2", "W3")
    ]
    parts += [
        section("Time to accuracy, W1", accuracy(found), accuracy_note(found)),
        section("Inference, W1", inference(found)),
        section("Preparation", preparation(found)),
        section("Start-up", start_up(found)),
        section("Against the best peer", against_peers(found)),
        section("We lose here", losses(found)),
        conditions(found),
    ]
    return "\n\n".join(filter(None, parts))


def short(found: Sequence[Record]) -> str:
    """One thread, W1: processor time and memory of every architecture, fastest training first."""
    rows = []
    for one in sorted(pick(found, task="train", workload="W1", threads=1), key=lambda one: one["cpu_s"]):
        same = {"system": one["system"], "backbone": one["backbone"], "threads": 1, "workload": "W1"}
        infer, target = first(found, task="infer", **same), first(found, task="to_accuracy", **same)
        reached = target and (target["cpu_s"] or beyond(target))
        rows.append([*name(one), 1e3 * one["cpu_s"], one["peak_mb"], infer and 1e3 * infer["cpu_s"], reached])
    columns = ["CPU", "width × layers", "training step, ms", "peak MB", "energy + forces, ms", "to 0.1 eV/Å, s"]
    return markdown(columns, rows)


# -- tables ------------------------------------------------------------------------------------------------------


def training(found: Sequence[Record], workload: str) -> str:
    """Structures per second for each number of threads; the rest for the fewest."""
    mine = pick(found, task="train", workload=workload)
    counts = threads_of(mine)
    rows = []
    for group in by_architecture(mine):
        one = group[min(group)]
        stress = {True: "with stress", False: "without stress"}[one["stress"]] if workload == "W2" else None
        speeds = [value(group.get(n), "structures_per_s") for n in counts]
        rows.append([*name(one, stress), one["parameters"], *speeds, one["cpu_s"], one["peak_mb"], one["baseline_mb"]])
    rows.sort(key=lambda row: -(row[3] or 0))
    by_threads = [f"structures/s, {plural(n)}" for n in counts]
    columns = ["", "width × layers", "parameters", *by_threads, "CPU s per step", "peak MB", "of which at start"]
    return markdown(columns, rows)


def training_note(found: Sequence[Record], workload: str) -> str:
    edges = [one["edges_per_step"] for one in pick(found, task="train", workload=workload)]
    return f"{edges[0]:,} edges per step." if edges else ""


def inference(found: Sequence[Record]) -> str:
    mine = pick(found, task="infer")
    counts = threads_of(mine)
    rows = []
    for group in by_architecture(mine):
        ase = [
            first(found, task="infer_ase", **{k: group[min(group)][k] for k in ("system", "backbone")}, threads=n)
            for n in counts
        ]
        cells = [value(group.get(n), "ms") for n in counts] + [value(one, "ms") for one in ase]
        rows.append([*name(group[min(group)]), *cells, *[value(group.get(n), "structures_per_s") for n in counts]])
    rows.sort(key=lambda row: row[2] or 0)
    kinds = ("one box, ms", "through ASE, moved, ms", "four boxes, structures/s")
    return markdown(["", "width × layers", *[f"{kind}, {plural(n)}" for kind in kinds for n in counts]], rows)


def preparation(found: Sequence[Record]) -> str:
    groups = by_system([one for one in pick(found, task="prepare")])
    rows: list[list[Any]] = [
        [system, *[value(first(group, workload=w), "ms") for w in ("W1", "W2")]] for system, group in groups
    ]
    return markdown(["", "W1, ms per structure", "W2, ms per structure"], sorted(rows, key=lambda row: row[2] or 0))


def start_up(found: Sequence[Record]) -> str:
    imports = pick(found, task="startup", what="import")
    rows = [[f"`import` {one['system']}", None, one["ms"], one["cpu_s"]] for one in sorted(imports, key=wall)]
    rows += [["`transfermium info`", None, one["ms"], one["cpu_s"]] for one in pick(found, task="startup", what="info")]
    steps = sorted(pick(found, task="startup", what="first step"), key=wall)
    rows += [["first W1 step, " + name(one)[0], name(one)[1], one["ms"], one["cpu_s"]] for one in steps]
    return markdown(["", "width × layers", "ms", "CPU s"], rows)


def accuracy(found: Sequence[Record]) -> str:
    mine = sorted(
        pick(found, task="to_accuracy"), key=lambda one: (one["threads"], one["seconds_to_target"] or 1e9, one["best"])
    )
    rows = [
        [
            *name(one),
            plural(one["threads"]),
            arrival(one),
            value(one, "cpu_s"),
            one["lr"],
            one["steps"],
            one["best"],
            one["warm_up_s"],
        ]
        for one in mine
    ]
    columns = [
        "",
        "width × layers",
        "",
        "s to target",
        "CPU s",
        "learning rate",
        "steps",
        "lowest MAE, eV/Å",
        "warm-up, s",
    ]
    return markdown(columns, rows)


def accuracy_note(found: Sequence[Record]) -> str:
    targets = [one["target"] for one in pick(found, task="to_accuracy")]
    return f"Target: a force MAE of {targets[0]} eV/Å on 20 boxes of the validation file." if targets else ""


def conditions(found: Sequence[Record]) -> str:
    """Machine, versions, dates and load."""
    if not found:
        return "Nothing has been measured yet."
    versions = sorted({f"{one['system']} {one['version']}" for one in found if one["version"]})
    dates = sorted({one["date"] for one in found})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    load = max(one.get("load", 0.0) for one in found)
    return (
        f"{'; '.join(sorted({one['machine'] for one in found}))}. {when}, load at most {load}. {', '.join(versions)}."
    )


# -- ratios ------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """Ours against the best of others, in seconds or in another quantity of which less is better."""

    about: str
    ours: float | None
    theirs: float | None
    who: str
    bar: float  # the ratio that we mean to reach

    @property
    def ratio(self) -> float:
        """How many times better we are; nothing where we do not arrive, without end where only we do."""
        if self.ours is None:
            return 0.0
        return float("inf") if self.theirs is None else self.theirs / self.ours


def against_peers(found: Sequence[Record]) -> str:
    rows = [
        [claim.about, claim.who, f"{claim.ratio:.2f}", f"{claim.bar:.2f}", "yes" if claim.ratio >= claim.bar else "no"]
        for claim in claims(found)
    ]
    return markdown(["", "best other", "ratio (more is better for us)", "bar", "reached"], rows)


def losses(found: Sequence[Record]) -> str:
    """One line for each comparison that we lose, and for each bar that we do not reach."""
    lost = sorted([*claims(found), *other_architectures(found)], key=lambda claim: claim.ratio)
    lines = [
        f"- {claim.about}: {claim.who} is {1 / claim.ratio:.2f}× better."
        for claim in lost
        if 0 < claim.ratio < min(1, claim.bar)
    ]
    lines += [f"- {claim.about}: {claim.who} arrives, we do not." for claim in lost if claim.ratio == 0]
    lines += [
        f"- {claim.about}: ahead of {claim.who}, {claim.ratio:.2f}×, but short of {claim.bar:.2f}×."
        for claim in lost
        if 1 <= claim.ratio < claim.bar
    ]
    return "\n".join(lines) or ("Nowhere in these measurements." if lost else "")


def claims(found: Sequence[Record]) -> Iterator[Claim]:
    """Every comparison for which records of both sides exist."""
    for task in ("train", "infer", "infer_ase"):
        for workload, threads in places(found, task):
            for backbone in {one["backbone"]: None for one in pick(found, task=task, system=OURS)}:
                rivals = pick(found, task=task, workload=workload, threads=threads, backbone=backbone)
                about = f"{task} {workload}, {backbone}, {plural(threads)}"
                yield from compared(about, rivals, spent, FASTER.get(task, 1.0))
                if task == "infer":
                    yield from compared(f"{about}, four boxes", rivals, seconds_each)
    for task in ("prepare", "to_accuracy"):
        for workload, threads in places(found, task):
            rivals = pick(found, task=task, workload=workload, threads=threads)
            about = f"{task} {workload}, any architecture, {plural(threads)}"
            yield from compared(about, rivals, spent)

    torch = pick(found, task="startup", what="import", system="torch")
    yield from compared(
        "import", [*torch, *pick(found, task="startup", what="import", system=OURS)], wall, 1 / SLOWER_IMPORT
    )
    for one in pick(found, task="train", workload="W1", system=OURS):
        if one["backbone"] in PEAK_OF:
            about = f"peak MB of train W1, {one['backbone']}, {plural(one['threads'])}"
            yield Claim(about, one["peak_mb"], PEAK_MB, f"the bar of {PEAK_MB:.0f} MB", 1.0)


def other_architectures(found: Sequence[Record]) -> Iterator[Claim]:
    """Our fastest architecture against the fastest of all: no bar, but a loss is a loss."""
    for task in ("train", "infer", "infer_ase"):
        for workload, threads in places(found, task):
            rivals = pick(found, task=task, workload=workload, threads=threads)
            about = f"{task} {workload}, the fastest architecture, {plural(threads)}"
            yield from compared(about, rivals, spent)


def compared(about: str, rivals: Sequence[Record], cost: Cost, bar: float = 1.0) -> Iterator[Claim]:
    """The cheapest of ours against the cheapest of others; nothing when one side is missing or nobody arrives."""
    ours = [one for one in rivals if one["system"] == OURS]
    others = [one for one in rivals if one["system"] != OURS]
    if not ours or not others:
        return
    mine = cost(min(ours, key=lambda one: cost(one) or float("inf")))
    best = min(others, key=lambda one: cost(one) or float("inf"))
    if mine is not None or cost(best) is not None:
        yield Claim(about, mine, cost(best), name(best)[0], bar)


def places(found: Sequence[Record], task: str) -> list[tuple[str, int]]:
    return list({(one["workload"], one["threads"]): None for one in pick(found, task=task)})


def spent(one: Record) -> float | None:
    """Processor seconds on one thread, which other jobs disturb less; wall seconds on more; None before arrival."""
    if one["threads"] == 1:
        return one["cpu_s"]
    return one["seconds_to_target"] if one["task"] == "to_accuracy" else one["ms"] / 1e3


def wall(one: Record) -> float:
    return one["ms"] / 1e3


def seconds_each(one: Record) -> float | None:
    return 1 / one["structures_per_s"]


# -- records and Markdown ----------------------------------------------------------------------------------------


def pick(found: Sequence[Record], **labels: object) -> list[Record]:
    return [one for one in found if all(one.get(key) == wanted for key, wanted in labels.items())]


def first(found: Sequence[Record], **labels: object) -> Record | None:
    return next(iter(pick(found, **labels)), None)


def by_architecture(found: Sequence[Record]) -> list[dict[int, Record]]:
    """For each system and backbone, number of threads to record."""
    groups: dict[tuple[str, str], dict[int, Record]] = {}
    for one in found:
        groups.setdefault((one["system"], one["backbone"]), {})[one["threads"]] = one
    return list(groups.values())


def by_system(found: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """One architecture of each: the graphs of the others are the same."""
    groups: dict[str, list[Record]] = {}
    for one in found:
        group = groups.setdefault(one["system"], [])
        if not group or group[0]["backbone"] == one["backbone"]:
            group.append(one)
    return list(groups.items())


def threads_of(found: Sequence[Record]) -> list[int]:
    return sorted({one["threads"] for one in found})


def name(one: Record, remark: str | None = None) -> list[str]:
    """Who, and how large."""
    who = " ".join(dict.fromkeys(filter(None, (one["system"], one["backbone"]))))
    who = f"**{who}**" if one["system"] == OURS else who
    size = f"{one['width']} × {one['layers']}" if one["width"] else ""
    return [f"{who}, {remark}" if remark else who, size]


def value(one: Record | None, key: str) -> float | None:
    return one[key] if one else None


def arrival(one: Record | None) -> str | float | None:
    if one is None:
        return None
    return one["seconds_to_target"] or beyond(one)


def beyond(one: Record) -> str:
    """How long was tried in vain, and the best force error until then."""
    return f"not in {one['cap']:.0f} s ({one['best']:.2f})"


def plural(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def section(title: str, *parts: str) -> str:
    body = "\n\n".join(filter(None, parts))
    return f"### {title}\n\n{body}" if body else ""


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; nothing when there are no rows."""
    if not rows:
        return ""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *[[shown(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(cell: float | str | None) -> str:
    """Three digits, and nothing for nothing."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    return f"{cell:,.0f}" if isinstance(cell, int) or cell >= 100 else f"{cell:.3g}"


def between_markers(text: str, new: str) -> str:
    """The text with everything between the markers replaced.

    Raises ValueError when the markers are not there.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"README.md needs the lines '{BEGIN}' and '{END}'")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    return f"{before}\n\n{new}\n\n{after}"


if __name__ == "__main__":
    main()

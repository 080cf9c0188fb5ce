"""Does pointing at removed atoms pre-train potentials of water? (arXiv:2402.15921)

    python recipes/masking/run.py --data DIR                          the core grid: two hours on two cores
    python recipes/masking/run.py --data DIR --only rpbed3            one entry of STUDIES
    python recipes/masking/run.py --data DIR --only pbe0ts --backbone GNS
    python recipes/masking/run.py --data DIR --only pbe0ts --backbone EGNN --tuning 4000
    python recipes/masking/run.py --data DIR --only pbe0ts --backbone TensorNet --ablations 1
    python recipes/masking/run.py --data DIR --only pbe0ts --backbone TensorNet --source rigid    TIP3P, or flexible
    python recipes/masking/run.py --data DIR --only pbe0ts --backbone TensorNet --all 1           and 300 labels
    python recipes/masking/run.py --data DIR --only pbe0ts --backbone EGNN --pretraining 8000 --sizes 10 --arms mask
    python recipes/masking/run.py --data DIR --only pbe0ts --backbone EGNN --sizes 10 --rates 0.008,0.002 --arms mask

Every way of pre-training is one `curve` with the same labels, test frames, steps and search of learning rates; what is
learned from scratch is computed once. Finished cells are kept in `--runs`, so that the same command goes on; each
finished curve goes into results.json beside this file, but for those with other learning rates, and `table.py` says
what they say.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import arguments

import transfermium as tm
from transfermium.model import copied
from transfermium.objectives import Objective
from transfermium.run import write_json
from transfermium.study.curve import curve

HERE = Path(__file__).parent
CUTOFF = 4.0  # Å: some 25 neighbours of each atom of water
SIGMAS = (0.03, 0.1, 0.3)  # Å, of noise: the best by validation labels counts
BACKBONES = {
    "TensorNet": (tm.TensorNet(32, 2, cutoff=CUTOFF), True),
    "EGNN": (tm.EGNN(32, 3, cutoff=CUTOFF), True),
    "GNS": (tm.GNS(64, 4, cutoff=CUTOFF), False),  # forces are an output of their own
    "ForceNet": (tm.ForceNet(64, 3, cutoff=CUTOFF), False),
    "PaiNN": (tm.PaiNN(32, 2, cutoff=CUTOFF), True),
    "ET": (tm.ET(32, 2, cutoff=CUTOFF), True),
}
STEPS, TUNING, EDGES = 800, 800, 10_000
RATES = (0.008, 0.002, 0.0005)  # of fine-tuning and of training from scratch
MASK = "mask"  # name of the part that is fine-tuned of what was learned together


class Study(NamedTuple):
    """Labelled frames, those to test on, and the numbers of labels that are compared."""

    pool: Callable[[Path], Sequence[Atoms]]
    test: Callable[[Path], Sequence[Atoms]]
    sizes: list[int]
    backbones: tuple[str, ...]
    source: str = "own"  # what is masked: the configurations of the pool, without labels, or boxes of TIP3P
    single: bool = False  # molecules, whose derivatives cannot point to one place
    more: tuple[int, ...] = ()  # numbers of labels beyond those, of `--all`


def _file(name: str) -> Callable[[Path], Sequence[Atoms]]:
    return lambda data: tm.read(data / f"{name}.extxyz.xz")


def _split(name: str, *sides: str) -> Callable[[Path], Sequence[Atoms]]:
    return lambda data: [a for a in tm.read(data / f"{name}.extxyz.xz") if a.info["split"] in sides]


STUDIES = {
    "pbe0ts": Study(
        _file("water_pbe0ts/train"), _file("water_pbe0ts/val"), [10, 30, 100], ("TensorNet", "EGNN", "GNS", "ForceNet"),
        more=(300,),
    ),
    "rpbed3": Study(
        _split("water_rpbed3/all", "train"), _split("water_rpbed3/all", "val", "test"), [10, 30, 100], ("TensorNet",)
    ),
    "revpbe0d3": Study(
        _file("water_revpbe0d3/train_30"), _file("water_revpbe0d3/val_100"), [10, 30], ("TensorNet",)
    ),
    "nacl": Study(
        _split("nacl_water/revPBE0-D3", "train"), _split("nacl_water/revPBE0-D3", "test"), [10, 30, 100],
        ("TensorNet",), more=(300,),
    ),
    "ethanol": Study(
        _split("md17_ethanol/all", "train"), _split("md17_ethanol/all", "test"), [30, 100, 300], ("TensorNet",),
        single=True,
    ),
    "aspirin": Study(
        _split("aspirin_ccsd/all", "train"), _split("aspirin_ccsd/all", "val", "test"), [30, 100, 300], ("TensorNet",),
        single=True,
    ),
}  # fmt: skip
CORE = {"EGNN": [10, 30], "GNS": [30], "ForceNet": [30]}  # sizes of the slower ones, before `--all`
ABLATIONS = {  # of masking half of the hydrogens, each with one thing changed
    "mask_quarter": tm.MaskAtoms(fraction=0.25),
    "mask_all": tm.MaskAtoms(fraction=1.0),
    "mask_unflagged": tm.MaskAtoms(flag=False),
    "mask_oxygen": tm.MaskAtoms(atoms="O"),
    "mask_length": tm.MaskAtoms(length=1.0),
    "mask_positions": tm.MaskPositions(),
    "mask_direct": tm.MaskAtoms(conservative=False),
}


def objectives(conservative: bool, single: bool, sigma: float) -> dict[str, Objective]:
    """Ways of pre-training, by the names of arms."""
    mask = tm.MaskAtoms(conservative=conservative and not single)
    noise = tm.Denoise(sigma, conservative=conservative)
    return {"denoise": noise, "mask": mask, "mask_denoise": tm.Together({MASK: mask, "noise": noise})}


def ablations(conservative: bool, single: bool) -> dict[str, Objective]:
    """Changed ways of masking, with forces of the kind that the usual one has."""
    if conservative and not single:
        return ABLATIONS
    return {
        arm: copied(objective, conservative=False) if isinstance(objective, tm.MaskAtoms) else objective
        for arm, objective in ABLATIONS.items()
        if arm != "mask_direct"  # which is the usual one here
    }


def main() -> None:
    args = arguments(
        __doc__, only="", backbone="", seeds=3, workers=2, source="own", all=0, pretraining=STEPS, tuning=TUNING,
        sigma=0.0, ablations=0, sizes="", arms="", rates="",
    )  # fmt: skip
    for name, study in STUDIES.items():
        if args.only not in ("", name) or (not args.only and name != "pbe0ts"):
            continue
        for backbone in [args.backbone] if args.backbone else study.backbones:
            compare(args, name, study, backbone)


def compare(args: Any, name: str, study: Study, backbone: str) -> None:
    """All ways of pre-training for one backbone on one set."""
    architecture, conservative = BACKBONES[backbone]
    pool, test = study.pool(args.data), study.test(args.data)
    sizes = [*study.sizes, *study.more] if args.all else CORE.get(backbone, study.sizes)
    sizes = [int(size) for size in args.sizes.split(",")] if args.sizes else sizes
    wanted = args.arms.split(",") if args.arms else []
    rates = [float(rate) for rate in args.rates.split(",")] if args.rates else list(RATES)
    source = pool if args.source == "own" else tm.water(args.source)

    def do(objective: Objective, sizes: Sequence[int], seeds: int, arms: Sequence[str], steps: int) -> Any:
        part = MASK if isinstance(objective, tm.Together) else None
        return curve(
            pool, tm.Potential(stress=0.0, conservative=conservative), args.runs / "masking" / name, base_data=source,
            base_objective=objective, part=part, test=test, backbone=architecture, arms=arms, sizes=sizes,
            seeds=seeds, pretraining=f"{steps}steps", tuning=f"{args.tuning}steps", edges=EDGES, workers=args.workers,
            rates=rates,
        )  # fmt: skip

    def compared(arm: str, objective: Objective, sizes: Sequence[int], sigma: float = 0.0) -> None:
        print(f"\n{name}, {backbone}: {arm}", flush=True)
        steps = args.pretraining // (2 if arm == "mask_denoise" else 1)  # a step of it learns from both
        result = do(objective, sizes, args.seeds, ["scratch", "full"], steps)
        noise = {"sigma": sigma, "sigma_losses": {str(width): loss for width, loss in losses.items()}}
        said = noise if "denoise" in arm else {"floor": objective.floor(source)}  # type: ignore[attr-defined]
        if not args.rates:
            keep(args, name, backbone, arm, said, result)
        longer = "" if args.pretraining == STEPS else f"-after-{args.pretraining}"
        some = f"-at-{args.sizes.replace(',', '-')}" if args.sizes else ""
        some += f"-with-{args.rates.replace(',', '-')}" if args.rates else ""
        write_json(HERE / f"curves/{name}-{backbone}-{arm}-{args.source}-{args.tuning}{longer}{some}.json", result)

    losses: dict[float, float] = {}
    if args.ablations:
        for arm, objective in ablations(conservative, study.single).items():
            if not wanted or arm in wanted:
                compared(arm, objective, sizes[:1])
        return

    middle = [sizes[-1]] if len(sizes) == 1 else [sizes[1]]
    # unless it is given, the noise is chosen by validation labels of the first seed, before anything else is compared
    searched = not wanted or {"denoise", "mask_denoise"} & set(wanted)
    for sigma in [args.sigma] if args.sigma else SIGMAS if searched else []:
        found = do(tm.Denoise(sigma, conservative=conservative), middle, 1, ["scratch", "full"], args.pretraining)
        folder = args.runs / "masking" / name / "cells"
        losses[sigma] = min(_best(folder / row["cell"])[1] for row in found["errors"] if row["arm"] == "full")
    sigma = min(losses, key=losses.__getitem__, default=SIGMAS[0])  # of nothing where no noise is asked for
    ways = objectives(conservative, study.single, sigma)
    for arm, objective in ways.items():
        if not wanted or arm in wanted:
            compared(arm, objective, sizes, sigma)
    if not wanted or "scratch_long" in wanted:
        result = do(ways["mask"], middle, args.seeds, ["scratch", "scratch_long"], args.pretraining)
        if not args.rates:
            keep(args, name, backbone, "scratch_long", {}, result)


def keep(args: Any, name: str, backbone: str, arm: str, said: dict[str, Any], result: dict[str, Any]) -> None:
    """Runs of one curve, in place of earlier ones of the same description."""
    cells = args.runs / "masking" / name / "cells"
    runs: dict[tuple[str, int, int], dict[str, Any]] = {}
    for row in result["errors"]:
        of = "scratch" if row["arm"] == "scratch" else arm
        run = runs.setdefault((of, row["n_train"], row["seed"]), {
            "set": name, "backbone": backbone, "arm": of, "n_train": row["n_train"], "seed": row["seed"],
            "pretrain_source": args.source if row["arm"] == "full" else None, **(said if of == arm else {}),
            "pretraining_steps": None if of == "scratch" else args.pretraining,  # of scratch_long those it makes up for
            "tuning_steps": args.tuning, "lr": row["lr"], "rates": list(RATES), "steps": row["steps"],
            "train_seconds": row["train_seconds"], "pretrain_seconds": row["pretrain_seconds"], "cell": row["cell"],
        })  # fmt: skip
        run[f"{row['quantity'].removesuffix('_per_atom')}_mae"] = row["mae"]
    for (_, n, seed), run in runs.items():
        goal = _best(cells / runs["scratch", n, seed]["cell"])[1]
        history, best = _best(cells / run["cell"])
        run |= {"validation_loss": best, **_before(cells, run["cell"]), **departures(cells, run["cell"])}
        run["steps_to_error"] = next((step for step, loss in history if loss <= goal), None)
    for run in runs.values():
        run |= {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU", "torch": torch.__version__,
            "transfermium": tm.__version__, "date": datetime.date.today().isoformat(),
        }  # fmt: skip
    path = HERE / "results.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for row in rows:
        row.setdefault("pretraining_steps", None if row["arm"] == "scratch" else STEPS)  # older ones do not say it
    identity = ("set", "backbone", "tuning_steps", "arm", "n_train", "seed", "pretrain_source", "pretraining_steps")
    new = {tuple(run[k] for k in identity) for run in runs.values()}
    rows = [row for row in rows if tuple(row[k] for k in identity) not in new] + list(runs.values())
    rows.sort(key=lambda row: [f"{row[k]:6}" if isinstance(row[k], int) else str(row[k]) for k in identity])
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")


def _before(cells: Path, cell: str) -> dict[str, float]:
    """The validation loss at the end of the pre-training that a cell began from."""
    needs = json.loads((cells / cell / "cell.json").read_text())["needs"]
    if "base" not in needs:
        return {}
    return {
        "pretrain_loss": json.loads((cells / needs["base"] / "result.json").read_text())["result"]["validation loss"]
    }


def departures(cells: Path, cell: str) -> dict[str, float]:
    """Of forces that are no derivatives: how far they turn otherwise than the structure (eV/Å, root mean square), and
    the asymmetry of their Jacobian."""
    card = tm.load(cells / cell / "run/model.safetensors").card
    if "jacobian asymmetry" not in card:
        return {}
    turned = card["equivariance error"]["forces"]["rms"]
    return {"equivariance_error": turned, "jacobian_asymmetry": card["jacobian asymmetry"]}


def _best(cell: Path) -> tuple[list[tuple[int, float]], float]:
    """Steps and validation losses of a fine-tuning, and the smallest loss."""
    lines = (json.loads(line) for line in (cell / "run/metrics.jsonl").read_text().splitlines())
    history = [(line["step"], line["valid"]) for line in lines if "valid" in line]
    return history, float(np.min([loss for _, loss in history]))


if __name__ == "__main__":  # workers import this file
    main()

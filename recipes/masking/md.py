"""Does the best potential hold together? Dynamics of 64 waters; and how fast force-centric models heat up.

    python recipes/masking/run.py --data DIR --only pbe0ts --backbone GNS          and ForceNet: their models
    python recipes/masking/md.py --data DIR

The best potential is made here, of what the study found best: TensorNet, pre-trained by denoising on configurations,
fine-tuned on 100 frames for longer. 2 ps of Langevin at 300 K, from there 5 ps at constant energy and 10 ps with a
thermostat; of each force-centric backbone the model with the smallest validation loss 2 ps at constant energy. The
reference frames are of path-integral dynamics: only oxygen-oxygen distances are compared, and even these are a little
broader there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import arguments, short
from run import BACKBONES, STUDIES

import transfermium as tm
from transfermium.report.figures import COLOURS, INK, styled
from transfermium.run import write_json

HERE = Path(__file__).parent
SET, BEST, NOISE, LABELS = "pbe0ts", "TensorNet", 0.1, 100


def main() -> None:
    args = arguments(
        __doc__, warm="2ps", nve="5ps", nvt="10ps", forces="2ps", pretraining=800, tuning=4_000, edges=10_000,
        device="cpu",
    )  # fmt: skip
    reference = STUDIES[SET].test(args.data)
    found = [simulated(args, potential(args), reference, {"backbone": BEST, "n_train": LABELS}, conservative=True)]
    write_json(HERE / "simulations.json", found)
    cells = args.runs / "masking" / SET / "cells"
    rows = [row for row in json.loads((HERE / "results.json").read_text()) if row["set"] == SET]
    for backbone in (name for name, (_, conservative) in BACKBONES.items() if not conservative):
        own = [row for row in rows if row["backbone"] == backbone]
        if own:
            best = min(own, key=lambda row: row["validation_loss"])
            said = {name: best[name] for name in ("backbone", "arm", "n_train", "seed")}
            model = cells / best["cell"] / "run/model.safetensors"
            found.append(simulated(args, model, reference, said, conservative=False))
            write_json(HERE / "simulations.json", found)
    figure = drawn(args.runs, [one["backbone"] for one in found])
    figure.savefig(HERE / "simulations.svg", bbox_inches="tight", metadata={"Date": None})


def potential(args: Any) -> Path:
    """Noise first, then labels; finished stages are kept."""
    out, frames = args.runs / "masking/best", STUDIES[SET].pool(args.data)
    noise, labels = tm.Denoise(NOISE), tm.Potential(stress=0.0)
    tm.pretrain(
        frames, noise, BACKBONES[BEST][0], steps=args.pretraining, lr=2e-3, edges=args.edges, device=args.device,
        out=out / "base",
    )  # fmt: skip
    tm.finetune(
        out / "base/model.safetensors", frames[:LABELS], labels, steps=args.tuning, lr=2e-3, edges=args.edges,
        device=args.device, split_by="random", out=out / "potential",
    )  # fmt: skip
    return out / "potential/model.safetensors"


def simulated(args: Any, model: Path, reference: Any, said: dict[str, Any], *, conservative: bool) -> dict[str, Any]:
    out, start = args.runs / "masking/md" / said["backbone"], reference[0].copy()
    runs = {"warm": tm.md(model, start, out / "warm", time=args.warm, device=args.device)}
    if runs["warm"]["stopped"] is None:
        warm = out / "warm/final.extxyz"
        time = args.nve if conservative else args.forces
        runs["nve"] = tm.md(model, warm, out / "nve", ensemble="nve", time=time, device=args.device)
        if conservative:
            runs["nvt"] = tm.md(
                model, warm, out / "nvt", thermostat="bussi", time=args.nvt, reference=reference, pairs=["O-O"],
                device=args.device,
            )  # fmt: skip
    return {
        **said,
        "errors": short(tm.evaluate(model, reference, device=args.device)),
        "simulations": {k: brief(r) for k, r in runs.items()},
    }


def brief(run: dict[str, Any]) -> dict[str, Any]:
    """Without curves, and without folders of this machine."""
    own = {name: value for name, value in run.items() if name not in ("log", "rdf", "msd")}
    own["stopped"] = run["stopped"] and run["stopped"].partition(";")[0]
    if "reference" in own:
        own["reference"] = {name: value for name, value in own["reference"].items() if name != "rdf"}
    return own


@styled()
def drawn(runs: Path, backbones: list[str]) -> Figure:
    """Distances between oxygens beside the reference, and how hot each model becomes."""

    def result(backbone: str, name: str) -> dict[str, Any] | None:
        file = runs / "masking/md" / backbone / name / "simulation.json"
        return json.loads(file.read_text()) if file.exists() else None

    figure = Figure(figsize=(6.6, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    if best := result(BEST, "nvt"):
        distance = best["rdf"]["r"]
        left.plot(distance, best["reference"]["rdf"]["O-O"], color=INK, linewidth=1, dashes=(3, 2), label="reference")
        left.plot(distance, best["rdf"]["O-O"], color=COLOURS[0], label=f"{BEST}, {best['log']['time_ps'][-1]:g} ps")
        left.set(xlabel="O-O distance (Å)", ylabel="g(r)", xlim=(2, distance[-1]), ylim=(0, None))
        left.legend(frameon=False)
    for backbone, colour in zip(backbones, COLOURS, strict=False):
        if one := result(backbone, "nve"):
            right.plot(one["log"]["time_ps"], one["log"]["temperature_K"], color=colour, label=backbone)
    right.set(xlabel="time at constant energy (ps)", ylabel="temperature (K)", xlim=(0, None), ylim=(0, None))
    right.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()

"""What pre-training on a cheap functional saves at an expensive one, measured (doi 10.1039/d3dd00030c).

    python recipes/functional/run.py --data DIR                    all studies, one after the other
    python recipes/functional/run.py --data DIR --only water       one of them
    python recipes/functional/run.py --data DIR --only water-joint one curve of one of them

Finished cells are kept in `--runs`, so that the same command goes on; a finished study writes NAME.json (all errors,
laws, factors, intervals) and figures beside this file. Studies of several pairs share one folder of cells.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from ase import Atoms
from common import arguments
from matplotlib.figure import Figure

import transfermium as tm
from transfermium.data import split
from transfermium.run import write_json
from transfermium.study.curve import curve
from transfermium.study.curve_figures import drawn, grown_drawn, worth_drawn

HERE = Path(__file__).parent
KCAL = "kcal/mol"
RATES = (2e-3, 5e-4)  # of fine-tuning and of training from scratch
WIDE = (2e-3, 8e-3, 5e-4)  # where short training from scratch is better at more than those
MP = {"functional": "PBE", "u": "as in the Materials Project", "code": "VASP"}
MAD = {"functional": "PBEsol", "u": "none", "code": "Quantum ESPRESSO"}
GAPS = {"hse": "HSE", "gllbsc": "GLLB-SC", "scan": "SCAN"}
WITH_PROBE = ("scratch", "aligned", "probe", "full")
SMALL = ("alexandria-random-1k", "mpf-TP", "mpf-alkali-TP", "mptrj-random-1k", "random-TP")  # not the highest stress


def crystals(data: Path, do: Callable[..., Any]) -> None:
    """The crystals of the package, PBE to r2SCAN, and what the number of PBE structures is worth."""
    do(
        "crystals", tm.crystals("r2SCAN", "train"), tm.Potential(), base_data=tm.crystals("PBE", "train"),
        test=tm.crystals("r2SCAN", "test"), base_sizes=[30, 60, 120, 220], sizes=[5, 10, 20, 40, 64],
        arms=WITH_PROBE, backbone=tm.PaiNN(32, 2), pretraining="800steps", tuning="300steps", edges=2_000,
        target="400meV/Å", seeds=5,
    )  # fmt: skip


def water(data: Path, do: Callable[..., Any]) -> None:
    """Salt water, revPBE0-D3 to r2SCAN, energies and forces; of some arms also against scratch for as long as both."""
    shared = {
        "base_data": data / "nacl_water/revPBE0-D3.extxyz.xz", "backbone": tm.PaiNN(32, 2), "pretraining": "240s",
        "tuning": "20s", "edges": 10_000, "target": "85meV/Å", "folder": "water",
        "rates": WIDE,
    }  # fmt: skip
    labels, objective = data / "nacl_water/r2SCAN.extxyz.xz", tm.Potential(stress=0.0)
    usual = ["scratch", "aligned", "head", "full", "replay"]
    do("water", labels, objective, sizes=[5, 10, 20, 40, 80, 160], arms=usual, **shared)
    longer = ["scratch", "scratch_long", "full", "replay"]
    do("water-long", labels, objective, sizes=[10, 20, 40, 80, 160], arms=longer, **shared)
    joint = ["scratch", "probe", "full", "multi-fidelity"]
    do("water-joint", labels, objective, sizes=[10, 80], arms=joint, **shared)
    do("water-probe", labels, objective, sizes=[5, 10, 20, 40, 80, 160], arms=["scratch", "aligned", "probe"], **shared)


def molecules(data: Path, do: Callable[..., Any]) -> None:
    """Atomization energies of molecules, DFTB3 to PBE0."""
    everything = tm.read(data / "qm7_dftb3_pbe0/all.extxyz.xz")
    pool = [a for a in everything if a.info["split"] != "test"]
    ae, test = tm.Property("ae", "extensive"), [a for a in everything if a.info["split"] == "test"]
    shared: dict[str, Any] = {
        "test": test, "base_data": pool, "label": {"ae": "ae_pbe0_kcal"}, "unit": {"ae": KCAL},
        "base_label": {"ae": "ae_dftb3_kcal"}, "base_unit": {"ae": KCAL}, "cheap": "ae_dftb3_kcal",
        "backbone": tm.PaiNN(32, 2), "pretraining": "300s", "tuning": "30s", "folder": "molecules",
        "provenance": {"functional": "PBE0"}, "base_provenance": {"functional": "DFTB3"},
    }  # fmt: skip
    do(
        "molecules", pool, ae, sizes=[50, 100, 200, 400, 1200, 4800],
        arms=["scratch", "aligned", "full", "delta"], **shared,
    )  # fmt: skip
    longer = ["scratch", "scratch_long", "full", "delta"]
    do("molecules-long", pool, ae, sizes=[200, 1200], arms=longer, **shared)


FUNCTIONALS = ("LDA", "PBE", "PBEsol", "AM05")


def oxides(data: Path, do: Callable[..., Any]) -> None:
    """Equations of state of oxides at four functionals: all pairs; a third of the polymorphs is at no functional.

    Forces are not learned: in these structures they are next to zero (8 meV/Å), and weights that follow their size
    would leave nothing of energies and stress.
    """
    read = {name: tm.read(data / f"bo2_polymorphs_4xc/{name}.extxyz.xz") for name in FUNCTIONALS}
    for structures in read.values():
        for atoms in structures:
            atoms.info["material_id"] = f"{atoms.info['oxide']} {atoms.info['polymorph']}"
    divided = split(read["PBE"], 1 / 3, by="material_id", seed=0)
    unseen = {read["PBE"][int(i)].info["material_id"] for i in divided.valid}
    for base, target in permutations(FUNCTIONALS, 2):
        do(
            f"oxides-{base}-{target}", [a for a in read[target] if a.info["material_id"] not in unseen],
            tm.Potential(forces=0.0), folder="oxides",
            base_data=[a for a in read[base] if a.info["material_id"] not in unseen],
            test=[a for a in read[target] if a.info["material_id"] in unseen], sizes=[10, 20, 40, 80, 160],
            arms=WITH_PROBE, backbone=tm.PaiNN(32, 2), pretraining="1000steps", tuning="300steps", edges=3_000,
            target="30meV/atom", seeds=6,
        )  # fmt: skip


def volumes(data: Path, do: Callable[..., Any]) -> None:
    """From one property to another: volumes of oxides to how stable they are; the oxide of iridium is new to both."""
    structures = tm.read(data / "bo2_polymorphs_4xc/PBE.extxyz.xz")
    curves: dict[tuple[str, str], list[Atoms]] = {}
    for atoms in structures:
        curves.setdefault((atoms.info["oxide"], atoms.info["polymorph"]), []).append(atoms)
    best = {name: min(own, key=lambda a: a.get_potential_energy()) for name, own in curves.items()}
    for (oxide, _), own in curves.items():
        lowest = min(a.get_potential_energy() / len(a) for (other, _), a in best.items() if other == oxide)
        at_rest = best[oxide, own[0].info["polymorph"]]
        for atoms in own:
            atoms.info["volume_at_rest"] = at_rest.get_volume() / len(at_rest)
            atoms.info["above_ground_state"] = atoms.get_potential_energy() / len(atoms) - lowest
    known = [a for a in structures if a.info["oxide"] != "IrO2"]
    do(
        "volumes", known, tm.Property("above_ground_state"), unit={"above_ground_state": "eV/atom"}, base_data=known,
        base_objective=tm.Property("volume_at_rest"), test=[a for a in structures if a.info["oxide"] == "IrO2"],
        arms=["scratch", "scratch_long", "probe", "full"], sizes=[10, 20, 40, 80, 160], backbone=tm.PaiNN(32, 2),
        pretraining="1000steps", tuning="300steps",
    )  # fmt: skip


def gaps(data: Path, do: Callable[..., Any]) -> None:
    """Band gaps, PBE to HSE, GLLB-SC and SCAN: transfer against joint training, with and without bond lengths."""
    everything = tm.read(data / "mp_gap_multifidelity/all.extxyz.xz")
    sides = {side: [a for a in everything if a.info["split"] == side] for side in ("train", "test")}
    cheap = [a for a in sides["train"] if "gap_pbe" in a.info]
    sizes = [40, 160, 640]
    tensornet = tm.TensorNet(32, 2), tm.Property("gap")
    cgat = tm.CGAT(), tm.Property("gap", pooling="composition", uncertainty=True)  # the head and loss that belong to it
    for name, (backbone, objective), level, most in (
        ("TensorNet-hse", tensornet, "hse", 640), ("CGAT-hse", cgat, "hse", 640),
        ("TensorNet-gllbsc", tensornet, "gllbsc", 640), ("TensorNet-scan", tensornet, "scan", 160),
    ):  # fmt: skip
        own = {
            side: [a for a in some if f"gap_{level}" in a.info and "gap_pbe" in a.info] for side, some in sides.items()
        }
        do(
            f"gaps-{name}", own["train"], objective, folder="gaps", test=own["test"],
            label={"gap": f"gap_{level}"}, unit={"gap": "eV"}, base_data=cheap, base_label={"gap": "gap_pbe"},
            base_unit={"gap": "eV"}, cheap="gap_pbe", backbone=backbone,
            provenance={"functional": GAPS[level]}, base_provenance={"functional": "PBE"},
            arms=["scratch", "aligned", "probe", "full", "multi-fidelity", "delta"],
            sizes=[n for n in sizes if n <= most], pretraining="60s", tuning="20s",
        )  # fmt: skip


def elements(data: Path, do: Callable[..., Any]) -> None:
    """85 elements, PBE with U (VASP) to PBEsol without (Quantum ESPRESSO), and curves over both."""
    do(
        "elements", data / "mad_pbesol_1000/all.extxyz.xz", tm.Potential(),
        base_data=[data / f"mattersim_benchmarks/{name}.extxyz.xz" for name in SMALL],
        base_sizes=[500, 1400, 4000], sizes=[20, 60, 180, 540], arms=WITH_PROBE, backbone=tm.TensorNet(32, 2),
        pretraining="240s", tuning="30s", edges=8_000, provenance=MAD, base_provenance=MP,
    )  # fmt: skip


STUDIES = {
    "crystals": crystals,
    "water": water,
    "molecules": molecules,
    "oxides": oxides,
    "volumes": volumes,
    "gaps": gaps,
    "elements": elements,
}


def main() -> None:
    args = arguments(__doc__, only="", seeds=0, workers=2)

    def do(name: str, structures: Any, objective: tm.Objective, folder: str | None = None, **given: Any) -> None:
        if args.only not in ("", name, name.split("-")[0]):
            return
        out = args.runs / "functional" / (folder or name)
        print(f"\n{name}", flush=True)
        seeds = {"seeds": args.seeds} if args.seeds else {}
        result = curve(structures, objective, out, workers=args.workers, **{"rates": RATES, **given} | seeds)
        write_json(HERE / f"{name}.json", result)
        first, *others = result["units"]
        figures: dict[str, Figure | None] = {name: drawn(result, first)}
        figures |= {
            f"{name}-{quantity.split('_')[0]}": drawn(result, quantity) for quantity in others if folder is None
        }
        figures[f"{name}-pretraining"] = grown_drawn(result, first)
        if "equal compute" in result:
            figures[f"{name}-worth"] = worth_drawn(result, first)
        for file, figure in figures.items():
            if figure is not None:
                figure.savefig(HERE / f"{file}.svg", bbox_inches="tight", metadata={"Date": None})

    for name, study in STUDIES.items():
        if args.only.split("-")[0] in ("", name):
            study(args.data, do)


if __name__ == "__main__":  # workers import this file
    main()

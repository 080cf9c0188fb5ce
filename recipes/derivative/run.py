"""Do derivatives of a scalar, and labels, pre-train better than direct outputs, and noise? (doi 10.1039/d3dd00214d)

    python recipes/derivative/run.py --data DIR                 the core grid: two hours on two cores
    python recipes/derivative/run.py --data DIR --arms all      all eleven arms
    python recipes/derivative/run.py --data DIR --backbone ET --only phonons,dielectric     other models, some targets
    python recipes/derivative/collect.py                        what is finished, into results.json

A study of six properties from few labels. Two levels of theory are pre-trained on together, PBE and PBEsol, each with
an energy of its own. Finished cells are kept in `--runs`, so that the same command goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ase import Atoms

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import arguments

import transfermium as tm
from transfermium import Denoise, Objective
from transfermium.study.bakeoff import ARMS, Arm, Target, bakeoff

FILES = (
    "alexandria-random-1k",
    "mpf-TP",
    "mpf-alkali-TP",
    "mptrj-random-1k",
    "random-TP",
)  # not the highest-stress file
CORE = ("denoise_derivative", "efs_direct", "efs_derivative")  # beside the two controls
ALL = (*CORE, "denoise_direct", "e_derivative", "f_derivative", "fs_derivative", "dens_derivative")
RATES, EDGES = (4e-3, 1e-3), 8_000
BACKBONES = {"TensorNet": tm.TensorNet(32, 2), "CGCNN": tm.CGCNN(64, 64, 3, cutoff=5.0), "ET": tm.ET(32, 3)}
IN_DOMAIN = "denoise_in_domain"  # on unlabelled perovskites, of which one target is about, and carbon


def cheap(data: Path) -> dict[str, Sequence[Atoms]]:
    """Two levels of theory to pre-train on."""
    return {
        "pbe": tm.read(*(data / f"mattersim_benchmarks/{name}.extxyz.xz" for name in FILES)),
        "pbesol": tm.read(data / "mad_pbesol_1000/all.extxyz.xz"),
    }


def targets(data: Path) -> dict[str, Target]:
    def table(name: str, label: str, key: str, test: object) -> Target:
        everything = tm.read(data / name)
        train = [a for a in everything if a.info[key] != test]
        return Target(train, tm.Property(label), [a for a in everything if a.info[key] == test])

    return {
        "phonons": table("matbench_phonons/all.extxyz.xz", "last_phdos_peak", "test_fold", 0),
        "jdft2d": table("matbench_jdft2d/all.extxyz.xz", "exfoliation_en", "test_fold", 0),
        "dielectric": table("dielectric_1056/all.extxyz.xz", "n", "cv_fold", 0),
        "nomad2018": table("nomad2018/train.extxyz.xz", "bandgap_energy_ev", "cv_fold", 0),
        "perov5": Target(
            tm.read(data / "perov5/train_labelled_from_val.extxyz.xz"),
            tm.Property("heat_ref"),
            tm.read(data / "perov5/test_labelled_from_test.extxyz.xz"),
        ),
        "qmof": table("qmof_small/all.extxyz.xz", "band_gap", "split", "test"),
    }


def arms(data: Path, chosen: str) -> dict[str, Objective | Arm]:
    found: dict[str, Objective | Arm] = {name: ARMS[name] for name in (CORE if chosen == "core" else ALL)}
    if chosen == "all":
        unlabelled = (data / f"{name}/unlabelled_train.extxyz.xz" for name in ("perov5", "carbon24"))
        found[IN_DOMAIN] = Arm(Denoise(), tm.read(*unlabelled))
    return found


def main() -> None:
    args = arguments(
        __doc__, arms="core", backbone="TensorNet", only="", seeds=3, workers=2, pretraining="180s", tuning="30s"
    )
    wanted = targets(args.data)
    bakeoff(
        cheap(args.data),
        {name: wanted[name] for name in args.only.split(",") if name} or wanted,
        args.runs / "derivative",
        arms=arms(args.data, args.arms),
        backbones={args.backbone: BACKBONES[args.backbone]},
        pretraining=args.pretraining,
        tuning=args.tuning,
        seeds=args.seeds,
        rates=RATES,
        edges=EDGES,
        workers=args.workers,
    )


if __name__ == "__main__":  # workers import this file
    main()

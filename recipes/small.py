"""The small model that ships with the package: TensorNet, energies, forces and stress of crystals, at the PBE level.

    python recipes/small.py --data DIR        an hour on one core; the model goes into the package

Three levels of theory are learned together, each with an energy of its own: PBE (and PBE+U) of VASP, PBEsol of Quantum
ESPRESSO and PBE of GPAW, whose energy zeros differ. The first one is kept. What matches a structure that is tested on
here, by the recipes for Matbench and derivatives, or in mlearn, is not trained on.
"""

import json
from pathlib import Path

from common import arguments, record, short, timed

import transfermium as tm

PBE = ("alexandria-random-1k", "mpf-TP", "mpf-alkali-TP", "mptrj-random-1k", "random-TP")
FOLD = {
    "matbench_phonons": "test_fold",
    "matbench_jdft2d": "test_fold",
    "dielectric_1056": "cv_fold",
    "nomad2018": "cv_fold",
}


def main() -> None:
    args = arguments(__doc__, width=64, minutes=30)
    everything = {name: tm.read(args.data / f"mattersim_benchmarks/{name}.extxyz.xz") for name in PBE}
    pbesol = list(tm.read(args.data / "mad_pbesol_1000/all.extxyz.xz"))
    tests = {name: [a for a in found if a.info["split"] == "test"] for name, found in everything.items()}
    targets = [
        a for name, key in FOLD.items() for a in tm.read(*(args.data / name).glob("*.extxyz.xz")) if a.info[key] == 0
    ]
    targets += [a for a in tm.read(args.data / "qmof_small/all.extxyz.xz") if a.info["split"] == "test"]
    targets += tm.read(args.data / "perov5/test_labelled_from_test.extxyz.xz")
    targets += tm.read(*sorted((args.data / "mlearn").glob("*_test.extxyz.xz")))

    levels = {
        "pbe": [a for found in everything.values() for a in found if a.info["split"] != "test"],
        "pbesol": [a for a in pbesol if a.info["split"] != "test"],
        "gpaw": tm.crystals("PBE", "train"),
    }
    for name, found in (("PBE and PBE+U, VASP", levels["pbe"]), ("PBEsol, Quantum ESPRESSO", levels["pbesol"])):
        for atoms in found:
            atoms.info["level"] = name
    tests["mad_pbesol_1000"] = [a for a in pbesol if a.info["split"] == "test"]
    tests["crystals"] = tm.crystals("PBE", "test")
    part = {"mad_pbesol_1000": "pbesol", "crystals": "gpaw"}

    whole, cpu = timed(
        tm.pretrain, levels, tm.Together({level: tm.Potential() for level in levels}), tm.TensorNet(args.width),
        processor_time=f"{args.minutes}min", edges=16_000, out=args.runs / "small", device="cpu",
        held_out=[a for found in tests.values() for a in found] + targets,
    )  # fmt: skip
    path = Path(tm.__file__).parent / "pretrained/small.safetensors"
    path.parent.mkdir(exist_ok=True)
    whole.part("pbe").save(path)
    for name, test in tests.items():
        errors = tm.evaluate(whole, test, part=part.get(name, "pbe"), verbose=False)
        record("small", task=name, n=len(test), cpu_seconds=cpu, errors=short(errors))
    print(json.dumps({"file": str(path), "MB": path.stat().st_size / 1e6}))


if __name__ == "__main__":
    main()

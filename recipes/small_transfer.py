"""What is the small model that ships good for? Three properties from a hundred labels each.

    python recipes/small_transfer.py --data DIR        a quarter of an hour on one core

Fine-tuned, probed (a Gaussian process or ridge regression on its features), and the same architecture from scratch with
the time of fine-tuning. One learning rate for all. Tested on a fold that the model never saw (recipes/small.py).
"""

import time

import numpy as np
from common import arguments, record, short

import transfermium as tm
from transfermium.data import nested

TARGETS = {
    "matbench_phonons": ("all", "last_phdos_peak", "test_fold"),
    "matbench_jdft2d": ("all", "exfoliation_en", "test_fold"),
    "nomad2018": ("train", "bandgap_energy_ev", "cv_fold"),
}


def main() -> None:
    args = arguments(__doc__, labels=100, seconds=40, seeds=3, arms="scratch,full,probe")
    for name, (file, label, key) in TARGETS.items():
        everything = tm.read(args.data / name / f"{file}.extxyz.xz")
        test = [a for a in everything if a.info[key] == 0]
        pool = [a for a in everything if a.info[key] != 0]
        pool = [pool[i] for i in np.setdiff1d(np.arange(len(pool)), [leak.index for leak in tm.leaks(pool, test)])]
        for seed in range(args.seeds):
            chosen = [pool[int(i)] for i in nested(np.arange(len(pool)), [args.labels], seed=seed)[0]]
            for arm in args.arms.split(","):
                start = time.process_time()
                model = trained(arm, chosen, tm.Property(label), args.seconds, seed)
                cpu = round(time.process_time() - start, 1)
                errors = short(tm.evaluate(model, test, verbose=False))
                run = {"task": name, "arm": arm, "seed": seed, "n_train": args.labels}
                record("small_transfer", **run, cpu_seconds=cpu, errors=errors)


def trained(arm: str, structures: list, objective: tm.Property, seconds: int, seed: int) -> tm.Model:
    options = {"seed": seed, "verbose": False, "device": "cpu"}
    if arm == "probe":  # leaves one out, and so needs no other labels to choose by
        return tm.finetune("small", structures, objective, strategy="probe", valid_fraction=0, **options)
    options |= {"valid_fraction": 0.2, "processor_time": f"{seconds}s", "lr": 2e-3, "edges": 8_000}
    if arm == "scratch":
        return tm.pretrain(structures, objective, tm.TensorNet(64), **options)
    return tm.finetune("small", structures, objective, **options)


if __name__ == "__main__":
    main()

"""Does pre-training on energies, forces and stress help phonon peaks and exfoliation energies?

    python recipes/matbench.py --data DIR

Pre-trains on the PBE crystals of `mattersim_benchmarks` (without its highest-stress file), fine-tunes on official
folds of `matbench_phonons` and `matbench_jdft2d`. Beside it, the same model from scratch with the same fine-tuning
steps, and from scratch with the compute of pre-training plus fine-tuning. About an hour on one core.
"""

from ase.formula import Formula
from common import arguments, record, short, timed

import transfermium as tm

FILES = ("alexandria-random-1k", "mpf-TP", "mpf-alkali-TP", "mptrj-random-1k", "random-TP")
TASKS = {"matbench_jdft2d": "exfoliation_en", "matbench_phonons": "last_phdos_peak"}

args = arguments(__doc__, width=32, pretraining=1000, steps=1200, seeds=2, folds="0", tasks=",".join(TASKS))
cheap = tm.read(*(args.data / f"mattersim_benchmarks/{name}.extxyz.xz" for name in FILES))
tables = {task: tm.read(args.data / f"{task}/all.extxyz.xz") for task in TASKS}


def formula(atoms) -> str:
    return Formula(atoms.get_chemical_formula()).reduce()[0].format("metal")


def architecture() -> tm.TensorNet:
    return tm.TensorNet(width=args.width)


for fold in map(int, args.folds.split(",")):
    # No composition of a test material is pre-trained on.
    hidden = {formula(a) for table in tables.values() for a in table if a.info["test_fold"] == fold}
    base, pretraining_cpu = timed(
        tm.pretrain, [a for a in cheap if formula(a) not in hidden], tm.Potential(), architecture(),
        steps=args.pretraining, out=args.runs / f"matbench-base-{fold}",
    )  # fmt: skip
    for task, seed in [(task, seed) for task in args.tasks.split(",") for seed in range(args.seeds)]:
        test = [a for a in tables[task] if a.info["test_fold"] == fold]
        train = [a for a in tables[task] if a.info["test_fold"] != fold]
        objective, run = tm.Property(TASKS[task]), f"{args.runs}/{task}-{fold}-{seed}"
        options = {"seed": seed, "lr": 1e-3, "edges": 5_000}

        scratch, cpu = timed(
            tm.pretrain, train, objective, architecture(), steps=args.steps, out=f"{run}-scratch", **options
        )
        transfer, tuning_cpu = timed(
            tm.finetune, base, train, objective, steps=args.steps, out=f"{run}-transfer", **options
        )
        more = args.steps + round(args.steps * pretraining_cpu / cpu)
        longer, long_cpu = timed(
            tm.pretrain, train, objective, architecture(), steps=more, out=f"{run}-long", **options
        )
        for arm, model, steps, seconds in (
            ("scratch", scratch, args.steps, cpu),
            ("transfer", transfer, args.steps, pretraining_cpu + tuning_cpu),
            ("scratch, equal compute", longer, more, long_cpu),
        ):
            errors = short(tm.evaluate(model, test, verbose=False))
            record(
                "matbench", task=task, fold=fold, seed=seed, arm=arm, steps=steps, width=args.width,
                cpu_seconds=seconds, errors=errors,
            )  # fmt: skip

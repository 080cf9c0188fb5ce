"""Silicon and copper, trained one element at a time, against published models on the same test sets.

    python recipes/mlearn.py --data DIR

Data set `mlearn` with its official training and test files. About 8 minutes per element on one core.
"""

from common import arguments, record, short, timed

import transfermium as tm

PUBLISHED = {  # force MAE, meV/Å (JARVIS-Leaderboard, on these test sets)
    "Si": {"ALIGNN-FF": 69.4, "NequIP": 90.1, "M3GNet": 112, "CHGNet": 136, "SNAP": 176},
    "Cu": {"M3GNet": 17.7, "ALIGNN-FF": 19.4, "SNAP": 59.6},
}

args = arguments(__doc__, steps=1200, width=32, seed=0, elements="Si,Cu")
for element in args.elements.split(","):
    model, cpu = timed(
        tm.pretrain,
        tm.read(args.data / f"mlearn/{element}_train.extxyz.xz"),
        tm.Potential(),
        tm.TensorNet(width=args.width),
        steps=args.steps,
        lr=2e-3,
        seed=args.seed,
        split_by="random",
        out=args.runs / f"mlearn-{element}-{args.seed}",
    )
    errors = tm.evaluate(model, tm.read(args.data / f"mlearn/{element}_test.extxyz.xz"))
    record(
        "mlearn",
        task=element,
        seed=args.seed,
        steps=args.steps,
        width=args.width,
        cpu_seconds=cpu,
        errors=short(errors),
        published_forces_mae_meV=PUBLISHED[element],
    )

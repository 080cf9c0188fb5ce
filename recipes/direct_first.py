"""Is training cheaper with direct forces first and derivatives after? (arXiv:2412.11569)

    python recipes/direct_first.py --data DIR        twenty minutes on one core

100 frames of liquid water (`water_pbe0ts`), energies and forces, the same processor time for both: a conservative
potential from the start, or half of the time with forces as an output of their own and the other half conservatively.
Each has the better of two learning rates by its validation frames (the first half of the time has one rate); 80 frames
test.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ase import Atoms
from common import arguments, record, short

import transfermium as tm
from transfermium.data import nested

BACKBONES = {"EGNN": tm.EGNN(32, 3, cutoff=4.0), "TensorNet": tm.TensorNet(32, 2, cutoff=4.0)}
RATES = (2e-3, 5e-4)
CONSERVATIVE, DIRECT = (tm.Potential(stress=0.0, conservative=conservative) for conservative in (True, False))


def main() -> None:
    args = arguments(__doc__, labels=100, seconds=60.0, seeds=3, backbones="EGNN,TensorNet")
    pool = tm.read(args.data / "water_pbe0ts/train.extxyz.xz")
    test = tm.read(args.data / "water_pbe0ts/val.extxyz.xz")
    for seed in range(args.seeds):
        frames = [pool[int(i)] for i in nested(range(len(pool)), [args.labels], seed=seed)[0]]
        for backbone in args.backbones.split(","):
            for arm, train in arms(frames, BACKBONES[backbone], args.seconds, seed).items():
                models = {lr: train(lr) for lr in RATES}
                losses = {lr: model.card["history"][-1]["best validation loss"] for lr, model in models.items()}
                rate = min(losses, key=losses.__getitem__)
                stages = models[rate].card["history"]
                record(
                    "direct_first", task=backbone, arm=arm, seed=seed, n_train=args.labels, seconds=args.seconds,
                    lr=rate, steps=[stage["steps"] for stage in stages],
                    cpu_seconds=sum(stage["processor seconds"] for stage in stages),
                    errors=short(tm.evaluate(models[rate], test, verbose=False)),
                )  # fmt: skip


def arms(
    frames: Sequence[Atoms], backbone: tm.Backbone, seconds: float, seed: int
) -> dict[str, Callable[[float], tm.Model]]:
    """Functions of the learning rate."""

    def options(lr: float, seconds: float) -> dict[str, Any]:
        time = {"processor_time": f"{seconds:g}s", "lr": lr}
        return {**time, "seed": seed, "split_by": "random", "device": "cpu", "verbose": False}

    direct = tm.pretrain(frames, DIRECT, backbone, **options(RATES[0], seconds / 2))
    return {
        "conservative": lambda lr: tm.pretrain(frames, CONSERVATIVE, backbone, **options(lr, seconds)),
        "direct first": lambda lr: tm.finetune(direct, frames, CONSERVATIVE, **options(lr, seconds / 2)),
    }


if __name__ == "__main__":
    main()

"""Is training cheaper with direct forces first and derivatives after? (arXiv:2412.11569)

    python recipes/direct_first.py --data DIR        an hour on one core

100 frames of liquid water (`water_pbe0ts`), energies and forces, the same processor time for both: a conservative
potential from the start, or half of the time with forces as an output of their own and the other half conservatively.
Each stage has the best of four learning rates by its validation frames; 80 frames test.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ase import Atoms
from common import arguments, record, short

import transfermium as tm
from transfermium.data import nested

BACKBONES = {"EGNN": tm.EGNN(32, 3, cutoff=4.0), "TensorNet": tm.TensorNet(32, 2, cutoff=4.0)}
RATES = (3e-2, 8e-3, 2e-3, 5e-4)
CONSERVATIVE, DIRECT = (tm.Potential(stress=0.0, conservative=conservative) for conservative in (True, False))


def main() -> None:
    args = arguments(__doc__, labels=100, seconds=60.0, seeds=3, backbones="EGNN,TensorNet")
    pool = tm.read(args.data / "water_pbe0ts/train.extxyz.xz")
    test = tm.read(args.data / "water_pbe0ts/val.extxyz.xz")
    for seed in range(args.seeds):
        frames = [pool[int(i)] for i in nested(range(len(pool)), [args.labels], seed=seed)[0]]
        for backbone in args.backbones.split(","):
            for arm, train in arms(frames, BACKBONES[backbone], args.seconds, seed).items():
                model, rate = best(train)
                stages = model.card["history"]
                record(
                    "direct_first", task=backbone, arm=arm, seed=seed, n_train=args.labels, seconds=args.seconds,
                    lr=rate, steps=[stage["steps"] for stage in stages],
                    cpu_seconds=sum(stage["processor seconds"] for stage in stages),
                    errors=short(tm.evaluate(model, test, verbose=False)),
                )  # fmt: skip


def best(train: Callable[[float], tm.Model]) -> tuple[tm.Model, float]:
    """The model of the rate with the smallest validation loss, and that rate."""
    models = {lr: train(lr) for lr in RATES}
    rate = min(models, key=lambda lr: float(models[lr].card["history"][-1]["best validation loss"]))
    return models[rate], rate


def arms(
    frames: Sequence[Atoms], backbone: tm.Backbone, seconds: float, seed: int
) -> dict[str, Callable[[float], tm.Model]]:
    """Functions of the learning rate."""

    def options(lr: float, seconds: float) -> dict[str, Any]:
        time = {"processor_time": f"{seconds:g}s", "lr": lr}
        return {**time, "seed": seed, "split_by": "random", "device": "cpu", "verbose": False}

    direct, _ = best(lambda lr: tm.pretrain(frames, DIRECT, backbone, **options(lr, seconds / 2)))
    return {
        "conservative": lambda lr: tm.pretrain(frames, CONSERVATIVE, backbone, **options(lr, seconds)),
        "direct first": lambda lr: tm.finetune(direct, frames, CONSERVATIVE, **options(lr, seconds / 2)),
    }


if __name__ == "__main__":
    main()

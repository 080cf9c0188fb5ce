"""Does longer pre-training help more? The arm of energies, forces and stress, pre-trained for other times.

    python recipes/derivative/dose.py --data DIR --pretraining 720s

Everything else, and the cells of training from scratch to compare with, are those of run.py, in the same folder.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import arguments
from run import BACKBONES, EDGES, RATES, cheap, targets

from transfermium.study.bakeoff import ARMS
from transfermium.study.cells import run
from transfermium.study.plan import Plan


def main() -> None:
    args = arguments(
        __doc__, arm="efs_derivative", backbone="TensorNet", seeds=3, workers=2, pretraining="720s", tuning="30s"
    )
    plan = Plan(cheap(args.data), {}, targets(args.data), args.runs / "derivative", {}, {}, None, False)
    settings = {"pretraining": args.pretraining, "tuning": args.tuning, "edges": EDGES}

    def cell(target: str, seed: int, rate: float):
        size = plan.sizes[target][-1]
        return plan.cell(
            {args.arm: ARMS[args.arm]}, BACKBONES, settings, target, args.backbone, args.arm, size, seed, rate
        )

    search = {target: [cell(target, 0, rate) for rate in RATES] for target in plan.targets}
    found = dict(run([one for tried in search.values() for one in tried], plan.out, workers=args.workers))
    losses = {target: [found[one]["validation loss"] or np.inf for one in tried] for target, tried in search.items()}
    rates = {target: RATES[int(np.argmin(tried))] for target, tried in losses.items()}
    rest = [cell(target, seed, rate) for seed in range(args.seeds) for target, rate in rates.items()]
    list(run(rest, plan.out, workers=args.workers))


if __name__ == "__main__":  # workers import this file
    main()

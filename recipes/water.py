"""Liquid water from 100 frames: a potential, its errors, and molecular dynamics that conserves energy.

    python recipes/water.py --data DIR

PBE0+TS frames of path-integral dynamics (data set `water_pbe0ts`). About 40 minutes on one core.
"""

import numpy as np
from ase import units
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import Stationary, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from common import arguments, record, short, timed

import transfermium as tm

args = arguments(__doc__, steps=3000, width=32, seed=0, frames=100, equilibration=1.0, production=2.0)
frames = tm.read(args.data / "water_pbe0ts/train.extxyz.xz")
test = tm.read(args.data / "water_pbe0ts/val.extxyz.xz")
chosen = np.random.default_rng(args.seed).permutation(len(frames))[: args.frames]

model, cpu = timed(
    tm.pretrain,
    [frames[i] for i in sorted(chosen)],
    tm.Potential(),
    tm.TensorNet(width=args.width),
    steps=args.steps,
    lr=2e-3,
    seed=args.seed,
    split_by="random",
    out=args.runs / f"water-{args.frames}-{args.seed}",
)
errors = tm.evaluate(model, test)
result = {"arm": f"{args.frames} frames", "seed": args.seed, "steps": args.steps, "width": args.width}
record("water", task="errors", **result, cpu_seconds=cpu, errors=short(errors))

atoms = test[0].copy()
atoms.calc = tm.Calculator(model)
rng = np.random.default_rng(args.seed)
thermalize_momenta(atoms, temperature_K=300, rng=rng)
step = 0.5 * units.fs
Langevin(atoms, step, temperature_K=300, friction=0.01 / units.fs, rng=rng, fixcm=False).run(
    int(args.equilibration * 2000)
)

Stationary(atoms)

times, totals, temperatures = [], [], []
dynamics = VelocityVerlet(atoms, step)


def observe() -> None:
    times.append(dynamics.get_time() / (1000 * units.fs))
    totals.append(1000 * atoms.get_total_energy() / len(atoms))
    temperatures.append(atoms.get_temperature())


dynamics.attach(observe, interval=10)
dynamics.run(int(args.production * 2000))
drift = float(np.polyfit(times, totals, 1)[0])
detrended = np.array(totals) - np.polyval(np.polyfit(times, totals, 1), times)
record(
    "water",
    task="molecular dynamics",
    **result,
    langevin_ps=args.equilibration,
    nve_ps=args.production,
    drift_meV_per_atom_per_ps=round(drift, 4),
    fluctuation_meV_per_atom=round(float(detrended.std()), 4),
    mean_temperature_K=round(float(np.mean(temperatures)), 1),
)

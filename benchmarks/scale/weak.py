"""Weak scaling: twice the processes on steps of twice the size, one core each.

    python benchmarks/scale/weak.py             # two minutes on two cores that do nothing else
    python benchmarks/scale/weak.py --quick     # seconds; keeps no result

Rounds of one and of two processes alternate, each process bound to one core with one thread. What one process does
while the other core idles is compared with what two do: clocks and memory that cores share are part of the price. On a
machine that others use only the processor seconds mean something; they leave out what processes wait for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from big import keep, made_up

WARM_UP = 5  # steps
EDGES = 40_000  # of each process and step, as four boxes of 192 atoms of water have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round of ten steps; results are only printed")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps, rounds = (10, 1) if options.quick else (options.steps, options.rounds)
    if options.rank is not None:
        print(json.dumps(worker(options.rank, steps)))
        return

    found: dict[int, list[tuple[float, float]]] = {1: [], options.processes: []}
    for _ in range(rounds):
        for processes in found:
            found[processes].append(together(processes, steps))
    alone, shared = (median(rate for rate, _ in found[n]) for n in found)
    cpu_alone, cpu_shared = (median(cpu for _, cpu in found[n]) for n in found)
    result = {
        "processes": options.processes,
        "model": "PaiNN 64x3, 5 Å, float32, energies and forces",
        "edges_per_process": EDGES,
        "structures_per_s_of_one": round(alone, 2),
        "structures_per_s_of_all": round(shared, 2),
        "speedup": round(shared / alone, 3),
        "cpu_s_per_structure": [round(cpu_alone, 4), round(cpu_shared, 4)],
        "speedup_by_cpu": round(options.processes * cpu_alone / cpu_shared, 3),
        "rounds": {str(n): [round(rate, 2) for rate, _ in found[n]] for n in found},
    }
    print(json.dumps(result, indent=1))
    if not options.quick:
        keep("weak", result, "processes")


def together(processes: int, steps: int) -> tuple[float, float]:
    """Structures per second, and processor seconds per structure, of all processes together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--steps", str(steps), "--rank"]
    running = [
        subprocess.Popen([*command, str(rank)], env={**os.environ, **world, "RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(processes)
    ]
    outputs = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    n = sum(output["structures"] for output in outputs)
    return n / max(output["seconds"] for output in outputs), sum(output["cpu"] for output in outputs) / n


def worker(rank: int, steps: int) -> dict[str, Any]:
    """Train; the first steps are not timed."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    import torch

    import transfermium as tm
    from transfermium import distributed
    from transfermium.data import Labelled, resolve
    from transfermium.train import TrainConfig, train

    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = [atoms * (2, 2, 2) for atoms in made_up(256 * int(os.environ["WORLD_SIZE"]))]
    for atoms in found:
        atoms.info["energy"] = 0.0
        atoms.arrays["forces"] = 0 * atoms.positions
    structures = list(Labelled(found, resolve(found, ["energy", "forces"])))
    objective = tm.Potential(1.0, 1.0, 0.0)
    model = tm.Model(tm.PaiNN(64, 3), objective.outputs(64))
    config = TrainConfig(steps=WARM_UP + steps, edges=EDGES, device="cpu")
    start, cpu, count = 0.0, 0.0, 0
    members = sys.modules["transfermium.train"]._Run._optimise

    def counted(self: Any, batches: Any, *rest: Any) -> Any:
        nonlocal count
        count += sum(len(piece.members) for piece in batches)
        return members(self, batches, *rest)

    sys.modules["transfermium.train"]._Run._optimise = counted  # type: ignore[attr-defined]
    for progress in train(model, objective, structures, config):
        if progress.step == WARM_UP:
            distributed.barrier()
            start, cpu, count = time.perf_counter(), time.process_time(), 0
    cpu = time.process_time() - cpu
    distributed.barrier()
    return {"structures": count, "seconds": time.perf_counter() - start, "cpu": cpu}


if __name__ == "__main__":
    main()

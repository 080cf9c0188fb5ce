"""One measurement in one environment: `worker.py JOB`, where JOB is JSON; the last line printed is its result.

Imports nothing of transfermium, unless that is what is measured.
"""

import argparse
import importlib
import itertools
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from peers import Peer, Setting
from workloads import (
    CUTOFF,
    VALIDATION,
    WORKLOADS,
    Targets,
    Workload,
    batches,
    edges,
    elements,
    energy_per_atom,
    loss,
    structures,
    targets,
)

Job = argparse.Namespace  # see run.py, which makes it
Measures = dict[str, Any]

WATER_BOXES = 9  # that inference goes through
CRYSTALS = 100  # that are prepared
VALIDATE_EVERY = 10  # steps
VALIDATION_BOXES = 20
RISE = 20  # steps until the learning rate is reached


def main() -> None:
    warnings.filterwarnings("ignore")
    job = Job(**json.loads(sys.argv[1]))
    torch.set_num_threads(job.threads)
    measures = TASKS[job.task](job)
    print(json.dumps({"version": version(job.package), "torch": torch.__version__} | measures))


class Ready(NamedTuple):
    """A peer and the structures it works on."""

    peer: Peer
    found: list[Any]
    workload: Workload
    reference: float  # eV/atom
    about: Measures

    def step_inputs(self, structures_: list[Any]) -> tuple[Any, Targets]:
        """A batch and its targets."""
        graphs = [self.peer.prepare(atoms) for atoms in structures_]
        return self.peer.collate(graphs), targets(structures_, self.workload, self.reference)


def ready(job: Job) -> Ready:
    """Read the data and build the untrained model."""
    workload = WORKLOADS[job.workload]
    found = structures(Path(job.data), workload.file)
    sample = found[:50]
    setting = Setting(
        backbone=job.backbone,
        width=job.width,
        layers=job.layers,
        cutoff=CUTOFF,
        elements=elements(found),
        neighbors=sum(map(edges, sample)) / sum(map(len, sample)),
        outputs=workload.outputs,
        compiled=job.compiled,
    )
    torch.manual_seed(0)
    peer: Peer = importlib.import_module(f"peers.{job.peer}").Peer(setting)
    parameters = sum(p.numel() for p in peer.model.parameters() if p.requires_grad)
    reference = fmean(energy_per_atom(atoms, workload) for atoms in found)
    return Ready(peer, found, workload, reference, {"parameters": parameters, "baseline_mb": peak_mb()})


# -- the tasks ---------------------------------------------------------------------------------------------------


def train(job: Job) -> Measures:
    """Training steps over a few batches again and again; the median of each batch counts, the first pass does not."""
    peer, found, workload, _, about = prepared = ready(job)
    groups = batches(found, workload.batch)[: 4 if job.workload == "W2" else 2]
    inputs = [prepared.step_inputs(group) for group in groups]
    peer.model.train()
    optimizer = torch.optim.Adam(peer.model.parameters(), lr=1e-4)

    works = [partial(step, peer, optimizer, *one) for one in inputs]
    warm_up, _ = clocks(lambda: [work() for work in works])
    wall, cpu = median_times(works, job.seconds).mean(axis=0)
    return about | {
        "edges_per_step": round(fmean(sum(map(edges, group)) for group in groups)),
        "stress": "stress" in peer(inputs[0][0]),
        "structures_per_s": workload.batch / wall,
        "cpu_s": cpu,
        "ms": 1e3 * wall,
        "peak_mb": peak_mb(),
        "warm_up_s": warm_up,
    }


def infer(job: Job) -> Measures:
    """Energy and forces of one box (ms), and of a batch of four (structures/s), graphs ready."""
    peer, found, _, _, about = prepared = ready(job)
    one, four = prepared.step_inputs(found[:1])[0], prepared.step_inputs(found[:4])[0]
    peer.model.eval()
    single = summary(lambda: peer(one), job.seconds / 2)
    batched = summary(lambda: peer(four), job.seconds / 2)
    return about | single | {"edges_per_step": edges(found[0]), "structures_per_s": 4e3 / batched["ms"]}


def infer_ase(job: Job) -> Measures:
    """Energy and forces of one box through the ASE calculator, after each atom has moved by some 0.002 Å."""
    peer, found, _, _, about = ready(job)
    atoms = found[0].copy()
    atoms.calc = peer.calculator()
    rng = np.random.default_rng(0)

    def moved() -> None:
        atoms.positions += 0.002 * rng.standard_normal(atoms.positions.shape)
        atoms.get_forces()

    measured = summary(moved, job.seconds)
    return about | measured | {"edges_per_step": edges(atoms), "structures_per_s": 1e3 / measured["ms"]}


def prepare(job: Job) -> Measures:
    """`ase.Atoms` to the graph of one structure, neighbours included: mean over structures, median over passes."""
    peer, found, _, _, about = ready(job)
    sample = [atoms.copy() for atoms in found[: WATER_BOXES if job.workload == "W1" else CRYSTALS]]
    measured = summary(lambda: [peer.prepare(atoms) for atoms in sample], job.seconds)
    each = {name: value / len(sample) for name, value in measured.items()}
    return about | each | {"structures_per_s": 1e3 / each["ms"], "edges_per_step": round(fmean(map(edges, sample)))}


def first_step(job: Job) -> Measures:
    """One training step; run.py times the whole process."""
    prepared = ready(job)
    prepared.peer.model.train()
    optimizer = torch.optim.Adam(prepared.peer.model.parameters(), lr=1e-4)
    step(prepared.peer, optimizer, *prepared.step_inputs(prepared.found[: prepared.workload.batch]))
    return prepared.about


def to_accuracy(job: Job) -> Measures:
    """Train until the force MAE on fixed boxes falls below the target; the clock stands still during validation.

    Preparation and one warm-up step without effect come before the clock starts. A run ends without success when its
    processor time reaches `job.cap`.
    """
    peer, found, workload, _, about = prepared = ready(job)
    inputs = [prepared.step_inputs(group) for group in batches(found, workload.batch)]
    boxes = structures(Path(job.data), VALIDATION)[:VALIDATION_BOXES]
    held_out = [prepared.step_inputs(group) for group in batches(boxes, 4)]
    optimizer = torch.optim.Adam(peer.model.parameters(), lr=job.lr)

    state = {name: value.clone() for name, value in peer.model.state_dict().items()}
    warm_up, _ = clocks(lambda: step(peer, None, *inputs[0]))
    peer.model.load_state_dict(state)  # statistics of batch normalisation
    times = np.zeros(2)
    best = force_error(peer, held_out)
    for number, one in enumerate(shuffled(inputs), start=1):
        for group in optimizer.param_groups:
            group["lr"] = job.lr * min(1.0, number / RISE)
        times = times + clocks(partial(step, peer, optimizer, *one))
        if number % VALIDATE_EVERY == 0:
            error = force_error(peer, held_out)
            best = min(best, error)  # not a number is never the lowest
            if error < job.target or times[1] > job.cap or not np.isfinite(error):
                break
    wall, cpu = times
    reached = best < job.target
    return about | {
        "seconds_to_target": wall if reached else None,
        "cpu_s": cpu if reached else None,
        "ms": 1e3 * wall / number,
        "edges_per_step": workload.batch * edges(found[0]),
        "stress": False,
        "structures_per_s": workload.batch * number / wall,
        "peak_mb": peak_mb(),
        "warm_up_s": warm_up,
        "target": job.target,
        "best": best,
        "lr": job.lr,
        "steps": number,
    }


TASKS: dict[str, Callable[[Job], Measures]] = {
    "train": train,
    "infer": infer,
    "infer_ase": infer_ase,
    "prepare": prepare,
    "startup": first_step,
    "to_accuracy": to_accuracy,
}


# -- steps and clocks --------------------------------------------------------------------------------------------


def step(peer: Peer, optimizer: torch.optim.Optimizer | None, batch: Any, wanted: Targets) -> None:
    """One training step; without an optimiser, all of it that has no effect."""
    peer.model.train()
    peer.model.zero_grad(set_to_none=True)
    loss(peer(batch), wanted).backward()
    if optimizer is not None:
        optimizer.step()


def force_error(peer: Peer, held_out: list[tuple[Any, Targets]]) -> float:
    """Mean absolute error, eV/Å."""
    peer.model.eval()
    errors = [(peer(batch)["forces"].detach() - wanted["forces"]).abs().mean().item() for batch, wanted in held_out]
    return fmean(errors)


def shuffled(inputs: list[Any]) -> Iterator[Any]:
    """Epoch after epoch, in an order that is the same for all."""
    rng = np.random.default_rng(0)
    return itertools.chain.from_iterable([inputs[i] for i in rng.permutation(len(inputs))] for _ in itertools.count())


def summary(work: Callable[[], object], seconds: float) -> Measures:
    """Median wall time (ms) and processor time (s) of a piece of work, after two that are not counted."""
    for _ in range(2):
        work()
    ((wall, cpu),) = median_times([work], seconds)
    return {"ms": 1e3 * wall, "cpu_s": cpu}


def median_times(works: Sequence[Callable[[], object]], seconds: float) -> np.ndarray:
    """Median wall and processor seconds of each piece of work, (n_works, 2).

    All are done in turn, at least twice, and again until the time is up.
    """
    passes: list[list[tuple[float, float]]] = []
    end = time.perf_counter() + seconds
    while len(passes) < 2 or time.perf_counter() < end:
        passes.append([clocks(work) for work in works])
    return np.median(passes, axis=0)


def clocks(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB (10^6 bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    main()

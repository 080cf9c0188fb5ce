"""What a training run would take: its size is counted, its time and memory are measured on a few steps."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import ase
import numpy as np
import torch

from . import distributed
from .data.load import Dealt, plan, training_batches
from .graph import Batch
from .model import Model
from .objectives import Objective
from .train import TrainConfig, _Run, device_of, done_in, evaluate_loss

TIMED = 3  # steps, of which the median counts
TRIES = 100  # batches and steps that are looked at for labels, which may be rare


class Cost(NamedTuple):
    """Sizes and measured costs of a run."""

    structures: int
    validation_structures: int
    edges: int  # of all training structures
    largest: int  # edges of the largest of them
    parameters: int
    trained_parameters: int
    step_seconds: float
    steps_per_epoch: float
    validation_seconds: float
    memory: int  # bytes at most: of this process, or of the GPU
    done: int  # steps that the run folder holds already
    steps: float  # that are left
    minutes: float  # that they take

    def rows(self) -> list[dict[str, str]]:
        """Rows of a table for people."""
        size = self.edges / self.structures
        lines = {
            "structures": f"{self.structures:,} to train on, {self.validation_structures:,} to validate",
            "edges": f"{self.edges:,}: {size:,.0f} a structure, {self.largest:,} in the largest",
            "parameters": f"{self.parameters:,}, of which {self.trained_parameters:,} are trained",
            "a step": f"{self.step_seconds:.3g} s for {self.structures / self.steps_per_epoch:.3g} structures",
            "an epoch": f"{self.steps_per_epoch:,.0f} steps, {_duration(self.steps_per_epoch * self.step_seconds)}",
            "a validation": _duration(self.validation_seconds),
            "memory": f"{self.memory / 1e9:.2g} GB at most",
            f"the {'rest' if self.done else 'run'}": f"{self.steps:,.0f} steps "
            f"({self.steps / self.steps_per_epoch:.3g} epochs), {_duration(60 * self.minutes)}"
            f"{f'; {self.done:,} steps are done' if self.done else ''}",
        }
        return [{"dry run": name, "": text} for name, text in lines.items()]


def rehearse(
    model: Model,
    objective: Objective,
    structures: Sequence[ase.Atoms],
    config: TrainConfig,
    *,
    valid: Sequence[ase.Atoms] = (),
    out: Path | None = None,
    counting: Callable[[int], None] = lambda done: None,
) -> Cost:
    """Count and measure what `train` with the same arguments would take; weights and files stay as they are.

    The labelled batch with most edges comes first, untimed: it needs the most memory, and whatever is compiled is
    compiled then. Steps without any label are not timed, for they learn nothing.
    """
    distributed.join()
    run = _Run(model, objective, structures, config, valid, None, counting)  # learning rates are zero until it is told
    batches = plan(run.counts, config.edges, np.arange(len(structures)))
    by_size = sorted(batches, key=lambda members: int(run.counts[members].sum()), reverse=True)
    largest = next((members for members in by_size[:TRIES] if _is_labelled(run.batches[0, members])), by_size[0])
    run._optimise([Dealt(0, largest, run.batches[0, largest], (0, 0))])

    step = _step_seconds(run)
    model.eval()
    validation = _validation_seconds(run)
    with_validation = step + (validation / run.validate_every if run.valid_members else 0.0)
    done = distributed.from_first(lambda: {} if out is None else done_in(out))
    steps = _steps_left(run, with_validation, done)
    return Cost(
        structures=len(structures),
        validation_structures=len(valid),
        edges=int(run.counts.sum()),
        largest=int(run.counts.max()),
        parameters=sum(p.numel() for p in model.parameters()),
        trained_parameters=sum(p.numel() for p in run.trained),
        step_seconds=step,
        steps_per_epoch=max(len(batches) / (distributed.size() * config.accumulate), 1.0),
        validation_seconds=validation,
        memory=_peak_memory(device_of(model)),
        done=done.get("step", 0),
        steps=steps,
        minutes=(steps * with_validation + (0.0 if done else validation)) / 60,
    )


def _step_seconds(run: _Run) -> float:
    """Of a step with labels, typically."""
    stream = training_batches(run.batches, run.counts, run.config.edges, share=run.share)
    labelled: list[float] = []
    others: list[float] = []
    while len(labelled) < TIMED and len(labelled) + len(others) < TRIES:
        start = time.perf_counter()
        _, terms = run._optimise(list(islice(stream, run.config.accumulate)))
        (labelled if terms else others).append(time.perf_counter() - start)
    return float(np.median(labelled or others))


def _is_labelled(batch: Batch) -> bool:
    return any(bool(target.isfinite().any()) for target in batch.targets.values())


def _steps_left(run: _Run, seconds: float, done: dict[str, Any]) -> float:
    """Of a run whose steps take so many seconds each, and of which a part may be done."""
    if done.get("finished"):
        return 0
    steps = run.n_steps - done.get("step", 0)
    for name, clock in (("time", "elapsed"), ("processor_time", "cpu")):  # with one thread the same
        if name in run.config.seconds:
            steps = min(steps, (run.config.seconds[name] - done.get(clock, 0.0)) / seconds)
    return max(steps, 0)


def _validation_seconds(run: _Run) -> float:
    """Of all validation structures, from a batch of them."""
    if not run.valid_members:
        return 0.0
    middle = run.valid_members[len(run.valid_members) // 2]
    start = time.perf_counter()
    evaluate_loss(run.model, run.valid, [middle] * distributed.size())  # each process works on one
    return (time.perf_counter() - start) * len(run.valid_members) / distributed.size()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"

"""What a training run would take: its size is counted, its time and memory are measured on two steps."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ase
import numpy as np
import torch

from . import distributed
from .data.load import Share, plan, training_batches
from .model import Model
from .objectives import Objective
from .train import TrainConfig, _Run, device_of, evaluate_loss


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
    steps: float
    minutes: float  # of the whole run

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
            "the run": f"{self.steps:,.0f} steps ({self.steps / self.steps_per_epoch:.3g} epochs), "
            f"{_duration(60 * self.minutes)}",
        }
        return [{"dry run": name, "": text} for name, text in lines.items()]


def rehearse(
    model: Model,
    objective: Objective,
    structures: Sequence[ase.Atoms],
    config: TrainConfig,
    valid: Sequence[ase.Atoms] = (),
    counting: Callable[[int], None] = lambda done: None,
) -> Cost:
    """Count and measure what `train` with the same arguments would take; weights stay as they are.

    The batch with most edges comes first, untimed: it needs the most memory, and whatever is compiled is compiled then.
    """
    distributed.join()
    run = _Run(model, objective, structures, config, valid, None, counting)  # learning rates are zero until it is told
    batches = plan(run.counts, config.edges, np.arange(len(structures)))
    largest = max(batches, key=lambda members: run.counts[members].sum())
    run._optimise([run.batches[0, largest]], [(0, largest)])

    share = Share(distributed.rank(), distributed.size(), config.accumulate)
    stream = training_batches(run.batches, run.counts, config.edges, 0, 0, share)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        found = [next(stream) for _ in range(config.accumulate)]
        run._optimise([b for _, _, b in found if b], [(epoch, members) for epoch, members, _ in found if len(members)])
        seconds.append(time.perf_counter() - start)
    model.eval()

    step = sum(seconds) / len(seconds)
    validation = _validation_seconds(run)
    with_validation = step + (validation / run.validate_every if run.valid_members else 0.0)
    steps = config.n_steps if config.seconds is None else min(config.n_steps, config.seconds / with_validation)
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
        steps=steps,
        minutes=(steps * with_validation + validation) / 60,
    )


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

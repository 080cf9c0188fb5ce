"""The one training loop, a generator: pre-training and fine-tuning alike."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import ase
import numpy as np
import torch
from torch import Tensor, nn

from . import distributed
from .backbones import Backbone
from .console import console
from .data.labels import geometries
from .data.load import VALIDATION, Batches, Dealt, Place, Share, ahead, count_edges, dealing, plan, training_batches
from .data.sequences import Subset, original, spoken
from .errors import InputError
from .flop import counted, parse_flop
from .graph import Batch
from .lora import adapted
from .model import Model, read_tensors, write_tensors, write_whole
from .objectives import Objective
from .objectives.base import Loss
from .optim import AdamW
from .uncertainty import CrossChoice

T = TypeVar("T")

VALIDATED = 0.2  # batches validated for each one trained on, at most: without a step they cost half of it or more
ROOM = "edges at once of process "
SLOWER = 0.25  # times the learning rate, after a loss that was not finite
MOST_NAMED = 10  # structures in a sentence
COUNTED = 16  # batches whose floating-point operations tell those of a step


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimiser steps at most; 1000 when nothing else bounds the run, which ends with what ends first.
        time: wall-clock time at most, such as "90s", "10min" or "2h".
        processor_time: of the (first) process at most, likewise: fair to runs that share a machine.
        flop: floating-point operations of all steps at most, forwards and backwards, such as "20TFLOP": as many steps
            as these allow, at least one, by what batches of the first epoch take. The same on any machine.
        lr: peak learning rate, after a linear warm-up and before a cosine decay.
        backbone_lr: peak learning rate of the backbone; zero freezes it, None is the same as lr.
        layer_decay: factor of the learning rate from each layer of the backbone to the one below it; below one, layers
            near the structure change less than those near the answer.
        l2_to_base: strength with which weights of the backbone are drawn back to where they started (L2-SP); like
            weight_decay, times the learning rate.
        weight_decay: of AdamW.
        warmup: fraction of the run in which the learning rate rises.
        ema: decay of the averaged weights, which are what is validated and returned; zero keeps no average.
        clip: largest norm of the gradient.
        edges: most edges in a batch, which is what a process works on at once.
        accumulate: batches that each process works on, one after the other, before one optimiser step; the step is that
            of all of them together, and of those of all processes.
        validate_every: steps between validations; None makes twenty of them, or fewer (but four) where they would take
            more than a tenth to a fifth of the time.
        patience: validations without improvement before the run stops; None never stops early.
        seed: of weights, split, order and noise.
        workers: processes that prepare batches.
        device: "auto" is CUDA where there is one, else the CPU.
        dtype: of the weights; None is float32, or that of the model to start from.
    """

    steps: int | None = None
    time: str | None = None
    processor_time: str | None = None
    flop: str | None = None
    lr: float = 2e-3
    backbone_lr: float | None = None
    layer_decay: float = 1.0
    l2_to_base: float = 0.0
    weight_decay: float = 1e-5
    warmup: float = 0.05
    ema: float = 0.999
    clip: float = 10.0
    edges: int = 10_000
    accumulate: int = 1
    validate_every: int | None = None
    patience: int | None = None
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    dtype: Literal["float32", "float64"] | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "backbone_lr", "l2_to_base", "weight_decay"):
            if not math.isfinite(getattr(self, name) or 0):
                raise InputError(f"{name} is {getattr(self, name)}, but must be a finite number")
        for name in ("lr", "clip", "edges"):
            if not (getattr(self, name) or 0) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, but must be above zero")
        for name in ("validate_every", "patience", "accumulate"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least one")
        for name in ("steps", "backbone_lr", "l2_to_base", "weight_decay", "seed", "workers"):
            if (getattr(self, name) or 0) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, but must not be negative")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay is {self.layer_decay}, but must be above zero and at most one")
        if not (0 <= self.warmup < 1 and 0 <= self.ema < 1):
            raise InputError("warmup and ema are fractions: zero or more, and below one")
        for name, seconds in self.seconds.items():
            if not 0 < seconds < math.inf:
                raise InputError(f"{name} is '{getattr(self, name)}', but must be above zero")
        if self.flop is not None:
            parse_flop(self.flop)

    @property
    def seconds(self) -> dict[str, float]:
        """Bounds of the run in seconds: "time", "processor_time"."""
        given = {"time": self.time, "processor_time": self.processor_time}
        return {name: parse_time(text) for name, text in given.items() if text is not None}

    @property
    def n_steps(self) -> float:
        """Steps at most; infinite where only time or operations bound the run."""
        if self.steps is not None:
            return self.steps
        return math.inf if self.seconds or self.flop else 1000


class Progress(NamedTuple):
    """One optimiser step."""

    step: int  # steps done
    fraction: float  # of the run, by steps or by time
    loss: float
    terms: dict[str, float]  # weighted mean errors of this batch
    lr: float
    valid: float | None  # validation loss, where this step was validated
    best: float | None
    elapsed: float  # seconds, earlier parts of a resumed run included
    cpu: float  # processor seconds of this process, likewise
    went_back: int | None = None  # the step whose loss was not finite, if there was one


def train(
    model: Model,
    objective: Objective,
    structures: Sequence[ase.Atoms],
    config: TrainConfig | None = None,
    *,
    valid: Sequence[ase.Atoms] = (),
    out: Path | None = None,
    save_every: float = 30.0,
    counting: Callable[[int], None] = lambda done: None,
    cross: CrossChoice | None = None,
) -> Iterator[Progress]:
    """Train `model` in place, one optimiser step per item; after the last one it holds its best weights.

    The best are those with the lowest loss on `valid`, the weights at the start included; without `valid` they are the
    last. With `out`, metrics are written there, and a run that was stopped goes on where it last saved its state: on a
    CPU the result is bit for bit that of an uninterrupted run bounded by steps.

    A backbone whose laws do not name rotation sees each of `structures` in a new orientation every time, and `valid` as
    it is.

    A step whose loss or gradient is not a finite number changes nothing. A structure with which that is so at the last
    good weights too ends the run and is named. Otherwise training has diverged: it goes on from these weights, with a
    quarter of every learning rate from then on, once in a run. The last good weights are the best validated so far;
    without `valid`, the averaged ones before the part of the run, a twentieth by default, with the lowest mean loss.

    Under torchrun or srun all processes train together: each works on its share of every step and of the validation,
    all have the same weights after it, and the first one alone writes. Structures are read by the process that works on
    them, so all must see the same ones.

    Args:
        model: calibrated already.
        objective: settled already, so that its weights are numbers.
        structures: with labels at their canonical places.
        save_every: seconds between saved states at most; less in the first minutes.
        counting: told how many structures have had their neighbours counted.
        cross: of `valid`, to be filled; it leaves the run as it is.

    Raises:
        InputError: naming the structures, where a loss is not finite and going back did not help, where that of `valid`
            is not before the first step, and where memory has no room for one structure alone.
    """
    config = config or TrainConfig()
    distributed.join()
    run = _Run(model, objective, structures, config, valid, out, counting, cross)
    return run.progress(save_every)


def evaluate_loss(
    model: Model, batches: Batches, members: Sequence[np.ndarray], cross: CrossChoice | None = None
) -> dict[str, float]:
    """Mean weighted error of each term over all batches, with fixed noise; processes share the work."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}

    def work(part: np.ndarray) -> dict[str, tuple[float, float]]:
        batch = batches[0, part].to(device_of(model))
        outputs = model(batch.graph, batches.objective.wanted(batch.targets))
        terms = batches.objective.loss(outputs, batch)
        if cross is not None:
            cross.see(part, outputs, batch)
        return {name: (float(total.detach()), float(count)) for name, (total, count) in terms.items()}

    for part in distributed.own(members):
        for terms in in_parts(work, part, batches.structures):
            for name, (total, count) in terms.items():
                sums[name] = sums.get(name, 0.0) + total
                counts[name] = counts.get(name, 0.0) + count
    sums, counts = distributed.sum_counts(sums), distributed.sum_counts(counts)
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}


def in_parts(work: Callable[[Any], T], members: Any, structures: Sequence[ase.Atoms]) -> Iterator[T]:
    """What `work` makes of these members of the structures; of each half of them, in order, when memory runs out.

    Raises `InputError` when there is no room for one of them alone.
    """
    try:
        found = work(members)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(members) == 1:
            raise _no_room(structures, int(members[0])) from None
    else:
        yield found
        return
    if torch.cuda.is_available():  # here, where the exception no longer holds what was computed
        torch.cuda.empty_cache()
    _tell_halved()
    half = len(members) // 2
    yield from in_parts(work, members[:half], structures)
    yield from in_parts(work, members[half:], structures)


def layers(backbone: Backbone) -> dict[str, int]:
    """In which layer each parameter is: zero before the repeated blocks, then by block, and above them what follows."""
    top = max((len(block) for block in backbone.children() if isinstance(block, nn.ModuleList)), default=0)
    found = {name: top + 1 for name, _ in backbone.named_parameters(recurse=False)}
    below = top > 0
    for name, child in backbone.named_children():
        repeated = isinstance(child, nn.ModuleList)
        below = below and not repeated
        for inner, _ in child.named_parameters():
            found[f"{name}.{inner}"] = 1 + int(inner.split(".")[0]) if repeated else 0 if below else top + 1
    return found


def device_of(model: Model) -> torch.device:
    return next(model.parameters()).device


def chosen_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one, and with several processes the GPU of this one."""
    if name in ("auto", "cuda") and torch.cuda.is_available() and distributed.size() > 1:
        return distributed.own_device()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{name}' cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def parse_time(text: str) -> float:
    """Seconds of "45", "45s", "10min" or "1.5h"."""
    for suffix, unit in (("min", 60.0), ("h", 3600.0), ("s", 1.0), ("", 1.0)):
        number = text.strip().removesuffix(suffix) if text.strip().endswith(suffix) else None
        try:
            return float(number) * unit  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
    raise InputError(f"'{text}' is not a time: write 90s, 10min or 2h")


class _Run:
    """Everything that changes during training, and how it is saved and restored."""

    def __init__(
        self,
        model: Model,
        objective: Objective,
        structures: Sequence[ase.Atoms],
        config: TrainConfig,
        valid: Sequence[ase.Atoms],
        out: Path | None,
        counting: Callable[[int], None],
        cross: CrossChoice | None = None,
    ):
        if len(structures) == 0:
            raise InputError("there is no structure to train on")
        dtype = getattr(torch, config.dtype) if config.dtype else None
        self.model = model.to(chosen_device(config.device), dtype)
        self.config = config
        self.out = out if distributed.rank() == 0 else None
        self.cross = cross
        distributed.share([*self.model.parameters(), *self.model.buffers()])

        edges = model.backbone.edges
        turning = "rotation" not in model.backbone.laws
        self.batches = Batches(structures, objective, edges, config.seed, turning=turning)
        self.counts = _counted(self.batches, counting)
        self.valid = Batches(valid, objective, edges, config.seed, VALIDATION)
        valid_counts = _counted(self.valid)
        self.valid_members = plan(valid_counts, config.edges, np.arange(len(valid)))

        self.groups = self._parameter_groups()
        self.trained = [p for group in self.groups for p in group["params"]]
        self.optimizer = AdamW(self.groups, config.weight_decay)
        self.average = [p.detach().clone() for p in self.trained]
        self.best_weights = [p.detach().clone() for p in self.trained]
        self.best: float | None = None
        self.n_steps = min(config.n_steps, self._affordable())  # before `like`, for the first process alone counts
        self.step = 0
        self.elapsed = 0.0
        self.cpu = 0.0
        self.unimproved = 0
        self.finished = False
        self.place: Place = (0, 0)  # where the next step begins
        self.like: dict[str, Tensor] = {}  # outputs of no rows, as the last ones were
        self.room = config.edges  # most edges at once that memory has had room for
        self.rooms: dict[str, float] = {}  # of each process whose memory has run out
        self.went_back: int | None = None  # the step whose loss was not finite
        self.candidate = [
            a.clone() for a in self.average
        ]  # where nothing validates: averaged weights, judged by the loss of steps after them
        self.lowest: float | None = None  # mean loss of the steps after those that were best
        self.recent = (0.0, 0)  # sum and number of losses after the candidate

    def progress(self, save_every: float) -> Iterator[Progress]:
        self._restore()
        with closing(Metrics(self.out, self.step)) as metrics:
            start = saved = time.monotonic()
            cpu_start = time.process_time()
            before, cpu_before = self.elapsed, self.cpu
            fresh = self.step == 0 and self.best is None
            if fresh and (loss_at_start := self._validate()) is not None:
                metrics.write({"step": 0, "valid": loss_at_start})

            stream = training_batches(
                self.batches, self.counts, self.config.edges, self.place, self.config.workers, self.share
            )
            stream = ahead(stream, device_of(self.model), next(self.model.parameters()).dtype)
            while not self.finished and (fraction := self._fraction()) < 1:
                pieces = list(islice(stream, self.config.accumulate))
                lr = self._set_learning_rates(fraction)
                loss, terms = self._optimise(pieces)
                self.step += 1
                self.place = pieces[-1].after
                clocks = before + time.monotonic() - start, cpu_before + time.process_time() - cpu_start
                self.elapsed, self.cpu = self._agreed(clocks)

                earlier, fraction = fraction, min(self._fraction(), 1.0)
                valid = self._validate() if self._validation_is_due(earlier, fraction) else None
                self._remember(loss)
                row = {"step": self.step, "epoch": pieces[0].epoch, "lr": lr, **terms, "valid": valid}
                if self.went_back == self.step:
                    row["went back"] = True
                if self.rooms:
                    row["edges at once"] = int(min(self.rooms.values()))
                metrics.write({**row, "elapsed": round(self.elapsed, 3), "cpu": round(self.cpu, 3)})
                self.finished = self.config.patience is not None and self.unimproved >= self.config.patience
                due = min(save_every, max(1.0, 0.1 * self.elapsed))  # often at first, so that little is ever lost
                if fraction >= 1 or self.finished or time.monotonic() - saved > due:
                    self._save()
                    saved = time.monotonic()
                yield Progress(
                    self.step, fraction, loss, terms, lr, valid, self.best, self.elapsed, self.cpu, self.went_back
                )

        chosen = self.average if self.best is None else self.best_weights
        self._load_weights(chosen)
        self.model.eval()

    @property
    def share(self) -> Share:
        return Share(distributed.rank(), distributed.size(), self.config.accumulate)

    def _optimise(self, pieces: Sequence[Dealt]) -> tuple[float, dict[str, float]]:
        """One step on the batches of all processes as if they were one; its loss and the terms of it."""
        self.model.train()
        self.optimizer.zero_grad()
        own = self._within_memory(pieces)
        room = {f"{ROOM}{distributed.rank()}": self.room} if self.room < self.config.edges else {}
        terms = distributed.sum_counts({**own, **room})
        self.rooms = {name: terms.pop(name) for name in list(terms) if name.startswith(ROOM)}
        if not terms:  # no label in this step: nothing to learn from it
            return math.nan, {}
        loss, what = sum(terms.values()), "loss"
        if math.isfinite(loss):
            distributed.sum_gradients(self.trained)
            norm, what = torch.nn.utils.clip_grad_norm_(self.trained, self.config.clip), "gradient of the loss"
            if math.isfinite(norm):
                self.optimizer.step()
                self._update_average()
                return loss, terms
        self._go_back(what, pieces)
        return math.nan, {}

    def _go_back(self, what: str, pieces: Sequence[Dealt]) -> None:
        """Return to the last good weights and go on more slowly; where that cannot help, say which structures are why.

        Momenta begin anew at zero, which makes the first steps small; the sizes of gradients seen so far stay.
        """
        own = [(piece.epoch, part) for piece in pieces for part in plan(self.counts, self.room, piece.members)]
        broken = self._broken(self.batches, own)
        if not any(distributed.gathered(bool(broken))):  # only all together
            broken = own
        self._load_weights(self.best_weights)
        faulty = self._broken(self.batches, broken)
        told = f"the {what} is not finite at step {self.step + 1}, for "
        if named := self._named(self.batches, faulty):
            raise InputError(
                f"{told}{named}, and not with the last good weights either: look at labels and distances of atoms, or "
                "leave them out"
            )
        told += self._named(self.batches, broken)
        if self.went_back is not None:
            raise InputError(
                f"{told}, once more after step {self.went_back}, from when on the learning rate was {SLOWER:g} of what "
                "it would have been: training diverges, so lower lr"
            )
        console.print(
            f"[yellow]T{told[1:]}: going back to the last good weights, and on with {SLOWER:g} of the learning "
            "rate[/yellow]"
        )
        self.went_back = self.step + 1
        self.average, self.candidate = ([p.detach().clone() for p in self.trained] for _ in range(2))
        self.recent = (0.0, 0)
        for state in self.optimizer.state.values():
            state["exp_avg"].zero_()

    def _broken(self, batches: Batches, parts: Iterable[tuple[int, np.ndarray]]) -> list[tuple[int, np.ndarray]]:
        """Of parts (epoch, members) the structures which, alone, have a loss or a gradient that is not finite."""
        found = []
        for epoch, members in parts:
            if self._is_finite(batches[epoch, members].to(device_of(self.model))):
                continue
            half = len(members) // 2
            halves = [(epoch, members[:half]), (epoch, members[half:])]
            found += self._broken(batches, halves) if half else [(epoch, members)]
        return found

    def _is_finite(self, batch: Batch) -> bool:
        self.optimizer.zero_grad()
        loss = [total.sum() for total, count in self._terms(batch).values() if count]
        if loss and loss[0].requires_grad:
            torch.stack(loss).sum().backward(inputs=self.trained)
        numbers = [*loss, *(p.grad for p in self.trained if p.grad is not None)]
        self.optimizer.zero_grad()
        return all(bool(value.isfinite().all()) for value in numbers)

    def _named(self, batches: Batches, parts: Sequence[tuple[int, np.ndarray]]) -> str:
        """Structures of all processes, by index and formula; empty where there are none."""
        members = [int(index) for _, part in parts for index in part]
        own = [(original(batches.structures, i), batches.structures[i].get_chemical_formula()) for i in members]
        each = sorted({one for some in distributed.gathered(own) for one in some})
        if not each:
            return ""
        words = ", ".join(f"{index} ({formula})" for index, formula in each[:MOST_NAMED])
        more = f" and {len(each) - MOST_NAMED} more" if len(each) > MOST_NAMED else ""
        return f"{'structure' if len(each) == 1 else 'structures'} {words}{more}"

    def _within_memory(self, pieces: Sequence[Dealt]) -> dict[str, float]:
        """`_backward`, with the same structures in smaller batches when memory runs out, and from then on."""
        summed: list[dict[str, float]] = []
        parts = [(piece.epoch, piece.members) for piece in pieces if piece.batch]
        batches = [piece.batch for piece in pieces if piece.batch]
        while True:
            if self.room < self.config.edges:
                parts = [(p.epoch, part) for p in pieces for part in plan(self.counts, self.room, p.members)]
                batches = [self.batches[part] for part in parts]
            try:
                return self._backward([batch.to(device_of(self.model)) for batch in batches], summed)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            self.optimizer.zero_grad()  # here, where the exception no longer holds what was computed
            sizes = [batch.graph.n_edges for batch in batches]
            largest = max(sizes)
            if all(batch.graph.n_systems == 1 for batch in batches):
                raise _no_room(self.batches.structures, int(parts[sizes.index(largest)][1][0]), largest)
            self.room = max(min(self.room, largest) // 2, 1)
            console.print(f"[yellow]Memory ran out: from now on at most {self.room} edges at once[/yellow]")
            if device_of(self.model).type == "cuda":
                torch.cuda.empty_cache()

    def _backward(self, batches: Sequence[Batch], summed: list[dict[str, float]]) -> dict[str, float]:
        """Add the gradient of what these batches have of the loss; returns their part of each of its terms.

        A term is the sum of the errors of all batches over the number of their labels. So numbers are added up first,
        over batches and processes; then each batch can be differentiated alone, and parts and gradients be added up.
        They are left in `summed`, so that a second try with the same labels adds up nothing with other processes.
        """
        finish = None
        if distributed.size() > 1 and self.like and not summed:
            finish = distributed.summing(self._labels_in(batches), device_of(self.model))
        try:  # the numbers travel while the first batch is computed, and arrive whatever becomes of it
            first = self._terms(batches[0]) if batches else {}
        finally:
            if finish is not None:
                summed.append(finish())
        if not summed:
            counts: Counter[str] = Counter()
            counts.update(_numbers({name: count for name, (_, count) in first.items()}))
            counts.update(self._labels_in(batches[1:]))
            summed.append(distributed.sum_counts(counts, device_of(self.model)))
        (total_counts,) = summed

        parts: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            terms = self._terms(batch) if number else first
            means = {name: total / total_counts[name] for name, (total, _) in terms.items() if total_counts[name]}
            if means:
                loss = torch.stack(list(means.values())).sum()
                loss.backward(inputs=self.trained)  # and not with respect to positions once more
            parts |= {name: parts.get(name, 0.0) + value.detach() for name, value in means.items()}
        return _numbers(parts)

    def _terms(self, batch: Batch) -> Loss:
        """The terms of the loss of a batch, and outputs of no rows that say what they were computed from."""
        outputs = self.model(batch.graph, self.batches.objective.wanted(batch.targets))
        self.like = {name: output.new_empty((0, *output.shape[1:])) for name, output in outputs.items()}
        return self.batches.objective.loss(outputs, batch)

    @torch.no_grad()
    def _labels_in(self, batches: Sequence[Batch]) -> Counter[str]:
        """How many labels of each term there are, told without the model: by the loss of outputs that are zero."""
        counts: Counter[str] = Counter()
        for batch in batches:
            rows = {
                name: batch.graph.n_atoms if self.model.per_atom(name) else batch.graph.n_systems for name in self.like
            }
            zeros = {name: like.new_zeros((rows[name], *like.shape[1:])) for name, like in self.like.items()}
            terms = self.batches.objective.loss(zeros, batch)
            counts.update(_numbers({name: count for name, (_, count) in terms.items()}))
        return counts

    def _agreed(self, clocks: tuple[float, float]) -> tuple[float, float]:
        """The first process's clocks, where they decide when the run ends."""
        return distributed.from_first(lambda: clocks) if self.config.seconds else clocks

    @torch.no_grad()
    def _update_average(self) -> None:
        t = self.step + 1
        decay = min(self.config.ema, (1 + t) / (10 + t)) if self.config.ema else 0.0
        torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - decay)

    def _affordable(self) -> float:
        """Steps, at least one, that take the floating-point operations allowed, by some batches of the first epoch."""
        if self.config.flop is None:
            return math.inf
        allowed = parse_flop(self.config.flop)

        def in_a_step() -> float:
            order = np.random.default_rng(self.config.seed).permutation(len(self.counts))
            batches = plan(self.counts, self.config.edges, order)[:COUNTED]
            found = [sum(in_parts(self._flop, part, self.batches.structures)) for part in batches]
            return float(np.mean(found)) * self.config.accumulate * distributed.size()

        return max(int(allowed / max(distributed.from_first(in_a_step), 1.0)), 1)

    def _flop(self, members: np.ndarray) -> int:
        """Floating-point operations of these structures, forwards and backwards."""
        batch = self.batches[0, members].to(device_of(self.model))
        return counted(lambda: self._is_finite(batch))

    def _fraction(self) -> float:
        by_steps = self.step / self.n_steps if self.n_steps else 1.0
        clocks = {"time": self.elapsed, "processor_time": self.cpu}
        return max(by_steps, *(clocks[name] / seconds for name, seconds in self.config.seconds.items()), 0.0)

    def _set_learning_rates(self, fraction: float) -> float:
        warmup = self.config.warmup
        if fraction < warmup:
            factor = max(fraction, 1 / 1000) / warmup
        else:
            factor = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))
        if self.went_back is not None:
            factor *= SLOWER
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return self.config.lr * factor

    def _validation_is_due(self, earlier: float, fraction: float) -> bool:
        """After a step that took the run from one fraction of it to another."""
        if not self.valid_members:
            return False
        a_quarter_is_over = self.config.validate_every is None and int(4 * fraction) > int(4 * earlier)
        return fraction >= 1 or a_quarter_is_over or self.step % self.validate_every == 0

    @property
    def validate_every(self) -> int:
        """Steps between validations; by default so many that validating is a small part of the work."""
        if self.config.validate_every is not None:
            return self.config.validate_every
        cheap = math.ceil(len(self.valid_members) / (VALIDATED * self.config.accumulate * distributed.size()))
        if not math.isfinite(self.n_steps):
            return max(50, cheap)
        return max(int(self.n_steps) // 20, cheap)

    def _remember(self, loss: float) -> None:
        """Where nothing validates, keep averaged weights after which the loss of training was lowest as good ones."""
        if self.valid_members:
            return
        if math.isfinite(loss):
            self.recent = (self.recent[0] + loss, self.recent[1] + 1)
        if self.step % max(self.validate_every, 1) == 0 and self.recent[1]:
            mean = self.recent[0] / self.recent[1]
            if self.lowest is None or mean < self.lowest:
                self.lowest, self.best_weights = mean, self.candidate
            self.candidate, self.recent = [a.clone() for a in self.average], (0.0, 0)

    def _validate(self) -> float | None:
        """Loss of the averaged weights on the validation set; they are kept when it is the lowest so far."""
        if not self.valid_members:
            return None
        current = [p.detach().clone() for p in self.trained]
        self._load_weights(self.average)
        self.model.eval()
        terms = evaluate_loss(self.model, self.valid, self.valid_members, self.cross)
        if self.cross is not None:
            self.cross.settle()
        if not terms:
            raise InputError("no validation structure has a label of this objective: give others, or valid_fraction=0")
        total = distributed.from_first(lambda: sum(terms.values()))  # one decides, or roundings might
        loss = total if math.isfinite(total) else math.inf
        if self.best is None and not math.isfinite(loss):
            parts = [(0, members) for members in distributed.own(self.valid_members)]
            named = self._named(self.valid, self._broken(self.valid, parts)) or "all together"
            raise InputError(
                f"the loss of validation is not finite before the first step, for {named}: look at labels and at "
                "distances of atoms, or leave them out"
            )
        self._load_weights(current)

        if self.best is None or loss < self.best:
            self.best, self.unimproved = loss, 0
            self.best_weights = [a.clone() for a in self.average]
        else:
            self.unimproved += 1
        return loss

    def _parameter_groups(self) -> list[dict[str, Any]]:
        config, backbone = self.config, {id(p) for p in self.model.backbone.parameters()}
        backbone_lr = config.lr if config.backbone_lr is None else config.backbone_lr
        chosen = adapted(self.model.backbone)  # what is frozen then stays so
        for p in self.model.backbone.parameters():
            p.requires_grad_(backbone_lr > 0 and (p.requires_grad or not chosen))
        layer = layers(self.model.backbone) if config.layer_decay < 1 else {}
        top = max(layer.values(), default=0)
        groups: list[dict[str, Any]] = []
        for k in sorted({*layer.values(), top}):
            own = [p for name, p in self.model.backbone.named_parameters() if layer.get(name, top) == k]
            own = [p for p in own if p.requires_grad]
            pull = {"pull": config.l2_to_base, "start": [p.detach().clone() for p in own]} if config.l2_to_base else {}
            groups.append({"params": own, "peak": backbone_lr * config.layer_decay ** (top - k), **pull})
        others = [p for p in self.model.parameters() if id(p) not in backbone]
        groups.append({"params": others, "peak": config.lr})
        return [{**group, "lr": 0.0} for group in groups if group["params"]]

    @torch.no_grad()
    def _load_weights(self, weights: Sequence[Tensor]) -> None:
        for p, w in zip(self.trained, weights, strict=True):
            p.copy_(w)

    def _save(self) -> None:
        if self.out is None:
            return
        adam = [self.optimizer.state.get(p, {}) for p in self.trained]
        lists = {
            "weights": self.trained,
            "average": self.average,
            "best": self.best_weights,
            "first": [a.get("exp_avg", torch.zeros_like(p)) for a, p in zip(adam, self.trained, strict=True)],
            "second": [a.get("exp_avg_sq", torch.zeros_like(p)) for a, p in zip(adam, self.trained, strict=True)],
        }
        tensors = {f"{name}.{i}": t.detach().cpu().clone() for name, ts in lists.items() for i, t in enumerate(ts)}
        tensors["updates"] = torch.tensor([float(a.get("step", 0.0)) for a in adam], dtype=torch.float64)
        tensors |= self.cross.state() if self.cross is not None else {}
        if not self.valid_members:
            tensors |= {f"candidate.{i}": t.detach().cpu().clone() for i, t in enumerate(self.candidate)}
        names = ["step", "place", "elapsed", "cpu", "best", "unimproved", "finished", "rooms"]
        names += ["went_back", "lowest", "recent"]
        numbers = {name: getattr(self, name) for name in names}
        write_tensors(self.out / "state.safetensors", tensors, {"numbers": json.dumps(numbers)})

    def _restore(self) -> None:
        found = distributed.from_first(self._saved)
        if found is None:
            return
        tensors, metadata = found
        numbers = json.loads(metadata["numbers"])
        for name, value in numbers.items():
            setattr(self, name, value)
        self.room = int(self.rooms.get(f"{ROOM}{distributed.rank()}", self.room))
        if "place" not in numbers:  # saved by an earlier version: all steps are dealt once more
            dealt = dealing(self.counts, self.config.edges, self.config.seed, share=self.share)
            for _, _, place in islice(dealt, self.step * self.config.accumulate):
                self.place = place
        if self.cross is not None:
            self.cross.restore(tensors)
        for i, p in enumerate(self.trained):
            with torch.no_grad():
                p.copy_(tensors[f"weights.{i}"])
            self.average[i].copy_(tensors[f"average.{i}"])
            self.best_weights[i].copy_(tensors[f"best.{i}"])
            self.candidate[i].copy_(tensors.get(f"candidate.{i}", self.average[i]))  # earlier versions saved none
            if tensors["updates"][i]:
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(tensors["updates"][i])),
                    "exp_avg": tensors[f"first.{i}"].to(p.device),
                    "exp_avg_sq": tensors[f"second.{i}"].to(p.device),
                }

    def _saved(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        return None if self.out is None else _state_in(self.out)


def done_in(out: Path) -> dict[str, Any]:
    """How far the run of a folder had come when it was last saved: "step", "elapsed", "finished"; empty if never."""
    state = _state_in(out)
    return {} if state is None else json.loads(state[1]["numbers"])


def _state_in(out: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    path = out / "state.safetensors"
    return read_tensors(path) if path.exists() else None


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Tensors of one number each, fetched from their device at once."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))


def _counted(batches: Batches, counting: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Edges of each structure; every process counts a part, and keeps the neighbours it found for its batches."""
    n, size = len(batches.structures), distributed.size()
    mine = range(n)[distributed.rank() :: size]
    own = Subset(geometries(batches.structures), mine)
    found = count_edges(
        own, batches.edges, lambda done: counting(done * size), lambda i, *found: batches.keep(mine[i], *found)
    )
    counts = np.zeros(n, np.int32)
    for rank, part in enumerate(distributed.gathered(found)):
        counts[rank::size] = part
    return counts


def is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _no_room(structures: Sequence[ase.Atoms], index: int, n_edges: int | None = None) -> InputError:
    size = f"{len(structures[index])} atoms" if n_edges is None else f"{n_edges} edges"
    return InputError(f"memory has no room for {spoken(structures, index)} of {size}: leave it out")


@cache
def _tell_halved() -> None:
    """Said once: validations are many, and their results are the same."""
    console.print("[yellow]Memory ran out: structures are evaluated in smaller batches[/yellow]")


class Metrics:
    """One JSON object per step in metrics.jsonl; at the end of the run the same as a table in metrics.csv."""

    def __init__(self, out: Path | None, step: int):
        self.out = out
        if out is None:
            return
        kept = [row for row in read_metrics(out) if row["step"] <= step] if step else []
        write_whole(out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept).encode())
        self.file = open(out / "metrics.jsonl", "a")  # noqa: SIM115

    def write(self, row: Mapping[str, Any]) -> None:
        if self.out is None:
            return
        self.file.write(json.dumps({name: value for name, value in row.items() if value is not None}) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.out is None:
            return
        self.file.close()
        rows = read_metrics(self.out)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = io.StringIO()
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self.out / "metrics.csv", table.getvalue().encode())


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of a run so far; a last line that was cut off is left out."""
    rows = []
    path = out / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows

"""Together: several objectives in one run, from one data set or from several; and what all such runs have."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self, TypeVar

import ase
import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..graph import Batch, Sample
from ..model import Output, copied
from .base import Loss, Objective, Quantity

T = TypeVar("T")

PART = "part"  # entry of `atoms.info` that says which objective a structure is for


class Parts(Objective, ABC):
    """Named objectives in one run, each learned from the structures that are for it.

    Args:
        parts: names to objectives.
        weights: of their losses; one by default.
    """

    marks: ClassVar[tuple[str, ...]] = (PART,)  # entries of `atoms.info` that name a part; the first one found counts

    def __init__(self, parts: dict[str, Objective], weights: dict[str, float] | None = None):
        if not parts:
            raise InputError("nothing to learn together: give parts, names to objectives")
        for name, part in parts.items():
            if not isinstance(part, Objective) or isinstance(part, Parts):
                raise InputError(f"the part '{name}' is {part!r}, but must be an objective such as Potential()")
            if not re.fullmatch(r"[\w+-]+", name):  # outputs, options and parameters are named after it
                raise InputError(f"'{name}' cannot name a part: use letters, digits, _, + and -")
        for name, weight in (weights or {}).items():
            if name not in parts:
                raise InputError(f"there is a weight for '{name}', but the parts are {', '.join(parts)}")
            if not 0 <= weight < np.inf:
                raise InputError(f"the weight of '{name}' is {weight}, but must be zero or positive")
        self.parts = dict(parts)
        self.weights = weights

    @property
    @abstractmethod
    def names(self) -> dict[str, dict[str, str]]:
        """Of each part: its own names of outputs to those in the model."""

    def constants(self, part: str) -> dict[str, float]:
        """Scalar inputs that are the same in all structures of this part, by name; none by default."""
        return {}

    def meant_for(self, atoms: ase.Atoms) -> str | None:
        """The part that a structure says it is for."""
        return next((str(atoms.info[mark]) for mark in self.marks if atoms.info.get(mark) is not None), None)

    def quantities(self) -> dict[str, Quantity]:
        found = {}
        for part, names in self.names.items():
            for name, quantity in self.parts[part].quantities().items():
                if name in names:
                    prefix = "" if names[name] == name else f"{part} "
                    found[names[name]] = quantity._replace(name=prefix + quantity.name)
        return found

    def labels(self) -> dict[str, bool]:
        wanted: dict[str, bool] = {}
        for objective in self.parts.values():
            for name, needed in objective.labels().items():
                wanted[name] = wanted.get(name, False) or needed
        return wanted

    def differences(self) -> dict[str, tuple[str, str]]:
        found = {}
        for part, names in self.names.items():
            for name, (quantity, minus) in self.parts[part].differences().items():
                prefix = "" if names[name] == name else f"{part} "
                found[names[name]] = (prefix + quantity, minus)
        return found

    def vector_inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.vector_inputs()))

    def scalar_inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for part in self.parts.values() for name in part.scalar_inputs()))

    def warnings(self, structures: Sequence[ase.Atoms]) -> list[str]:
        return [
            f"{name}: {text}"
            for name, objective in self.parts.items()
            for text in objective.warnings([a for a in structures if self.meant_for(a) in (None, name)])
        ]

    def settled(self, samples: Sequence[Sample]) -> Self:
        parts = {name: part.settled(self.own(name, samples)) for name, part in self.parts.items()}
        settled: Self = copied(self, parts=parts)
        return settled

    def comparable(self) -> Self:
        comparable: Self = copied(self, parts={name: part.comparable() for name, part in self.parts.items()})
        return comparable

    def wanted(self, targets: Mapping[str, Any]) -> list[str]:
        found = [
            names[name]
            for part, names in self.names.items()
            for name in self.parts[part].wanted(dict(_of_part(part, targets)))
        ]
        return list(dict.fromkeys(found))

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        terms: Loss = {}
        for part, names in self.names.items():
            weight = (self.weights or {}).get(part, 1.0)
            own = {name: outputs[full] for name, full in names.items() if full in outputs}
            targets = dict(_of_part(part, batch.targets))
            for term, (total, count) in self.parts[part].loss(own, batch._replace(targets=targets)).items():
                terms[f"{part} {term}"] = (weight * total, count)
        return terms

    def own(self, part: str, samples: Sequence[Sample]) -> list[Sample]:
        """What samples are to one part: those that teach it anything, with its own names."""
        found = [sample._replace(targets=dict(_of_part(part, sample.targets))) for sample in samples]
        return [sample for sample in found if teaches(sample)]


class Together(Parts):
    """Named objectives that share a backbone; a structure may teach any of them.

    Two levels of theory, each with an energy and references of its own, are
    `Together({"pbe": Potential(), "pbesol": Potential()})` on structures `{"pbe": ..., "pbesol": ...}`. A model that
    learns a property and is not to forget the force field it was has
    `Together({"gap": Property("band_gap"), "field": Potential()}, weights={"field": 0.1})`.

    Structures with `info["part"]` teach the objective of that name, others all whose labels they have. Where objectives
    want to see a structure differently, as those that add noise do, one view is drawn at each access. Outputs that
    several objectives have are called PART_NAME ("pbe_energy"), and the model is used as one of its parts.

    Args:
        parts: names to objectives.
        weights: of their losses; one by default.
    """

    def __init__(self, parts: dict[str, Objective], weights: dict[str, float] | None = None):
        super().__init__(parts, weights)
        names = [full for own in self.names.values() for full in own.values()]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two parts would have an output '{twice[0]}': choose another name for one of them")

    @cached_property
    def names(self) -> dict[str, dict[str, str]]:
        """Of each part: its own names of outputs to those in the model."""
        with torch.random.fork_rng(devices=[]):  # heads draw weights
            own = {part: list(objective.outputs(2)) for part, objective in self.parts.items()}
        often = Counter(name for names in own.values() for name in names)
        shared = {part for part, names in own.items() if any(often[name] > 1 for name in names)}
        return {
            part: {name: f"{part}_{name}" if part in shared else name for name in names} for part, names in own.items()
        }

    def outputs(self, width: int) -> dict[str, Output]:
        outputs: dict[str, Output] = {}
        for part, names in self.names.items():
            for name, output in self.parts[part].outputs(width).items():
                derived = getattr(output, "of", None)
                outputs[names[name]] = output if derived is None else type(output)(names[derived])
        return outputs

    def calibration(self, name: str, samples: Sequence[Sample]) -> tuple[str, Sequence[Sample]]:
        for part, names in self.names.items():
            for own, full in names.items():
                if full == name:
                    return self.parts[part].calibration(own, self.own(part, samples))
        return name, samples

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        chosen = self.meant_for(atoms)
        if chosen is not None and chosen not in self.parts:
            raise InputError(f"a structure is for the part '{chosen}', but the parts are {', '.join(self.parts)}")
        samples = {name: part.prepare(atoms, rng) for name, part in self.parts.items()}
        candidates = [name for name in samples if chosen in (None, name) and teaches(samples[name])]
        views = list({id(samples[name].atoms): samples[name].atoms for name in candidates}.values())
        view = views[rng.integers(len(views))] if len(views) > 1 else (views or [atoms])[0]

        targets: dict[str, np.ndarray] = {}
        inputs: dict[str, np.ndarray] = {}
        for name, sample in samples.items():
            seen = name in candidates and sample.atoms is view
            for target, values in sample.targets.items():
                targets[f"{name} {target}"] = values if seen else _blank(values, np.nan, sample.atoms, view)
            for given, values in sample.inputs.items():
                if seen or given not in inputs:
                    inputs[given] = values if seen else _blank(values, 0.0, sample.atoms, view)
        return Sample(view, targets, inputs)


def _blank(values: np.ndarray, fill: float, seen: ase.Atoms, view: ase.Atoms) -> np.ndarray:
    """One number in place of values of a structure as it was `seen`, in the shape for another view of it.

    Views may differ in their number of atoms, as when some are masked, but none leaves one atom of several.
    """
    rows = len(view) if len(values) == len(seen) else len(values)
    return np.full((rows, *np.shape(values)[1:]), fill)


def _of_part(part: str, targets: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    for name, values in targets.items():
        owner, _, own = name.partition(" ")
        if owner == part:
            yield own, values


def teaches(sample: Sample) -> bool:
    """Whether a sample has any label."""
    return any(np.isfinite(values).any() for values in sample.targets.values())

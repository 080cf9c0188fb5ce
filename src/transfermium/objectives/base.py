"""What every objective promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import ase
import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..graph import Batch, Sample
from ..model import Output, copied
from ..nn import NodeInputs

Backbone = TypeVar("Backbone")


class Quantity(NamedTuple):
    """What an output means: the quantity it was trained on and its unit."""

    name: str
    unit: str


Loss = dict[str, tuple[Tensor, Tensor]]  # term -> (weighted sum, count of present labels)


class Objective:
    """What is to be learned: which outputs, from which view of a structure, by which loss.

    A subclass keeps every constructor argument as an attribute of the same name.
    """

    def outputs(self, width: int) -> dict[str, Output]:
        """Heads and their derivatives, on features of this width."""
        raise NotImplementedError

    def labels(self) -> dict[str, bool]:
        """Quantities wanted from the data, each with whether it must be there; none by default."""
        return {}

    def quantities(self) -> dict[str, Quantity]:
        """What each output means; by default its own name, without unit."""
        return {}

    def differences(self) -> dict[str, tuple[str, str]]:
        """Outputs that are the difference between a quantity and a cheaper label: to these two; none by default."""
        return {}

    def vector_inputs(self) -> tuple[str, ...]:
        """Vectors per atom that samples have as inputs, which the backbone has to be told; none by default."""
        return ()

    def scalar_inputs(self) -> tuple[str, ...]:
        """Numbers that samples have as inputs, which the backbone has to be told; none by default."""
        return ()

    def warnings(self, structures: Sequence[ase.Atoms]) -> list[str]:
        """What a user should know before training on these structures; by default nothing."""
        return []

    def settled(self, samples: Sequence[Sample]) -> Objective:
        """This objective with every number that depends on the training data fixed; itself by default."""
        return self

    def calibration(self, name: str, samples: Sequence[Sample]) -> tuple[str, Sequence[Sample]]:
        """What the head called `name` is calibrated on: targets by their own names, and which of them is the head's."""
        return name, samples

    def comparable(self) -> Objective:
        """This objective with all targets that its outputs can be compared with in an evaluation; itself by default."""
        return self

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        """The structure as it is to be seen this time, with its targets; `atoms` stays as it is."""
        raise NotImplementedError

    def wanted(self, targets: Mapping[str, Any]) -> list[str]:
        """Outputs that the loss of a batch with these targets reads; by default those called like them."""
        return list(targets)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        """Each term as a weighted sum over present labels and their count."""
        raise NotImplementedError


def told(backbone: Backbone, objective: Objective) -> Backbone:
    """A new backbone like this one, which is told what samples of the objective have as inputs."""
    changes: dict[str, tuple[str, ...]] = {}
    for argument, asked in (("vector_inputs", objective.vector_inputs()), ("inputs", objective.scalar_inputs())):
        has = tuple(getattr(backbone, argument, ()))
        wanted = tuple(dict.fromkeys([*has, *asked]))
        if wanted != has and not hasattr(backbone, argument):
            raise InputError(
                f"this objective tells the model {', '.join(wanted)} per atom, but {type(backbone).__name__} takes no "
                f"{argument}: choose another backbone"
            )
        changes |= {argument: wanted} if wanted != has else {}
    new: Backbone = copied(backbone, **changes)
    blocks = [module for module in new.modules() if isinstance(module, NodeInputs)]  # type: ignore[attr-defined]
    if lost := [name for name in objective.scalar_inputs() if not any(name in block.inputs for block in blocks)]:
        raise InputError(f"{type(backbone).__name__} has no NodeInputs that takes {', '.join(lost)}: give it one")
    return new


def has_volume(atoms: ase.Atoms) -> bool:
    """Whether a structure is periodic in three directions: others have no stress, which is per volume."""
    return bool(atoms.pbc.all() and atoms.cell.rank == 3)


def label(atoms: ase.Atoms, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The label called `name` as an array of this shape, NaN when the structure has none.

    Looked for in `atoms.arrays`, `atoms.info` and the results of a calculator, in this order.
    """
    results = atoms.calc.results if atoms.calc is not None else {}
    for place in (atoms.arrays, atoms.info, results):
        if place.get(name) is not None:
            try:
                return np.asarray(place[name], float).reshape(shape)
            except (TypeError, ValueError):
                found = np.asarray(place[name])
                hint = ": give kind='per-atom'" if found.ndim and len(found) == len(atoms) and shape == (1,) else ""
                shown = f"of shape {found.shape}" if found.ndim else repr(place[name])
                raise InputError(f"the label '{name}' is {shown}, but must be {_spelled(shape)}{hint}") from None
    return np.full(shape, np.nan)


def _spelled(shape: tuple[int, ...]) -> str:
    return "a number" if np.prod(shape) == 1 else f"numbers of shape {shape}"


def absolute_errors(output: Tensor, target: Tensor, weight: float, rounding: float = 0.0) -> tuple[Tensor, Tensor]:
    """Weighted sum of |output - target| over the components that have a label, and their count.

    Errors well below `rounding` r count less, as |x|²/2r: the pseudo-Huber loss.
    """
    present = torch.isfinite(target)
    errors = torch.where(present, output.double() - target, 0.0)  # a selection would wait for the GPU
    errors = rounding * (torch.sqrt(1 + (errors / rounding) ** 2) - 1) if rounding else errors.abs()
    return weight * errors.sum(), present.sum()

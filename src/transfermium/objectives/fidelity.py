"""Fidelities: several levels of theory in one model, which is told the level of each structure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import ase
import numpy as np
import torch

from ..errors import InputError
from ..graph import Sample
from ..heads import Head, level_input, with_levels
from ..model import Output, described
from .base import Objective
from .together import PART, Parts, teaches


class Fidelities(Parts):
    """Levels of theory that share backbone and readout; what differs is an input, references, shift and scale.

    `Fidelities(Potential(), ["pbe", "r2scan"])` learns from structures `{"pbe": ..., "r2scan": ...}`, or from such
    that say their level in `info["level"]`. The level is an input of the model whose weights start at zero, so that
    before training levels differ by their references only: the energies of the elements, or shift and scale of a
    property. A model of one level that is fine-tuned to several starts each of them as it is.

    Each level counts alike, however few its labels: of every step that has labels of it, its mean errors are a term of
    their own, weighted like those of the others or by `weights`. The model is used as one of its levels, which is a
    plain model.

    Args:
        parts: what every level learns; or levels to objectives, which have to be of the same outputs.
        levels: their names, where there is one objective for all.
        weights: of the losses of levels; one by default.
    """

    marks: ClassVar[tuple[str, ...]] = (PART, "level")

    def __init__(
        self,
        parts: Objective | dict[str, Objective],
        levels: list[str] | None = None,
        weights: dict[str, float] | None = None,
    ):
        if isinstance(parts, Objective):
            if not levels:
                raise InputError("levels has no name: give those of the levels of theory, such as levels=[pbe,r2scan]")
            parts = dict.fromkeys(levels, parts)
        super().__init__(parts, weights)
        self.levels = list(self.parts)
        if levels is not None and list(levels) != self.levels:
            raise InputError(f"levels are {', '.join(levels)}, but objectives are of {', '.join(self.levels)}")
        self._check_alike()

    def _check_alike(self) -> None:
        with torch.random.fork_rng(devices=[]):  # heads draw weights
            kinds = {level: _kinds(part) for level, part in self.parts.items()}
        first = self.levels[0]
        for level, part in self.parts.items():
            if part.vector_inputs() or part.scalar_inputs():
                what = "vectors" if part.vector_inputs() else "numbers"
                raise InputError(f"{level} is {type(part).__name__}, which tells the model {what}: levels cannot")
            if kinds[level] != kinds[first]:
                raise InputError(
                    f"{first} and {level} would have other outputs, but levels of theory share them: give objectives "
                    "of the same kind, or learn them with Together"
                )

    @cached_property
    def names(self) -> dict[str, dict[str, str]]:
        with torch.random.fork_rng(devices=[]):
            own = list(next(iter(self.parts.values())).outputs(2))
        return {level: {name: name for name in own} for level in self.levels}

    def constants(self, part: str) -> dict[str, float]:
        return {level_input(level): float(level == part) for level in self.levels}

    def scalar_inputs(self) -> tuple[str, ...]:
        return tuple(self.constants(""))

    def outputs(self, width: int) -> dict[str, Output]:
        outputs = next(iter(self.parts.values())).outputs(width)
        return {name: with_levels(o, self.levels) if isinstance(o, Head) else o for name, o in outputs.items()}

    def calibration(self, name: str, samples: Sequence[Sample]) -> tuple[str, Sequence[Sample]]:
        everything = [sample for level in self.levels for sample in self.own(level, samples)]
        return next(iter(self.parts.values())).calibration(name, everything)

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        own = self.meant_for(atoms)
        if own is not None and own not in self.parts:
            raise InputError(
                f"a structure is of the level '{own}', but the levels are {', '.join(self.levels)}: call them so, or "
                "give structures by level"
            )
        samples = {level: part.prepare(atoms, rng) for level, part in self.parts.items()}
        if own is None and any(map(teaches, samples.values())):
            first, *_, last = self.levels * 2
            raise InputError(
                f"a structure has labels, but no level: give structures as {first}=FILE {last}=FILE, or info['level']"
            )
        targets = {
            f"{level} {name}": values if level == own else np.full(np.shape(values), np.nan)
            for level, sample in samples.items()
            for name, values in sample.targets.items()
        }
        told = {name: np.array([value]) for name, value in self.constants(own or "").items()}
        return Sample(samples[own].atoms if own else atoms, targets, told)


def _kinds(part: Objective) -> dict[str, object]:
    """What the outputs of a part are: equal where they can be shared."""
    return {name: described(o) if isinstance(o, Head) else o for name, o in part.outputs(2).items()}

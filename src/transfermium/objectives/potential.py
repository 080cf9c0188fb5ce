"""Potential: energies, forces and stress (doi 10.1039/d3dd00214d)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ase
import numpy as np
from torch import Tensor

from ..errors import InputError
from ..graph import Batch, Sample
from ..heads import EnergyHead, TensorHead, VectorHead, rms, spread_of_energies, values
from ..model import Gradient, Output, Strain
from .base import Loss, Objective, Quantity, absolute_errors, has_volume, label


class Potential(Objective):
    """A potential energy surface, by mean absolute errors of energy per atom, forces and stress.

    With automatic weights, errors of what is labelled once per structure, energy and stress, are rounded off below
    `rounding`: their gradients add up coherently over all atoms, and those of a plain absolute error would drown those
    of the forces for ever. A weight that is given is that of the plain absolute error.

    Args:
        energy, forces, stress: weights of the errors in eV/atom, eV/Å and eV/Å³. None weights a label that is found
            by one over its RMS in the training set (energies: after per-element references) and leaves out one that is
            not; zero leaves it out.
        conservative: forces and stress are derivatives of the energy; otherwise they are outputs of their own heads.
        rounding: "energy" and "stress" to the error (eV/atom, eV/Å³) below which they count less; None is, for
            automatic weights, the work of the RMS force over 1 Å, per atom and per volume of an atom, and at least
            their own RMS; {} is nothing.
    """

    def __init__(
        self,
        energy: float | None = None,
        forces: float | None = None,
        stress: float | None = None,
        conservative: bool = True,
        rounding: Mapping[str, float] | None = None,
    ):
        for name, weight in {"energy": energy, "forces": forces, "stress": stress}.items():
            if weight is not None and not 0 <= weight < np.inf:
                raise InputError(f"the weight of {name} is {weight}, but must be zero or positive")
        if energy == forces == stress == 0:
            raise InputError("a potential with weight zero for energy, forces and stress has nothing to learn")
        self.energy = energy
        self.forces = forces
        self.stress = stress
        self.conservative = conservative
        self.rounding = rounding

    @property
    def weights(self) -> dict[str, float | None]:
        """The weights that are not zero."""
        all_three = {"energy": self.energy, "forces": self.forces, "stress": self.stress}
        return {name: weight for name, weight in all_three.items() if weight != 0}

    def outputs(self, width: int) -> dict[str, Output]:
        if self.conservative:
            return {"energy": EnergyHead(width), "forces": Gradient("energy"), "stress": Strain("energy")}
        heads = {"energy": EnergyHead(width), "forces": VectorHead(width), "stress": TensorHead(width)}
        return {name: head for name, head in heads.items() if name in self.weights}

    def labels(self) -> dict[str, bool]:
        return {name: weight is not None for name, weight in self.weights.items()}

    def quantities(self) -> dict[str, Quantity]:
        units = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3"}
        return {name: Quantity(name, unit) for name, unit in units.items()}

    def settled(self, samples: Sequence[Sample]) -> Potential:
        sizes = {name: size for name in self.weights if (size := _typical_size(name, samples))}
        if self.stress and "stress" not in sizes and not any(map(has_volume, (s.atoms for s in samples))):
            raise InputError(
                "stress is asked for, but no structure is periodic in three directions, and without a volume there is "
                "none: leave it out (stress=0), or give cell and pbc"
            )
        if not sizes:
            raise InputError("no structure has an energy, forces or a stress: name their keys with --label energy=KEY")
        given = {"energy": self.energy, "forces": self.forces, "stress": self.stress}
        found = {name: 1 / sizes[name] if name in sizes else 0.0 for name in given}
        weights = {name: found[name] if weight is None else weight for name, weight in given.items()}
        automatic = {n: r for n, r in _rounding(sizes, samples).items() if given[n] is None}
        rounding = automatic if self.rounding is None else self.rounding
        return Potential(**weights, conservative=self.conservative, rounding=rounding)

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        shapes = {"energy": (1,), "forces": (len(atoms), 3), "stress": (1, 3, 3)}
        targets = {name: label(atoms, name, shapes[name]) for name in self.weights}
        if "stress" in targets and not has_volume(atoms):
            targets["stress"] = np.full((1, 3, 3), np.nan)  # it is per volume, and there is none
        return Sample(atoms, targets)

    def comparable(self) -> Potential:
        """Derivatives can be compared with labels whether they were trained on or not."""
        if not self.conservative:
            return self
        return Potential(self.energy, forces=None, stress=None, rounding=self.rounding)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        terms = {}
        for name, weight in self.weights.items():
            output, target = outputs[name].double(), batch.targets[name]
            if name == "energy":
                size = batch.graph.atoms_per_system().clamp(min=1)
                output, target = output / size, target / size
            rounding = (self.rounding or {}).get(name, 0.0)
            terms[name] = absolute_errors(output, target, 1.0 if weight is None else weight, rounding)
        return terms


def _rounding(sizes: Mapping[str, float], samples: Sequence[Sample]) -> dict[str, float]:
    """Where errors of energy and stress begin to count in full; empty without forces, which alone need it."""
    if "forces" not in sizes:
        return {}
    volumes = [s.atoms.get_volume() / len(s.atoms) for s in samples if s.atoms.cell.rank == 3 and len(s.atoms)]
    work = {"energy": sizes["forces"], "stress": sizes["forces"] / np.median(volumes or [1.0])}
    return {name: float(max(sizes[name], work[name])) for name in ("energy", "stress") if name in sizes}


def _typical_size(name: str, samples: Sequence[Sample]) -> float:
    """RMS of a label, of energies per atom and after references; zero where there is none."""
    found = values(name, samples)
    if len(found) == 0:
        return 0.0
    return spread_of_energies(name, samples) if name == "energy" else rms(found)

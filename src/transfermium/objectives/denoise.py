"""Denoising: displace the atoms, predict the way back (arXiv:2206.00133, doi 10.1039/d3dd00214d)."""

from __future__ import annotations

from collections.abc import Mapping

import ase
import numpy as np
from torch import Tensor

from ..errors import InputError
from ..graph import Batch, Sample
from ..heads import EnergyHead, VectorHead
from ..model import Gradient, Output
from .base import Loss, Objective, Quantity, absolute_errors


class Denoise(Objective):
    """Gaussian noise on the positions; the output called "forces" learns the displacement back, -noise, in Å.

    Noise is drawn afresh at every access. Its mean over the atoms is taken out, and in structures without periodic
    directions its rotation too: a derivative of an energy has neither net force nor net torque, so it could never
    fit them.

    Args:
        sigma: standard deviation of the noise per component, in Å.
        conservative: the way back is minus the derivative of a scalar output; otherwise a vector output.
    """

    def __init__(self, sigma: float = 0.1, conservative: bool = True):
        if not 0 < sigma < 5:
            raise InputError(f"sigma is {sigma} Å, but noise must be above 0 and below 5 Å; 0.05 to 0.3 is usual")
        self.sigma = sigma
        self.conservative = conservative

    def outputs(self, width: int) -> dict[str, Output]:
        if self.conservative:
            return {"energy": EnergyHead(width), "forces": Gradient("energy")}
        return {"forces": VectorHead(width)}

    def quantities(self) -> dict[str, Quantity]:
        energy = {"energy": Quantity("denoising potential", "Å^2")} if self.conservative else {}
        return {**energy, "forces": Quantity("denoising displacement", "Å")}

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        noise = self.sigma * rng.normal(size=atoms.positions.shape)
        noise -= noise.mean(axis=0) if len(atoms) else 0.0
        if not atoms.pbc.any() and len(atoms) > 1:
            noise -= rigid_rotation(atoms.positions, noise)  # then it has no torque in the noisy structure either
        noisy = ase.Atoms(atoms.numbers, atoms.positions + noise, cell=atoms.cell, pbc=atoms.pbc)
        return Sample(noisy, {"forces": -noise})

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        return {"forces": absolute_errors(outputs["forces"], batch.targets["forces"], 1 / self.sigma)}


def rigid_rotation(positions: np.ndarray, field: np.ndarray) -> np.ndarray:
    """The part of a vector field (n_atoms, 3) that turns the structure as a whole: its least-squares ω × r."""
    r = positions - positions.mean(axis=0)
    spin = np.zeros((*r.shape, 3))  # ω × r as a matrix acting on ω
    x, y, z = r.T
    spin[:, 0, 1], spin[:, 0, 2] = z, -y
    spin[:, 1, 0], spin[:, 1, 2] = -z, x
    spin[:, 2, 0], spin[:, 2, 1] = y, -x
    matrix = spin.reshape(-1, 3)
    omega = np.linalg.lstsq(matrix, field.reshape(-1), rcond=None)[0]
    return (matrix @ omega).reshape(field.shape)

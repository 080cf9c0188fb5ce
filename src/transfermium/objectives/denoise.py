"""Denoising: displace the atoms, strain the cell, predict the way back (arXiv:2206.00133, doi 10.1039/d3dd00214d)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ase
import numpy as np
from torch import Tensor

from ..errors import InputError
from ..graph import Batch, Sample
from ..heads import EnergyHead, TensorHead, VectorHead
from ..model import Gradient, Output, Strain
from .base import Loss, Objective, Quantity, absolute_errors, has_volume, label

MOST_STRAIN = 0.1  # of more, draws turn cells inside out
VACUUM = 6.0  # Å, across which nothing is bonded
FAR = 0.5  # eV/Å: with larger forces the way back to where noise began is not the way to a minimum


class Denoise(Objective):
    """Gaussian noise on the positions; the output called "forces" learns the displacement back, -noise, in Å.

    Noise is drawn afresh at every access. Its mean over the atoms is taken out, and in structures without periodic
    directions, or with a vacuum in all of these (6 Å), its rotation too: a derivative of an energy has neither net
    force nor net torque, so it could never fit them. With `strain`, structures that are periodic in three directions
    are strained as well, and the output called "stress" learns by how much: the energy Σ noise²/2 + V Σ strain²/2 is
    lowest at the structure as it was; its force is -noise, and its stress strain + Σ noise⊗noise / V, as displacements
    are stretched with the cell.

    A structure is a minimum of that energy only if it was relaxed. Others can be used when the model is told their
    forces (`told_forces`: DeNS, arXiv:2403.09549), which make the way back unique; those without forces teach nothing
    then.

    Args:
        sigma: standard deviation of the noise per component, in Å. Of several, each structure draws one anew every
            time; errors count relative to it.
        conservative: the way back is minus the derivative of a scalar output (and the strain its derivative with
            respect to strain, per volume); otherwise both are outputs of their own.
        strain: standard deviation of the components of a symmetric strain.
        told_forces: the backbone is told the forces (eV/Å) of the structure without noise.
    """

    def __init__(
        self,
        sigma: float | Sequence[float] = 0.1,
        conservative: bool = True,
        strain: float = 0.0,
        told_forces: bool = False,
    ):
        if not isinstance(sigma, int | float):
            sigma = list(sigma)
        for one in sigma if isinstance(sigma, list) else [sigma]:
            if not 0 < one < 5:
                raise InputError(f"sigma is {one} Å, but noise must be above 0 and below 5 Å; 0.05 to 0.3 is usual")
        if sigma == []:
            raise InputError("sigma names no noise: give one number in Å, or several")
        if not 0 <= strain <= MOST_STRAIN:
            raise InputError(f"strain is {strain}, but must be between zero and {MOST_STRAIN}; 0.02 is usual")
        self.sigma = sigma
        self.strain = strain
        self.conservative = conservative
        self.told_forces = told_forces

    @property
    def sigmas(self) -> list[float]:
        return self.sigma if isinstance(self.sigma, list) else [self.sigma]

    def outputs(self, width: int) -> dict[str, Output]:
        if self.conservative:
            outputs: dict[str, Output] = {"energy": EnergyHead(width), "forces": Gradient("energy")}
            return {**outputs, "stress": Strain("energy")} if self.strain else outputs
        direct: dict[str, Output] = {"forces": VectorHead(width)}
        return {**direct, "stress": TensorHead(width)} if self.strain else direct

    def quantities(self) -> dict[str, Quantity]:
        energy = {"energy": Quantity("denoising potential", "Å^2")} if self.conservative else {}
        strain = {"stress": Quantity("denoising strain", "")} if self.strain else {}
        return {**energy, "forces": Quantity("denoising displacement", "Å"), **strain}

    def labels(self) -> dict[str, bool]:
        return {"forces": True} if self.told_forces else {}

    def vector_inputs(self) -> tuple[str, ...]:
        return ("forces",) if self.told_forces else ()

    def warnings(self, structures: Sequence[ase.Atoms]) -> list[str]:
        """Structures that are far from equilibrium, where nobody tells the model so."""
        if self.told_forces:
            return []
        forces = [label(atoms, "forces", (len(atoms), 3)) for atoms in structures]
        sizes = np.concatenate([np.linalg.norm(f, axis=1) for f in forces] or [np.zeros(0)])
        known = sizes[np.isfinite(sizes)]
        if not len(known) or (median := float(np.median(known))) < FAR:
            return []
        return [
            f"these structures are not relaxed: the median force is {median:.2g} eV/Å, and denoising learns a minimum "
            "where none is; choose relaxed structures, or tell the model the forces (told_forces=True)"
        ]

    def settled(self, samples: Sequence[Sample]) -> Denoise:
        if self.strain and samples and not any(np.isfinite(sample.targets["stress"]).any() for sample in samples):
            raise InputError(
                "strain is to be learned, but no structure is periodic in three directions: leave strain out, or give "
                "cell and pbc"
            )
        return self

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        sigma = self.sigmas[rng.integers(len(self.sigmas))] if len(self.sigmas) > 1 else self.sigmas[0]
        noise = sigma * rng.normal(size=atoms.positions.shape)
        noise -= noise.mean(axis=0) if len(atoms) else 0.0
        targets: dict[str, np.ndarray] = {}
        noisy = ase.Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        if self.strain:
            drawn = self.strain * rng.normal(size=(3, 3))
            strain = np.triu(drawn) + np.triu(drawn, 1).T
            if has_volume(atoms):
                noisy.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            else:
                strain = np.full((3, 3), np.nan)
        alone = whole_in_vacuum(noisy) if len(atoms) > 1 else None
        if alone is not None:
            noise -= rigid_rotation(alone, noise)  # then it has no torque in the noisy structure either
        noisy.positions += noise
        if self.strain:
            volume = noisy.get_volume() if noisy.cell.rank == 3 else np.nan
            targets["stress"] = (strain + noise.T @ noise / volume)[None]
        targets |= {"forces": -noise, "noise": np.array([sigma])}
        if not self.told_forces:
            return Sample(noisy, targets)

        forces = label(atoms, "forces", (len(atoms), 3))
        if not np.isfinite(forces).all():
            forces = np.zeros((len(atoms), 3))
            targets = {name: np.full_like(values, np.nan) for name, values in targets.items()}
        return Sample(noisy, targets, {"forces": forces})

    def wanted(self, targets: Mapping[str, Any]) -> list[str]:
        return [name for name in targets if name != "noise"]

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        sigma = batch.targets["noise"].nan_to_num(1.0).index_select(0, batch.graph.system_idx).unsqueeze(1)
        output, target = outputs["forces"].double(), batch.targets["forces"]
        terms = {"forces": absolute_errors(output / sigma, target / sigma, 1.0)}
        if self.strain:
            terms["stress"] = absolute_errors(outputs["stress"], batch.targets["stress"], 1 / self.strain)
        return terms


def whole_in_vacuum(atoms: ase.Atoms) -> np.ndarray | None:
    """Positions (Å) of atoms that nothing connects with their images: of a molecule, also one in a periodic box, where
    it may lie across a face; None of all others."""
    if not atoms.pbc.any():
        return np.asarray(atoms.positions)
    cell = atoms.cell.complete()
    inside = cell.scaled_positions(atoms.positions)
    for axis in np.flatnonzero(atoms.pbc):
        ordered = np.sort(inside[:, axis] % 1.0)
        gaps = np.diff(ordered, append=ordered[0] + 1.0)
        widest = int(gaps.argmax())
        if gaps[widest] / np.linalg.norm(cell.reciprocal()[axis]) < VACUUM:
            return None
        inside[:, axis] = (inside[:, axis] - ordered[(widest + 1) % len(ordered)]) % 1.0
    return np.asarray(cell.cartesian_positions(inside))


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

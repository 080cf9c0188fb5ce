"""The same structures, targets and loss for every system; every environment has what is imported here."""

import io
import lzma
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from ase.units import kcal, mol
from torch import Tensor
from torch.nn import functional as F
from vesin import NeighborList

CUTOFF = 5.0  # Å

Targets = dict[str, Tensor]


class Workload(NamedTuple):
    """A public data set, how many of its structures make a step, and what is learned from them."""

    file: str
    batch: int
    outputs: tuple[str, ...]
    energy: str | None = None  # key of the energy in kcal/mol, where it is not the calculator's


WORKLOADS = {
    "W1": Workload("water_pbe0ts/train.extxyz.xz", 4, ("energy", "forces")),
    "W2": Workload("mattersim_benchmarks/mptrj-random-1k.extxyz.xz", 16, ("energy", "forces", "stress")),
    "W3": Workload("qm7_dftb3_pbe0/all.extxyz.xz", 128, ("energy",), "ae_pbe0_kcal"),
}
VALIDATION = "water_pbe0ts/val.extxyz.xz"


def structures(data: Path, file: str) -> list[Atoms]:
    """All structures of a file, shuffled; decompressed first, because ASE seeks in the file."""
    with lzma.open(data / file, "rt") as text:
        found = list(read(io.StringIO(text.read()), ":", format="extxyz"))
    random.Random(0).shuffle(found)
    return found


def batches(found: Sequence[Atoms], size: int) -> list[list[Atoms]]:
    """Whole batches only, so that every step does the same work."""
    return [list(found[i : i + size]) for i in range(0, len(found) - size + 1, size)]


def elements(found: Sequence[Atoms]) -> list[int]:
    return sorted({int(z) for atoms in found for z in atoms.numbers})


def edges(atoms: Atoms) -> int:
    """Directed edges within the cutoff, whatever a system makes of the structure."""
    search = NeighborList(cutoff=CUTOFF, full_list=True)
    return len(search.compute(atoms.positions, atoms.cell.array, atoms.pbc, "i")[0])


def energy_per_atom(atoms: Atoms, workload: Workload) -> float:
    """In eV."""
    total = atoms.get_potential_energy() if workload.energy is None else atoms.info[workload.energy] * kcal / mol
    return total / len(atoms)


def targets(batch: Sequence[Atoms], workload: Workload, reference: float) -> Targets:
    """Energy per atom less a reference (eV), forces (eV/Å) and stress (eV/Å³), in single precision."""
    found = {
        "energy": np.array([energy_per_atom(atoms, workload) - reference for atoms in batch]),
        "sizes": np.array([len(atoms) for atoms in batch]),
    }
    if "forces" in workload.outputs:
        found["forces"] = np.concatenate([atoms.get_forces() for atoms in batch])
    if "stress" in workload.outputs:
        found["stress"] = np.stack([atoms.get_stress(voigt=False) for atoms in batch])
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in found.items()}


def loss(outputs: Mapping[str, Tensor], wanted: Targets) -> Tensor:
    """Rounded absolute errors of forces and stress, and a tenth of the squared error of the energy per atom."""
    total = 0.1 * F.mse_loss(outputs["energy"].flatten().float() / wanted["sizes"], wanted["energy"])
    if "forces" in wanted:
        total = total + F.smooth_l1_loss(outputs["forces"].float(), wanted["forces"], beta=0.1)
    if "stress" in wanted and "stress" in outputs:
        total = total + 10 * F.smooth_l1_loss(outputs["stress"].float(), wanted["stress"], beta=0.01)
    return total

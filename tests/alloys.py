"""Tiny copper-gold alloys labelled by ASE's effective medium theory, and models that train on them in a moment."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from torch import Tensor

import transfermium as tm
from transfermium.data import Labelled, resolve

QUICK: dict[str, Any] = {"edges": 400, "device": "cpu", "split_by": "random", "verbose": False}


def alloys(n: int = 12, seed: int = 0) -> list[Atoms]:
    """Rattled and strained cells of 4 atoms with energy, forces, stress, and a made-up `info["gap"]`."""
    return [_alloy(np.random.default_rng((seed, index))) for index in range(n)]


def painn(**changes: Any) -> tm.PaiNN:
    return tm.PaiNN(**{"width": 8, "depth": 1, "cutoff": 4.0, "radial": 6, **changes})


@functools.cache
def potential() -> tm.Model:
    """A potential of the alloys; leave it as it is."""
    return tm.pretrain(alloys(16), tm.Potential(), painn(), steps=20, lr=0.01, **QUICK)


@functools.cache
def gap_model() -> tm.Model:
    """A property of the alloys; leave it as it is."""
    return tm.pretrain(alloys(16), tm.Property("gap"), painn(), steps=20, lr=0.01, **QUICK)


def without(structures: list[Atoms], *labels: str) -> list[Atoms]:
    """Copies that lack these results of a calculator."""
    copies = [atoms.copy() for atoms in structures]
    for copy, atoms in zip(copies, structures, strict=True):
        kept = {name: value for name, value in atoms.calc.results.items() if name not in labels}
        copy.calc = SinglePointCalculator(copy, **kept)
    return copies


def ready(structures: list[Atoms]) -> Labelled:
    """The same with labels in the form that objectives read."""
    return Labelled(structures, resolve(structures, [], optional=["energy", "forces", "stress", "gap"]))


def weights_of(model: tm.Model, part: str = "") -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items() if name.startswith(part)}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _alloy(rng: np.random.Generator) -> Atoms:
    atoms = bulk("Cu", "fcc", a=3.7 + 0.3 * rng.random(), cubic=True)
    atoms.numbers[:] = rng.choice([29, 79], size=4)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), scale_atoms=True)
    atoms.positions += 0.1 * rng.normal(size=(4, 3))
    atoms.info["gap"] = float(atoms.get_volume() / 10)
    atoms.calc = EMT()
    results = {name: atoms.calc.get_property(name, atoms) for name in ("energy", "forces", "stress")}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms

"""Masking: remove atoms and point at them (arXiv:2402.15921), or hide elements and name them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import ase
import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..graph import Batch, Sample
from ..heads import AtomHead, EnergyHead, VectorHead
from ..model import Gradient, Output, copied
from ..molecules import Molecules, molecules
from ..nn import LAST_ELEMENT
from .base import Loss, Objective, Quantity, absolute_errors

MASKED = "masked"  # input of the atoms that lost one of their molecule
SMALL = 1e-3  # of the output called forces: a shorter one has no direction that could be learned
REPEAT = "one atom at least is to be seen; repeat them, as atoms.repeat(2) does"
MOST_CLUES = 4_000  # atoms that the floor of the loss is computed from


class Removal(Objective, ABC):
    """Objectives that remove atoms and ask others for them.

    A subclass says by `_hindrance` why nothing of a structure can be removed, in words that are keys of its `_advice`,
    those first that lie nearest to success.
    """

    target: ClassVar[str]  # what atoms are asked for; NaN where nothing is asked
    flag: bool

    def scalar_inputs(self) -> tuple[str, ...]:
        return (MASKED,) if self.flag else ()

    def settled(self, samples: Sequence[Sample]) -> Self:
        """Itself; raises `InputError` where there is nothing to mask at all."""
        if not samples or any(np.isfinite(sample.targets[self.target]).any() for sample in samples):
            return self  # beside other objectives there may be none, by the chance of their views
        reasons = Counter(filter(None, (self._hindrance(sample.atoms) for sample in samples)))
        for reason, advice in self._advice().items():
            if reasons[reason]:
                raise InputError(
                    f"there is nothing to mask, for {reason} in {reasons[reason]} structures to train on: {advice}"
                )
        return self

    def warnings(self, structures: Sequence[ase.Atoms]) -> list[str]:
        """Structures that teach nothing, and what takes no look at surroundings."""
        hindrances = Counter(filter(None, (self._hindrance(atoms) for atoms in structures)))
        n = hindrances.total()
        why = ", ".join(f"{count}: {reason}" for reason, count in hindrances.most_common())
        left_out = [f"{n} of {len(structures)} structures have nothing to mask and teach nothing ({why})"] if n else []
        return left_out if n == len(structures) else [*left_out, self._told(structures)]

    def teaching(self, structures: Sequence[ase.Atoms]) -> int:
        """How many of the structures something can be removed from."""
        return sum(self._hindrance(atoms) is None for atoms in structures)

    @abstractmethod
    def floor(self, structures: Sequence[ase.Atoms]) -> float:
        """Loss of the best guess that takes no look at surroundings; NaN where nothing can be masked."""

    def floors(self, structures: Sequence[ase.Atoms]) -> dict[str, float]:
        """The same of each term of the loss, in its own unit."""
        return {self.target: self.floor(structures)}

    def units(self) -> dict[str, tuple[float, str]]:
        """Terms of the loss that are errors in a unit: their weight in the loss, and the unit."""
        return {}

    @abstractmethod
    def _told(self, structures: Sequence[ase.Atoms]) -> str:
        """What that guess knows, in words."""

    @abstractmethod
    def _hindrance(self, atoms: ase.Atoms) -> str | None: ...

    @abstractmethod
    def _advice(self) -> dict[str, str]: ...


class MaskAtoms(Removal):
    """Some molecules lose an atom; the output called "forces" learns to point from the others to where it was.

    At every access molecules are chosen afresh, and of each the atom that is removed. What is left of such a molecule
    is flagged, and each flagged atom has an error of 1 - cos between its "forces" and the vector to the removed atom.
    There is no head for this task alone, so that fine-tuning to a potential goes on with all weights.

    Molecules are found from bonds (`transfermium.molecules`). Chains and networks of bonds, single atoms, and molecules
    that their cell is too small for stay as they are.

    Args:
        fraction: of the molecules with such an atom; at least one of them.
        atoms: which are removed: an element, or "leaf" for any atom with a single bond.
        flag: the backbone is told which atoms lost one of their molecule.
        length: weight of the error of the length of "forces", which is then the distance to the removed atom, per Å.
        conservative: "forces" are minus the derivative of a scalar output; otherwise an output of their own.
            Derivatives neither push nor turn the whole: in single molecules they cannot all point to one place.
    """

    target: ClassVar[str] = "direction"

    def __init__(
        self,
        fraction: float = 0.5,
        atoms: str = "H",
        flag: bool = True,
        length: float = 0.0,
        conservative: bool = True,
    ):
        if not 0 < fraction <= 1:
            raise InputError(f"fraction is {fraction}, but must be above 0 and at most 1 of the molecules")
        if atoms != "leaf" and atoms not in chemical_symbols[1:]:
            raise InputError(f"atoms is '{atoms}', but must be an element such as H, or leaf for atoms with one bond")
        if not 0 <= length < np.inf:
            raise InputError(f"the weight of the length is {length}, but must be zero or positive")
        self.fraction = fraction
        self.atoms = atoms
        self.flag = flag
        self.length = length
        self.conservative = conservative

    def outputs(self, width: int) -> dict[str, Output]:
        if self.conservative:
            return {"energy": EnergyHead(width), "forces": Gradient("energy")}
        return {"forces": VectorHead(width)}

    def quantities(self) -> dict[str, Quantity]:
        energy = {"energy": Quantity("masking potential", "Å^2" if self.length else "")} if self.conservative else {}
        vector = Quantity("masking displacement", "Å") if self.length else Quantity("masking direction", "")
        return {**energy, "forces": vector}

    def warnings(self, structures: Sequence[ase.Atoms]) -> list[str]:
        found = super().warnings(structures)
        single = (len(molecules(atoms).sizes) == 1 and self._hindrance(atoms) is None for atoms in structures)
        if not (self.conservative and (alone := sum(single))):
            return found
        return [
            *found,
            f"{alone} of {len(structures)} structures are single molecules, whose forces as derivatives add up to "
            "nothing and cannot all point to one place: the loss stays high there; with conservative=False it need not",
        ]

    def _told(self, structures: Sequence[ase.Atoms]) -> str:
        floors = self.floors(structures)
        loss = f"a loss of {floors['direction']:.3f}"
        if self.length:
            loss += f" in the direction and an error of {floors['distance']:.3f} Å in the distance need"
        return (
            f"{loss if self.length else f'{loss} needs'} only a simple guess from what is left of each molecule: a "
            "model that does not get clearly below that has learned nothing of what surrounds them"
        )

    def units(self) -> dict[str, tuple[float, str]]:
        return {"distance": (self.length, "Å")} if self.length else {}

    def floor(self, structures: Sequence[ase.Atoms]) -> float:
        """Loss of a simple guess from what is left of each molecule alone; NaN where nothing can be masked.

        It is the sum of its terms (`floors`), of which the distance counts with its weight.
        """
        floors = self.floors(structures)
        return floors["direction"] + self.length * floors.get("distance", 0.0)

    def floors(self, structures: Sequence[ase.Atoms]) -> dict[str, float]:
        """Loss in the direction and, where the length is learned, error of the distance in Å, of a simple guess.

        Its direction is, for atoms in the same role, the best linear combination of three sums of unit vectors: to the
        neighbours that the removed atom had, along the other bonds of these, and along the atom's own. For molecules of
        three atoms none is better, and rigid TIP3P has 0.479; what is left of larger ones may tell more. Its distance
        is the median of the role. Both are fitted to these structures, so that few of them make floors too low.
        """
        clues: list[_Clue] = []
        for k in np.random.default_rng(0).permutation(len(structures)):
            found = molecules(structures[k])
            candidates = self._candidates(structures[k], found)
            clues += _clues(structures[k].numbers, found, candidates, self._share(found, candidates))
            if len(clues) >= MOST_CLUES:
                break
        distance = {"distance": _mean(_distances(clues))} if self.length else {}
        return {"direction": _mean(_directions(clues)), **distance}

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        found = molecules(atoms)
        shuffled = rng.permutation(self._candidates(atoms, found))
        owners, first = np.unique(found.owner[shuffled], return_index=True)  # of each molecule one, all alike likely
        hole = np.full(len(found.sizes), -1)
        if len(owners):
            n = max(1, int(self.fraction * len(owners) + rng.random()))  # on average the fraction
            chosen = rng.choice(len(owners), n, replace=False)
            hole[owners[chosen]] = shuffled[first[chosen]]

        missing = hole[found.owner]  # (n_atoms,), the removed atom of the same molecule, or -1
        kept = missing != np.arange(len(atoms))
        flagged = kept & (missing >= 0)
        vectors = np.full((len(atoms), 3), np.nan)
        vectors[flagged] = found.positions[missing[flagged]] - found.positions[flagged]
        distances = np.linalg.norm(vectors, axis=1)
        targets = {"direction": (vectors / distances[:, None])[kept]}
        if self.length:
            targets["distance"] = distances[kept]
        inputs = {MASKED: flagged[kept, None].astype(float)} if self.flag else {}
        if kept.all():
            return Sample(atoms, targets, inputs)
        seen = ase.Atoms(atoms.numbers[kept], atoms.positions[kept], cell=atoms.cell, pbc=atoms.pbc)
        return Sample(seen, targets, inputs)

    def wanted(self, targets: Mapping[str, Any]) -> list[str]:
        return ["forces"]

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        direction = batch.targets["direction"]
        present = torch.isfinite(direction).all(dim=1)
        forces = outputs["forces"].double()
        length = torch.sqrt(forces.square().sum(dim=1) + SMALL**2)
        cosine = (direction.nan_to_num(0.0) * forces).sum(dim=1) / length
        terms = {"direction": (torch.where(present, 1 - cosine, 0.0).sum(), present.sum())}
        if self.length:
            terms["distance"] = absolute_errors(length, batch.targets["distance"], self.length)
        return terms

    def _share(self, found: Molecules, candidates: np.ndarray) -> float:
        """How often a molecule of a structure loses an atom: more than the fraction where there are few of them."""
        return max(1 / max(len(np.unique(found.owner[candidates])), 1), self.fraction)

    def _candidates(self, atoms: ase.Atoms, found: Molecules) -> np.ndarray:
        """Atoms that may be removed."""
        fine = (found.sizes > 1) & ~found.endless & ~found.crowded
        return np.flatnonzero(self._asked(atoms, found) & fine[found.owner] & (len(atoms) > 2))

    def _asked(self, atoms: ase.Atoms, found: Molecules) -> np.ndarray:
        if self.atoms == "leaf":
            return np.bincount(found.bonds[:, 0], minlength=len(atoms)) == 1
        return np.asarray(atoms.numbers == atomic_numbers[self.atoms])

    def _hindrance(self, atoms: ase.Atoms) -> str | None:
        """Why nothing of a structure can be removed."""
        found = molecules(atoms)
        if len(self._candidates(atoms, found)):
            return None
        crowded, endless, small, lone, none, without = self._advice()
        if not (found.sizes > 1).any():
            return none
        own = np.unique(found.owner[self._asked(atoms, found)])
        if not len(own):
            return without
        if found.crowded[own].any():
            return crowded
        if found.endless[own].any():
            return endless
        return small if (found.sizes[own] > 1).any() else lone

    def _advice(self) -> dict[str, str]:
        """Hindrances, and what to do about each; those first that lie nearest to a molecule."""
        name = "leaf (atom with one bond)" if self.atoms == "leaf" else self.atoms
        without = "atoms='H' or another element" if self.atoms == "leaf" else "atoms='leaf' or another element"
        other = "choose other structures, or MaskElements or Denoise, which need no molecules"
        return {
            "cells are too small to tell atoms of a molecule from their images": "repeat them, as atoms.repeat(2) does",
            f"bonds of the {name} go on without end, as in solid networks": other,
            "structures have two atoms, and one alone has no direction": other,
            f"no {name} is bonded to another nonmetal": other,
            "no two nonmetals are bonded (metals and most salts have no molecules)": other,
            f"there is no {name}": f"choose {without}, or other structures",
        }


class MaskElements(Objective):
    """Some atoms hide their element, and an output called "element" learns to name it, by cross entropy.

    Hidden atoms are dummies (X, number 0); at least one is hidden, and at least one is not.

    Args:
        fraction: of the atoms, drawn afresh at every access.
        elements: symbols that are told apart, in the order of the classes, and of which atoms are hidden; None is those
            of the training data.
    """

    task: ClassVar[str] = "classification"

    def __init__(self, fraction: float = 0.15, elements: list[str] | None = None):
        if not 0 < fraction < 1:
            raise InputError(
                f"fraction is {fraction}, but must be above 0 and below 1 of the atoms, or nothing is left to be seen"
            )
        for symbol in elements or ():
            if symbol not in chemical_symbols[1:]:
                raise InputError(f"'{symbol}' is no element: give symbols such as H")
        self.fraction = fraction
        self.elements = elements

    @property
    def numbers(self) -> np.ndarray:
        """Atomic numbers of the classes."""
        if self.elements is None:
            return np.arange(LAST_ELEMENT + 1)
        return np.array([atomic_numbers[symbol] for symbol in self.elements], int)

    def outputs(self, width: int) -> dict[str, Output]:
        return {"element": AtomHead(width, len(self.numbers))}

    def quantities(self) -> dict[str, Quantity]:
        return {"element": Quantity("hidden element", "")}

    def warnings(self, structures: Sequence[ase.Atoms]) -> list[str]:
        """Structures that teach nothing."""
        n = sum(len(atoms) < 2 for atoms in structures)
        told = f"{n} of {len(structures)} structures are single atoms and teach nothing: {REPEAT}"
        return [told] if 0 < n < len(structures) else []

    def settled(self, samples: Sequence[Sample]) -> MaskElements:
        """With the elements of the data; raises `InputError` where there is nothing to hide."""
        hidden = [sample.targets["element"] for sample in samples]
        if samples and not any(np.isfinite(row).any() for row in hidden):
            if all(len(sample.atoms) < 2 for sample in samples):
                raise InputError(
                    f"there is nothing to hide, for all {len(samples)} structures are single atoms: {REPEAT}"
                )
            raise InputError(
                f"there is nothing to hide: no structure has an atom of {', '.join(self.elements or ())} beside another"
            )
        if self.elements is not None or not samples:
            return self
        present = {int(z) for row in [*hidden, *(s.atoms.numbers for s in samples)] for z in row[np.isfinite(row)]}
        symbols = [chemical_symbols[z] for z in sorted(present - {0})]
        if len(symbols) < 2:
            raise InputError(f"all atoms are {''.join(symbols) or 'missing'}: there is no element to guess")
        settled: MaskElements = copied(self, elements=symbols)
        return settled

    def prepare(self, atoms: ase.Atoms, rng: np.random.Generator) -> Sample:
        classes = np.full(LAST_ELEMENT + 1, np.nan)
        classes[self.numbers] = np.arange(len(self.numbers))
        target = classes[atoms.numbers]
        known = np.flatnonzero(np.isfinite(target))
        n = min(max(1, int(self.fraction * len(atoms) + rng.random())), len(known), max(len(atoms) - 1, 0))
        hidden = np.isin(np.arange(len(atoms)), rng.choice(known, n, replace=False))
        numbers = np.where(hidden, 0, atoms.numbers)
        seen = ase.Atoms(numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        return Sample(seen, {"element": np.where(hidden, target, np.nan)})

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Loss:
        target = batch.targets["element"]
        present = torch.isfinite(target)
        classes = torch.where(present, target, -100.0).long()  # which the cross entropy leaves out
        entropy = F.cross_entropy(outputs["element"].double(), classes, reduction="sum", ignore_index=-100)
        return {"element": (entropy, present.sum())}


class _Clue(NamedTuple):
    """What is left of a molecule, seen from one of its atoms, and what is to be guessed."""

    role: tuple[int, ...]
    weight: float
    direction: np.ndarray  # (3,), to the removed atom
    distance: float  # the same, in Å
    seen: np.ndarray  # (3, 3), rows are sums of unit vectors


class _Guesses(NamedTuple):
    weight: np.ndarray
    error: np.ndarray


def _clues(numbers: np.ndarray, found: Molecules, candidates: np.ndarray, share: float) -> Iterator[_Clue]:
    """Of every atom that would be flagged, for each atom that may be removed; a share of the molecules loses one."""
    bonded: dict[int, list[int]] = {}
    for receiver, sender in found.bonds.tolist():
        bonded.setdefault(receiver, []).append(sender)
    members: dict[int, list[int]] = {}
    for atom, molecule in enumerate(found.owner.tolist()):
        members.setdefault(molecule, []).append(atom)
    choices = np.bincount(found.owner[candidates])

    def towards(atom: int, others: Sequence[int], removed: int) -> np.ndarray:
        vectors = found.positions[[other for other in others if other not in (atom, removed)]] - found.positions[atom]
        return np.asarray((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).sum(axis=0))

    for removed in candidates.tolist():
        own, parents = members[found.owner[removed]], bonded[removed]
        beyond = np.sum([towards(parent, bonded[parent], removed) for parent in parents], axis=0)
        weight = share / choices[found.owner[removed]]
        for atom in own:
            if atom != removed:
                bonds = bonded[atom]
                near = 2 if atom in parents else int(any(parent in bonds for parent in parents))
                vector = found.positions[removed] - found.positions[atom]
                distance = float(np.linalg.norm(vector))
                seen = np.stack([towards(atom, parents, removed), beyond, towards(atom, bonds, removed)])
                role = (int(numbers[atom]), int(numbers[removed]), near, len(bonds), len(own))
                yield _Clue(role, weight, vector / distance, distance, seen)


def _by_role(clues: Sequence[_Clue]) -> list[list[_Clue]]:
    roles: dict[tuple[int, ...], list[_Clue]] = {}
    for clue in clues:
        roles.setdefault(clue.role, []).append(clue)
    return list(roles.values())


def _mean(guesses: Iterator[_Guesses]) -> float:
    """Of the errors; NaN of none."""
    total = weight = 0.0
    for own in guesses:
        total += float((own.weight * own.error).sum())
        weight += float(own.weight.sum())
    return total / weight if weight else float("nan")


def _distances(clues: Sequence[_Clue]) -> Iterator[_Guesses]:
    """How well distances are guessed in each role by one number."""
    for some in _by_role(clues):
        ordered = sorted(some, key=lambda clue: clue.distance)
        weights, distances = (np.array([getattr(c, name) for c in ordered]) for name in ("weight", "distance"))
        total = weights.cumsum()
        yield _Guesses(weights, np.abs(distances - distances[np.searchsorted(total, total[-1] / 2)]))


def _directions(clues: Sequence[_Clue]) -> Iterator[_Guesses]:
    """How well directions are guessed in each role, by least squares: 1 - cos."""
    for some in _by_role(clues):
        seen, directions = np.stack([c.seen.T for c in some]), np.stack([c.direction for c in some])
        weights = np.array([c.weight for c in some])
        root = np.repeat(np.sqrt(weights), 3)
        best = np.linalg.lstsq(root[:, None] * seen.reshape(-1, 3), root * directions.reshape(-1), rcond=1e-9)[0]
        guess = seen @ best
        length = np.linalg.norm(guess, axis=1)
        yield _Guesses(weights, 1 - (guess * directions).sum(axis=1) / np.where(length > 1e-6, length, np.inf))

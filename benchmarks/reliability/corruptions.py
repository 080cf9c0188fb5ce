"""Known ways to spoil a data set, and what `doctor` must say of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator

HA, BOHR, KCAL = units.Hartree, units.Bohr, units.kcal / units.mol


class Corruption(NamedTuple):
    """One way to spoil structures.

    Attributes:
        name: what was done.
        spoil: from copies of structures to spoiled ones.
        kind: of the finding that must come.
        cause: words of the likely cause; alternatives are separated by a bar.
        needs: labels without which it makes no sense.
    """

    name: str
    spoil: Callable[[list[Atoms]], list[Atoms]]
    kind: str
    cause: str
    needs: tuple[str, ...] = ("energy",)


def copied(structures: Sequence[Atoms]) -> list[Atoms]:
    """Copies with calculators of their own."""
    copies = []
    for atoms in structures:
        copy = atoms.copy()
        if atoms.calc is not None:
            results = {name: np.array(value) if np.ndim(value) else value for name, value in atoms.calc.results.items()}
            copy.calc = SinglePointCalculator(copy, **results)
        copies.append(copy)
    return copies


def scaled(**factors: float) -> Callable[[list[Atoms]], list[Atoms]]:
    def spoil(structures: list[Atoms]) -> list[Atoms]:
        for atoms in structures:
            for name, factor in factors.items():
                if name in atoms.calc.results:
                    atoms.calc.results[name] = atoms.calc.results[name] * factor
        return structures

    return spoil


def each(change: Callable[[Atoms, int], None], every: int = 1) -> Callable[[list[Atoms]], list[Atoms]]:
    """Change every so-many-th structure."""

    def spoil(structures: list[Atoms]) -> list[Atoms]:
        for index, atoms in enumerate(structures):
            if index % every == every - 1:
                change(atoms, index)
        return structures

    return spoil


def set_energy(value: Callable[[Atoms], float]) -> Callable[[Atoms, int], None]:
    def change(atoms: Atoms, _: int) -> None:
        atoms.calc.results["energy"] = value(atoms)

    return change


def energy(atoms: Atoms) -> float:
    return float(atoms.calc.results["energy"])


def reordered(atoms: Atoms, _: int) -> None:
    atoms.calc.results["stress"] = atoms.calc.results["stress"][[0, 1, 2, 5, 3, 4]]  # xy yz xz, as in VASP


def virial(sign: float) -> Callable[[Atoms, int], None]:
    def change(atoms: Atoms, _: int) -> None:
        atoms.calc.results["stress"] = sign * atoms.get_volume() * atoms.calc.results["stress"]

    return change


def pushed(atoms: Atoms, _: int) -> None:
    atoms.calc.results["forces"] = atoms.calc.results["forces"] + [0.0, 0.0, 0.2]


def shuffled_forces(atoms: Atoms, index: int) -> None:
    atoms.calc.results["forces"] = np.random.default_rng(index).permutation(atoms.calc.results["forces"])


def shuffled_energies(structures: list[Atoms]) -> list[Atoms]:
    energies = [energy(atoms) for atoms in structures]
    for atoms, value in zip(structures, np.random.default_rng(0).permutation(energies).tolist(), strict=True):
        atoms.calc.results["energy"] = value
    return structures


def no_forces(atoms: Atoms, _: int) -> None:
    atoms.calc.results["forces"] = np.zeros((len(atoms), 3))


def turned(atoms: Atoms, index: int) -> None:
    results = atoms.calc.results
    atoms.rotate(80, [1, 2, 3], rotate_cell=True)
    atoms.calc = SinglePointCalculator(atoms, **results)


def in_bohr(atoms: Atoms, _: int) -> None:
    results = atoms.calc.results if atoms.calc else {}
    atoms.set_cell(atoms.cell.array / BOHR)
    atoms.positions /= BOHR
    atoms.calc = SinglePointCalculator(atoms, **results)


def in_nm(atoms: Atoms, _: int) -> None:
    results = atoms.calc.results if atoms.calc else {}
    atoms.set_cell(atoms.cell.array / 10)
    atoms.positions /= 10
    atoms.calc = SinglePointCalculator(atoms, **results)


def moved(vector: Callable[[Atoms], np.ndarray]) -> Callable[[Atoms, int], None]:
    def change(atoms: Atoms, _: int) -> None:
        results = atoms.calc.results if atoms.calc else {}
        atoms.positions[0] = vector(atoms)
        atoms.calc = SinglePointCalculator(atoms, **results)

    return change


def flung(structures: list[Atoms]) -> list[Atoms]:
    """In some, without periodicity, one atom flies off."""
    for atoms in structures[::10]:
        results = atoms.calc.results if atoms.calc else {}
        atoms.pbc = False
        atoms.positions[0] = atoms.positions.max(axis=0) + 30
        atoms.calc = SinglePointCalculator(atoms, **results)
    return structures


def without_pbc(atoms: Atoms, _: int) -> None:
    results = atoms.calc.results if atoms.calc else {}
    atoms.pbc = False
    atoms.calc = SinglePointCalculator(atoms, **results)


def doubled(structures: list[Atoms]) -> list[Atoms]:
    return structures + copied(structures[: max(len(structures) // 5, 3)])


def turned_copies(structures: list[Atoms]) -> list[Atoms]:
    """Copies that are numbered, turned and moved differently."""
    copies = copied(structures[: max(len(structures) // 5, 3)])
    for index, atoms in enumerate(copies):
        order = np.random.default_rng(index).permutation(len(atoms))
        results = {
            n: v[order] if n == "forces" else v for n, v in atoms.calc.results.items() if n in ("energy", "forces")
        }
        copies[index] = atoms[order]
        copies[index].translate([0.3, 0.2, 0.1])
        copies[index].calc = SinglePointCalculator(copies[index], **results)
    return structures + copies


def conflicting(structures: list[Atoms]) -> list[Atoms]:
    copies = copied(structures[: max(len(structures) // 5, 6)])
    for atoms in copies:
        atoms.calc.results["energy"] += 0.3 * len(atoms)
    return structures + copies


def constant(structures: list[Atoms]) -> list[Atoms]:
    for atoms in structures:
        atoms.calc.results["energy"] = -1.0
    return structures


def leaking(structures: list[Atoms]) -> list[Atoms]:
    n = len(structures)
    for index, atoms in enumerate(structures):
        atoms.info["split"] = "train" if index < 0.8 * n else "test"
    copies = copied(structures[: n // 5])
    for atoms in copies:
        atoms.info["split"] = "test"
    return structures + copies


def sharing_ids(structures: list[Atoms]) -> list[Atoms]:
    for index, atoms in enumerate(structures):
        atoms.info["material_id"] = f"m{index // 4}"
        atoms.info["split"] = "test" if index % 4 == 0 else "train"
    return structures


def without_an_element(structures: list[Atoms]) -> list[Atoms]:
    """An element is in test structures only."""
    for index, atoms in enumerate(structures):
        atoms.info["split"] = "test" if index % 5 == 0 else "train"
        if index == 0:
            results = atoms.calc.results
            atoms.numbers[0] = 94
            atoms.calc = SinglePointCalculator(atoms, **results)
    return structures


def unconverged(atoms: Atoms, _: int) -> None:
    atoms.info["converged"] = False


def not_finite(atoms: Atoms, _: int) -> None:
    atoms.calc.results["energy"] = float("nan")


def far_energy(atoms: Atoms, _: int) -> None:
    atoms.calc.results["energy"] += 40.0 * len(atoms)


def large_force(atoms: Atoms, _: int) -> None:
    atoms.calc.results["forces"] = atoms.calc.results["forces"] + 0
    atoms.calc.results["forces"][0, 0] += 500.0


def two_levels(structures: list[Atoms]) -> list[Atoms]:
    for index, atoms in enumerate(structures):
        atoms.info["level"] = "PBE" if index % 3 else "r2SCAN"
    return structures


def other_key(atoms: Atoms, _: int) -> None:
    atoms.info["REF_energy"] = energy(atoms) + 0.1 * len(atoms)


def formation(structures: list[Atoms]) -> list[Atoms]:
    """A fifth of the energies are relative to elements."""
    shares = np.array([np.bincount(atoms.numbers, minlength=119) for atoms in structures], float)
    given = np.array([energy(atoms) for atoms in structures])
    references = np.linalg.lstsq(shares / shares.sum(axis=1)[:, None], given / shares.sum(axis=1), rcond=None)[0]
    for index in range(4, len(structures), 5):
        structures[index].calc.results["energy"] = given[index] - float(shares[index] @ references)
    return structures


def placeholder(structures: list[Atoms]) -> list[Atoms]:
    rng = np.random.default_rng(0)
    for index, atoms in enumerate(structures):
        atoms.info["band_gap"] = -999.0 if index % 20 == 0 else float(rng.uniform(0, 5))
    return structures


ES, EF, FS, EFS = ("energy", "stress"), ("energy", "forces"), ("forces", "stress"), ("energy", "forces", "stress")

CORRUPTIONS = (
    Corruption("forces are gradients", scaled(forces=-1), "forces-sign", "gradients", ("forces",)),
    Corruption("forces in Ha/bohr", scaled(forces=BOHR / HA), "forces-unit", "hartree/bohr", ("forces",)),
    Corruption("forces in kcal/mol/Å", scaled(forces=1 / KCAL), "forces-unit", "kcal/mol/Å", ("forces",)),
    Corruption("forces in meV/Å", scaled(forces=1e3), "forces-unit", "meV/Å", ("forces",)),
    Corruption(
        "forces are gradients in Ha/bohr",
        scaled(forces=-BOHR / HA),
        "forces-unit",
        "gradients in hartree/bohr",
        ("forces",),
    ),
    Corruption("energies in hartree", scaled(energy=1 / HA), "energy-unit|energy-per-atom", "hartree"),
    Corruption("energies in kcal/mol", scaled(energy=1 / KCAL), "energy-unit", "kcal/mol"),
    Corruption("energies in rydberg", scaled(energy=2 / HA), "energy-unit", "rydberg"),
    Corruption("energies per atom", each(set_energy(lambda a: energy(a) / len(a))), "energy-per-atom", "per atom"),
    Corruption(
        "energies and forces in atomic units",
        scaled(energy=1 / HA, forces=BOHR / HA),
        "forces-unit",
        "hartree/bohr",
        EF,
    ),
    Corruption(
        "energies and forces in kcal/mol", scaled(energy=1 / KCAL, forces=1 / KCAL), "forces-unit", "kcal/mol/Å", EF
    ),
    Corruption(
        "every fifth energy per atom",
        each(set_energy(lambda a: energy(a) / len(a)), 5),
        "energy-mixed-units",
        "per atom",
    ),
    Corruption(
        "every fifth energy in hartree", each(set_energy(lambda a: energy(a) / HA), 5), "energy-mixed-units", "hartree"
    ),
    Corruption("every fifth energy relative to elements", formation, "energy-mixed-zero", "relative to elements"),
    Corruption("energies in another order", shuffled_energies, "energy-shuffled", "different orders"),
    Corruption(
        "forces in another order",
        each(shuffled_forces),
        "forces-shuffled|forces-orientation",
        "order|other atoms",
        ("forces",),
    ),
    Corruption(
        "positions turned, forces not", each(turned), "forces-orientation|forces-shuffled", "turned", ("forces",)
    ),
    Corruption("forces do not sum to zero", each(pushed), "forces-net", "fixed", ("forces",)),
    Corruption("every tenth forces are zeros", each(no_forces, 10), "forces-zero", "zeros", ("forces",)),
    Corruption("stress in GPa", scaled(stress=1 / units.GPa), "stress-unit", "GPa", ("stress",)),
    Corruption(
        "stress in kbar, sign of VASP",
        scaled(stress=-10 / units.GPa),
        "stress-unit",
        "kbar, positive under compression",
        ("stress",),
    ),
    Corruption("stress of the opposite sign", scaled(stress=-1), "stress-sign", "opposite sign", ("stress",)),
    Corruption("stress in the order xy yz xz", each(reordered), "stress-order", "xy yz xz", ("stress",)),
    Corruption("virial as stress", each(virial(-1)), "stress-virial", "virials", ("stress",)),
    Corruption(
        "virial of the opposite sign",
        each(virial(1)),
        "stress-virial",
        "virials, not stresses, of the opposite sign",
        ("stress",),
    ),
    Corruption("lengths in bohr", each(in_bohr), "length-unit", "bohr", ()),
    Corruption("lengths in nm", each(in_nm), "length-unit", "nm", ()),
    Corruption(
        "atoms almost in the same place",
        each(moved(lambda a: a.positions[1] + [0.2, 0, 0]), 10),
        "too-close",
        "broken structure",
        (),
    ),
    Corruption("atoms in the same place", each(moved(lambda a: a.positions[1]), 10), "unusable", "same place", ()),
    Corruption("an atom flew off", flung, "exploded", "flew off", ()),
    Corruption("pbc was lost", each(without_pbc), "pbc-lost", "pbc was lost", ("stress",)),
    Corruption("copies", doubled, "duplicates", "overlap", ()),
    Corruption("copies, turned and numbered otherwise", turned_copies, "duplicates", "overlap"),
    Corruption("copies with other energies", conflicting, "conflicting-duplicates", "two levels"),
    Corruption("energies are all the same", constant, "constant-energy", "placeholder"),
    Corruption("placeholders of -999", placeholder, "placeholder-band_gap", "placeholder", ()),
    Corruption("test structures among training", leaking, "leak", "split at random", ()),
    Corruption("materials on both sides", sharing_ids, "leak-by-id", "one material", ()),
    Corruption("an element in test structures only", without_an_element, "elements-untrained", "one side"),
    Corruption("not converged", each(unconverged, 25), "unconverged", "self-consistency"),
    Corruption("energies that are NaN", each(not_finite, 20), "unreadable-energy", "failed"),
    Corruption("absurd energies", each(far_energy, 100), "energy-outliers", "converge"),
    Corruption("absurd forces", each(large_force, 30), "forces-large", "converge", ("forces",)),
    Corruption("two levels of theory", two_levels, "levels", "different origin"),
    Corruption("two keys that disagree", each(other_key), "ambiguous-energy", "beside the reference"),
)


def found(findings: Sequence[tuple[str, str]], corruption: Corruption) -> bool:
    """Whether one of the findings (kind, cause) is the one that must come."""
    kinds, causes = corruption.kind.split("|"), corruption.cause.split("|")
    return any(kind in kinds and any(words in cause for words in causes) for kind, cause in findings)

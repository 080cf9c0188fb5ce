"""Outputs of CP2K, which ASE does not read: energies, forces and stress, with the trajectory files beside them."""

import re
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Bohr, GPa, Hartree

from .formats import open_text

FLOAT = r"[-+]?\d+\.?\d*(?:[Ee][-+]?\d+)?"
ENERGY = re.compile(rf"ENERGY\| Total FORCE_EVAL.*?energy \[(?:a\.u\.|hartree)\]:?\s+({FLOAT})")
FORCES = re.compile(r"ATOMIC FORCES in \[a\.u\.\]|FORCES\| Atomic forces \[hartree/bohr\]")
STRESS = re.compile(r"(?:STRESS\| Analytical stress tensor|STRESS TENSOR) \[(GPa|bar|kbar)\]")
PRESSURES = {"GPa": GPa, "bar": 1e-4 * GPa, "kbar": 0.1 * GPa}
ROW = re.compile(r"\s*(?:(?:FORCES|STRESS)\|)?\s+(?:\d+\s+\d+\s+\S+|\d+|[xyzXYZ])" + rf"\s+({FLOAT})" * 3)
SAME = 1e-7  # hartree; energies are printed with more and fewer digits


class Evaluation(NamedTuple):
    """One electronic cycle, in atomic units; without energy where CP2K gave up."""

    energy: float | None
    converged: bool
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None  # eV/Å^3, sign of ASE: CP2K's own is positive under compression


def read_cp2k(path: Path) -> tuple[list[Atoms | None], str | None, bool]:
    """Steps (None for those that did not converge), level of theory, and whether the output ends too early.

    Positions are in the output for its first step only. Those of the later ones come from PROJECT-pos-1.xyz, with
    forces of PROJECT-frc-1.xyz and cells of PROJECT-1.cell; without them the output counts as cut after its first step.
    """
    with open_text(path) as file:
        lines = file.read().splitlines()
    ended = any("PROGRAM ENDED" in line for line in lines)
    level = cp2k_level(lines, _input(path, lines))
    atoms, evaluations = _first_structure(lines), _evaluations(lines)
    if atoms is None:
        return [], level, not ended
    project = _after(r" GLOBAL\| Project name", lines)
    trajectory = path.with_name(f"{project}-pos-1.xyz")
    if not project or not trajectory.is_file():
        return [_labelled(atoms, first) for first in evaluations[:1]], level, not ended or len(evaluations) > 1

    forces = dict(_frames(path.with_name(f"{project}-frc-1.xyz")))
    cells = dict(_cells(path.with_name(f"{project}-1.cell")))
    steps: list[Atoms | None] = []
    begin = 0  # of evaluations that no frame has used
    for (step, energy), positions in _frames(trajectory):
        moved = atoms.copy()
        moved.cell[:] = cells.get(step, atoms.cell.array)
        moved.positions = positions
        alike = (n for n in range(begin, len(evaluations)) if _same(evaluations[n].energy, energy))
        number = next(alike, None)
        here = Evaluation(energy, True) if number is None else evaluations[number]
        begin = begin if number is None else number + 1
        steps.append(_labelled(moved, here._replace(forces=forces.get((step, energy), here.forces))))
    steps += repeat(None, sum(evaluation.energy is None for evaluation in evaluations))
    return steps, level, not ended


def _same(energy: float | None, other: float) -> bool:
    return energy is not None and abs(energy - other) < SAME


def _labelled(atoms: Atoms, evaluation: Evaluation) -> Atoms | None:
    energy, converged, forces, stress = evaluation
    if not converged or energy is None:
        return None
    results: dict[str, Any] = {"energy": energy * Hartree, "free_energy": energy * Hartree}
    if forces is not None and len(forces) == len(atoms):
        results["forces"] = forces * Hartree / Bohr
    if stress is not None:
        results["stress"] = stress
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def _evaluations(lines: Sequence[str]) -> list[Evaluation]:
    found: list[Evaluation] = []
    converged = True
    for number, line in enumerate(lines):
        if "SCF run NOT converged" in line:
            converged = False
        elif energy := ENERGY.search(line):
            found.append(Evaluation(float(energy[1]), converged))
            converged = True
        elif found and FORCES.search(line):
            found[-1] = found[-1]._replace(forces=_rows(lines, number + 1))
        elif found and (unit := STRESS.search(line)):
            tensor = _rows(lines, number + 1)
            if tensor.shape == (3, 3):
                voigt = -tensor[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] * PRESSURES[unit[1]]
                found[-1] = found[-1]._replace(stress=voigt)
    return found if converged else [*found, Evaluation(None, False)]


def _rows(lines: Sequence[str], start: int) -> np.ndarray:
    """The vectors of the table that begins here, whose rows are "1 1 O x y z", "FORCES| 1 x y z" or "STRESS| x ..."."""
    rows: list[list[float]] = []
    for number in range(start, len(lines)):
        if found := ROW.match(lines[number]):
            rows.append([float(word) for word in found.groups()])
        elif rows:
            break
    return np.array(rows)


def _first_structure(lines: Sequence[str]) -> Atoms | None:
    """The first table of coordinates in the first cell."""
    text = "\n".join(lines[:2000])
    vectors = [re.search(rf"CELL\| Vector {axis} .*?:" + rf"\s+({FLOAT})" * 3, text) for axis in "abc"]
    cell = np.array([[float(x) for x in vector.groups()] for vector in vectors if vector])
    start = next((n for n, line in enumerate(lines) if "ATOMIC COORDINATES IN ANGSTROM" in line.upper()), None)
    if start is None:
        return None
    row = re.compile(r"\s+\d+\s+\d+\s+\S+\s+(\d+)" + rf"\s+({FLOAT})" * 3 + rf"\s+{FLOAT}\s+{FLOAT}")
    numbers: list[int] = []
    positions: list[list[float]] = []
    for line in lines[start + 1 :]:
        if found := row.match(line):
            numbers.append(int(found[1]))
            positions.append([float(word) for word in found.groups()[1:]])
        elif numbers:
            break
    if len(cell) < 3:
        return Atoms(numbers, positions)
    periodic = _after(r" POISSON\| Periodicity", lines).upper() or "XYZ"
    return Atoms(numbers, positions, cell=cell, pbc=[axis in periodic for axis in "XYZ"])


def _frames(path: Path) -> Iterator[tuple[tuple[int, float], np.ndarray]]:
    """(step, energy) and vectors of the frames of an XYZ file of CP2K, up to where it is complete."""
    if not path.is_file():
        return
    with open_text(path) as file:
        while (line := file.readline()).strip():
            comment = file.readline()
            rows = [file.readline().split()[1:4] for _ in range(int(line))]
            found = re.search(rf"i\s*=\s*(\d+).*?E\s*=\s*({FLOAT})", comment)
            if found and all(len(row) == 3 for row in rows):
                yield (int(found[1]), float(found[2])), np.array(rows, float)


def _cells(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Step and cell (Å) of the lines of a .cell file: step, time, nine components, volume."""
    if not path.is_file():
        return
    with open_text(path) as file:
        for line in file:
            words = line.split()
            if len(words) >= 11 and words[0].isdecimal():
                yield int(words[0]), np.array(words[2:11], float).reshape(3, 3)


def _after(pattern: str, lines: Sequence[str]) -> str:
    """The word that follows a pattern at the beginning of a line."""
    return next((found[1] for line in lines if (found := re.match(rf"{pattern}\s+(\S+)", line))), "")


def _input(path: Path, lines: Sequence[str]) -> str:
    """The input that the output names, when it lies beside it."""
    name = Path(_after(r" CP2K\| Input file name", lines)).name
    beside = path.with_name(name) if name else path
    return beside.read_text(errors="replace") if beside != path and beside.is_file() else ""


# ------------------------------------------------------------------------------------------------- level of theory

NAMES = {
    "PADE": "LDA", "BECKE88+LYP": "BLYP", "B88+LYP": "BLYP", "BP": "BP86", "R2SCAN": "r2SCAN", "PBESOL": "PBEsol",
    "REVPBE": "revPBE", "PBE_SOL": "PBEsol",
}  # fmt: skip
LIBXC = re.compile(r"^(XC_)?(HYB_)?(LDA|GGA|MGGA)_(XC|X|C)_")


def cp2k_level(lines: Sequence[str], text: str = "") -> str | None:
    """Name the level of theory by the sections of the input in `text`, else by what the output repeats of it."""
    said = "\n".join(line for line in lines if re.match(r" *(FUNCTIONAL|vdW POTENTIAL|HFX_INFO)\|", line))
    shortcut = re.search(r"&XC_FUNCTIONAL\s+(?!NO_SHORTCUT)(\w+)", text, re.IGNORECASE)
    words = [shortcut[1]] if shortcut else re.findall(r"FUNCTIONAL\|\s+([\w-]+)(?:\s*\([^)]*\))?:", said)
    if not words:
        return None
    name = "+".join(dict.fromkeys(LIBXC.sub("", word.upper()) for word in words))
    if name == "PBE":  # of its family, which is told in the reference only
        name = next((kind for kind in ("revPBE", "PBEsol") if kind.lower() in said.lower()), name)
    level = NAMES.get(name, name)

    exact = re.search(rf"HFX_INFO\| FRACTION:?\s+({FLOAT})", said)
    exact = exact or re.search(rf"&HF\b[^&]*?\bFRACTION\s+({FLOAT})", text, re.IGNORECASE)
    if exact and level in ("PBE", "revPBE"):
        level += "0" if abs(float(exact[1]) - 0.25) < 1e-3 else f"({float(exact[1]):g})"
    dispersion = re.search(r"\bDFT-?(D[234])(\(BJ\))?", f"{text}\n{said}")
    if dispersion:
        level += f"-{dispersion[1]}" + ("(BJ)" if dispersion[2] or "BJ" in said else "")
    return level

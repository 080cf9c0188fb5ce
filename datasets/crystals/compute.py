"""Compute the crystals that ship with transfermium: PBE and r2SCAN, with GPAW.

    nice python datasets/crystals/compute.py --out datasets/crystals/log.jsonl

Needs GPAW and its atomic setups (Debian packages `gpaw` and `gpaw-data`, or pip), not transfermium.
Each finished cell is one line of the log, with its settings, timing or failure; the same command goes
on where it was stopped. `collect.py` turns the log into the files inside the package.
"""

import argparse
import json
import os
import time
import zlib

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.spacegroup import crystal

# ruff: noqa: E501
PRIMITIVE = {
    "LiF": ("rocksalt", 4.02), "LiCl": ("rocksalt", 5.13), "NaF": ("rocksalt", 4.62), "NaCl": ("rocksalt", 5.64),
    "KF": ("rocksalt", 5.34), "KCl": ("rocksalt", 6.29), "MgO": ("rocksalt", 4.21), "CaO": ("rocksalt", 4.81),
    "MgS": ("rocksalt", 5.20), "CaS": ("rocksalt", 5.69), "ZnS": ("zincblende", 5.41), "C": ("diamond", 3.57),
    "Si": ("diamond", 5.43), "Ge": ("diamond", 5.66), "AlN": ("zincblende", 4.38), "AlP": ("zincblende", 5.46),
    "AlAs": ("zincblende", 5.66), "GaN": ("zincblende", 4.50), "GaP": ("zincblende", 5.45), "GaAs": ("zincblende", 5.65),
    "CaF2": ("fluorite", 5.46), "Li2O": ("antifluorite", 4.62), "Na2O": ("antifluorite", 5.55),
    "Mg2Si": ("antifluorite", 6.35), "Mg2Ge": ("antifluorite", 6.39),
    "LiAl": ("b32", 6.37), "LiGa": ("b32", 6.20), "LiZn": ("b32", 6.22), "CuZn": ("cesiumchloride", 2.95),
    "Li": ("bcc", 3.49), "Na": ("bcc", 4.29), "Ca": ("fcc", 5.58), "Al": ("fcc", 4.05), "Cu": ("fcc", 3.61),
}  # fmt: skip
OTHERS = ("SiC", "ZnO", "Mg", "MgF2", "KMgF3")
METALS = {"LiAl", "LiGa", "LiZn", "CuZn", "Li", "Na", "Ca", "Al", "Cu", "Mg"}

# Chosen by hand before any calculation: every element of a test material occurs in training, no test composition does.
TEST = {"NaF", "KCl", "CaO", "ZnS", "AlP", "GaAs", "SiC", "Mg2Ge", "LiGa", "Li2O"}

LEVELS = {"PBE": "PBE", "r2SCAN": "MGGA_X_R2SCAN+MGGA_C_R2SCAN"}
FRAMES = {"PBE": 8, "r2SCAN": 3}
CUTOFF = 450.0  # eV, plane waves
SMEARING = 0.1  # eV, Fermi-Dirac
DENSITY = {"metal": 2.2, "insulator": 1.5}  # k-points per 1/Angstrom, fixed for each material on its unstrained cell


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="datasets/crystals/log.jsonl")
    parser.add_argument("--only", nargs="*", help="formulas to compute; all by default")
    args = parser.parse_args()

    done = set()
    if os.path.exists(args.out):
        with open(args.out) as lines:
            done = {(r["material"], r["level"], r["frame"]) for r in map(json.loads, lines)}

    work = [
        (material, level, frame)
        for round_ in range(max(FRAMES.values()))  # every material at both levels first, then more of each
        for level in LEVELS
        for material in materials()
        for frame in frames_of_round(level, round_)
        if args.only is None or material in args.only
    ]
    for material, level, frame in work:
        if (material, level, frame) in done:
            continue
        record = compute(material, level, frame)
        with open(args.out, "a") as log:
            log.write(json.dumps(record) + "\n")
        print(material, level, frame, record["seconds"], record.get("failure", ""), flush=True)


def frames_of_round(level, round_):
    """Three of eight PBE frames for each r2SCAN frame, so that a log cut short is balanced."""
    return {
        "PBE": range(3 * round_, min(3 * round_ + 3, FRAMES["PBE"])) if round_ < 3 else (),
        "r2SCAN": [round_] if round_ < FRAMES["r2SCAN"] else (),
    }[level]


def materials():
    return [*PRIMITIVE, *OTHERS]


def compute(material, level, frame):
    """One self-consistent calculation of one rattled cell, as a record for the log."""
    from ase.calculators.calculator import kpts2sizeandoffsets
    from gpaw import GPAW, PW, FermiDirac
    from gpaw import __version__ as gpaw_version

    reference = unstrained(material)
    density = DENSITY["metal" if material in METALS else "insulator"]
    size, _ = kpts2sizeandoffsets(density=density, even=True, atoms=reference)
    atoms = rattled(reference, material, level, frame)

    start = time.time()
    record = {
        "material": material,
        "level": level,
        "frame": frame,
        "split": "test" if material in TEST else "train",
        "symbols": atoms.get_chemical_symbols(),
        "cell": atoms.cell.tolist(),
        "positions": atoms.positions.tolist(),
        "kpts": [int(n) for n in size],
        "cutoff_eV": CUTOFF,
        "smearing_eV": SMEARING,
        "xc": LEVELS[level],
        "gpaw": gpaw_version,
    }
    try:
        calculator = GPAW(
            mode=PW(CUTOFF),
            xc=LEVELS[level],
            kpts={"size": size, "gamma": True},
            occupations=FermiDirac(SMEARING),
            symmetry={"point_group": False},
            convergence={"energy": 1e-5, "density": 1e-5, "eigenstates": 1e-7},
            maxiter=150,
            txt=None,
        )
        atoms.calc = calculator
        record["energy"] = float(atoms.get_potential_energy(force_consistent=True))
        record["forces"] = atoms.get_forces().tolist()
        if level == "PBE":  # this GPAW has no stress for meta-GGAs
            record["stress"] = atoms.get_stress(voigt=False).tolist()
    except Exception as error:  # a failed cell is recorded, never dropped silently
        record["failure"] = f"{type(error).__name__}: {error}"
    record["seconds"] = round(time.time() - start, 1)
    return record


def rattled(reference, material, level, frame):
    """A strained, displaced copy; the amplitudes and the noise depend on the names alone."""
    rng = np.random.default_rng(zlib.crc32(f"{material} {level} {frame}".encode()))
    strain = rng.normal(scale=rng.uniform(0.005, 0.03), size=(3, 3))
    atoms = reference.copy()
    atoms.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.positions += rng.normal(scale=rng.uniform(0.02, 0.12), size=atoms.positions.shape)
    return atoms


def unstrained(material):
    """The cell at about its measured lattice constant, with two atoms or more."""
    if material == "SiC":
        return bulk("SiC", "zincblende", a=4.36, cubic=True)
    if material == "ZnO":
        return bulk("ZnO", "wurtzite", a=3.25, c=5.21, u=0.382)
    if material == "Mg":
        return bulk("Mg", "hcp", a=3.21, c=5.21)
    if material == "MgF2":
        rutile = [(0, 0, 0), (0.303, 0.303, 0)]
        return crystal(("Mg", "F"), rutile, spacegroup=136, cellpar=[4.62, 4.62, 3.05, 90, 90, 90])
    if material == "KMgF3":
        sites = [(0, 0, 0), (0.5, 0.5, 0.5), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)]
        return Atoms("KMgF3", scaled_positions=sites, cell=[3.99] * 3, pbc=True)

    kind, a = PRIMITIVE[material]
    if kind == "bcc":
        return bulk(material, "bcc", a=a, cubic=True)
    if kind == "fcc":
        return bulk(material, "fcc", a=a, orthorhombic=True)
    if kind == "cesiumchloride":
        return Atoms(material, scaled_positions=[(0, 0, 0), (0.5, 0.5, 0.5)], cell=[a] * 3, pbc=True)

    symbols = Atoms(material).get_chemical_symbols()
    if kind in ("diamond", "b32"):
        symbols = [s for s in symbols for _ in range(2)]
    half = a / 2
    cell = [(0, half, half), (half, 0, half), (half, half, 0)]
    return Atoms(symbols, scaled_positions=[(x, x, x) for x in DIAGONAL[kind]], cell=cell, pbc=True)


# Sites along the cube's diagonal, in the order of the formula, for structures on a face-centred lattice.
DIAGONAL = {
    "rocksalt": (0, 0.5),
    "diamond": (0, 0.25),
    "zincblende": (0, 0.25),
    "fluorite": (0, 0.25, 0.75),
    "antifluorite": (0.25, 0.75, 0),
    "b32": (0, 0.25, 0.5, 0.75),
}


if __name__ == "__main__":
    main()
